"""Latency, throughput and peak memory of a system. Nothing here is in the report's `results`."""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tess.cli import CHECKOUT
from tess.comparison.progress import MEMORY, SINGLE, row_work, timing_work
from tess.comparison.recipe import System
from tess.comparison.report import Latency, Throughput, Timing, from_json, to_json
from tess.comparison.state import Comparison, Models
from tess.comparison.systems import load_system, write_texts
from tess.comparison.texts import texts_key
from tess.costs.machine import TIMING, environment, resident_peak
from tess.decoders.base import Decoder, Generation
from tess.errors import UserError
from tess.storage.kept import keep, kept

WARM_UP = 2
"""Texts that are written before a clock runs."""

Loaded = Mapping[System, Decoder]
Advance = Callable[[System, int], None]

# A process of its own, so that nothing but loading and writing moves its peak.
_CHILD = """
import json, sys
import torch
from tess.comparison.timing import measure_peak
spec = json.load(sys.stdin)
torch.set_num_threads(spec["threads"])
print(json.dumps(measure_peak(spec)))
"""


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, spread over all of them, the first among them."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def time_all(run: Comparison) -> dict[str, Timing]:
    """Latency, throughput and memory of every system but the untrained one, by name.

    Those that are there, of the same setting, are not measured again.

    Raises:
        UserError: one is not timed where only a report is asked for.
    """
    setting, reports = environment(TIMING), run.only == "report"
    rows = evenly_spaced(len(run.sources), run.recipe.timing_rows)
    chosen = [run.sources[i] for i in rows]
    found: dict[str, Timing] = {}
    missing = {}
    for system in run.systems:
        if system.untrained:
            continue
        path, key = run.folder / "timings" / f"{system.name}.json", _key(run, system, chosen)
        key["setting"] = setting
        value = kept(path, key, ("device", "setting") if reports else ())
        if value is None:
            missing[system] = path, key
            continue
        found[system.name] = from_json(Timing, value)
        run.progress.skip(timing_work(run.recipe, system, len(run.sources)))
        if not reports:
            run.say(f"{system.name}: timings are there already")
    if missing and reports:
        raise UserError(f"{next(iter(missing)).name} is not timed yet; run --only decode")
    if missing:
        timed = _time(run, list(missing), chosen, setting)
        for system, (path, key) in missing.items():
            found[system.name] = timed[system.name]
            keep(path, key, to_json(found[system.name]))
    return {system.name: found[system.name] for system in run.systems if not system.untrained}


def _key(run: Comparison, system: System, chosen: Sequence[str]) -> dict[str, Any]:
    recipe = run.recipe
    size = {"batch_size": recipe.batch_size, "dtype": recipe.dtype}
    return texts_key(system, run.first_models, chosen, **size) | {
        "batch_sizes": list(recipe.batch_sizes),
        "memory": recipe.memory,
        "repeats": recipe.timing_repeats,
    }


def _time(
    run: Comparison, systems: Sequence[System], chosen: Sequence[str], setting: Mapping[str, Any]
) -> dict[str, Timing]:
    """All systems on the sources `chosen`, in turns, so that their times can be compared.

    load_average: of the machine before it began.
    """
    recipe, models, progress = run.recipe, run.first_models, run.progress
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    loaded = {system: load_system(system, models, recipe.dtype) for system in systems}
    given = {"seed": models.seed, "repeats": recipe.timing_repeats}

    def single(system: System, rows: int) -> None:
        progress.advance(SINGLE * rows * row_work(system))

    def batched(system: System, rows: int) -> None:
        progress.advance(rows * row_work(system))

    progress.begin("time one text at a time")
    alone = latencies(loaded, chosen, advance=single, **given)
    batches = {}
    for batch_size in sorted(recipe.batch_sizes):
        progress.begin(f"time batches of {batch_size}")
        if batch_size == 1:  # that is what was timed just now
            batches[1] = {name: _batch_of_one(one) for name, one in alone.items()}
        else:
            batches[batch_size] = throughputs(loaded, chosen, batch_size, advance=batched, **given)
    loaded.clear()
    peaks = _peaks(run, systems, chosen)
    for system in systems:
        run.say(f"{system.name}: timed, {alone[system.name].median_ms:.0f} ms a text")
    return {
        system.name: Timing(
            setting=setting,
            latency=alone[system.name],
            throughput=[batch[system.name] for batch in batches.values()],
            peak_memory_bytes=peaks[system.name],
            peak_memory_batch_size=max(recipe.batch_sizes),
            load_average=load,
        )
        for system in systems
    }


def _batch_of_one(one: Latency) -> Throughput:
    return Throughput(1, one.new_tokens_per_second, one.texts, 1e3 / one.mean_ms)


def _peaks(
    run: Comparison, systems: Sequence[System], chosen: Sequence[str]
) -> dict[str, int | None]:
    recipe, models, progress = run.recipe, run.first_models, run.progress
    most = max(recipe.batch_sizes)
    if not recipe.memory:
        return dict.fromkeys((system.name for system in systems), None)
    progress.begin("memory of an empty process")
    base = 0
    if not torch.cuda.is_available():
        base = peak_memory(None, models, chosen, most, recipe.dtype)
    found = {}
    for system in systems:
        progress.begin(f"memory of {system.name}")
        peak = peak_memory(system, models, chosen, most, recipe.dtype)
        found[system.name] = None if peak is None or base is None else peak - base
        progress.advance(MEMORY)
    return found


def latencies(
    loaded: Loaded, sources: Sequence[str], *, seed: int, repeats: int, advance: Advance
) -> dict[str, Latency]:
    """Milliseconds per text at batch 1 after a warm-up, by the name of the system.

    The systems write each source in turn, so that other work of the machine meets them alike, and
    of each text the shortest of its repeats counts.
    """
    for system, decoder in loaded.items():
        for source in sources[:WARM_UP]:
            write_texts(system, decoder, [source], seed=seed, batch_size=1)
    times = {system: [math.inf] * len(sources) for system in loaded}
    tokens = dict.fromkeys(loaded, 0)
    for at_repeat in range(repeats):
        for index, source in enumerate(sources):
            for system, decoder in loaded.items():
                seconds, texts = _timed(system, decoder, [source], seed, 1)
                times[system][index] = min(times[system][index], 1e3 * seconds)
                tokens[system] += texts[0].num_new_tokens if at_repeat == 0 else 0
                advance(system, 1)
    return {
        system.name: Latency(
            median_ms=statistics.median(own),
            p90_ms=sorted(own)[math.ceil(0.9 * len(own)) - 1],
            mean_ms=statistics.mean(own),
            new_tokens_per_second=1e3 * tokens[system] / sum(own),
            texts=len(own),
            repeats=repeats,
        )
        for system, own in times.items()
    }


def throughputs(
    loaded: Loaded,
    sources: Sequence[str],
    batch_size: int,
    *,
    seed: int,
    repeats: int,
    advance: Advance,
) -> dict[str, Throughput]:
    """New tokens per second at a batch size, padding not counted, by the name of the system.

    In whole batches: the sources are repeated until the last one is full. In turns, and the
    shortest of the repeats counts. None: the device's memory was too small.
    """
    count = batch_size * math.ceil(len(sources) / batch_size)
    rows = [sources[index % len(sources)] for index in range(count)]
    best, tokens = dict.fromkeys(loaded, math.inf), {}
    fitting = {s: d for s, d in loaded.items() if _fits(s, d, rows[:batch_size], seed)}
    for _ in range(repeats):
        for system, decoder in fitting.items():
            seconds, texts = _timed(system, decoder, rows, seed, batch_size)
            best[system] = min(best[system], seconds)
            tokens[system] = sum(text.num_new_tokens for text in texts)
            advance(system, count)
    return {
        system.name: Throughput(
            batch_size, tokens[system] / best[system], count, count / best[system]
        )
        if system in fitting
        else Throughput(batch_size, None, count)
        for system in loaded
    }


def _fits(system: System, decoder: Decoder, rows: Sequence[str], seed: int) -> bool:
    """Writes one batch, to warm up; False where memory is too small for it."""
    try:
        write_texts(system, decoder, rows, seed=seed, batch_size=len(rows))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def _timed(
    system: System, decoder: Decoder, sources: Sequence[str], seed: int, batch_size: int
) -> tuple[float, list[Generation]]:
    _wait()
    start = time.perf_counter()
    texts = write_texts(system, decoder, sources, seed=seed, batch_size=batch_size)
    _wait()
    return time.perf_counter() - start, texts


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- memory ----


def peak_memory(
    system: System | None, models: Models, sources: Sequence[str], batch_size: int, dtype: str
) -> int | None:
    """Most bytes of a fresh process that loads the system and writes one batch.

    On a GPU the most that torch had allocated there; else the resident high-water mark (Linux).
    system None: of a process that only imports. None: this machine has no such counter.

    Raises:
        UserError: the process failed.
    """
    spec: dict[str, Any] = {"threads": torch.get_num_threads(), "system": None}
    if system is not None:
        spec |= {
            "system": dataclasses.asdict(system),
            "folder": str(models.folder),
            "seed": models.seed,
            "dtype": dtype,
            "sources": [sources[index % len(sources)] for index in range(batch_size)],
        }
    root = str(CHECKOUT)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    out = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(spec), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    if out.returncode:
        lines = out.stderr.strip().splitlines() or ["no message"]
        name = "an empty process" if system is None else f"system {system.name!r}"
        raise UserError(f"the process that measures the memory of {name} failed: {lines[-1]}")
    return json.loads(out.stdout.splitlines()[-1])


def measure_peak(spec: Mapping[str, Any]) -> int | None:
    """What `peak_memory` asks its process; the peak of this very process, in bytes."""
    if spec["system"] is not None:
        system = System(**spec["system"])
        decoder = load_system(system, Models(spec["seed"], Path(spec["folder"]), {}), spec["dtype"])
        rows = spec["sources"]
        write_texts(system, decoder, rows, seed=spec["seed"], batch_size=len(rows))
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_peak()
