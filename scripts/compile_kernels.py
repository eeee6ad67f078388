"""Compile every Triton kernel for every architecture, without a GPU, and print what each needs.

Exits with status 1 if a kernel does not compile or a hot one spills registers. Needs the extra
`kernels` (Linux).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tess.cli import run
from tess.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--architectures", nargs="+", metavar="ARCH", help="(default: sm_80 sm_90 sm_100)"
    )
    parser.add_argument("--modules", nargs="+", help="files of kernels/triton (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="(default: 2)")
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the table; status 1 for what the table must not show."""
    args = make_parser().parse_args(argv)
    try:
        from tess.kernels.triton import ahead_of_time
        from tess.kernels.triton.launch import ARCHITECTURES
    except ImportError as error:
        raise UserError(f"the kernels need the package triton: {error}") from error
    for given, known, flag in (
        (args.architectures, ARCHITECTURES, "--architectures"),
        (args.modules, ahead_of_time.MODULES, "--modules"),
    ):
        if unknown := sorted(set(given or ()) - set(known)):
            raise UserError(f"{flag} takes {', '.join(known)}, got {', '.join(unknown)}")
    results = ahead_of_time.compile_all(
        args.architectures or ARCHITECTURES, args.modules or ahead_of_time.MODULES, args.processes
    )
    print(ahead_of_time.format_table(results))
    if args.json is not None:
        args.json.write_text(json.dumps([r._asdict() for r in results], indent=2) + "\n")
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    run(main)
