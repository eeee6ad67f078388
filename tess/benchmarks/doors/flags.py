"""Flags that several benchmarks take, and how they say what is under way."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tess.benchmarks.sampling.trials import Data


def tell(line: str) -> None:
    """What is under way, on stderr."""
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """An argument that has to be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def several(
    parser: argparse.ArgumentParser,
    flag: str,
    kind: Any,
    default: Sequence[Any],
    what: str,
    choices: Sequence[Any] | None = None,
) -> None:
    """A flag that takes several values; of `choices`, all are the default."""
    shown = "all" if choices else " ".join(map(str, default))
    parser.add_argument(
        flag, type=kind, nargs="+", default=list(default), choices=choices,
        help=f"{what} (default: {shown})",
    )


def add_checkpoint(parser: argparse.ArgumentParser, what: str = "") -> None:
    help = f"{what}(a folder or a hub id; default: the shipped)"
    parser.add_argument("--checkpoint", help=help)


def add_matrix(parser: argparse.ArgumentParser, vocab_size: int) -> None:
    """The embedding matrix of a law, and how many samples of it."""
    parser.add_argument("--embedding", type=Path, help="safetensors file or checkpoint folder")
    parser.add_argument(
        "--vocab_size", type=positive, default=vocab_size, help="without it (default: %(default)s)"
    )
    parser.add_argument("--width", type=positive, default=128, help="without it (default: 128)")
    parser.add_argument("--n", type=positive, default=2_048, help="samples a side (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def add_rows(parser: argparse.ArgumentParser, limit: str) -> None:
    """A checkpoint, and the rows whose texts it writes."""
    add_checkpoint(parser)
    parser.add_argument("--task", help="(default: simplification)")
    parser.add_argument("--dataset", help="of the task (default: samples, the packaged rows)")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--data", type=Path, help="a file with source and target instead")
    parser.add_argument(
        "--limit", type=positive, help=f"rows, spread evenly over all (default: {limit})"
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="(default: 16)")


def rows_of(args: argparse.Namespace, limit: int | None) -> "Data":
    """The rows that the flags of `add_rows` name."""
    from tess.benchmarks.sampling.trials import Data

    return Data.load(args.task, args.dataset, args.split, limit, args.data)
