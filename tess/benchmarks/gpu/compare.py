"""Times and peak memory of one case, ours beside all contenders, and whether they agree."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tess.benchmarks.gpu import cases as sequence_cases
from tess.benchmarks.gpu import peers as sequence_peers
from tess.benchmarks.gpu import token_peers
from tess.benchmarks.gpu import tokens as token_cases
from tess.benchmarks.gpu.cases import Case, Maker, Outputs, evaluate
from tess.benchmarks.gpu.checks import BUILDERS, LIMITS, LOOSE, difference, said
from tess.benchmarks.gpu.clock import Clock, Timing
from tess.benchmarks.gpu.peers import Contender
from tess.benchmarks.gpu.shapes import Shape
from tess.costs.gpus import Gpu
from tess.errors import UserError

OURS, PLAIN = "ours", "PyTorch path of ours"
FORWARD, TRAINING = "forward", "forward + backward"
NO_ROOM = "OutOfMemoryError"


@dataclass(frozen=True)
class Settings:
    """What all comparisons share; `peers` are packages."""

    dtype: str
    repeats: int
    seed: int
    peers: tuple[str, ...]
    clock: Clock
    gpu: Gpu


def compare(op: str, shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    """The rows of all timed variants of an operation, forward and with its gradients.

    A row is `failed` where ours raises, or differs from the PyTorch path by more than twice what
    a result may be off by; such a variant has no times.

    Raises:
        UserError: a run left the GPU in a state in which nothing works.
    """
    timed = sequence_cases.TIMED | token_cases.TIMED
    timed["experts"] = token_cases.timed_experts(shape)
    rows = []
    for variant in timed[op]:
        settings.clock.free()
        try:
            make = Maker(settings.clock.device, getattr(torch, settings.dtype), settings.seed)
            case = BUILDERS[op](shape, variant, make)
            rows += _compare_case(case, make, settings)
        except Exception as error:  # ours, or there is no room for the inputs
            _require_health(settings.clock, OURS, error)
            rows.append(_failed(op, variant, shape, said(error)))
    return rows


def _require_health(clock: Clock, system: str, error: BaseException) -> None:
    try:
        clock.synchronize()
    except Exception:  # after an illegal access nothing works in this process
        raise UserError(
            f"{system} left the GPU unusable, so that no more can be measured ({said(error)}); "
            "--peers and --ops leave it out"
        ) from error


def _contenders(case: Case, peers: tuple[str, ...]) -> Iterator[Contender]:
    run = lambda backend: lambda leaves: case.run(leaves, backend)  # noqa: E731
    yield Contender(OURS, "tess-diffusion", lambda: run("triton"))
    yield Contender(PLAIN, "tess-diffusion", lambda: run("torch"))
    home = sequence_peers if case.op in sequence_cases.BUILDERS else token_peers
    yield from (c for c in home.contenders(case) if c.package in peers)


def _compare_case(case: Case, make: Maker, settings: Settings) -> list[dict[str, Any]]:
    trains = case.costs.training is not None
    for leaf in case.leaves.values():
        leaf.requires_grad_(trains)
    rows = []
    for what in (FORWARD, TRAINING) if trains else (FORWARD,):
        upstream = _upstream(case, make) if what == TRAINING else None
        rows += _Group(case, what, upstream, settings).rows()
        settings.clock.free()
        if any(row["failed"] for row in rows):
            break
    return rows


def _upstream(case: Case, make: Maker) -> Outputs:
    out = evaluate(lambda leaves: case.run(leaves, "triton"), case.leaves, None)
    return {
        name: make.normal(*tensor.shape, dtype=tensor.dtype)
        for name, tensor in out.items()
        if tensor.dtype.is_floating_point
    }


class _Group:
    """All systems of one comparison: what runs, and what the others say."""

    def __init__(self, case: Case, what: str, upstream: Outputs | None, settings: Settings) -> None:
        self.case, self.what, self.upstream, self.settings = case, what, upstream, settings
        self.clock = settings.clock
        self.systems = [
            system
            for system in _contenders(case, settings.peers)
            if not (system.forward_only and upstream)
        ]
        self.notes: dict[str, str] = {}
        self.calls: dict[str, Callable[[], Outputs]] = {}
        self.resets = {s.name: s.reset for s in self.systems if s.reset is not None}

    def rows(self) -> list[dict[str, Any]]:
        """Build, compare values, then measure memory and time of those that run."""
        for system in self.systems:
            self._attempt(system.name, lambda: self._build(system))
        differences = self._differences()
        limit = 2 * LIMITS[self.settings.dtype]  # two narrow results are compared
        for name, value in differences.items():
            if not value <= limit:
                self.notes[name] = f"differs from the PyTorch path by {value:.1e} > {limit:.0e}"
        peaks = {
            name: self._attempt(name, lambda: self.clock.peak(call))
            for name, call in list(self.calls.items())
        }
        timings = {} if OURS in self.notes else self._timings()
        if OURS in self.notes:
            case = self.case
            return [_failed(case.op, case.variant, case.shape, self.notes[OURS], self.what)]
        if PLAIN not in self.calls:
            self.notes[OURS] = "values not compared at this size"
        return [self._row(system, timings, peaks, differences) for system in self.systems]

    def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a call; whoever raises has a note and is left out from then on."""
        try:
            return call()
        except Exception as error:  # other projects' code may raise anything
            self._leave_out(name, error)
        finally:
            self.clock.free()

    def _leave_out(self, name: str, error: Exception) -> None:
        _require_health(self.clock, name, error)
        self.notes[name] = said(error)
        self.calls.pop(name, None)

    def _timings(self) -> dict[str, Timing]:
        def guarded(name: str) -> Callable[[], None]:
            def run() -> None:
                if name in self.calls:
                    try:
                        self.calls[name]()
                    except Exception as error:
                        self._leave_out(name, error)

            return run

        calls = {name: guarded(name) for name in self.calls}
        found = self.clock.compare(calls, self.settings.repeats, self.resets)
        return {name: found[name] for name in self.calls}

    def _build(self, system: Contender) -> None:
        function = system.make()

        def call() -> Outputs:
            return evaluate(function, self.case.leaves, self.upstream)

        self._fresh(system.name, call)
        self.clock.synchronize()
        self.calls[system.name] = call

    def _fresh(self, name: str, call: Callable[[], Outputs]) -> Outputs:
        if name in self.resets:
            self.resets[name]()
        return call()

    def _differences(self) -> dict[str, float]:
        """Worst norm ratio of outputs and gradients to those of the PyTorch path, where it runs."""
        if PLAIN not in self.calls:
            return {}
        want = self.calls[PLAIN]()
        found = {}
        for system in self.systems:
            name = system.name
            if name in self.calls and system.comparable and name != PLAIN:
                found[name] = self._attempt(
                    name, lambda: self._distance(self._fresh(name, self.calls[name]), want)
                )
        return {name: value for name, value in found.items() if value is not None}

    def _distance(self, got: Outputs, want: Outputs) -> float | None:
        ratios = []
        for name in got.keys() & want.keys():
            if not _measurable(want[name]):
                continue
            ratio = difference(got[name], want[name])
            ratios.append(ratio / (LOOSE if name in self.case.loose else 1))
        bad = [ratio for ratio in ratios if ratio != ratio]
        return bad[0] if bad else max(ratios, default=None)

    def _row(
        self, system: Contender, timings: dict[str, Timing], peaks: dict[str, int | None],
        differences: dict[str, float],
    ) -> dict[str, Any]:
        name = system.name
        row = _blank(self.case.op, self.case.variant, self.case.shape, self.what) | {
            "system": name, "package": system.package, "comparable": system.comparable,
            "difference": _finite(differences.get(name)), "note": self.notes.get(name, ""),
        }
        if name not in timings:
            return row
        timing, own, peak = timings[name], peaks[OURS], peaks[name]
        row |= asdict(timing) | {
            "ratio": timing.ms / timings[OURS].ms, "peak_bytes": peak,
            "memory_ratio": peak / own if peak is not None and own else None,
        }
        if not system.comparable:  # it has other costs
            return row
        costs = self.case.costs
        cost = costs.training if self.what == TRAINING else costs.forward
        least = 1e3 * cost.seconds(self.settings.gpu)
        return row | {
            "least_ms": least, "of_roofline": least / timing.ms,
            "bound_by": cost.bound(self.settings.gpu),
        }


def _measurable(want: Tensor) -> bool:
    """Chosen ids differ between near ties, and nothing can be a share of zeros."""
    return want.dtype.is_floating_point and bool(want.any())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _blank(op: str, variant: str, shape: Shape, what: str) -> dict[str, Any]:
    return {
        "op": op, "variant": variant, "shape": shape.name, "what": what, "system": OURS,
        "package": "tess-diffusion", "comparable": True, "failed": False, "ms": None,
        "ms_q20": None, "ms_q80": None, "host_ms": None, "runs": 0, "ratio": None,
        "peak_bytes": None, "memory_ratio": None, "difference": None, "least_ms": None,
        "of_roofline": None, "bound_by": None, "note": "",
    }


def _failed(op: str, variant: str, shape: Shape, note: str, what: str = FORWARD) -> dict[str, Any]:
    """Ours is wrong, or merely too large for this GPU, which is no fault."""
    failed = not note.startswith(NO_ROOM)
    return _blank(op, variant, shape, what) | {"failed": failed, "note": note}
