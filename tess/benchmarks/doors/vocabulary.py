"""Noised simplex and whole steps, against the same model with materialised tensors."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import ratio, setting
from tess.benchmarks.doors.flags import positive, several

PARTS = ("embedding", "training", "denoising")


def add(parser: argparse.ArgumentParser) -> None:
    several(parser, "--parts", str, PARTS, "what is run", choices=PARTS)
    several(parser, "--vocab_size", positive, (8_192, 32_768, 131_072), "tokens")
    parser.add_argument("--repeats", type=positive, default=5, help="pairs (default: 5)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the steps, bfloat16 by autocast (default: float32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="weights and data (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.vocabulary import benchmark_vocabulary

    return benchmark_vocabulary(args.vocab_size, args.parts, args.repeats, args.dtype, args.seed)


def table(result: dict[str, Any]) -> str:
    lines = [
        f"vocabulary: {result['batch']} x {result['length']} target positions after "
        f"{result['source']} source tokens, pattern {result['pattern']}, hidden "
        f"{result['hidden_size']}, {result['dtype']} (embedding: float32), rival "
        f"{result['rival']}; {setting(result['environment'])}",
    ]
    for part in PARTS:
        rows = [row for row in result["rows"] if row["part"] == part]
        if rows:
            lines += ["", *(_embedding_table if part == "embedding" else _step_table)(part, rows)]
    return "\n".join(lines)


def _embedding_table(part: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| embedding, V | K | ours, us per position | rival | ratio (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['vocab_size']} | {row['num_top']} | {row['ours_us']:.1f} | "
            f"{row['rival_us']:.0f} | {ratio(row)} |"
        )
    return lines


def _step_table(part: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| {part} step, V | ours, ms | rival, ms | ratio (quartiles) | official, ms | ratio | "
        "ours, peak MB | rival | ratio | official | ratio | two head products, ms | "
        "ours / products |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        cells = [str(row["vocab_size"]), f"{row['ours_ms']:.0f}", f"{row['rival_ms']:.0f}"]
        cells += [ratio(row), f"{row['official_ms']:.0f}", f"{row['official_ratio']:.2f}"]
        if row["peak_ratio"] is None:
            cells += ["-"] * 5
        else:
            cells += [f"{row['ours_peak'] / 1e6:.0f}", f"{row['rival_peak'] / 1e6:.0f}"]
            cells += [f"{row['peak_ratio']:.1f}", f"{row['official_peak'] / 1e6:.0f}"]
            cells.append(f"{row['official_peak_ratio']:.1f}")
        products = ["-"] * 2
        if "products_ms" in row:
            products = [f"{row['products_ms']:.0f}", f"{row['of_products']:.2f}"]
        lines.append("| " + " | ".join([*cells, *products]) + " |")
    return lines
