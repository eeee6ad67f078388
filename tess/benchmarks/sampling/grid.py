"""Quality against network evaluations: schedulers, spacings, steps and seeds on one set of rows."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tess.benchmarks.sampling.trials import METRICS, SPACINGS, VARIANTS, Trials
from tess.costs.machine import environment
from tess.errors import UserError
from tess.schedulers.stopping import StoppingRule
from tess.storage.files import write_atomically

SCHEDULERS = ("renoising", "ddim", "euler_stochastic", "dpm_solver", "ddim_carried")
STEPS = (1, 2, 4, 8, 16, 32, 100)
SEEDS = (0, 1, 2)
LIMIT = 24
"""Rows, so that the whole grid takes half an hour on one core with the shipped model."""

CELL = ("steps", "scheduler", "spacing", "seed")
GOAL_STEPS, REFERENCE_STEPS = 8, 100


def benchmark_sampling(
    trials: Trials,
    schedulers: Sequence[str] = SCHEDULERS,
    spacings: Sequence[str] = tuple(SPACINGS),
    steps: Sequence[int] = STEPS,
    seeds: Sequence[int] = SEEDS,
    rules: Sequence[StoppingRule] = (StoppingRule(),),
    path: Path | None = None,
    report: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Write and score all rows in every cell of the grid, and sum up over the seeds.

    path: JSON that is written after every cell. What it already holds is not run again, and cells
    that this call did not ask for stay in it.

    Returns:
        `cells`, one for each (scheduler, spacing, steps, seed), with `full`, the figures of all
        steps, and `stopped`, those under each of the rules; `rows`, their means over the seeds with
        sd, min and max; and `copy`, the figures of the sources themselves.

    Raises:
        UserError: an unknown name, more steps than the scheduler has, or a file of another setting.
    """
    for name, given, known in (
        ("--schedulers", schedulers, VARIANTS),
        ("--spacings", spacings, SPACINGS),
    ):
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"{name} takes {', '.join(known)}, got {', '.join(unknown)}")
    if not rules:
        raise UserError("expected at least one stopping rule, got none")
    setting = _setting(trials, rules)
    cells = _read(path, setting)
    wanted = list(product(sorted(set(steps)), schedulers, spacings, seeds))
    missing = [cell for cell in wanted if cell not in cells]
    clock = _Clock(missing)
    for cell in missing:
        cells[cell] = _run_cell(trials, rules, *cell)
        _write(path, _result(trials, setting, cells))
        report(clock.line(cell, cells[cell]["seconds"]))
    result = _result(trials, setting, cells)
    _write(path, result)
    return result


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_atomically(path, json.dumps(result) + "\n")


def _setting(trials: Trials, rules: Sequence[StoppingRule]) -> dict[str, Any]:
    """What has to be equal of two cells that are compared."""
    digest = hashlib.sha256()
    for name, tensor in trials.pipeline.denoiser.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return {
        "checkpoint": trials.checkpoint,
        "weights": digest.hexdigest()[:16],
        "parameters": sum(p.numel() for p in trials.pipeline.denoiser.parameters()),
        "dtype": str(trials.pipeline.denoiser.dtype).removeprefix("torch."),
        "data": dict(trials.data.label),
        "batch_size": trials.batch_size,
        "rules": [_rule(rule) for rule in rules],
    }


def _rule(rule: StoppingRule) -> dict[str, float | None]:
    """As JSON has it: null for no bound."""
    bound = rule.max_entropy
    return {"patience": rule.patience, "max_entropy": bound if math.isfinite(bound) else None}


def _read(path: Path | None, setting: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    """The cells of an earlier run."""
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        theirs, cells = found["setting"], found["cells"]
        table = {tuple(cell[name] for name in CELL): cell for cell in cells}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no figures of this benchmark; name another file") from error
    for name, ours in setting.items():
        if theirs.get(name) != ours:
            raise UserError(
                f"{path} was measured with {name} = {theirs.get(name)}, and this run has {ours}; "
                "name another file"
            )
    return table


def _run_cell(
    trials: Trials,
    rules: Sequence[StoppingRule],
    steps: int,
    scheduler: str,
    spacing: str,
    seed: int,
) -> dict[str, Any]:
    trials.use(scheduler, spacing)
    start = time.perf_counter()
    full, stopped = trials.write(steps, seed, rules)
    seconds = time.perf_counter() - start
    return {
        "scheduler": scheduler,
        "spacing": spacing,
        "steps": steps,
        "seed": seed,
        "seconds": seconds,
        "full": trials.figures(full),
        "stopped": [
            _rule(rule) | trials.figures(texts) for rule, texts in zip(rules, stopped, strict=True)
        ],
    }


class _Clock:
    """Guesses the time that is left: a cell takes as long as its steps say."""

    def __init__(self, cells: Sequence[tuple]) -> None:
        self.left, self.done, self.seconds, self.count = list(cells), 0, 0.0, len(cells)

    def line(self, cell: tuple, seconds: float) -> str:
        self.left.remove(cell)
        self.done += cell[0]
        self.seconds += seconds
        rest = sum(other[0] for other in self.left) * self.seconds / self.done
        steps, scheduler, spacing, seed = cell
        return (
            f"{self.count - len(self.left)} of {self.count}: {scheduler}, {spacing}, {steps} "
            f"steps, seed {seed}: {seconds:.1f} s; about {rest / 60:.0f} min left"
        )


# ---- figures over seeds ----


def _result(
    trials: Trials, setting: dict[str, Any], cells: dict[tuple, dict[str, Any]]
) -> dict[str, Any]:
    found = sorted(cells.values(), key=lambda cell: [cell[name] for name in CELL])
    return {
        "benchmark": "sampling",
        "rival": "re-noising at 100 evaluations; a copy of the source",
        "setting": setting,
        "copy": trials.score(trials.sources),
        "rows": summarize(found),
        "cells": found,
        "environment": environment(),
    }


def summarize(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each (scheduler, spacing, steps), in the order of `VARIANTS`."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        key = (cell["scheduler"], cell["spacing"], cell["steps"])
        groups.setdefault(key, []).append(cell)
    order = list(VARIANTS)
    rows = []
    for key in sorted(groups, key=lambda key: (order.index(key[0]), *key[1:])):
        group = groups[key]
        row = dict(zip(("scheduler", "spacing", "steps"), key, strict=True))
        row["seeds"] = sorted(cell["seed"] for cell in group)
        row["full"] = over_seeds([cell["full"] for cell in group])
        row["stopped"] = [
            {name: same[0][name] for name in ("patience", "max_entropy")} | over_seeds(same)
            for same in zip(*(cell["stopped"] for cell in group), strict=True)
        ]
        rows.append(row)
    return rows


def over_seeds(figures: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 of one), min and max of each metric; evaluations."""
    found: dict[str, Any] = {
        "nfe_mean": statistics.mean(one["nfe_mean"] for one in figures),
        "nfe_max": max(one["nfe_max"] for one in figures),
    }
    for name in METRICS:
        values = [one[name] for one in figures]
        found[name] = {
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
    return found


def goals(result: dict[str, Any]) -> dict[str, Any]:
    """Who is at 8 evaluations no worse than re-noising at 100, and who stops in 8 on average.

    The bar is re-noising at 100 with uniform spacing, as TESS samples (or its first spacing there
    is). "No worse" is a mean plus standard deviation over the seeds of at least the bar's mean
    minus its own, in SARI and in BLEU. `stopping` has the rows whose mean is no worse by the same
    rule and whose texts took at most 8 evaluations on average.
    """
    rows = result["rows"]
    at_100 = [r for r in rows if (r["scheduler"], r["steps"]) == ("renoising", REFERENCE_STEPS)]
    if not at_100:
        return {"bar": None, "few": [], "stopping": []}
    row = next((r for r in at_100 if r["spacing"] == "uniform"), at_100[0])
    bar = {name: row["full"][name] for name in ("sari", "bleu")}

    def no_worse(figures: dict[str, Any]) -> bool:
        return all(
            figures[name]["mean"] + figures[name]["sd"] >= one["mean"] - one["sd"]
            for name, one in bar.items()
        )

    few = [r for r in rows if r["steps"] == GOAL_STEPS and no_worse(r["full"])]
    early = [
        (r, one)
        for r in rows
        for one in r["stopped"]
        if r["steps"] > GOAL_STEPS and one["nfe_mean"] <= GOAL_STEPS and no_worse(one)
    ]
    return {"bar": bar, "few": few, "stopping": early}
