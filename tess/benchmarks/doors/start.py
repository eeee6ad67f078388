"""From start to help and to text, against another commit of this repository."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import ratio
from tess.benchmarks.doors.flags import add_checkpoint, positive, several, tell
from tess.benchmarks.start import SCRIPTS, benchmark_start
from tess.cli import default_checkpoint

TEXT = "The museum, which opened in the spring, shows paintings by local artists."


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rival", default="e42b00d", metavar="REV", help="a commit (default: %(default)s)"
    )
    several(parser, "--scripts", str, SCRIPTS, "whose help is printed", choices=SCRIPTS)
    parser.add_argument("--text", default=TEXT, help="(default: %(default)s)")
    add_checkpoint(parser)
    parser.add_argument("--repeats", type=positive, default=5, help="pairs (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return benchmark_start(
        args.checkpoint or default_checkpoint(), args.text, args.rival, args.scripts, args.repeats,
        tell,
    )


def table(result: dict[str, Any]) -> str:
    env = result["environment"]
    lines = [
        f"start: processor time of a child process, user and system, rival {result['rival'][:7]}; "
        f"{result['checkpoint']}; Python {env['python']}, torch {env['torch']}, transformers "
        f"{env['transformers']}, diffusers {env['diffusers']}, {env['processors']} processors, "
        f"{env['processor']}, {env['date']}",
        "",
        "| command | ours, s | rival, s | ratio (quartiles) | pairs | ours loads | rival loads |",
        "|---|---:|---:|---|---:|---|---|",
    ]
    for row in result["rows"]:
        loads = (", ".join(row[name]) or "none" for name in ("loaded", "rival_loaded"))
        lines.append(
            f"| {row['command']} | {row['ours_ms'] / 1e3:.2f} | {row['rival_ms'] / 1e3:.2f} | "
            f"{ratio(row)} | {row['pairs']} | {' | '.join(loads)} |"
        )
    met = {None: "not measured", True: "met", False: "missed"}
    for goal in result["goals"]:
        figure = "–" if goal["figure"] is None else f"{goal['figure']:.2f}"
        most = f"{figure}, at most {goal['at_most']} wanted: {met[goal['met']]}"
        lines += ["", f"goal: {goal['goal']}: {most}"]
    return "\n".join(lines)
