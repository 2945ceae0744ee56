"""The shell of the programs: sample, sweep and studio parse options and end in the same way.

Exit status: 0, 2 after a mistake of the user's, which is one line on standard error, and 130 after
Ctrl+C. Any other error is a bug, and shows its traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from .errors import UserError, check

if TYPE_CHECKING:
    from .settings import Bounds  # imports torch


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and whose options are given once and in full."""

    def __init__(self, **arguments: Any):
        super().__init__(allow_abbrev=False, **arguments)
        self.register("action", None, Once)  # the action of options that name none

    def error(self, message: str) -> NoReturn:
        raise UserError(message[:1].upper() + message[1:].rstrip(".") + ".")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(
                f"{' '.join(rest)!r} is not understood: a prompt stands in quotes, and --help "
                "lists the options"
            )
        return options


class Once(argparse.Action):
    """Store a value; a second one is a mistake, not a correction."""

    is_given = False

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        if self.is_given:
            raise argparse.ArgumentError(self, f"it can be given only once, not again as {value!r}")
        self.is_given = True
        setattr(namespace, self.dest, value)


def number(bounds: Bounds) -> Callable[[str], float]:
    """Return a function that reads a number within the bounds, for an option's `type`."""

    def read(text: str) -> float:
        try:
            value: Any = int(text) if bounds.is_whole else float(text)
        except ValueError:
            value = text
        try:
            return bounds.read(value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None

    return read


def file(text: str) -> Path:
    """Read the name of a file or a folder, for an option's `type`; ~ is the home folder."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"it must be a file, not the address {text!r}: save it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise argparse.ArgumentTypeError(f"{text!r} can't be found: {error}") from None


def split_pair(option: str, text: str, at_last: bool = False) -> tuple[str, str]:
    """Split LEFT=RIGHT at its first "=", or at its last. Raises UserError without both sides."""
    left, equals, right = text.rpartition("=") if at_last else text.partition("=")
    check(
        left.strip() and equals and right.strip(),
        f"{option} takes two sides, A=B, not {text!r}.",
    )
    return left.strip(), right.strip()


# --- what is printed ------------------------------------------------------------------------------


# They change the order in which a terminal shows the rest of a line.
BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str, stream: TextIO) -> str:
    """Return the text with escapes for control characters and for what the stream can't encode.

    A file's text must not move the cursor of a terminal, and a console that lacks a letter must not
    end a run. Line feeds and tabs stay.
    """
    escaped = "".join(
        c
        if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in BIDI_CONTROLS)
        else c.encode("unicode_escape").decode()
        for c in text
    )
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def say(text: object) -> None:
    """Print a line on standard output. A reader that has gone away (| head -1) is no error."""
    try:
        print(printable(str(text), sys.stdout), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: object) -> None:
    """Print one line on standard error."""
    print(printable(" ".join(str(text).split()), sys.stderr), file=sys.stderr, flush=True)


def fail(error: object) -> int:
    """Print an error as one sentence, and return the exit status of a mistake."""
    complain(str(error).rstrip().rstrip(".") + ".")
    return 2


# --- how a program begins -------------------------------------------------------------------------


def is_running() -> bool:
    """Tell, while minip2p is imported, whether the process is python -m minip2p... or minip2p."""
    command = sys.argv[0] if sys.argv else ""
    if command == "-m":  # until Python has found the module and replaces it by the file's path
        command = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return os.path.basename(command).partition(".")[0] == "minip2p"


def begin() -> None:
    """Prepare the process of a program, before torch is imported.

    OpenMP's threads spin while they wait for each other, which keeps cores from other processes:
    with two of those on two cores, the first command took 90 s, and 30 s with a short spin. On a
    quiet machine both took 13 s. The number of threads stays, and so does every bit of a picture.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if sys.stderr is None:  # closed by 2>&-, and the progress bar writes to it
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores it
        signal.signal(signal.SIGINT, end_at_once)


def end_at_once(*_: object) -> None:
    """End at Ctrl+C in the imports, where a KeyboardInterrupt would be a traceback."""
    os.write(2, b"Interrupted.\n")
    os._exit(130)


# --- how a program runs and ends ------------------------------------------------------------------

MEMORY = "There is not enough memory: ask for smaller pictures or for fewer at a time."


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: on a GPU, in torch's allocator, in Python."""
    import torch

    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def run_program(
    program: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    interrupted: str = "Interrupted.",
) -> int:
    """Run a program with its arguments, and return its exit status.

    program: returns a status, or None for 0. argv: None takes the process's own.
    interrupted: what is printed after Ctrl+C.
    """
    warnings.formatwarning = lambda message, *_, **__: (
        printable(" ".join(str(message).split()), sys.stderr) + "\n"
    )
    try:
        if signal.getsignal(signal.SIGINT) is end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return program(list(sys.argv[1:] if argv is None else argv)) or 0
    except (UserError, OSError, UserWarning) as error:  # a UserWarning under python -W error
        for sentence in getattr(error, "sentences", [error]):  # a study has several mistakes
            fail(sentence)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return fail(MEMORY)
    except KeyboardInterrupt:
        complain(interrupted)
        return 130
