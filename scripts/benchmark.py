"""Measure against a named rival in the same run: scripts/benchmark.py SUBCOMMAND [--json FILE]"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tess.benchmarks import benchmark_backbone, format_table
from tess.cli import run
from tess.errors import UserError

JSON_KEYS = """\
--json FILE writes one object; its keys are stable:
  benchmark             "backbone"
  rival                 what it is compared with
  pattern, hidden_size, length, batch, seed
                        what was run
  relative_difference   of the two outputs, as a share of the rival's norm
  rows                  a list with an object per line of the table:
      what              "forward" or "forward + backward"
      dtype             "float32" or "bfloat16" (autocast)
      ours_ms, rival_ms medians in milliseconds
      ratio             median of rival / ours, pair by pair: above 1, ours is faster
      ratio_q1, ratio_q3
                        its quartiles
      pairs             measurements of each
  environment           date, processor, threads, python, torch, transformers
"""


def positive(text: str) -> int:
    """An argument that has to be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print the table, and write the figures if asked."""
    layout = {"epilog": JSON_KEYS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    backbone = commands.add_parser(
        "backbone", help="the backbone against transformers' Nemotron-H", **layout
    )
    backbone.add_argument("--pattern", default="M*E-", help="layers (default: %(default)s)")
    backbone.add_argument("--length", type=positive, default=512, help="tokens (default: 512)")
    backbone.add_argument("--batch", type=positive, default=1, help="rows (default: 1)")
    backbone.add_argument("--repeats", type=positive, default=15, help="pairs (default: 15)")
    backbone.add_argument("--seed", type=int, default=0, help="weights and input (default: 0)")
    backbone.add_argument("--json", type=Path, help="also write all figures here, see below")
    args = parser.parse_args(argv)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.resolve().parent}")
    result = benchmark_backbone(args.pattern, args.length, args.batch, args.repeats, args.seed)
    print(format_table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
