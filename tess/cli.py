"""What every script does: run `main`, and turn a user's mistake into one sentence and status 2."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tess.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent
DEFAULT_CHECKPOINT = CHECKOUT / "checkpoints" / "default"


def one_sentence(error: BaseException) -> str:
    """The message of `error` on one line; the class's name where the message is empty."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def run(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Call `main(None)` and leave with its status.

    A `UserError`, `ValueError` or `OSError` is printed as `error: <one sentence>` on stderr, status
    2; Ctrl-C gives status 130 and a closed pipe on stdout gives 141. Anything else is a defect and
    keeps its traceback.
    """
    _disable_progress_bars()
    try:
        status = main(None)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python would complain again while it closes
        # stdout.
        sys.stdout = None
        sys.exit(141)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


def _disable_progress_bars() -> None:
    """transformers' and diffusers', for reading and writing files; scripts have their own.

    Imported here and where they are installed only: kernels are compiled and measured without them.
    """
    for package in ("transformers", "diffusers"):
        if find_spec(package) is not None:
            import_module(f"{package}.utils.logging").disable_progress_bar()


def default_checkpoint() -> Path:
    """The checkpoint shipped in a checkout of the repository; a wheel has none.

    Raises:
        UserError: when this is not a checkout, or the checkout has no `checkpoints/default`.
    """
    if not DEFAULT_CHECKPOINT.is_dir():
        raise UserError(
            f"no shipped checkpoint at {DEFAULT_CHECKPOINT}; name one with --checkpoint DIR"
        )
    return DEFAULT_CHECKPOINT
