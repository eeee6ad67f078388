"""Order statistics against dense noise, by two-sample tests."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import setting
from tess.benchmarks.doors.flags import add_matrix


def add(parser: argparse.ArgumentParser) -> None:
    add_matrix(parser, vocab_size=131_072)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.law.order_statistics import benchmark_law

    return benchmark_law(
        args.vocab_size, args.width, embedding=args.embedding, n=args.n, seed=args.seed
    )


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    lines = [
        f"law: {result['embedding']} embedding {result['vocab_size']:,} x {result['width']}, "
        f"k = {result['simplex_value']:.2f}, {result['n']:,} samples a side against dense ones; "
        f"{setting(result['environment'])}",
        "",
        "Each cell: largest Kolmogorov-Smirnov statistic over its bound / energy distance in "
        "deviations of its null / accuracy of a classifier; * where the laws are told apart.",
        "",
        "| t | sigma | " + " | ".join(samplers) + " |",
        "|---|---" + "|---" * len(samplers) + "|",
    ]
    for t in dict.fromkeys(row["time"] for row in rows):
        cells = {row["sampler"]: row for row in rows if row["time"] == t}
        texts = " | ".join(_cell(cells[name]) for name in samplers)
        lines.append(f"| {t:g} | {cells[samplers[0]]['sigma']:.2f} | {texts} |")
    names = ("ks_share", "energy", "accuracy", "rejected")
    largest = [
        {name: max(row[name] for row in rows if row["sampler"] == sampler) for name in names}
        for sampler in samplers
    ]
    lines.append("| largest | | " + " | ".join(_cell(row) for row in largest) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    mark = " *" if row["rejected"] else ""
    return f"{row['ks_share']:.2f} / {row['energy']:.1f} / {row['accuracy']:.3f}{mark}"
