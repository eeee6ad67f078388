"""Inputs and calls of the operations over tokens: router, experts, embedding, loss, sweep, a layer.

Cases as in `cases.py`. Where a token is chosen, the choice is judged in float64: an
output "regret" or "outside" is zero for a right choice and small for a near tie.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tess.benchmarks.gpu.cases import Case, Leaves, Maker, Outputs
from tess.benchmarks.gpu.shapes import (
    Costs,
    Shape,
    embedding_costs,
    expert_costs,
    head_costs,
    router_costs,
    scan_costs,
)
from tess.costs.roofline import Cost
from tess.kernels import cross_entropy, head, reference, simplex_embedding
from tess.kernels import experts as moe
from tess.kernels.dispatch import VARIABLE
from tess.kernels.order_statistics import embedding_moments

ROUTED_SCALE = 2.5
TOP_P = 0.9
PAIRS_PER_EXPERT = {"few": 8, "some": 20, "many": 66}  # a tile that is not full is in each


# ---- experts ----


def router_case(s: Shape, variant: str, make: Maker) -> Case:
    """float32 logits on a grid, so that no two biased scores of a token are nearly equal."""
    tokens, count = s.tokens, s.experts
    order = make.uniform(tokens, count).argsort(dim=1)
    leaves = {"logits": (order + 0.5) * (8 / count) - 4}
    bias = torch.arange(count, device=make.device) % 3 * 0.0625
    options = {"scaling": ROUTED_SCALE}
    if variant == "groups":
        options |= {"num_groups": 2, "top_groups": 1, "normalize": False}

    def call(function: Callable[..., Any], leaves: Leaves, **more: Any) -> Outputs:
        logits = leaves["logits"]
        ids, weights = function(logits, bias.to(logits.dtype), s.top_k, **options, **more)
        return {"weights": weights, "ids": ids}

    return Case(
        "route_tokens", variant, s, leaves,
        lambda leaves, backend: call(moe.route_tokens, leaves, backend=backend),
        lambda leaves: call(reference.route_tokens, leaves), router_costs(s), {"bias": bias},
    )


def expert_case(s: Shape, variant: str, make: Maker) -> Case:
    """Distinct experts for a token; the variant is a number of tokens, or of pairs per expert."""
    tokens = _expert_tokens(s, variant)
    width, inner, count = s.expert_width, s.inner, s.experts
    ids = make.uniform(tokens, count).topk(s.top_k, dim=-1).indices
    weights = make.uniform(tokens, s.top_k, low=0.1)
    leaves = {
        "x": make.normal(tokens, width),
        "weights": weights * (ROUTED_SCALE / weights.sum(-1, keepdim=True)),
        "up": make.normal(count, inner, width, scale=width**-0.5),
        "down": make.normal(count, width, inner, scale=inner**-0.5),
    }

    def call(function: Callable[..., Tensor], leaves: Leaves, **more: Any) -> Outputs:
        tensors = (leaves[name] for name in ("weights", "up", "down"))
        return {"y": function(leaves["x"], ids, *tensors, **more)}

    touched = int(ids.unique().numel())
    return Case(
        "experts", variant, s, leaves,
        lambda leaves, backend: call(moe.experts, leaves, backend=backend),
        lambda leaves: call(reference.experts, leaves),
        expert_costs(s, make.itemsize, tokens, touched), {"ids": ids},
    )


def _expert_tokens(s: Shape, variant: str) -> int:
    if variant in PAIRS_PER_EXPERT:
        return -(-PAIRS_PER_EXPERT[variant] * s.experts // s.top_k)
    return int(variant.split()[0])


# ---- vocabulary ----


def embedding_case(s: Shape, variant: str, make: Maker) -> Case:
    """Noise levels from the start to the end of the schedule, moments of E ready.

    Both backends draw the same tokens, so the PyTorch path in float64 is the reference.
    """
    leaves = {"weight": make.normal(s.vocabulary, s.hidden)}
    ids = make.integers(s.batch, s.length, high=s.vocabulary)
    share = make.uniform(s.batch, 1, low=0.02, high=0.98)
    scales = 5 * share.sqrt(), 5 * (1 - share).sqrt()
    keys = torch.arange(s.batch, device=make.device)
    noise = "dense" if variant == "dense" else "order_statistics"
    moments = embedding_moments(leaves["weight"]) if noise == "order_statistics" else None
    options = {"keys_B": keys, "noise": noise, "num_top": s.num_top, "moments": moments}

    def run(leaves: Leaves, backend: str) -> Outputs:
        x = simplex_embedding.simplex_embedding(
            ids, *scales, leaves["weight"], **options, backend=backend
        )
        return {"x": x}

    costs = embedding_costs(s, make.itemsize)
    return Case(
        "simplex_embedding", variant, s, leaves, run, lambda leaves: run(leaves, "torch"), costs,
        {"ids": ids, "scales": scales},
    )


def _head_leaves(s: Shape, make: Maker) -> Leaves:
    return {
        "hidden": make.normal(s.tokens, s.hidden, scale=s.hidden**-0.5),
        "weight": make.normal(s.vocabulary, s.hidden),
    }


def loss_case(s: Shape, variant: str, make: Maker) -> Case:
    """The mean over all tokens; or weights, smoothing, an ignored id, and sums or single losses."""
    leaves = _head_leaves(s, make)
    ids = make.integers(s.tokens, high=s.vocabulary)
    options: dict[str, Any] = {}
    if variant != "mean":
        ids[::5] = -100
        weights = make.uniform(s.tokens)
        weights[::7] = 0
        reduction = "sum" if variant == "weighted sum" else "none"
        options = {"weights_T": weights, "label_smoothing": 0.1, "reduction": reduction}

    def run(leaves: Leaves, backend: str) -> Outputs:
        loss = cross_entropy.linear_cross_entropy(
            leaves["hidden"], leaves["weight"], ids, **options, backend=backend
        )
        return {"loss": loss}

    def exact(leaves: Leaves) -> Outputs:
        logits = leaves["hidden"] @ leaves["weight"].T
        smoothing = options.get("label_smoothing", 0.0)
        losses = F.cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing)
        losses = losses * options.get("weights_T", torch.ones_like(losses))
        reduced = {"mean": losses.mean, "weighted sum": losses.sum, "losses": losses.clone}
        return {"loss": reduced[variant]()}

    costs = head_costs(s, make.itemsize)
    return Case("linear_cross_entropy", variant, s, leaves, run, exact, costs, {"ids": ids})


def sweep_case(s: Shape, variant: str, make: Maker) -> Case:
    """Arg-max with the expected embedding, a sample, or a sample of the nucleus."""
    leaves = _head_leaves(s, make)
    options: dict[str, Any] = {"choose": "argmax" if variant == "argmax" else "sample"}
    if variant != "argmax":
        options["uniform_T"] = make.uniform(s.tokens, high=0.999)
    if variant == "nucleus":
        options["top_p"] = TOP_P
    judge = _judge(variant, options)
    wide: dict[str, Tensor] = {}

    def run(leaves: Leaves, backend: str) -> Outputs:
        hidden, weight = leaves["hidden"], leaves["weight"]
        table = weight if variant == "argmax" else None
        out = head.vocabulary_sweep(
            hidden, weight, expected_embedding_of=table, **options, backend=backend
        )
        found = {
            "log_prob": out.log_prob_T, "entropy": out.entropy_T,
            "log_sum_exp": out.log_sum_exp_T, "tokens": out.tokens_T,
        }
        return found if table is None else found | {"embedding": out.embedding_TH}

    def exact(leaves: Leaves) -> Outputs:
        logits = leaves["hidden"] @ leaves["weight"].T
        log_probs = logits.log_softmax(dim=-1)
        wide["log_probs"] = log_probs
        probs = log_probs.exp()
        found = {
            "entropy": -(probs * log_probs).sum(dim=-1), "log_sum_exp": logits.logsumexp(dim=-1),
        }
        return found | ({"embedding": probs @ leaves["weight"]} if variant == "argmax" else {})

    def judged(out: Outputs) -> Outputs:
        log_probs = wide["log_probs"]
        own = log_probs.gather(1, out["tokens"][:, None])[:, 0]
        verdict = judge(log_probs, out["tokens"])
        return {**out, "log_prob": out["log_prob"].double() - own, verdict[0]: verdict[1]}

    costs = Costs(head_costs(s, make.itemsize, 2 if variant == "argmax" else 1).forward)
    return Case(
        "vocabulary_sweep", variant, s, leaves, run, exact, costs, {"judged": judged, **options}
    )


def _judge(variant: str, options: dict[str, Any]) -> Callable[[Tensor, Tensor], tuple[str, Tensor]]:
    """How far from right the tokens are in float64."""

    def regret(log_probs: Tensor, tokens: Tensor) -> tuple[str, Tensor]:
        return "regret", log_probs.amax(dim=1) - log_probs.gather(1, tokens[:, None])[:, 0]

    def outside_interval(log_probs: Tensor, tokens: Tensor) -> tuple[str, Tensor]:
        probs, point = log_probs.exp(), options["uniform_T"].double()
        end = probs.cumsum(dim=1).gather(1, tokens[:, None])[:, 0]
        start = end - probs.gather(1, tokens[:, None])[:, 0]
        return "outside", (start - point).clamp(min=0) + (point - end).clamp(min=0)

    def outside_nucleus(log_probs: Tensor, tokens: Tensor) -> tuple[str, Tensor]:
        probs = log_probs.exp()
        own = probs.gather(1, tokens[:, None])
        before = (probs * (probs > own)).sum(dim=1)
        return "outside", (before - TOP_P).clamp(min=0)

    return {"argmax": regret, "sample": outside_interval, "nucleus": outside_nucleus}[variant]


# ---- a whole layer ----


def mixer_case(s: Shape, variant: str, make: Maker) -> Case:
    """A Mamba layer from hidden states to hidden states; timed only, its parts are checked."""
    from tess.backbones.config import HybridConfig
    from tess.backbones.context import make_context
    from tess.backbones.mamba import Mamba2Mixer

    config = HybridConfig(
        hidden_size=s.hidden, mamba_num_heads=s.heads, mamba_head_dim=s.head_width,
        ssm_state_size=s.states, n_groups=s.groups, conv_kernel=s.taps, vocab_size=64,
        hybrid_override_pattern="M", mamba_direction="bidirectional", layer_norm_epsilon=1e-5,
        chunk_size=128 if s.states >= 128 else 64,
    )
    with torch.device(make.device):
        mixer = Mamba2Mixer(config, 0).to(make.dtype)
    leaves = {"hidden": make.normal(s.batch, s.length, s.hidden)}
    leaves |= {name: _mixer_weight(name, p, s, make) for name, p in mixer.named_parameters()}
    mode = "causal" if variant == "forward" else "denoise"
    context = make_context(mode, leaves["hidden"], None, None)

    def run(leaves: Leaves, backend: str) -> Outputs:
        with forced_backend(backend):
            weights = {name: leaf for name, leaf in leaves.items() if name != "hidden"}
            y = torch.func.functional_call(mixer, weights, (leaves["hidden"], context))
        return {"y": y}

    return Case(
        "mamba_mixer", variant, s, leaves, run, None, _mixer_costs(s, make.itemsize, variant),
        {"direction": variant}, frozenset(("d A_log", "d dt_bias", "d D")),
    )


def _mixer_weight(name: str, like: Tensor, s: Shape, make: Maker) -> Tensor:
    if name == "A_log":
        return make.uniform(s.heads, low=1.0, high=16.0).log().to(like.dtype)
    if name == "dt_bias":
        return (make.uniform(s.heads, low=-7.0, high=-2.0)).to(like.dtype)
    if name in ("D", "norm.weight"):
        return torch.ones_like(like).detach()
    fan = like[0].numel() if like.dim() > 1 else 4 * len(like)
    return make.normal(*like.shape, scale=fan**-0.5)


def _mixer_costs(s: Shape, itemsize: int, variant: str) -> Costs:
    rows = s.mamba_width + s.conv_width + s.heads
    weights = s.hidden * (rows + s.mamba_width)
    scan = scan_costs(s, itemsize, 2 if variant == "bidirectional" else 1).forward
    moved = itemsize * (weights + 2 * s.tokens * s.hidden)
    forward = Cost(moved, 2 * s.tokens * weights + scan.flops)
    return Costs(forward, forward + Cost(2 * moved, 2 * forward.flops))


@contextmanager
def forced_backend(backend: str) -> Iterator[None]:
    """Every operation inside takes this backend unless it is told otherwise."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


BUILDERS = {
    "route_tokens": router_case, "experts": expert_case, "simplex_embedding": embedding_case,
    "linear_cross_entropy": loss_case, "vocabulary_sweep": sweep_case, "mamba_mixer": mixer_case,
}
VARIANTS = {
    "route_tokens": ("plain", "groups"),
    "experts": tuple(PAIRS_PER_EXPERT),
    "simplex_embedding": ("order statistics", "dense"),
    "linear_cross_entropy": ("mean", "weighted sum", "losses"),
    "vocabulary_sweep": ("argmax", "sample", "nucleus"),
    "mamba_mixer": (),
}
TIMED = {
    "route_tokens": ("plain",), "simplex_embedding": ("order statistics",),
    "linear_cross_entropy": ("mean",), "vocabulary_sweep": ("argmax", "sample"),
    "mamba_mixer": ("forward", "bidirectional"),
}


def timed_experts(s: Shape) -> tuple[str, ...]:
    """The expert layer is timed at the whole block and at few tokens."""
    return tuple(f"{tokens} tokens" for tokens in (s.tokens, *s.few_tokens))
