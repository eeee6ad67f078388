"""The backbone against transformers' Nemotron-H, on a CPU."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import ratio, setting
from tess.benchmarks.doors.flags import positive, several

PARTS = ("model", "scan", "wide", "block")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pattern", default="M*E-", help="layers (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=512, help="tokens (default: 512)")
    parser.add_argument("--batch", type=positive, default=1, help="rows (default: 1)")
    parser.add_argument("--repeats", type=positive, default=15, help="turns (default: 15)")
    several(parser, "--parts", str, PARTS, "what is run", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="weights and input (default: 0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.backbone import benchmark_backbone

    return benchmark_backbone(
        args.pattern, args.length, args.batch, args.repeats, args.seed, args.parts
    )


def table(result: dict[str, Any]) -> str:
    from tess.benchmarks.backbone import CHUNK_RIVAL, CHUNK_RIVAL_FAST, HIDDEN_1024

    difference = result["relative_difference"]
    lines = [
        f"{result['benchmark']}: pattern {result['pattern']}, hidden {result['hidden_size']} "
        f"(wide: {HIDDEN_1024['hidden_size']}), {result['batch']} x {result['length']} tokens, "
        f"rival {result['rival']} with chunks of {CHUNK_RIVAL} and of {CHUNK_RIVAL_FAST}; "
        f"{setting(result['environment'])}"
        + ("" if difference is None else f"; outputs differ by {difference:.1e}"),
        "",
        f"| part | what | dtype | ours ms | rival ms | ratio (quartiles) | {CHUNK_RIVAL_FAST}: "
        "ratio (quartiles) | bare products / ours | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        share = row["products_share"]
        lines.append(
            f"| {row['part']} | {row['what']} | {row['dtype']} | {row['ours_ms']:.1f} | "
            f"{row['rival_ms']:.1f} | "
            f"{ratio(row)} | {ratio(row, 'fast_')} | "
            f"{'' if share is None else format(share, '.2f')} | {row['pairs']} |"
        )
    return "\n".join(lines)
