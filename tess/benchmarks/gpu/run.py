"""The Triton kernels on this GPU: whether they are right and how fast.

In this order: what the machine can do at most; every operation in every configuration against
float64 (`checks.py`); then times and peak memory side by side with our PyTorch path
and with every other project that is installed, in one run (`compare.py`); an
operation that fails the gate has no times. The tables are in `report.py`.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch

from tess.benchmarks.gpu.checks import PARTS, all_tables, check_all, requests
from tess.benchmarks.gpu.clock import Clock, as_gpu, ceilings
from tess.benchmarks.gpu.compare import Settings, compare
from tess.benchmarks.gpu.options import OPERATIONS, Options
from tess.benchmarks.gpu.peers import installed
from tess.benchmarks.gpu.report import goals
from tess.benchmarks.gpu.shapes import NANO, TINY, Shape, shipped
from tess.cli import DEFAULT_CHECKPOINT
from tess.costs.machine import gpu_environment
from tess.errors import UserError
from tess.kernels.dispatch import is_interpreted


def benchmark_gpu(
    options: Options,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run it; `say` is told what is under way, `keep` gets the result after each part of it.

    Raises:
        UserError: no CUDA device, or one too old; Triton is missing or interprets; a dry run
            outside of Triton's interpreter.
    """
    _require(options.dry_run)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.dry_run:
        options = replace(options, repeats=1, workers=0, dtype="float32", shapes=("tiny",))
    shapes = [_resized(shape, options) for shape in _shapes(options)]
    clock = Clock(device)
    say("measuring the machine")
    found = ceilings(clock, min(options.repeats, 10), options.dry_run)
    result: dict[str, Any] = {
        "benchmark": "gpu", "dry_run": options.dry_run, "dtype": options.dtype,
        "seed": options.seed, "repeats": options.repeats, "environment": gpu_environment(device),
        "shapes": [asdict(shape) for shape in shapes], "ceilings": found, "peers": installed(),
        "checks": [], "tables_not_run": [], "failed": [], "rows": [], "goals": [],
    }
    result["checks"] = _check(shapes, options, device, say)
    result["failed"] = sorted({row["op"] for row in result["checks"] if row["passed"] is False})
    result["tables_not_run"] = _not_run(result["checks"], options)
    result["goals"] = goals(result)
    keep(result)
    settings = Settings(
        options.dtype, options.repeats, options.seed, options.peers, clock,
        as_gpu(found, options.dtype),
    )
    for shape in shapes:
        for op in options.ops:
            broken = _broken(op, result)
            if broken:
                say(f"no times of {op}: {', '.join(broken)} failed")
                continue
            say(f"timing {op}, {shape.name}")
            result["rows"] += compare(op, shape, settings)
            wrong = {row["op"] for row in result["rows"] if row["failed"]}
            result["failed"] = sorted(wrong.union(result["failed"]))
            result["rows"] = [
                row for row in result["rows"] if row["failed"] or not _broken(row["op"], result)
            ]
            result["goals"] = goals(result)
            keep(result)
    return result


def _broken(op: str, result: dict[str, Any]) -> list[str]:
    """Which of an operation and its parts failed."""
    return sorted({op, *PARTS.get(op, ())}.intersection(result["failed"]))


def _require(dry_run: bool) -> None:
    if find_spec("triton") is None:
        raise UserError("the GPU benchmark needs the package triton, which is not installed")
    if dry_run and not is_interpreted():
        raise UserError(
            "--dry_run runs the kernels in Triton's interpreter and needs TRITON_INTERPRET=1 in "
            "the environment"
        )
    if dry_run:
        return
    if not torch.cuda.is_available():
        raise UserError(
            "the GPU benchmark needs a CUDA device of compute capability 8.0 or newer, and torch "
            "finds none; --dry_run tries the command without one"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            "the GPU benchmark needs compute capability 8.0 or newer, "
            f"{torch.cuda.get_device_name()} has {torch.cuda.get_device_capability()}"
        )
    if is_interpreted():
        raise UserError("TRITON_INTERPRET=1 replaces the GPU by an interpreter; unset it")


def _shapes(options: Options) -> list[Shape]:
    known = {
        "nano": lambda: NANO, "tiny": lambda: TINY, "shipped": lambda: shipped(DEFAULT_CHECKPOINT)
    }
    return [known[name]() for name in options.shapes]


def _resized(shape: Shape, options: Options) -> Shape:
    given = {"batch": options.batch, "length": options.length}
    return replace(shape, **{name: size for name, size in given.items() if size is not None})


# ---- the gate ----


def _check(
    shapes: list[Shape], options: Options, device: torch.device, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    parts = {part for op in options.ops for part in PARTS.get(op, (op,))}
    wanted = [
        one
        for op in OPERATIONS
        if op in parts
        for shape in shapes
        for one in requests(op, shape, device.type, options.seed, quick=options.dry_run)
    ]
    return check_all(wanted, options.workers, say)


def _not_run(checks: list[dict[str, Any]], options: Options) -> list[str]:
    """Tables of configurations that no check used; of a part of the operations none is missed."""
    if set(options.ops) < set(OPERATIONS):
        return []
    return sorted(set(all_tables()) - {name for row in checks for name in row.get("tables", ())})
