"""Predicted, rule, fixed and gold canvases."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import setting
from tess.benchmarks.doors.flags import add_rows, positive, rows_of, several
from tess.cli import default_checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    add_rows(parser, "all")
    parser.add_argument("--canvases", nargs="+", metavar="NAME", help="(default: all there are)")
    several(parser, "--schedulers", str, ("renoising",), "names")
    parser.add_argument("--steps", type=positive, default=16, help="(default: 16)")
    several(parser, "--seeds", int, (0, 1, 2), "of the noise")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.sampling.lengths import benchmark_lengths
    from tess.benchmarks.sampling.trials import Trials

    folder = args.checkpoint or default_checkpoint()
    trials = Trials.load(folder, rows_of(args, args.limit), args.batch_size)
    return benchmark_lengths(trials, args.canvases, args.schedulers, args.steps, args.seeds)


def table(result: dict[str, Any]) -> str:
    from tess.benchmarks.sampling.report import TITLES, spread

    data = result["data"]
    lines = [
        f"lengths: {result['checkpoint']}, {result['steps']} steps, {data['rows']} of {data['of']} "
        f"rows, seeds {', '.join(map(str, result['seeds']))}, mean ± standard deviation; "
        f"{setting(result['environment'])}. References have "
        f'{result["rows"][0]["gold_mean"]:.1f} tokens on average. "gold" is a diagnostic: it '
        "knows the reference's length.",
        "",
        "| scheduler | canvas | tokens, mean | shorter than the reference | "
        + " | ".join(title for title, _ in TITLES.values())
        + " | length ratio |",
        "|---|---|" + "---:|" * (3 + len(TITLES)),
    ]
    for row in result["rows"]:
        name = "gold (diagnostic)" if row["canvas"] == "gold" else row["canvas"]
        cells = [spread(row["full"][key], digits) for key, (_, digits) in TITLES.items()]
        lines.append(
            f"| {row['scheduler']} | {name} | {row['canvas_mean']:.1f} | {row['too_short']:.0%} | "
            f"{' | '.join(cells)} | {spread(row['full']['length_ratio'], 2)} |"
        )
    return "\n".join(lines)
