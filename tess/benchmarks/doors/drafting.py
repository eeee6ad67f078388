"""Drafts by diffusion, verified by the autoregressive model."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import number, setting
from tess.benchmarks.doors.flags import add_checkpoint, positive, several
from tess.cli import default_checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--rows", type=positive, default=200, help="sources (default: 200)")
    several(parser, "--num_inference_steps", positive, (1, 4, 8, 16), "of a draft")
    several(parser, "--redraft_steps", positive, (1, 4), "of drafts that are new in every round")
    parser.add_argument(
        "--redraft_every", type=positive, default=5, help="of so many batches one (default: 5)"
    )
    several(parser, "--batch_size", positive, (1, 8), "sources at once")
    parser.add_argument("--repeats", type=positive, default=1, help="passes (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.drafting import benchmark_drafting

    return benchmark_drafting(
        args.checkpoint or default_checkpoint(), rows=args.rows,
        num_inference_steps=args.num_inference_steps, redraft_steps=args.redraft_steps,
        redraft_every=args.redraft_every, batch_sizes=args.batch_size, repeats=args.repeats,
        seed=args.seed,
    )


def table(result: dict[str, Any]) -> str:
    sizes = result["parameters"]
    lines = [
        f"drafting: greedy, {result['sources']} packaged sources, {result['checkpoint']} "
        f"({sizes['tess'] / 1e6:.1f} M and {sizes['ar'] / 1e6:.1f} M parameters), "
        f"{result['dtype']}, best of {result['repeats']}; "
        f"{setting(result['environment'])}",
        "",
        "| batch | system | texts equal to ar's | diffusion evaluations per text | AR evaluations "
        "per text | tokens per AR evaluation | first draft: accepted tokens, mean (median) | "
        "drafts that stay | ms per token | speed of ar = 1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name, first = row["system"], "–"
        if row["redraft"] is not None:
            name += f", {row['num_inference_steps']} steps, redraft {row['redraft']}"
            first = f"{row['first_accepted_mean']:.1f} ({row['first_accepted_median']:g})"
        lines.append(
            f"| {row['batch_size']} | {name} | {row['equal_texts']} of {row['rows']} | "
            f"{number(row['diffusion_evaluations'])} | {number(row['ar_evaluations'])} | "
            f"{number(row['tokens_per_ar_evaluation'])} | {first} | "
            f"{number(row['accepted_share'])} | "
            f"{number(row['ms_per_token'])} | {number(row['speedup'])} |"
        )
    return "\n".join(lines)
