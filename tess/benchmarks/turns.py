"""Side-by-side timings: every figure is taken in the same run as its rival's, as a ratio."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tess.cli import CHECKOUT

HIDDEN_256 = {
    "vocab_size": 1024, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 512, "ssm_state_size": 64, "mamba_num_heads": 8,
    "mamba_head_dim": 64, "n_groups": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 256,
    "moe_latent_size": 64,
}


def checkpoint_label(checkpoint: str | Path) -> str:
    """From the root of the repository where it lies in there, or else its own name only; a hub id
    as it is."""
    if not (path := Path(checkpoint).resolve()).exists():
        return str(checkpoint)
    return str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else path.name


def time_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Run all in turn, A B C A B C, after one warm-up each; milliseconds of each run."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summarize_turns(ours: list[float], rival: list[float]) -> dict[str, float | int]:
    """The medians in milliseconds, the median of the ratios rival / ours of the same turn (above
    1: ours is faster), its quartiles, and the number of turns."""
    ratios = sorted(theirs / mine for mine, theirs in zip(ours, rival, strict=True))
    return {
        "ours_ms": statistics.median(ours),
        "rival_ms": statistics.median(rival),
        "ratio": statistics.median(ratios),
        "ratio_q1": ratios[len(ratios) // 4],
        "ratio_q3": ratios[(3 * len(ratios)) // 4],
        "pairs": len(ratios),
    }


def time_pairs(
    ours: Callable[[], Any], rival: Callable[[], Any], repeats: int
) -> dict[str, float | int]:
    """Run both in turn, A B A B, after one warm-up each, and summarize."""
    times = time_turns({"ours": ours, "rival": rival}, repeats)
    return summarize_turns(times["ours"], times["rival"])
