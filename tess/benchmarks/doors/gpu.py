"""The kernels on this GPU: right, then how fast."""

import argparse
import json
from typing import Any

from tess.benchmarks.doors.flags import positive, several, tell
from tess.benchmarks.gpu.options import DTYPES, OPERATIONS, PACKAGES, SHAPES, Options
from tess.benchmarks.gpu.report import format_gpu

table = format_gpu


def add(parser: argparse.ArgumentParser) -> None:
    several(parser, "--shapes", str, SHAPES, "Nemotron-3-Nano, the shipped model", choices=SHAPES)
    several(parser, "--ops", str, OPERATIONS, "kernels", choices=OPERATIONS)
    parser.add_argument(
        "--peers", choices=tuple(PACKAGES), nargs="*", default=list(PACKAGES),
        help="packages to compare with (default: all)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the times (default: bfloat16)"
    )
    parser.add_argument("--repeats", type=positive, default=20, help="timed runs (default: 20)")
    parser.add_argument("--batch", type=positive, help="texts (default: 8, shipped model 64)")
    parser.add_argument("--length", type=positive, help="tokens (default: 4096, shipped model 128)")
    parser.add_argument("--seed", type=int, default=0, help="inputs (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=Options.workers,
        help="processes that check the kernels; 0: this one (default: %(default)s)",
    )
    parser.add_argument(
        "--dry_run", action="store_true",
        help="tiny shapes on the CPU in Triton's interpreter, to see that everything runs",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What is known after each part is in the JSON file at once."""
    from tess.benchmarks.gpu.run import benchmark_gpu

    def keep(result: dict[str, Any]) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n")

    options = Options(
        shapes=tuple(args.shapes), ops=tuple(args.ops), peers=tuple(args.peers), dtype=args.dtype,
        repeats=args.repeats, batch=args.batch, length=args.length, seed=args.seed,
        workers=args.workers, dry_run=args.dry_run,
    )
    return benchmark_gpu(options, tell, keep)
