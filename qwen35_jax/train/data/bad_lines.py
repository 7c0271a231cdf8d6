"""The names of all lines that a run skips, in a file of their own: the log has the first few alone."""

from __future__ import annotations

import jax
from etils import epath

from qwen35_jax.checkpoint.safetensors_file import is_local
from qwen35_jax.errors import reachable, writable

FILE = "bad_lines.txt"


class BadLines:
    """Writes `workdir`/bad_lines.txt, local or gs://, from the first process alone: where each line stands and why it is bad.

    A line that is met again, in another epoch or when the run goes on, is there once.
    """

    def __init__(self, workdir: epath.PathLike):
        self._file = epath.Path(workdir) / FILE
        self._writes = jax.process_index() == 0
        with reachable(self._file):
            stored = self._file.read_text() if self._writes and self._file.exists() else ""
        self._known = dict.fromkeys(stored.split("\n")[:-1])
        self._new: list[str] = []

    def add(self, text: str) -> None:
        """Notes "a.jsonl:17: why", to be written by `write`."""
        text = text.encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
        if self._writes and text not in self._known:
            self._known[text] = None
            self._new.append(text)

    def write(self) -> None:
        """Writes what is new. UserError where the file cannot be written."""
        if not self._new:
            return
        with writable(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if is_local(self._file):
                with self._file.open("a") as f:
                    f.write("".join(f"{text}\n" for text in self._new))
            else:  # object stores cannot append
                self._file.write_text("".join(f"{text}\n" for text in self._known))
        self._new = []

    def close(self) -> None:
        """The last `write`."""
        self.write()
