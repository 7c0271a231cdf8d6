"""What the command lines share: flags are parsed here, and errors that are the user's end in one line and a non-zero status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from absl import flags

from qwen35_jax.errors import UserError


def run(main: Callable[[list[str]], None], usage: str) -> None:
    """Parses sys.argv into the absl flags, calls main(positional arguments), and exits.

    Status 0 is success, 1 wrong input (one line on stderr), 130 Ctrl-C. `usage` is what --help prints above the flags.
    """
    try:
        if any(arg in ("--help", "-h", "-help", "--helpshort") for arg in sys.argv[1:]):
            print(usage.strip() + "\n\n" + flags.FLAGS.module_help("__main__"))
            raise SystemExit(0)
        main(flags.FLAGS(sys.argv)[1:])
        sys.stdout.flush()
    except (UserError, flags.Error) as error:
        _fail(str(error), 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # a compilation in another thread would hold an ordinary exit back until it is done


def _fail(message: str, status: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)
