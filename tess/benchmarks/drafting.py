"""Draft and verify against plain autoregressive decoding: the same texts, in how many passes."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tess.benchmarks.decoding import packaged_sources
from tess.benchmarks.turns import checkpoint_label
from tess.costs.machine import environment
from tess.decoders.base import Decoder, Generation
from tess.decoders.load import load_decoder
from tess.decoders.options import DECODERS
from tess.decoders.verified import DraftVerifyDecoder

Batches = list[list[list[int]]]
Writes = Callable[[list[list[int]]], list[Generation]]


@dataclass(frozen=True)
class _System:
    """One way to write. `every`: it gets one batch of so many, where all would take too long."""

    name: str
    write: Writes
    redraft: str | None = None
    num_inference_steps: int | None = None
    every: int = 1


def benchmark_drafting(
    checkpoint: str | Path,
    *,
    rows: int = 200,
    num_inference_steps: Sequence[int] = (1, 4, 8, 16),
    redraft_steps: Sequence[int] = (1, 4),
    redraft_every: int = 5,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Greedy decoding of packaged sources in float32: `ar`, `ar+mtp` and `tess+ar`, turn by turn.

    `tess+ar` drafts with each of `num_inference_steps` and goes on with the rest of its draft;
    with `redraft_steps` it writes a new draft in every round, on one batch of `redraft_every`.

    Returns, per batch size and system: how many texts equal those of `ar` (what a mismatch would
    mean is a bug), evaluations of both models per text, new tokens per evaluation of the causal
    model, the accepted prefix of the first draft in tokens (the causal model's first token is known
    before and is in it where the draft has it too), the share of drafted tokens that stay, and the
    median over batches of the time of `ar` divided by the system's (above 1: it is faster).

    Raises:
        UserError: a checkpoint without one of the models, or more rows than are packaged.
    """
    decoders = {name: load_decoder(checkpoint, name) for name in DECODERS}
    sources = packaged_sources(decoders["ar"], rows)
    systems = _systems(decoders, num_inference_steps, redraft_steps, redraft_every, seed)
    figures = []
    for size in batch_sizes:
        batches = [sources[i : i + size] for i in range(0, rows, size)]
        figures += _compare(systems, batches, size, repeats)
    return {
        "benchmark": "drafting",
        "checkpoint": checkpoint_label(checkpoint),
        "rows": figures,
        "sources": rows,
        "dtype": "float32",
        "repeats": repeats,
        "seed": seed,
        "redraft_every": redraft_every,
        "parameters": {name: decoders[name].num_parameters for name in ("tess", "ar")},
        "environment": environment(),
    }


def _systems(
    decoders: dict[str, Decoder],
    steps: Sequence[int],
    redraft_steps: Sequence[int],
    every: int,
    seed: int,
) -> list[_System]:
    def write(decoder: Decoder, rows: list[list[int]], **options: Any) -> list[Generation]:
        return decoder.generate_ids(rows, batch_size=len(rows), seed=seed, **options)

    def drafted(
        decoder: DraftVerifyDecoder, redraft: str, steps: int, rows: list[list[int]]
    ) -> list[Generation]:
        decoder.redraft = redraft
        return write(decoder, rows, num_inference_steps=steps)

    systems = [_System(name, partial(write, decoders[name])) for name in ("ar", "ar+mtp")]
    for redraft, counts, share in (("suffix", steps, 1), ("diffusion", redraft_steps, every)):
        for count in counts:
            call = partial(drafted, decoders["tess+ar"], redraft, count)
            systems.append(_System("tess+ar", call, redraft, count, share))
    return systems


def _compare(
    systems: list[_System], batches: Batches, size: int, repeats: int
) -> list[dict[str, Any]]:
    for system in systems:
        system.write(batches[0])  # warm-up
    times: list[dict[int, float]] = [{} for _ in systems]
    texts: list[dict[int, list[Generation]]] = [{} for _ in systems]
    for index, batch in enumerate(batches):
        for _ in range(repeats):
            for number, system in enumerate(systems):
                if index % system.every:
                    continue
                start = time.perf_counter()
                texts[number][index] = system.write(batch)
                seconds = time.perf_counter() - start
                times[number][index] = min(seconds, times[number].get(index, seconds))
    return [
        _figures(system, size, times[0], times[number], texts[0], texts[number])
        for number, system in enumerate(systems)
    ]


def _figures(
    system: _System,
    size: int,
    plain_times: dict[int, float],
    times: dict[int, float],
    plain: dict[int, list[Generation]],
    written: dict[int, list[Generation]],
) -> dict[str, Any]:
    pairs = [pair for index in written for pair in zip(plain[index], written[index], strict=True)]
    own = [text for _, text in pairs]
    rows, tokens = len(own), sum(text.num_new_tokens for text in own)
    drafts = system.name == DraftVerifyDecoder.name
    passes = [text.num_verifications + 1 if drafts else text.nfe for text in own]
    first = [text.num_first_accepted for text in own]
    drafted = sum(text.num_drafted for text in own)
    return {
        "system": system.name,
        "redraft": system.redraft,
        "num_inference_steps": system.num_inference_steps,
        "batch_size": size,
        "rows": rows,
        "equal_texts": sum(one.token_ids == other.token_ids for one, other in pairs),
        "new_tokens": tokens,
        "diffusion_evaluations": sum(t.nfe - n for t, n in zip(own, passes)) / rows,
        "ar_evaluations": sum(passes) / rows,
        "tokens_per_ar_evaluation": tokens / sum(passes),
        "first_accepted_mean": statistics.mean(first) if drafts else None,
        "first_accepted_median": statistics.median(first) if drafts else None,
        "accepted_share": sum(t.num_accepted for t in own) / drafted if drafted else None,
        "ms_per_token": 1e3 * sum(times.values()) / tokens,
        "speedup": statistics.median(plain_times[index] / times[index] for index in times),
    }
