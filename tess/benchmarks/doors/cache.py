"""A denoising step with and without the source cache."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import ratio, setting
from tess.benchmarks.doors.flags import add_checkpoint, positive, several
from tess.cli import default_checkpoint

GOAL = {"source": 1_024, "target": 128, "ratio": 4.0}


def add(parser: argparse.ArgumentParser) -> None:
    several(parser, "--source", positive, (128, 256, 512, 1_024, 2_048), "tokens")
    parser.add_argument("--target", type=positive, default=128, help="tokens (default: 128)")
    several(parser, "--batch", positive, (1, 8), "texts at once")
    several(parser, "--steps", positive, (8, 16), "of a whole generation")
    parser.add_argument("--repeats", type=positive, default=7, help="turns (default: 7)")
    parser.add_argument("--seed", type=int, default=0, help="weights and input (default: 0)")
    add_checkpoint(parser, "measured too, where its learned positions allow ")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.cache import benchmark_cache

    return benchmark_cache(
        args.source, args.target, args.batch, args.steps, args.repeats, args.seed,
        args.checkpoint or default_checkpoint(),
    )


def table(result: dict[str, Any]) -> str:
    steps = [str(one["steps"]) for one in result["rows"][0]["generations"]]
    lines = [
        f"cache: one denoising step with the source cached, encoded in every step, and with source "
        f'and target as one sequence; "hidden {result["hidden_size"]}" is pattern '
        f"{result['pattern']}, vocabulary {result['vocab_size']}, "
        f"{result['parameters'] / 1e6:.1f} M random parameters; float32, seed {result['seed']}; "
        f"{setting(result['environment'])}; "
        f"{result['rows'][0]['pairs']} turns, ratios with quartiles",
        "",
        "| model | source | target | batch | cached, ms | encoded, ms | ratio | joint, ms | "
        "ratio | "
        + "".join(f"{number} steps, ratio | to joint | " for number in steps)
        + "cache, MB |",
        "|---|" + "---:|" * (9 + 2 * len(steps)),
    ]
    for row in result["rows"]:
        whole = "".join(
            f"{one['ratio']:.2f} | {one['joint_ratio']:.2f} | " for one in row["generations"]
        )
        lines.append(
            f"| {row['model']} | {row['source']} | {row['target']} | {row['batch']} | "
            f"{row['cached_ms']:.1f} | {row['encoded_ms']:.1f} | {ratio(row)} | "
            f"{row['joint_ms']:.1f} | {ratio(row, 'joint_')} | {whole}"
            f"{row['cache_bytes'] / 1e6:.2f} |"
        )
    return "\n".join([*lines, *_goal_lines(result)])


def _goal_lines(result: dict[str, Any]) -> list[str]:
    """Whether a step at the goal's shape is as much faster as it should be."""
    wanted = (GOAL["source"], GOAL["target"])
    ratios = [row["ratio"] for row in result["rows"] if (row["source"], row["target"]) == wanted]
    if not ratios:
        return []
    met = "met" if min(ratios) >= GOAL["ratio"] else "missed"
    found = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return [
        "",
        f"goal: at {wanted[0]} source and {wanted[1]} target tokens at least {GOAL['ratio']:g} "
        f"times faster; {found}: {met}",
    ]
