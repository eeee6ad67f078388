"""Quality against network evaluations: schedulers, spacings, stopping."""

import argparse
import math
from itertools import product
from pathlib import Path
from typing import Any

from tess.benchmarks.doors.flags import add_rows, positive, rows_of, several, tell
from tess.cli import default_checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    add_rows(parser, "24; about an hour on one core with all cells")
    parser.add_argument(
        "--schedulers", nargs="+", metavar="NAME",
        help="(default: renoising ddim euler_stochastic dpm_solver ddim_carried)",
    )
    parser.add_argument("--spacings", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--steps", type=positive, nargs="+", help="(default: 1 2 4 8 16 32 100)")
    several(parser, "--seeds", int, (0, 1, 2), "of the noise")
    several(parser, "--stop_patience", positive, (1, 2), "of the stopping rules")
    several(parser, "--stop_entropy", float, (math.inf, 1.0), "of the stopping rules, in nats")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--plot", type=Path, help="also write a figure here (SVG; extra plots)")
    parser.set_defaults(writes_json=True)  # after every cell, and goes on from what is there


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.sampling.grid import LIMIT, SCHEDULERS, STEPS, benchmark_sampling
    from tess.benchmarks.sampling.plot import plot_sampling
    from tess.benchmarks.sampling.trials import SPACINGS, Trials
    from tess.evaluation.plots import check_plots
    from tess.schedulers.stopping import StoppingRule

    if args.plot is not None:
        check_plots()
    rules = [StoppingRule(*pair) for pair in product(args.stop_patience, args.stop_entropy)]
    everything = args.data is not None
    data = rows_of(args, args.limit or (None if everything else LIMIT))
    trials = Trials.load(args.checkpoint or default_checkpoint(), data, args.batch_size)
    result = benchmark_sampling(
        trials, args.schedulers or SCHEDULERS, args.spacings or tuple(SPACINGS),
        args.steps or STEPS, args.seeds, rules, args.json, tell,
    )
    if args.markdown is not None:
        text = f"# Quality against network evaluations\n\n{table(result)}\n"
        args.markdown.write_text(text)
    if args.plot is not None:
        plot_sampling(result, args.plot)
    return result


def table(result: dict[str, Any]) -> str:
    from tess.benchmarks.sampling.report import format_sampling

    return format_sampling(result)
