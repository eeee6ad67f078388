"""Peak memory and time of reading a released folder, against transformers."""

import argparse
from typing import Any

from tess.benchmarks.doors.cells import setting
from tess.benchmarks.doors.flags import positive


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=positive, default=400, help="(default: 400)")
    parser.add_argument("--shard_megabytes", type=positive, default=100, help="(default: 100)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from tess.benchmarks.loading import benchmark_loading

    return benchmark_loading(args.megabytes, args.shard_megabytes)


def table(result: dict[str, Any]) -> str:
    lines = [
        f"loading: {result['tensor_bytes'] / 1e6:.0f} MB of bfloat16 tensors in {result['shards']} "
        f"shards, one tensor per expert; {setting(result['environment'])}",
        "",
        "| system | peak memory, MB | of the tensors' size | seconds |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['system']} | {row['peak'] / 1e6:.0f} | {row['peak_share']:.2f} | "
            f"{row['seconds']:.2f} |"
        )
    return "\n".join(lines)
