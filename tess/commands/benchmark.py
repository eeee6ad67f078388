"""Measure against a named rival in the same run: tess-benchmark SUBCOMMAND [--json FILE]"""

import json
from collections.abc import Sequence

from tess.benchmarks.commands import benchmark, make_parser
from tess.cli import run
from tess.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print the table, and write the figures if asked.

    Returns 1 where the GPU benchmark found a wrong kernel, or else 0.
    """
    args = make_parser().parse_args(argv)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.resolve().parent}")
    chosen = benchmark(args.command)
    result = chosen.run(args)
    print(chosen.table(result))
    if args.json is not None and not args.writes_json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(result.get("failed")))


def command() -> None:
    """`tess-benchmark`."""
    run(main)
