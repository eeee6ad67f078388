"""Other projects' ways to compute the cases over tokens (`peers.py`)."""

import inspect
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tess.benchmarks.gpu.cases import EPS, Case, Leaves, Outputs
from tess.benchmarks.gpu.peers import Absent, Contender, Function, load
from tess.benchmarks.gpu.tokens import ROUTED_SCALE

MODELING = "transformers.models.nemotron_h.modeling_nemotron_h"
DENSE_ROWS = 2048  # of the materialised simplex: a slab of [rows, V] float32 at a time
MOST_BATCHED = 64  # tokens that each get copies of their experts' matrices


def contenders(case: Case) -> Iterator[Contender]:
    """All that this case is compared with."""
    yield from {
        "route_tokens": _routers, "experts": _experts, "simplex_embedding": _embeddings,
        "linear_cross_entropy": _losses, "vocabulary_sweep": _sweeps, "mamba_mixer": _mixers,
    }[case.op](case)


# ---- experts ----


def _routers(case: Case) -> Iterator[Contender]:
    def make() -> Function:
        config = _config(case)
        with torch.device("meta"):
            router = load("transformers", MODELING, "NemotronHTopkRouter")(config)
        # its own product with the router's weight is left out: the logits are given
        linear = torch.eye(case.shape.experts, device=case.leaves["logits"].device)
        router.hidden_dim = case.shape.experts
        buffers = {"e_score_correction_bias": case.given["bias"], "weight": linear}

        def run(t: Leaves) -> Outputs:
            _, weights, _ = torch.func.functional_call(router, buffers, (t["logits"],))
            return {"weights": weights}

        return run

    yield Contender("transformers, with a product by 1", "transformers", make, False)


def _experts(case: Case) -> Iterator[Contender]:
    yield Contender(
        "torch grouped_mm, sort and scatter", "torch", lambda: _grouped(case.given["ids"])
    )
    for name in ("grouped_mm", "batched_mm", "eager"):
        if name != "batched_mm" or len(case.given["ids"]) <= MOST_BATCHED:
            yield Contender(
                f"transformers, {name}", "transformers",
                lambda name=name: _transformers_experts(case, name),
            )


def _grouped(ids_TS: Tensor) -> Function:
    """Sorted by expert, gathered, two grouped products, weighted and added to each token's row."""
    multiply = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if multiply is None:
        raise Absent(f"torch {torch.__version__} has no grouped_mm")

    def run(t: Leaves) -> Outputs:
        order = ids_TS.flatten().argsort()
        counts = torch.bincount(ids_TS.flatten(), minlength=len(t["up"]))
        ends = counts.cumsum(0).to(torch.int32)
        token = order // ids_TS.shape[1]
        hidden = multiply(t["x"][token], t["up"].transpose(1, 2), offs=ends)
        rows = multiply(hidden.relu().square(), t["down"].transpose(1, 2), offs=ends)
        rows = rows * t["weights"].flatten()[order, None].to(rows.dtype)
        return {"y": torch.zeros_like(t["x"]).index_add(0, token, rows)}

    return run


def _transformers_experts(case: Case, implementation: str) -> Function:
    config = _config(case)
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer = load("transformers", MODELING, "NemotronHExperts")(config)
    names = {name for name, _ in layer.named_parameters()}
    if names != {"up_proj", "down_proj"}:
        raise Absent(f"transformers {version('transformers')} keeps its experts in another form")

    def run(t: Leaves) -> Outputs:
        weights = {"up_proj": t["up"], "down_proj": t["down"]}
        arguments = (t["x"], case.given["ids"], t["weights"])
        return {"y": torch.func.functional_call(layer, weights, arguments)}

    return run


def _config(case: Case, **options: Any) -> Any:
    s = case.shape
    return load("transformers", "transformers", "NemotronHConfig")(
        hidden_size=s.expert_width, n_routed_experts=s.experts, num_experts_per_tok=s.top_k,
        moe_intermediate_size=s.inner, moe_latent_size=None, n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=ROUTED_SCALE, mlp_hidden_act="relu2",
        hybrid_override_pattern="M", vocab_size=64, **options,
    )


# ---- vocabulary ----


def _embeddings(case: Case) -> Iterator[Contender]:
    ids_T = case.given["ids"].flatten()
    signal_T, noise_T = (x.expand_as(case.given["ids"]).flatten() for x in case.given["scales"])

    def materialised(t: Leaves) -> Outputs:
        """Noise, simplex and softmax in float32, the product in E's dtype, slab by slab."""
        weight, rows = t["weight"], []
        for start in range(0, len(ids_T), DENSE_ROWS):
            part = slice(start, start + DENSE_ROWS)
            x = torch.randn(len(ids_T[part]), len(weight), device=weight.device)
            x.mul_(noise_T[part, None])
            x.scatter_add_(1, ids_T[part, None], 2 * signal_T[part, None])
            rows.append(x.softmax(dim=-1).to(weight.dtype) @ weight)
        return {"x": torch.cat(rows).view(*case.given["ids"].shape, -1)}

    # other noise than ours, so that the values cannot be compared; its law is ours
    yield Contender("torch, materialised", "torch", lambda: materialised, False)


def _losses(case: Case) -> Iterator[Contender]:
    ids = case.given["ids"]

    def liger() -> Function:
        kind = load(
            "liger-kernel", "liger_kernel.transformers.fused_linear_cross_entropy",
            "LigerFusedLinearCrossEntropyLoss",
        )
        loss = kind()
        return lambda t: {"loss": loss(t["weight"], t["hidden"], ids)}

    def cut(**options: Any) -> Function:
        loss = load("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
        known = inspect.signature(loss).parameters
        if unknown := set(options) - set(known):
            raise Absent(f"this cut-cross-entropy has no option {', '.join(unknown)}")
        return lambda t: {"loss": loss(t["hidden"], t["weight"], ids, **options)}

    def whole(t: Leaves) -> Outputs:
        return {"loss": F.cross_entropy((t["hidden"] @ t["weight"].T).float(), ids)}

    yield Contender("Liger", "liger-kernel", liger)
    yield Contender("cut-cross-entropy", "cut-cross-entropy", cut)
    yield Contender(
        "cut-cross-entropy, unfiltered", "cut-cross-entropy", lambda: cut(filter_eps=None)
    )
    yield Contender("torch, F.cross_entropy", "torch", lambda: whole)
    yield Contender("bare products", "torch", lambda: _products, False)


def _products(t: Leaves) -> Outputs:
    """Logits, and in training the two products of the gradients; nothing else."""
    hidden, weight = t["hidden"].detach(), t["weight"].detach()
    logits = hidden @ weight.T
    if torch.is_grad_enabled():
        logits @ weight, logits.T @ hidden
    return {}


def _sweeps(case: Case) -> Iterator[Contender]:
    sampled = case.variant != "argmax"

    def whole(t: Leaves) -> Outputs:
        """What PyTorch users write; logits of some rows at a time, or they would not fit."""
        rows = []
        for hidden in t["hidden"].split(DENSE_ROWS):
            logits = (hidden @ t["weight"].T).float()
            log_probs = logits.log_softmax(dim=-1)
            probs = log_probs.exp()
            tokens = probs.multinomial(1)[:, 0] if sampled else logits.argmax(dim=-1)
            columns = {
                "tokens": tokens, "log_prob": log_probs.gather(1, tokens[:, None])[:, 0],
                "entropy": -(probs * log_probs).sum(dim=-1),
                "log_sum_exp": logits.logsumexp(dim=-1),
            }
            if not sampled:
                columns["embedding"] = probs.to(hidden.dtype) @ t["weight"]
            rows.append(columns)
        found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if sampled:  # other random numbers than ours
            del found["tokens"], found["log_prob"]
        return found

    def bare(t: Leaves) -> Outputs:
        logits = t["hidden"] @ t["weight"].T
        if not sampled:
            logits @ t["weight"]
        return {}

    yield Contender("torch, whole logits", "torch", lambda: whole, forward_only=True)
    yield Contender("bare products", "torch", lambda: bare, False, forward_only=True)


# ---- a whole layer ----


def _mixers(case: Case) -> Iterator[Contender]:
    causal = case.given["direction"] == "forward"

    def make() -> Function:
        s = case.shape
        config = _config(
            case, mamba_num_heads=s.heads, mamba_head_dim=s.head_width, ssm_state_size=s.states,
            n_groups=s.groups, conv_kernel=s.taps, chunk_size=128, layer_norm_epsilon=EPS,
        )
        with torch.device("meta"):
            mixer = load("transformers", MODELING, "NemotronHMamba2Mixer")(config, 0)
        mixer.time_step_limit = (0.0, float("inf"))  # as ours

        # in training mode one fused function, which needs both packages, does it all
        fused = all(find_spec(module) for module in ("mamba_ssm", "causal_conv1d"))

        def run(t: Leaves) -> Outputs:
            mixer.train(fused and torch.is_grad_enabled())
            weights = {name: leaf for name, leaf in t.items() if name != "hidden"}
            return {"y": torch.func.functional_call(mixer, weights, (t["hidden"],))}

        return run

    name = "transformers" if causal else "transformers, one causal pass"
    yield Contender(name, "transformers", make, causal)
