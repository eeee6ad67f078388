"""Soft predictions as short lists, against the dense simplex."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import number, setting
from tess.benchmarks.doors.flags import add_matrix, positive, several


def add(parser: argparse.ArgumentParser) -> None:
    add_matrix(parser, vocab_size=32_768)
    several(parser, "--num_soft_tokens", positive, (8, 32, 128), "M, tokens of a prediction")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.law.carried import benchmark_carried

    return benchmark_carried(
        args.vocab_size, args.width, embedding=args.embedding,
        num_soft_tokens=args.num_soft_tokens, n=args.n, seed=args.seed,
    )


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    lines = [
        f"carried: {result['embedding']} embedding {result['vocab_size']:,} x {result['width']}, "
        f"k = {result['simplex_value']:.2f}, K = {result['num_top']}, {result['n']:,} samples a "
        f"side against dense ones; {setting(result['environment'])}",
        "",
        "Each cell: relative error of the mean / largest Kolmogorov-Smirnov statistic over its "
        "bound / largest error of a correlation with the time before; * where the laws are told "
        "apart.",
        "",
        "| prediction | t | sigma | correlation | " + " | ".join(samplers) + " |",
        "|---|---|---|---" + "|---" * len(samplers) + "|",
    ]
    for prediction, t in dict.fromkeys((row["prediction"], row["time"]) for row in rows):
        here = [row for row in rows if (row["prediction"], row["time"]) == (prediction, t)]
        cells = {row["sampler"]: row for row in here}
        first = cells[samplers[0]]
        texts = " | ".join(_cell(cells[name]) for name in samplers)
        before = number(first["dense_correlation"], 3)
        lines.append(f"| {prediction} | {t:g} | {first['sigma']:.2f} | {before} | {texts} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    mark = " *" if row["rejected"] else ""
    error = number(row["correlation_error"], 3)
    return f"{row['mean_error']:.3f} / {row['ks_share']:.2f} / {error}{mark}"
