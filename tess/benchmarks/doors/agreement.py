"""Texts with and without cache, alone, in batches, in bfloat16."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import setting
from tess.benchmarks.doors.flags import add_rows, positive, rows_of, several
from tess.cli import default_checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    add_rows(parser, "all")
    several(parser, "--schedulers", str, ("renoising", "ddim", "ddim_carried"), "names")
    parser.add_argument("--steps", type=positive, default=8, help="(default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.sampling.agreement import benchmark_agreement

    return benchmark_agreement(
        args.checkpoint or default_checkpoint(), rows_of(args, args.limit), args.schedulers,
        args.steps, args.batch_size, args.seed,
    )


def table(result: dict[str, Any]) -> str:
    lines = [
        f"agreement: {result['checkpoint']}, {result['steps']} steps, seed {result['seed']}, "
        f"cached and in batches of {result['batch_size']}, against other ways to compute the same; "
        f"{setting(result['environment'])}",
        "",
        "| scheduler | type | compared with | equal texts | equal tokens |",
        "|---|---|---|---:|---:|",
    ]
    for row in result["rows"]:
        equal = f"{row['equal_texts']} of {row['texts']} | {row['equal_tokens']:.1%}"
        lines.append(f"| {row['scheduler']} | {row['dtype']} | {row['comparison']} | {equal} |")
    return "\n".join(lines)
