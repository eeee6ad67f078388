"""The backbone and its Mamba-2 scan against transformers' Nemotron-H, on a CPU.

Letters: B batch, L length, H heads, P head width, G groups, N state width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from tess.backbones.cache import HybridCache
from tess.backbones.config import HybridConfig
from tess.backbones.feedforward import Router, StackedExperts
from tess.backbones.hybrid import HybridModel
from tess.benchmarks.turns import HIDDEN_256, summarize_turns, time_turns
from tess.costs.machine import environment
from tess.kernels.ssd import ssd_scan

HIDDEN_1024 = HIDDEN_256 | {
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4,
    "intermediate_size": 2048, "ssm_state_size": 128, "mamba_num_heads": 32, "n_groups": 8,
    "moe_intermediate_size": 512, "moe_shared_expert_intermediate_size": 1024,
    "moe_latent_size": 256,
}
NEMOTRON_SCAN = {"heads": 64, "width": 64, "states": 128, "groups": 8}
CHUNK_OURS = 64
# transformers' default, which the released checkpoints keep, and what is faster on a CPU
CHUNK_RIVAL, CHUNK_RIVAL_FAST = 128, 64
BLOCK = 64  # tokens denoised at once
DTYPES = (torch.float32, torch.bfloat16)


def benchmark_backbone(
    pattern: str, length: int, batch: int, repeats: int, seed: int, parts: Sequence[str]
) -> dict[str, Any]:
    """Our backbone against transformers' Nemotron-H with the same weights.

    Parts: "model" at hidden width 256 and "wide" at 1024, forward, and forward with backward, in
    float32 and under bfloat16 autocast; "scan", the Mamba-2 scan alone at the shapes of
    Nemotron-3-Nano; "block", denoising a block of 64 tokens after a cached prefix of `length`,
    where transformers reads the whole text again (causally: it has no such mode).

    transformers' step-size floor is opened first, so that both compute the same function; the
    relative difference of their outputs is part of the result. It is timed with two chunk sizes.
    """
    torch.manual_seed(seed)
    measured = {
        "model": lambda: _model_rows("model", HIDDEN_256, pattern, length, batch, repeats),
        "scan": lambda: _scan_rows(length, batch, repeats),
        "wide": lambda: _model_rows("wide", HIDDEN_1024, pattern, length, batch, repeats),
        "block": lambda: _block_rows(pattern, length, batch, repeats),
    }
    rows = [row for part in parts for row in measured[part]()]
    differences = [row["difference"] for row in rows if row["dtype"] == "float32"]
    return {
        "benchmark": "backbone",
        "rival": "transformers NemotronHModel",
        "pattern": pattern,
        "hidden_size": HIDDEN_256["hidden_size"],
        "length": length,
        "batch": batch,
        "seed": seed,
        "relative_difference": max((d for d in differences if d is not None), default=None),
        "rows": rows,
        "environment": environment(),
    }


def _model_rows(
    part: str, sizes: dict[str, int], pattern: str, length: int, batch: int, repeats: int
) -> Iterator[dict[str, Any]]:
    ours, rival, rival_at = _models(sizes, pattern)
    ids = torch.randint(0, sizes["vocab_size"], (batch, length))

    def inference(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return _hidden(model, ids)

    def training(model: nn.Module) -> None:
        _hidden(model, ids).square().mean().backward()

    for name, function in (("forward", inference), ("forward + backward", training)):
        for dtype in DTYPES:
            products = bare_products(ours, batch * length, dtype, function is training)
            with _autocast(dtype):
                want = inference(rival)
                difference = ((inference(ours) - want).norm() / want.norm()).item()
                times = time_turns(
                    {
                        "ours": lambda: function(ours),
                        "rival": rival_at(CHUNK_RIVAL, lambda: function(rival)),
                        "fast_rival": rival_at(CHUNK_RIVAL_FAST, lambda: function(rival)),
                        "products": products,
                    },
                    repeats,
                )
            yield _row(part, name, dtype, times, difference)


def _models(
    sizes: dict[str, int], pattern: str
) -> tuple[nn.Module, nn.Module, Callable[[int, Callable[[], Any]], Callable[[], Any]]]:
    """Both models, and how to call a function with the rival at a chunk size."""
    from transformers import NemotronHConfig, NemotronHModel

    options = sizes | {"hybrid_override_pattern": pattern}
    ours = HybridModel(HybridConfig(**options, chunk_size=CHUNK_OURS))
    rival = NemotronHModel(NemotronHConfig(**options, chunk_size=CHUNK_RIVAL))
    ours.load_state_dict(rival.state_dict())
    mixers = [module for module in rival.modules() if hasattr(module, "time_step_limit")]
    for module in mixers:
        module.time_step_limit = (0.0, math.inf)

    def at(chunk: int, function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            for module in mixers:
                module.chunk_size = chunk
            return function()

        return call

    return ours, rival, at


def _hidden(model: nn.Module, ids_BL: Tensor) -> Tensor:
    options = {} if isinstance(model, HybridModel) else {"use_cache": False}
    return model(input_ids=ids_BL, **options).last_hidden_state


def _autocast(dtype: torch.dtype) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def bare_products(
    model: nn.Module, tokens: int, dtype: torch.dtype, with_gradients: bool
) -> Callable[[], None]:
    """The products of the model's weights with as many tokens, and nothing else.

    Experts are given equal shares of the tokens. With gradients two more products per weight.
    """
    shapes = []  # tokens, width of the output, width of the input
    for module in model.modules():
        if isinstance(module, nn.Linear | Router):
            shapes.append((tokens, *module.weight.shape))
        elif isinstance(module, StackedExperts):
            top_k = model.config.num_experts_per_tok
            share = -(-tokens * top_k // len(module.up_proj))
            for weights in (module.up_proj, module.down_proj):
                shapes += [(share, *weight.shape) for weight in weights]
    operands = [
        tuple(torch.randn(*size, dtype=dtype) for size in ((t, i), (o, i), (t, o)))
        for t, o, i in shapes
    ]

    def run() -> None:
        for x, weight, gradient in operands:
            x @ weight.T
            if with_gradients:
                gradient @ weight, gradient.T @ x

    return run


def _scan_rows(length: int, batch: int, repeats: int) -> Iterator[dict[str, Any]]:
    for with_gradients in (False, True):
        for dtype in DTYPES:
            leaves = _scan_inputs(length, batch, dtype, with_gradients)
            mix = torch.randn(leaves[0].shape)
            ours, rival, fast_rival = _scans(leaves)
            difference = ((ours() - rival()).norm() / rival().norm()).item()

            def run(scan: Callable[[], Tensor], leaves=leaves, mix=mix) -> None:
                y = scan()
                if y.requires_grad:
                    torch.autograd.grad(y, leaves, mix.to(y.dtype))

            times = time_turns(
                {
                    "ours": lambda: run(ours),  # noqa: B023
                    "rival": lambda: run(rival),  # noqa: B023
                    "fast_rival": lambda: run(fast_rival),  # noqa: B023
                },
                repeats,
            )
            what = "forward + backward" if with_gradients else "forward"
            yield _row("scan", what, dtype, times, difference)


def _scan_inputs(length: int, batch: int, dtype: torch.dtype, with_gradients: bool) -> list[Tensor]:
    """x, raw steps, rates, b, c, d and the steps' bias, in sizes that training leads to."""
    heads, width, states, groups = NEMOTRON_SCAN.values()
    x_BLHP = torch.randn(batch, length, heads, width)
    steps_BLH = torch.randn(batch, length, heads)
    b_BLGN, c_BLGN = torch.randn(2, batch, length, groups, states).unbind()
    rates_H = -torch.linspace(1, 16, heads)
    leaves = [x_BLHP.to(dtype), steps_BLH.to(dtype), rates_H, b_BLGN.to(dtype), c_BLGN.to(dtype)]
    leaves += [torch.randn(heads), torch.randn(heads) - 4]
    return [leaf.requires_grad_(with_gradients) for leaf in leaves]


def _scans(leaves: list[Tensor]) -> list[Callable[[], Tensor]]:
    """Our scan, and transformers' with either chunk size; it computes in float32 throughout."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    x, steps, rates, b, c, d, bias = leaves

    def ours() -> Tensor:
        return ssd_scan(
            x, steps, rates, b, c,
            d_H=d, dt_bias_H=bias, dt_softplus=True, chunk_size=CHUNK_OURS,
        ).y

    def rival(chunk: int) -> Callable[[], Tensor]:
        return lambda: mamba2_chunk_scan(
            x, steps, rates, b, c, chunk_size=chunk, D=d, dt_bias=bias, dt_softplus=True
        )

    return [ours, rival(CHUNK_RIVAL), rival(CHUNK_RIVAL_FAST)]


@torch.no_grad()
def _block_rows(pattern: str, length: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    ours, rival, rival_at = _models(HIDDEN_256, pattern)
    ids = torch.randint(0, HIDDEN_256["vocab_size"], (batch, length + BLOCK))
    rows = []
    for dtype in DTYPES:
        with _autocast(dtype):
            cache = HybridCache()
            ours(input_ids=ids[:, :length], cache=cache, mode="prefix")
            again = lambda: _hidden(rival, ids)  # noqa: E731
            times = time_turns(
                {
                    "ours": lambda: ours(
                        input_ids=ids[:, length:],
                        cache=cache,  # noqa: B023
                        mode="denoise",
                    ),
                    "rival": rival_at(CHUNK_RIVAL, again),
                    "fast_rival": rival_at(CHUNK_RIVAL_FAST, again),
                    "products": bare_products(ours, batch * BLOCK, dtype, False),
                },
                repeats,
            )
        rows.append(_row("block", "denoise", dtype, times, None))
    return rows


def _row(
    part: str,
    what: str,
    dtype: torch.dtype,
    times: dict[str, list[float]],
    difference: float | None,
) -> dict[str, Any]:
    slow = summarize_turns(times["ours"], times["rival"])
    fast = summarize_turns(times["ours"], times["fast_rival"])
    products = None
    if "products" in times:
        products = summarize_turns(times["ours"], times["products"])
    return {
        "part": part,
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        **slow,
        "fast_rival_ms": fast["rival_ms"],
        "fast_ratio": fast["ratio"],
        "fast_ratio_q1": fast["ratio_q1"],
        "fast_ratio_q3": fast["ratio_q3"],
        "products_ms": None if products is None else products["rival_ms"],
        "products_share": None if products is None else products["ratio"],
        "difference": difference,
    }
