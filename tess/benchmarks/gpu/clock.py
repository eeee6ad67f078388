"""Clock, memory and ceilings of a device for `tess-benchmark gpu`.

All systems of one comparison take turns, A B C A B C, and the L2 cache is overwritten before each
run, so that none finds its inputs there. The GPU then waits for a moment, in which the launches of
the run are queued: what is timed is the GPU's work, and the host's time to launch it is a figure
of its own.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tess.costs.gpus import Gpu

FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
WARM_UPS = 2
LEAST_RUNS = 5
HEAD_START_CYCLES = 2_000_000  # about 1 ms of a GPU's clock
GROUP_SECONDS = 30.0  # a comparison of slow systems stops early, with `LEAST_RUNS` at least


@dataclass(frozen=True)
class Timing:
    """Milliseconds of so many runs: the median and the quantiles at 0.2 and 0.8.

    host_ms: the median time until all was launched, which is the whole time on a CPU.
    """

    ms: float
    ms_q20: float
    ms_q80: float
    host_ms: float
    runs: int


class Clock:
    """Times calls on one device, by CUDA events where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 0
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        """Wait for what was launched, so that an error is raised where it belongs."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def once(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds of one run on the device, and on the host."""
        if self.cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
            first.record()
        start = time.perf_counter()
        call()
        host = 1e3 * (time.perf_counter() - start)
        if not self.cuda:
            return host, host
        last.record()
        last.synchronize()
        return first.elapsed_time(last), host

    def compare(
        self,
        calls: Mapping[str, Callable[[], Any]],
        repeats: int,
        resets: Mapping[str, Callable[[], None]] | None = None,
    ) -> dict[str, Timing]:
        """Time all of them in turn; `resets` run before, outside of the time."""
        resets = resets or {}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        started = time.perf_counter()
        for run in range(-min(WARM_UPS, repeats - 1), repeats):
            for name, call in calls.items():
                resets.get(name, lambda: None)()
                found = self.once(call)
                if run >= 0:
                    times[name].append(found)
            late = time.perf_counter() - started > GROUP_SECONDS
            if late and run + 1 >= min(LEAST_RUNS, repeats):
                break
        return {name: summarize(found) for name, found in times.items()}

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Most bytes that a run holds beyond those before it; None on a CPU."""
        if not self.cuda:
            return None
        gc.collect()
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        """Give unused memory back, so that one comparison cannot starve the next."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()


def summarize(times: list[tuple[float, float]]) -> Timing:
    """Medians and quantiles of milliseconds on the device and on the host."""
    ordered = sorted(device for device, _ in times)
    host = statistics.median(host for _, host in times)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, part = math.floor(place), place % 1
        high = min(low + 1, len(ordered) - 1)
        return (1 - part) * ordered[low] + part * ordered[high]

    return Timing(statistics.median(ordered), quantile(0.2), quantile(0.8), host, len(ordered))


def ceilings(clock: Clock, repeats: int, dry_run: bool) -> dict[str, float]:
    """What this device does at most: bytes moved per second by a copy, FLOP/s of large products.

    A copy moves its bytes twice. Products are square, in bfloat16 and in float32 without TF32.
    """
    size, width = ((1 << 20), 64) if dry_run else ((1 << 30), 8192)
    source = torch.zeros(size, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for name in ("bfloat16", "float32"):
        left, right = (
            torch.randn(width, width, device=clock.device).to(getattr(torch, name))
            for _ in range(2)
        )
        calls[name] = lambda left=left, right=right: left @ right
    timings = clock.compare(calls, repeats)
    seconds = {name: timing.ms / 1e3 for name, timing in timings.items()}
    return {
        "copy_bytes_per_second": 2 * size / seconds["copy"],
        "bfloat16_flops": 2 * width**3 / seconds["bfloat16"],
        "float32_flops": 2 * width**3 / seconds["float32"],
    }


def as_gpu(found: Mapping[str, float], dtype: str) -> Gpu:
    """The measured ceilings as a machine of `tess/costs/roofline.py`; float16 is as fast as
    bfloat16."""
    flops = found["float32_flops" if dtype == "float32" else "bfloat16_flops"]
    return Gpu("measured", flops, found["copy_bytes_per_second"], 0.0)
