"""Golden values of self-conditioning, and what of the simplex each kind asks for."""

import math

import pytest
import torch

from tess.backbones.config import HybridConfig
from tess.config import MIXING, TessConfig
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import DenseSimplex
from tess.self_conditioning import Prediction, SelfConditioning

V, H, K = 40, 32, 5.0


def conditioning(**settings) -> SelfConditioning:
    backbone = HybridConfig(
        vocab_size=V, hidden_size=H, hybrid_override_pattern="*", num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )
    return SelfConditioning(TessConfig(backbone_config=backbone, simplex_value=K, **settings))


def soft(logits: torch.Tensor, weight: torch.Tensor) -> Prediction:
    """A prediction as a denoiser gives it: tokens, and an embedding in place of logits."""
    return Prediction(logits.argmax(-1), embedding=logits.softmax(-1) @ weight)


def mixed_embedding(kind, mix, x, previous, weight, zeros):
    """TESS's formulas (arXiv 2305.08379, section 3.3, and its table of options) in float64."""
    a = x.exp() / x.exp().sum(-1, keepdim=True)
    if previous is None:
        logits = torch.zeros_like(x)
    elif "projection" in kind:
        logits = torch.full_like(x, -K)
        logits.scatter_(-1, previous.argmax(-1, keepdim=True), K)
    else:
        logits = previous
    b = logits.exp() / logits.exp().sum(-1, keepdim=True)
    if previous is None and zeros:
        b = torch.zeros_like(b)
    combine = {
        "logits_addition": lambda p, q: p + q,
        "logits_with_projection_addition": lambda p, q: p + q,
        "logits_mean": lambda p, q: (p + q) / 2,
        "logits_max": lambda p, q: torch.where(p > q, p, q),
        "logits_multiply": lambda p, q: p * q,
    }[kind]
    if mix == "logits":
        both = combine(x, logits).exp()
        return both / both.sum(-1, keepdim=True) @ weight
    if mix == "probabilities":
        return combine(a, b) @ weight
    return combine(a @ weight, b @ weight)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(
    "mix, zeros",
    [
        ("embeddings", False),
        ("embeddings", True),
        ("probabilities", False),
        ("probabilities", True),
        ("logits", False),  # zeros are excluded there
    ],
)
@pytest.mark.parametrize("kind", MIXING)
def test_mixed_embedding_has_the_values_of_the_formula(kind, mix, zeros, absent):
    module = conditioning(
        self_conditioning=kind,
        self_conditioning_mix=mix,
        self_conditioning_zeros_after_softmax=zeros,
    )
    x, weight = 2 * torch.randn(2, 3, V), torch.randn(V, H)
    previous = None if absent else 3 * torch.randn(2, 3, V)
    expected = mixed_embedding(
        kind, mix, x.double(), None if absent else previous.double(), weight.double(), zeros
    )
    for given in [None] if absent else [Prediction.from_logits(previous), soft(previous, weight)]:
        if module.needs_whole_simplex and not absent and given.logits is None:
            if "projection" not in kind:
                with pytest.raises(ValueError, match="needs the logits of the previous prediction"):
                    module(DenseSimplex(x), given, weight)
                continue
        got = module(DenseSimplex(x), given, weight)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("kind", ["logits", "logits_with_projection"])
def test_concatenated_embedding_has_the_values_of_the_formula(kind, mlp):
    module = conditioning(self_conditioning=kind, self_conditioning_mlp=mlp)
    assert module.mix_point == "embeddings"
    x, previous, weight = torch.randn(2, 3, V), torch.randn(2, 3, V), torch.randn(V, H)
    logits = previous.double()
    if kind == "logits_with_projection":
        logits = torch.full_like(logits, -K).scatter_(-1, logits.argmax(-1, keepdim=True), K)
    parts = [p.exp() / p.exp().sum(-1, keepdim=True) for p in (x.double(), logits)]
    joined = torch.cat([p @ weight.double() for p in parts], dim=-1)
    layers = [module.projection[0], module.projection[2]] if mlp else [module.projection]
    expected = joined @ layers[0].weight.double().T
    if mlp:
        gelu = expected * 0.5 * (1 + torch.erf(expected / math.sqrt(2)))
        expected = gelu @ layers[1].weight.double().T
    for given in (Prediction.from_logits(previous), soft(previous, weight)):
        got = module(DenseSimplex(x), given, weight)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_deepmind_embedding_has_the_values_of_the_formula():
    module = conditioning(deepmind_conditional=True)
    x, previous, weight = torch.randn(2, 3, V), torch.randn(2, 3, V), torch.randn(V, H)
    clean = torch.randn(2, 3, H)
    is_noised = torch.tensor([[True, False, True], [False, False, True]])
    a, b = (
        p.double().exp() / p.double().exp().sum(-1, keepdim=True) @ weight.double()
        for p in (x, previous)
    )
    m = is_noised[..., None].double().expand(2, 3, H)
    joined = torch.cat([a * m, clean.double() * (1 - m), b * m, m], dim=-1)
    expected = joined @ module.projection.weight.double().T
    for given in (Prediction.from_logits(previous), soft(previous, weight)):
        got = module(DenseSimplex(x), given, weight, clean, is_noised)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["logits_with_projection", "logits_with_projection_addition"])
def test_projection_kinds_read_the_tokens_alone(kind):
    module, weight = conditioning(self_conditioning=kind), torch.randn(V, H)
    x, logits = DenseSimplex(torch.randn(2, 3, V)), torch.randn(2, 3, V)
    got = module(x, Prediction(logits.argmax(-1)), weight)
    torch.testing.assert_close(got, module(x, Prediction.from_logits(logits), weight))
    other = (logits.argmax(-1) + 1) % V
    assert not torch.allclose(got, module(x, Prediction(other), weight))


def test_the_matrix_learns_through_logits_and_not_through_an_embedding():
    """TESS's gradient of W has a part from the previous prediction; ours takes that as given."""
    module, weight = conditioning(self_conditioning="logits_mean"), torch.randn(V, H)
    x, logits = DenseSimplex(torch.randn(2, 3, V)), torch.randn(2, 3, V)

    def gradient(previous):
        leaf = weight.clone().requires_grad_()
        module(x, previous, leaf).sum().backward()
        return leaf.grad

    own = x.probabilities().sum((0, 1))[:, None].expand(V, H) / 2
    torch.testing.assert_close(gradient(soft(logits, weight)), own)
    through = logits.softmax(-1).sum((0, 1))[:, None].expand(V, H) / 2
    torch.testing.assert_close(gradient(Prediction.from_logits(logits)), own + through)


LINEAR = ("logits_addition", "logits_mean", "logits_with_projection_addition")


@pytest.mark.parametrize(
    "kind, mix",
    [(kind, "embeddings") for kind in (None, "logits", "logits_with_projection")]
    + [(kind, mix) for kind in MIXING for mix in ("embeddings", "probabilities", "logits")],
)
def test_only_kinds_that_mix_over_the_vocabulary_need_the_whole_simplex(kind, mix):
    settings = {} if kind is None else {"self_conditioning_mix": mix}
    module = conditioning(self_conditioning=kind, **settings)
    needs = mix == "logits" or (mix == "probabilities" and kind not in LINEAR)
    assert module.needs_whole_simplex == needs
    scheduler = RenoisingScheduler(vocab_size=V, simplex_value=K)
    sample = scheduler.initial((2, 3), torch.arange(2))
    weight = torch.randn(V, H)
    for previous in (None, soft(torch.randn(2, 3, V), weight)):
        if needs:
            with pytest.raises(ValueError, match=f"'{kind}' mixed at the {mix} needs the whole"):
                module(sample, previous, weight)
        else:
            assert module(sample, previous, weight).shape == (2, 3, H)


def test_a_prediction_without_what_is_needed_is_refused():
    module = conditioning(self_conditioning="logits_mean")
    empty = Prediction(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="needs the embedding or the logits of the previous"):
        module(DenseSimplex(torch.randn(2, 3, V)), empty, torch.randn(V, H))
    with pytest.raises(ValueError, match="previous must be a Prediction .* got a tensor"):
        module(DenseSimplex(torch.randn(2, 3, V)), torch.randn(2, 3, V), torch.randn(V, H))
