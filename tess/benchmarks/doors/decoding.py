"""Greedy `ar` and `ar+mtp`, against transformers' generate on the same weights."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import number, setting
from tess.benchmarks.doors.flags import add_checkpoint, positive, several
from tess.cli import default_checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, "with a predictor ")
    parser.add_argument("--rows", type=positive, default=200, help="sources (default: 200)")
    several(parser, "--batch_size", positive, (1, 8), "texts at once")
    several(parser, "--num_draft_tokens", positive, (1, 2, 3, 4, 6), "drafted at a time")
    parser.add_argument("--repeats", type=positive, default=3, help="passes (default: 3)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.decoding import benchmark_decoding

    return benchmark_decoding(
        args.checkpoint or default_checkpoint(), rows=args.rows, batch_sizes=args.batch_size,
        drafts=args.num_draft_tokens, repeats=args.repeats, dtype=args.dtype,
    )


def table(result: dict[str, Any]) -> str:
    lines = [
        f"decoding: greedy, {result['sources']} packaged sources, {result['checkpoint']} "
        f"({result['parameters'] / 1e6:.1f} M parameters), {result['dtype']}, best of "
        f"{result['repeats']}; {setting(result['environment'])}",
        "",
        "| batch | system | ms per token | speed of ar = 1 | texts equal to ar's | "
        "acceptance length | drafts that stay | tokens per evaluation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['batch_size']} | {row['system']} | {number(row['ms_per_token'])} | "
            f"{number(row['speedup'])} | {row['equal_texts']} of {result['sources']} | "
            f"{number(row['acceptance_length'])} | {number(row['accepted_share'])} | "
            f"{number(row['tokens_per_forward'])} |"
        )
    return "\n".join(lines)
