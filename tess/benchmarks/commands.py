"""The benchmarks by name: a line of help each, and a door in `doors/` of the same name."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from tess.cli import Parser

DESCRIPTION = "Measure against a named rival in the same run."
KEYS = "The keys of --json are stable; docs/benchmarks/keys.md in the repository says them all."
BENCHMARKS = {
    "backbone": "the backbone against transformers' Nemotron-H",
    "decoding": "greedy AR, AR + MTP and transformers' generate on one model",
    "loading": "peak memory of reading a released folder",
    "vocabulary": "noised simplex and whole steps against materialised tensors",
    "law": "order statistics against dense noise, by two-sample tests",
    "gpu": "the kernels on this GPU: right, then how fast",
    "cache": "a denoising step with and without the source cache",
    "sampling": "quality against evaluations: schedulers, spacings, stopping",
    "lengths": "predicted, rule, fixed and gold canvases",
    "agreement": "texts with and without cache, alone, in batches, in bfloat16",
    "drafting": "drafts by diffusion, verified by the autoregressive model",
    "start": "processor time from start to help and to text, against another commit",
    "carried": "soft predictions as short lists against the dense simplex",
}


class Benchmark(Protocol):
    """What a door offers. None of it loads torch before `run`."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags."""

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Measure; the figures as JSON has them. `failed` among them is status 1."""

    def table(self, result: dict[str, Any]) -> str:
        """The figures as Markdown, under a line that says what was measured."""


def benchmark(name: str) -> Benchmark:
    return cast(Benchmark, import_module(f"tess.benchmarks.doors.{name}"))


def make_parser() -> argparse.ArgumentParser:
    """A subcommand a benchmark, with its flags."""
    parser = Parser(description=DESCRIPTION, epilog=KEYS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name, what in BENCHMARKS.items():
        command = commands.add_parser(name, help=what, description=what, epilog=KEYS)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
        command.set_defaults(writes_json=False)
        benchmark(name).add(command)
    return parser
