"""Side-by-side timings: every figure is taken in the same run as its rival's, as a ratio."""

import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from tess.backbones.config import HybridConfig
from tess.backbones.hybrid import HybridModel

HIDDEN_256 = {
    "vocab_size": 1024, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 512, "ssm_state_size": 64, "mamba_num_heads": 8,
    "mamba_head_dim": 64, "n_groups": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 256,
    "moe_latent_size": 64,
}  # fmt: skip
CHUNK_OURS, CHUNK_RIVAL = 64, 128  # each its faster of the two on CPU; rounding alone differs


def environment() -> dict[str, Any]:
    """What a figure has to name: date, machine, threads, versions."""
    packages = ("torch", "transformers")
    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def time_pairs(
    ours: Callable[[], Any], rival: Callable[[], Any], repeats: int
) -> dict[str, float | int]:
    """Run both in turn, A B A B, after one warm-up each.

    Returns the medians in milliseconds, the median of the pairwise ratios rival / ours (above 1:
    ours is faster), its quartiles, and the number of pairs.
    """
    ours(), rival()
    pairs = []
    for _ in range(repeats):
        times = []
        for function in (ours, rival):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        pairs.append(times)
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    return {
        "ours_ms": statistics.median(mine for mine, _ in pairs),
        "rival_ms": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "ratio_q1": ratios[len(ratios) // 4],
        "ratio_q3": ratios[(3 * len(ratios)) // 4],
        "pairs": repeats,
    }


def benchmark_backbone(
    pattern: str = "M*E-", length: int = 512, batch: int = 1, repeats: int = 15, seed: int = 0
) -> dict[str, Any]:
    """Our backbone against transformers' Nemotron-H with the same weights, hidden width 256.

    Forward, and forward with backward, in float32 and under bfloat16 autocast. transformers'
    step-size floor is opened first, so that both compute the same function; the relative
    difference of their outputs is part of the result.
    """
    from transformers import NemotronHConfig, NemotronHModel

    torch.manual_seed(seed)
    options = HIDDEN_256 | {"hybrid_override_pattern": pattern}
    ours = HybridModel(HybridConfig(**options, chunk_size=CHUNK_OURS))
    rival = NemotronHModel(NemotronHConfig(**options, chunk_size=CHUNK_RIVAL))
    ours.load_state_dict(rival.state_dict())
    for module in rival.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    ids = torch.randint(0, options["vocab_size"], (batch, length))

    def forward(model: nn.Module) -> torch.Tensor:
        options = {"use_cache": False} if model is rival else {}
        return model(input_ids=ids, **options).last_hidden_state

    def inference(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return forward(model)

    def training(model: nn.Module) -> None:
        forward(model).square().mean().backward()

    want = inference(rival)
    difference = ((inference(ours) - want).norm() / want.norm()).item()
    rows = []
    for name, function in (("forward", inference), ("forward + backward", training)):
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                figures = time_pairs(lambda: function(ours), lambda: function(rival), repeats)
            rows.append({"what": name, "dtype": str(dtype).removeprefix("torch."), **figures})
    return {
        "benchmark": "backbone",
        "rival": "transformers NemotronHModel",
        "pattern": pattern,
        "hidden_size": options["hidden_size"],
        "length": length,
        "batch": batch,
        "seed": seed,
        "relative_difference": difference,
        "rows": rows,
        "environment": environment(),
    }


def format_table(result: dict[str, Any]) -> str:
    """A benchmark's rows as a Markdown table under one line that says what was measured."""
    env = result["environment"]
    lines = [
        f"{result['benchmark']}: pattern {result['pattern']}, hidden {result['hidden_size']}, "
        f"{result['batch']} x {result['length']} tokens, rival {result['rival']}; "
        f"torch {env['torch']}, transformers {env['transformers']}, {env['threads']} threads, "
        f"{env['processor']}, {env['date']}; outputs differ by {result['relative_difference']:.1e}",
        "",
        "| what | dtype | ours ms | rival ms | ratio (quartiles) | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['what']} | {row['dtype']} | {row['ours_ms']:.1f} | {row['rival_ms']:.1f} | "
            f"{row['ratio']:.2f} ({row['ratio_q1']:.2f}-{row['ratio_q3']:.2f}) | {row['pairs']} |"
        )
    return "\n".join(lines)
