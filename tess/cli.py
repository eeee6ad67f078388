"""What every command does: parse, run `main`, and turn a user's mistake into one sentence.

A command's file imports nothing heavy at its top: `make_parser` needs argparse alone, and `main`
imports the rest once the arguments are parsed. `--help` is then quick, and a typing mistake too.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tess.errors import UserError
from tess.version import VERSION

CHECKOUT = Path(__file__).resolve().parent.parent
DEFAULT_CHECKPOINT = CHECKOUT / "checkpoints" / "default"

INTERRUPTED, CLOSED_PIPE, MISTAKE = 130, 141, 2
"""Exit statuses, as shells give them."""


class Parser(argparse.ArgumentParser):
    """Keeps the lines of a description, knows --version, and raises its errors as `UserError`."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)
        add_version(self)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def add_version(parser: argparse.ArgumentParser) -> None:
    """The flag --version."""
    parser.add_argument(
        "--version", action="version", version=f"tess-diffusion {VERSION}",
        help="print the version and leave",
    )


def one_sentence(error: BaseException) -> str:
    """The message of `error` on one line; the class's name where the message is empty."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def run(main: Callable[[Sequence[str] | None], int | None]) -> NoReturn:
    """Call `main(None)` and leave with its status.

    A `UserError`, `ValueError` or `OSError` is printed as `error: <one sentence>` on stderr, status
    2; Ctrl-C gives status 130 and a closed pipe on stdout gives 141. Anything else is a defect and
    keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's `&` ignores it
        signal.signal(signal.SIGINT, _interrupt)
    # of the libraries, for reading and writing files; the commands have their own
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = main(None) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python would complain again while it closes
        # stdout.
        sys.stdout = None
        status = CLOSED_PIPE
    except (UserError, ValueError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        status = MISTAKE
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, _leave_at_once)  # an exit handler would print a traceback
    sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C during an import ends the process at once, elsewhere it is a `KeyboardInterrupt`.

    Libraries catch all exceptions of what they try to import, and Python prints those in the
    callbacks of its import locks and goes on: there an exception would be lost, or be a traceback.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave_at_once()
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave_at_once(*_: Any) -> NoReturn:
    os.write(2, b"interrupted\n")  # not by `sys.stderr`, which may be what was interrupted
    os._exit(INTERRUPTED)


@contextmanager
def no_collection() -> Iterator[None]:
    """Around imports: none of what they make is garbage, and looking for some takes a seventh."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def checkpoint_or_default(given: str | None) -> str | Path:
    """What the user named, or the checkpoint shipped in a checkout; a wheel has none."""
    return default_checkpoint() if given is None else given


def default_checkpoint() -> Path:
    """The checkpoint shipped in a checkout of the repository; a wheel has none.

    Raises:
        UserError: when this is not a checkout, or the checkout has no `checkpoints/default`.
    """
    if not DEFAULT_CHECKPOINT.is_dir():
        raise UserError(
            "no checkpoint here: give a folder or a hub id with --checkpoint, such as the folder "
            "checkpoints/default of the repository tess-diffusion"
        )
    return DEFAULT_CHECKPOINT
