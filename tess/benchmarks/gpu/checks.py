"""The gate of `tess-benchmark gpu`: every configuration of every kernel, before any time.

Each operation runs in every option and dtype against the float64 reference, outputs and gradients
by norm ratio; then with every other configuration of the kernels it used; and each of these some
times over, which must give the same bits (a compiler has been wrong in some configurations only,
and in some runs only).
"""

import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tess.benchmarks.gpu import cases as sequence_cases
from tess.benchmarks.gpu import tokens as token_cases
from tess.benchmarks.gpu.cases import Case, Maker, Outputs, evaluate
from tess.benchmarks.gpu.options import DTYPES
from tess.benchmarks.gpu.shapes import Shape, for_checks
from tess.cli import CHECKOUT, one_sentence
from tess.errors import UserError

BUILDERS = sequence_cases.BUILDERS | token_cases.BUILDERS
VARIANTS = sequence_cases.VARIANTS | token_cases.VARIANTS
PARTS = {"mamba_mixer": ("ssd_scan", "causal_conv1d", "gated_group_rms_norm")}
"""Operations that are only timed, and what they are made of."""

LIMITS = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
FLOORS = {"float32": 2e-5, "bfloat16": 8e-3, "float16": 1e-3}
"""A result may be off by twice what the PyTorch path is off by, in any case by a dtype's floor and
in no case by more than its limit."""
LOOSE = 10  # times the bound of sums whose terms cancel
NOTHING = 1e-10  # a norm that is rounding error alone, as of the reverse part of one position
RUNS = 5
HANG_SECONDS = 1200


def check_all(
    wanted: Sequence[dict[str, Any]], workers: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of all requests (`request`); with workers, each request in a process of its own.

    A process that dies, or whose GPU context is lost, costs the rows of its request only.
    """
    if workers < 1:
        rows = []
        for one in wanted:
            say(f"checking {_title(one)}")
            rows += check(**one)
        return rows
    with ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(lambda one: _elsewhere(one, say), wanted) for row in rows]


def requests(
    op: str, shape: Shape, device: str, seed: int, quick: bool = False
) -> Iterator[dict[str, Any]]:
    """One operation at one model's block sizes, as arguments of `check`: about equal pieces.

    quick: of a dry run, which leaves out bfloat16, in which Triton's interpreter is wrong, most
    repetitions, and configurations but for the last of the options in float16.
    """
    for dtype in DTYPES:
        if dtype == "bfloat16" and quick or op == "route_tokens" and dtype != "float32":
            continue  # router logits are float32
        names = VARIANTS[op]
        for variants in [(name,) for name in names] if op == "ssd_scan" else [names]:
            yield {
                "op": op, "variants": list(variants), "dtype": dtype, "device": device,
                "shape": vars(shape) | {"few_tokens": list(shape.few_tokens)}, "seed": seed,
                "quick": quick,
            }


def _title(one: dict[str, Any]) -> str:
    return f"{one['op']} ({'; '.join(one['variants'])}), {one['shape']['name']}, {one['dtype']}"


def _elsewhere(one: dict[str, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    root = str(CHECKOUT)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    code = "from tess.benchmarks.gpu.checks import main; main()"
    try:
        out = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(one), capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": paths}, timeout=HANG_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [_lost(one, f"no result in {HANG_SECONDS} seconds")]
    say(f"checked {_title(one)}")
    if out.returncode == 0:
        return json.loads(out.stdout.splitlines()[-1])
    said = (out.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    return [_lost(one, f"the process ended with status {out.returncode}: {said}")]


def _lost(one: dict[str, Any], note: str) -> dict[str, Any]:
    return _row(one, "; ".join(one["variants"]), "its own", note)


def main() -> None:
    """Check what stdin asks for and print the rows as JSON (`_elsewhere`)."""
    print(json.dumps(check(**json.load(sys.stdin))))


def _row(one: dict[str, Any], variant: str, configuration: str, note: str = "") -> dict[str, Any]:
    return {
        "op": one["op"], "variant": variant, "shape": one["shape"]["name"], "dtype": one["dtype"],
        "configuration": configuration, "worst": None, "error": None, "bound": None,
        "runs_equal": None, "passed": False, "note": note,
    }


def check(
    op: str, variants: Sequence[str], shape: dict[str, Any], dtype: str, device: str, seed: int,
    quick: bool = False,
) -> list[dict[str, Any]]:
    """A row for every option, and one for every configuration that is not the device's own."""
    one = {"op": op, "shape": shape, "dtype": dtype}
    sizes = for_checks(Shape(**(shape | {"few_tokens": tuple(shape["few_tokens"])})))
    rows = []
    for variant in variants:
        try:
            make = Maker(torch.device(device), getattr(torch, dtype), seed)
            case = BUILDERS[op](sizes, variant, make)
            others = not quick or (variant == VARIANTS[op][-1] and dtype == "float16")
            rows += _check_case(case, make, others, 2 if quick else RUNS, one)
        except Exception as error:  # the gate has to report whatever a kernel raises
            rows.append(_row(one, variant, "its own", said(error)))
    return rows


def _check_case(
    case: Case, make: Maker, others: bool, runs: int, one: dict[str, Any]
) -> list[dict[str, Any]]:
    exact, upstream = _exact(case, make)
    plain, note = _plain_errors(case, exact, upstream)
    ours = lambda x: case.run(x, "triton")  # noqa: E731

    def row(configuration: str) -> dict[str, Any]:
        results = []
        for _ in range(runs):
            results.append(evaluate(ours, case.leaves, upstream))
        filled = _row(one, case.variant, configuration, note)
        errors = {
            name: difference(got, exact.get(name))
            for name, got in _judged(case, results[0]).items()
        }
        bounds = {
            name: bound(one["dtype"], plain.get(name), loose=name in case.loose) for name in errors
        }
        worst = max(errors, key=lambda name: _over(errors[name], bounds[name]))
        equal = all(_same(results[0], other) for other in results[1:])
        passed = equal and _over(errors[worst], bounds[worst]) <= 1
        filled |= {"worst": worst, "bound": bounds[worst], "runs_equal": equal, "passed": passed}
        if not _finite(errors[worst]):
            return filled | {"note": f"{worst} is not finite"}
        return filled | {"error": errors[worst]}

    with used_tables() as used:
        first = row("its own")
    rows = [first | {"tables": sorted({table.name for table, _ in used})}]
    for table, config in other_configurations(used) if others else ():
        label = f"{table.name} {_label(config)}"
        try:
            with forced(table, config):
                rows.append(row(label))
        except Exception as error:
            fits = type(error).__name__ != "OutOfResources"
            failed = _row(one, case.variant, label, said(error) if fits else "does not fit")
            rows.append(failed | {"passed": False if fits else None})
    return rows


def _exact(case: Case, make: Maker) -> tuple[Outputs, Outputs | None]:
    """Float64 outputs and gradients, and the random gradients from above they were made with."""
    leaves = {name: leaf.detach().double() for name, leaf in case.leaves.items()}
    with torch.no_grad():
        shapes = case.run(case.leaves, "triton")
    upstream = None
    if case.costs.training is not None:
        for leaf in (*case.leaves.values(), *leaves.values()):
            leaf.requires_grad_()
        upstream = {
            name: make.normal(*tensor.shape, dtype=tensor.dtype)
            for name, tensor in shapes.items()
            if tensor.dtype.is_floating_point
        }
    return evaluate(case.exact, leaves, upstream), upstream


def _plain_errors(
    case: Case, exact: Outputs, upstream: Outputs | None
) -> tuple[dict[str, float | None], str]:
    """What the PyTorch path is off by, or what it says if it cannot run here."""
    try:
        found = _judged(case, evaluate(lambda x: case.run(x, "torch"), case.leaves, upstream))
    except Exception as error:  # the gate is about the kernels; their bounds are the floors then
        return {}, f"PyTorch path: {said(error)}"
    return {name: difference(got, exact.get(name)) for name, got in found.items()}, ""


def _judged(case: Case, out: Outputs) -> Outputs:
    return case.given["judged"](out) if "judged" in case.given else out


def difference(got: Tensor, want: Tensor | None) -> float | None:
    """|got - want| / |want|; where nothing is wanted, the largest of |got|.

    Integers: the share that differs. None: integers that no reference has.
    """
    if not got.dtype.is_floating_point:
        return None if want is None else (got != want).double().mean().item()
    got = got.double()
    size = 0.0 if want is None else want.double().norm().item()
    if size < NOTHING:
        return got.abs().max().item()
    return (got - want.double()).norm().item() / size


def bound(dtype: str, plain: float | None, loose: bool = False) -> float:
    """What a result may be off by, where the PyTorch path is off by `plain`."""
    allowed = min(LIMITS[dtype], 2 * plain) if plain is not None else 0.0
    return (LOOSE if loose else 1) * max(FLOORS[dtype], allowed)


def _finite(error: float | None) -> bool:
    return error is None or math.isfinite(error)


def _over(error: float | None, bound: float) -> float:
    """The error as a multiple of the bound; NaN is beyond any."""
    if not _finite(error):
        return math.inf
    return 0.0 if error is None else error / bound


def _same(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def said(error: BaseException) -> str:
    """An error as a cell of a table."""
    text = one_sentence(error)[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


# ---- the configurations of the kernels ----


def _label(config: Any) -> str:
    blocks = " ".join(f"{name}={size}" for name, size in config.blocks.items())
    return f"{blocks} warps={config.num_warps} stages={config.num_stages}".strip()


@contextmanager
def used_tables() -> Iterator[list[tuple[Any, Any]]]:
    """Collects the tables that anything inside launches from, each with its configuration.

    Nothing is tuned inside.
    """
    from tess.kernels.triton.launch import AUTOTUNE_VARIABLE, Table

    run, found = Table.run, []

    def noting(self, like: Tensor, *args: Any) -> None:
        config = self.config(like)
        if all(table is not self or known != config for table, known in found):
            found.append((self, config))
        run(self, like, *args)

    tuned = os.environ.pop(AUTOTUNE_VARIABLE, None)
    Table.run = noting
    try:
        yield found
    finally:
        Table.run = run
        if tuned is not None:
            os.environ[AUTOTUNE_VARIABLE] = tuned


@contextmanager
def forced(table: Any, config: Any) -> Iterator[None]:
    """Inside, the table has this configuration alone."""
    kept = table.fixed, table.float32
    table.fixed, table.float32 = {"sm_80": config}, {}
    try:
        with used_tables():
            yield
    finally:
        table.fixed, table.float32 = kept


def other_configurations(used: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """All candidates of the tables but those that were used."""
    tables = {id(table): table for table, _ in used}
    return [
        (table, config)
        for table in tables.values()
        for config in table.candidates()
        if all(known is not table or done != config for known, done in used)
    ]


def all_tables() -> list[str]:
    """Names of the tables in all modules of kernels."""
    from tess.kernels import triton as folder
    from tess.kernels.triton.launch import Table

    names = set()
    for module in pkgutil.iter_modules(folder.__path__):
        values = vars(importlib.import_module(f"tess.kernels.triton.{module.name}")).values()
        for value in values:
            members = value.values() if isinstance(value, dict) else value
            members = members if isinstance(value, (dict, tuple, list)) else (value,)
            names |= {member.name for member in members if isinstance(member, Table)}
    return sorted(names)
