"""Does a text depend on how it was computed? With and without the cache, alone and in batches."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tess.benchmarks.sampling.trials import Data, Texts, Trials
from tess.costs.machine import environment

COMPARISONS = ("uncached", "alone", "reordered")
SCHEDULERS = ("renoising", "ddim", "ddim_carried")


def benchmark_agreement(
    checkpoint: str | Path,
    data: Data,
    schedulers: Sequence[str] = SCHEDULERS,
    steps: int = 8,
    batch_size: int = 16,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> dict[str, Any]:
    """Write all rows in batches with the cache, and compare the texts with those written

    - "uncached": in the same batches, the source read in every step;
    - "alone": one at a time;
    - "reordered": in a random order, so that each has other neighbours and other padding;
    - "float32": in the same batches in float32, where that was run before another type.

    Returns a row for each scheduler, type and comparison: texts that are equal of how many, and the
    share of tokens that are, place by place.
    """
    rows = []
    first: dict[str, Texts] = {}
    for dtype in dtypes:
        trials = Trials.load(checkpoint, data, batch_size, getattr(torch, dtype))
        for scheduler in schedulers:
            trials.use(scheduler)
            ours, _ = trials.write(steps, seed)
            others = {name: _write(trials, name, steps, seed) for name in COMPARISONS}
            if scheduler in first:
                others["float32"] = first[scheduler]
            elif dtype == "float32":
                first[scheduler] = ours
            for name, other in others.items():
                row = {"scheduler": scheduler, "dtype": dtype, "comparison": name}
                rows.append(row | compare(ours, other))
    return {
        "benchmark": "agreement",
        "rival": "the same texts computed in another way",
        "checkpoint": trials.checkpoint,
        "data": dict(data.label),
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "rows": rows,
        "environment": environment(),
    }


def _write(trials: Trials, comparison: str, steps: int, seed: int) -> Texts:
    if comparison == "uncached":
        return trials.write(steps, seed, use_cache=False)[0]
    if comparison == "alone":
        return trials.write(steps, seed, batches=trials.batches(1))[0]
    order = list(range(len(trials.rows)))
    random.Random(seed).shuffle(order)
    return trials.write(steps, seed, batches=trials.batches(order=order))[0]


def compare(ours: Texts, other: Texts) -> dict[str, float]:
    """How many texts are equal, token for token, and the share of equal tokens of the longer."""
    pairs = list(zip(ours.ids, other.ids, strict=True))
    places = sum(max(len(a), len(b)) for a, b in pairs)
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return {
        "texts": len(pairs),
        "equal_texts": sum(a == b for a, b in pairs),
        "equal_tokens": same / places,
    }
