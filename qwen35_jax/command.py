"""What the command lines share: flags are parsed here, and errors that are the user's end in one line and a non-zero status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

from absl import flags

from qwen35_jax.errors import UserError

EXPECTED = (UserError, flags.Error, OSError)  # what is the user's to mend: one line, no stack trace
HELP = flags.DEFINE_bool("help", False, "print this and exit", short_name="h")


def quiet_interrupts() -> None:
    """Lets Ctrl-C end the process in one line until `run` takes over.

    The commands call this before their other imports, which take seconds in which a KeyboardInterrupt could surface
    anywhere. Where interrupts are ignored (`nohup`, background jobs), they stay so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def run(main: Callable[[list[str]], None], usage: str) -> None:
    """Parses sys.argv into the absl flags, calls main(positional arguments), and exits.

    Status 0 is success, 1 wrong input (one line on stderr), 130 Ctrl-C. `usage` is what --help prints above the flags.
    Text goes in and out as UTF-8, whatever the locale is.
    """
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _open_streams()
        arguments = parsed(flags.FLAGS, sys.argv)
        if HELP.value:
            print(usage.strip() + "\n\n" + flags.FLAGS.module_help("__main__"))
        else:
            main(arguments)
        sys.stdout.flush()
    except (UserError, flags.Error) as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as with `| head`
            _discard_output()
            raise SystemExit(1) from None
        if error.filename is None:  # perhaps of our output, as on a full disk: the exit would try it again
            _discard_output()
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename is not None else error.strerror or str(error))
    except KeyboardInterrupt:
        _end()
    except RuntimeError as error:  # as JAX has it, which is not imported for this
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED:")[2].strip().split("\n")[0][:200]
        _fail(f"out of memory on a device ({reason}): take less at a time or more devices; qwen35_jax.plan says what fits")


def parsed(values: flags.FlagValues, words: list[str], known_only: bool = False) -> list[str]:
    """Positional arguments (with known_only, unknown flags too). Loading a configuration runs the user's code, which can raise
    anything: that is a UserError in one line."""
    try:
        return values(words, known_only)[1:]
    except UserError:
        raise
    except flags.Error as error:
        before, found, trace = str(error).partition("Error whilst parsing config file:")
        if not found:
            raise
        raise UserError(before + trace.strip().splitlines()[-1]) from error
    except SyntaxError as error:
        where = f"{error.filename} line {error.lineno}: " if error.filename else "wrong configuration: "
        raise UserError(f"{where}{error.msg}") from error
    except Exception as error:
        text = str(error.args[0] if error.args else error)
        if text[:1] in "'\"":  # a field that is not there, in quotes that are quoted again
            text = "no field " + text.replace("\\n", " ").replace("\\'", "").strip("'\"")
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "<module>")]
        where = f"{frames[-1].filename} line {frames[-1].lineno}: " if frames else ""
        raise UserError(f"wrong configuration: {where}{text}; qwen35_jax/train/config.py has all fields") from error


def _end(*_) -> None:
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # a compilation in another thread would hold an ordinary exit back until it is done


def complain(message: str) -> None:
    """An error, in one line on stderr."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


def _fail(message: str) -> None:
    complain(message)
    raise SystemExit(1)


def _open_streams() -> None:
    """Makes the three streams UTF-8. A closed input counts as empty, a closed output is an error."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise UserError("the output is closed: send it to a file, or to /dev/null")
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    # Bytes that are no UTF-8 come in as lone surrogates, as in sys.argv; the tokenizer says what is wrong with them.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
