"""Laws and golden values of the denoiser's input, its source layouts, and its checkpoints."""

import math

import pytest
import torch

from tess.arguments import DiffusionArguments
from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.config import MIXING, SELF_CONDITIONING, TessConfig
from tess.denoiser import TessDenoiser
from tess.schedulers.renoising import RenoisingScheduler
from tess.schedulers.simplex import DenseSimplex
from tess.self_conditioning import SelfConditioning

V, H, K = 40, 32, 5.0
PATTERN = "M*-E"


def backbone(pattern: str = PATTERN, **settings) -> dict:
    sizes = dict(
        vocab_size=V, hidden_size=H, hybrid_override_pattern=pattern, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, ssm_state_size=8,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=2, conv_kernel=4, chunk_size=4,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return sizes | settings


def make(pattern: str = PATTERN, tie: bool = True, direction: str = "bidirectional", **settings):
    config = TessConfig(
        backbone_config=HybridConfig(
            **backbone(pattern, tie_word_embeddings=tie, mamba_direction=direction)
        ),
        **{"max_source_length": 12, "max_target_length": 8} | settings,
    )
    return TessDenoiser(config).eval()


def noised(ids: torch.Tensor, t: float = 0.4, keys: torch.Tensor | None = None):
    keys = torch.arange(len(ids)) if keys is None else keys
    return RenoisingScheduler().add_noise(ids, torch.full((len(ids),), t), keys=keys, vocab_size=V)


def batch_of(lengths: list[tuple[int, int]]):
    """Random sources and targets, padded as the collators do; and the rows alone."""
    rows = [(torch.randint(5, V, (1, s)), torch.randint(5, V, (1, t))) for s, t in lengths]
    width_s, width_t = (max(pair[side] for pair in lengths) for side in (0, 1))
    source = torch.zeros(len(rows), width_s, dtype=torch.long)
    target = torch.zeros(len(rows), width_t, dtype=torch.long)
    source_mask, target_mask = torch.zeros_like(source), torch.zeros_like(target)
    for i, (s, t) in enumerate(rows):
        source[i, width_s - s.shape[1] :] = s
        source_mask[i, width_s - s.shape[1] :] = 1
        target[i, : t.shape[1]], target_mask[i, : t.shape[1]] = t, 1
    return rows, source, source_mask, target, target_mask


# --- golden values of the input ---


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
    config = TessConfig(
        backbone_config=backbone(),
        self_conditioning=kind,
        self_conditioning_mix=mix,
        self_conditioning_zeros_after_softmax=zeros,
    )
    x, weight = 2 * torch.randn(2, 3, V), torch.randn(V, H)
    previous = None if absent else 3 * torch.randn(2, 3, V)
    got = SelfConditioning(config)(DenseSimplex(x), previous, weight)
    expected = mixed_embedding(
        kind, mix, x.double(), None if absent else previous.double(), weight.double(), zeros
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("kind", ["logits", "logits_with_projection"])
def test_concatenated_embedding_has_the_values_of_the_formula(kind, mlp):
    config = TessConfig(
        backbone_config=backbone(), self_conditioning=kind, self_conditioning_mlp=mlp
    )
    assert config.self_conditioning_mix == "embeddings"
    module = SelfConditioning(config)
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
    got = module(DenseSimplex(x), previous, weight)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_deepmind_embedding_has_the_values_of_the_formula():
    config = TessConfig(backbone_config=backbone(), deepmind_conditional=True)
    module = SelfConditioning(config)
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
    got = module(DenseSimplex(x), previous, weight, clean, is_noised)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_projection_kinds_take_tokens_as_well_as_logits():
    for kind in ("logits_with_projection", "logits_with_projection_addition"):
        config = TessConfig(backbone_config=backbone(), self_conditioning=kind)
        module = SelfConditioning(config)
        x, previous, weight = torch.randn(2, 3, V), torch.randn(2, 3, V), torch.randn(V, H)
        x = DenseSimplex(x)
        assert torch.equal(module(x, previous, weight), module(x, previous.argmax(-1), weight))


def test_time_is_added_to_noised_positions_only_and_context_is_the_clean_embedding():
    model = make(num_target_positions=8)
    ids = torch.randint(5, V, (2, 5))
    noise_mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    times = torch.tensor([0.25, 0.75])
    sample = noised(ids)
    got = model._embed_target(sample, times, None, ids, noise_mask).detach().double()

    weight = model.backbone.embeddings.weight.detach().double()
    x = sample.logits().double()
    mixed = (x.exp() / x.exp().sum(-1, keepdim=True) + 1 / V) / 2 @ weight
    linear = model.time_embedding
    time = times.double()[:, None] * linear.weight.detach().double()[:, 0] + linear.bias.double()
    expected = torch.where(noise_mask[..., None].bool(), mixed + time[:, None], weight[ids])
    expected = expected + model.target_positions.weight.detach().double()[:5]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


# --- laws ---


@pytest.mark.parametrize("direction", ["forward", "bidirectional", "gated"])
@pytest.mark.parametrize("encoding", ["causal", "bidirectional"])
def test_cached_source_equals_source_recomputed(encoding, direction):
    model = make(source_encoding=encoding, direction=direction, num_source_positions=12)
    _, source, source_mask, target, target_mask = batch_of([(5, 4), (9, 7), (1, 6)])
    cache = model.encode_source(source, source_mask)
    length = cache.get_seq_length()
    previous = None
    for t in (1.0, 0.5):
        inputs = dict(timesteps=torch.full((3,), t), previous=previous, target_mask=target_mask)
        sample = noised(target, t)
        cached = model(sample, cache=cache, **inputs).logits
        fresh = model(sample, source_ids=source, source_mask=source_mask, **inputs).logits
        torch.testing.assert_close(cached, fresh, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == length
        previous = cached.detach()


@pytest.mark.parametrize("encoding", ["causal", "bidirectional", "joint"])
def test_prediction_of_an_example_ignores_its_neighbours(encoding):
    model = make(
        "M*-EM*", source_encoding=encoding, num_source_positions=12, num_target_positions=8
    )
    rows, source, source_mask, target, target_mask = batch_of([(5, 4), (9, 7), (2, 8)])
    times = torch.tensor([0.3, 0.6, 0.9])
    sample = RenoisingScheduler().add_noise(target, times, keys=torch.arange(3), vocab_size=V)
    previous = torch.randn(3, 8, V)
    together = model(
        sample, times, previous, None, source, source_mask, target_mask=target_mask
    ).logits
    for i, (s, t) in enumerate(rows):
        length = t.shape[1]
        alone = RenoisingScheduler().add_noise(
            t, times[i : i + 1], keys=torch.tensor([i]), vocab_size=V
        )
        got = model(alone, times[i : i + 1], previous[i : i + 1, :length], source_ids=s).logits
        torch.testing.assert_close(together[i : i + 1, :length], got, rtol=1e-4, atol=1e-4)


def test_joint_layout_lets_the_source_see_the_target_and_has_no_cache():
    model = make(source_encoding="joint")
    source = torch.randint(5, V, (1, 6))
    assert model.encode_source(source, None) is None
    ids = torch.randint(5, V, (1, 4))
    out = model(noised(ids), torch.tensor([0.5]), source_ids=source)
    assert out.logits.shape == (1, 4, V) and out.last_hidden_state.shape == (1, 4, H)
    other = model(noised(ids), torch.tensor([0.5]), source_ids=source.flip(1))
    assert not torch.allclose(out.logits, other.logits)


def test_source_changes_the_prediction_and_may_be_missing():
    model = make()
    ids, times = torch.randint(5, V, (2, 4)), torch.tensor([0.5, 0.5])
    alone = model(noised(ids), times).logits
    read = model(noised(ids), times, source_ids=torch.randint(5, V, (2, 6))).logits
    assert alone.shape == read.shape == (2, 4, V) and not torch.allclose(alone, read)


def test_source_positions_count_from_the_first_token():
    model = make(num_source_positions=6, max_source_length=6)
    ids = torch.randint(5, V, (1, 5))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 4).long()[None]
    alone = model._embed_source(ids, None)
    assert torch.equal(model._embed_source(padded, mask)[:, 4:], alone)
    with pytest.raises(ValueError, match="the source has 9 positions"):
        model._embed_source(padded, None)


def test_dense_sample_equals_noised_simplex_and_logits_are_float32():
    model = make(tie=False)
    sample, times = noised(torch.randint(5, V, (2, 4))), torch.tensor([0.2, 0.8])
    assert torch.equal(model(sample, times).logits, model(sample.logits(), times).logits)
    half = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(sample, times).logits.dtype == torch.float32
        assert sample.logits().dtype == sample.probabilities().dtype == torch.float32


@pytest.mark.parametrize("encoding", ["causal", "bidirectional", "joint"])
@pytest.mark.parametrize("kind", [None, *SELF_CONDITIONING, "deepmind"])
def test_every_parameter_is_trained_and_the_previous_prediction_is_not(kind, encoding):
    settings = {"self_conditioning": kind}
    if kind == "deepmind":
        settings = {"deepmind_conditional": True}
    model = make(
        tie=False, source_encoding=encoding, num_source_positions=12, num_target_positions=8,
        **settings,
    ).train()  # fmt: skip
    _, source, source_mask, target, target_mask = batch_of([(5, 4), (12, 8)])
    sample = RenoisingScheduler().add_noise(target, torch.tensor([0.3, 0.7]), torch.randn(2, 8, V))
    previous = torch.randn(2, 8, V, requires_grad=True)
    noise_mask = target_mask.clone()
    noise_mask[:, 1] = 0
    out = model(
        sample, torch.tensor([0.3, 0.7]), previous, None, source, source_mask,
        target_mask=target_mask, clean_ids=target, noise_mask=noise_mask,
    )  # fmt: skip
    out.logits[target_mask.bool()].square().mean().backward()
    assert previous.grad is None
    untrained = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not untrained


def test_source_gets_gradients_through_the_cache():
    model = make(num_source_positions=12)
    _, source, source_mask, target, target_mask = batch_of([(5, 4), (9, 7)])
    cache = model.encode_source(source, source_mask)
    out = model(noised(target), torch.rand(2), cache=cache, target_mask=target_mask)
    out.logits.square().mean().backward()
    used = model.source_positions.weight.grad[:9].abs().sum(-1)
    assert (used > 0).all() and model.source_positions.weight.grad[9:].abs().sum() == 0


def test_head_is_the_word_embedding_when_tied():
    tied, own = make(tie=True), make(tie=False)
    assert tied.lm_head is None and own.lm_head.weight.shape == (V, H)
    out = tied(noised(torch.randint(5, V, (1, 3))), torch.tensor([0.5]))
    expected = out.last_hidden_state @ tied.get_input_embeddings().weight.T
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)


# --- label shift ---


def shifting(pattern: str = "M*-EM*", **settings) -> TessDenoiser:
    """A denoiser with label shift and learned positions, in float64."""
    settings = {"num_source_positions": 12, "num_target_positions": 8} | settings
    return make(pattern, label_shift=True, **settings).double()


def causal_states(model: TessDenoiser, source: torch.Tensor, target: torch.Tensor):
    """States and logits of a causal language model with the denoiser's weights, for each target."""
    causal = HybridForCausalLM(model.config.backbone_config).double().eval()
    weights = model.state_dict().items()
    causal.load_state_dict({k: w for k, w in weights if k.startswith(("backbone.", "lm_head."))})
    embeds = [model.backbone.embeddings(source), model.backbone.embeddings(target)]
    for side, positions in enumerate((model.source_positions, model.target_positions)):
        if positions is not None:
            embeds[side] = embeds[side] + positions.weight[: embeds[side].shape[1]]
    embeds = torch.cat(embeds, dim=1)
    predicting = slice(source.shape[1] - 1, -1)
    states = causal.backbone(inputs_embeds=embeds).last_hidden_state[:, predicting]
    return states, causal(inputs_embeds=embeds).logits[:, predicting]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("encoding", ["causal", "joint"])
@pytest.mark.parametrize("positions", [0, 12])
@pytest.mark.parametrize("lengths", [[(6, 5)], [(5, 4), (9, 7), (1, 8), (2, 1)]])
def test_clean_targets_are_predicted_as_by_the_causal_model(encoding, positions, lengths):
    settings = dict(
        tie=False, direction="gated", source_encoding=encoding,
        num_source_positions=positions, num_target_positions=positions,
    )  # fmt: skip
    # a gate of zero and no attention: denoising reads forward only, as the causal model
    shifted = make("M-M", label_shift=True, **settings).double()
    plain = make("M-M", **settings).double()
    plain.load_state_dict(shifted.state_dict())
    rows, source, source_mask, target, target_mask = batch_of(lengths)
    inputs = dict(
        sample=noised(target), timesteps=torch.rand(len(rows)), source_ids=source,
        source_mask=source_mask, target_mask=target_mask, clean_ids=target,
        noise_mask=torch.zeros_like(target),
    )  # fmt: skip
    got, unshifted = shifted(**inputs), plain(**inputs)
    for i, (s, t) in enumerate(rows):
        states, logits = causal_states(shifted, s, t)
        length = t.shape[1]
        assert relative_error(got.last_hidden_state[i : i + 1, :length], states) < 1e-10
        # logits are rounded to float32
        assert relative_error(got.logits[i : i + 1, :length], logits) < 1e-6
        assert relative_error(unshifted.logits[i : i + 1, :length], logits) > 0.1


@pytest.mark.parametrize("direction", ["forward", "bidirectional", "gated"])
@pytest.mark.parametrize("lengths", [[(5, 4), (9, 7), (1, 6)], [(1, 3), (1, 8)], [(7, 4)]])
def test_label_shift_with_a_cache_equals_the_source_recomputed(direction, lengths):
    model = shifting(direction=direction)
    rows, source, source_mask, target, target_mask = batch_of(lengths)
    cache = model.encode_source(source, source_mask)
    length = source.shape[1] - 1
    assert cache.get_seq_length() == length and bool(cache.layers) == (length > 0)
    previous = None
    for t in (1.0, 0.5):
        inputs = dict(
            sample=noised(target, t), timesteps=torch.full((len(rows),), t), previous=previous,
            source_ids=source, source_mask=source_mask, target_mask=target_mask,
        )  # fmt: skip
        cached = model(cache=cache, **inputs)
        fresh = model(**inputs)
        assert relative_error(cached.last_hidden_state, fresh.last_hidden_state) < 1e-12
        assert cached.logits.shape == (*target.shape, V)
        assert cached.last_hidden_state.shape == (*target.shape, H)
        assert cache.get_seq_length() == length
        previous = cached.logits.detach()


def test_label_shift_reads_only_the_last_column_beside_a_cache():
    model = shifting()
    _, source, source_mask, target, _ = batch_of([(5, 4), (9, 4)])
    cache = model.encode_source(source, source_mask)

    def states(ids):
        inputs = dict(cache=cache, source_ids=ids, source_mask=source_mask)
        return model(noised(target), torch.full((2,), 0.5), **inputs).last_hidden_state

    before, last = source.clone(), source.clone()
    before[:, :-1] = 7
    last[:, -1] = 7
    assert torch.equal(states(before), states(source))
    assert not torch.allclose(states(last), states(source))


@pytest.mark.parametrize("encoding", ["causal", "joint"])
@pytest.mark.parametrize("direction", ["bidirectional", "gated"])
def test_prediction_with_label_shift_ignores_the_neighbours(encoding, direction):
    model = shifting(source_encoding=encoding, direction=direction)
    rows, source, source_mask, target, target_mask = batch_of([(5, 4), (9, 7), (1, 8), (2, 1)])
    times, previous = torch.tensor([0.3, 0.6, 0.9, 0.1]), torch.randn(4, 8, V)
    sample = RenoisingScheduler().add_noise(target, times, keys=torch.arange(4), vocab_size=V)
    together = model(
        sample, times, previous, None, source, source_mask, target_mask=target_mask
    ).last_hidden_state
    for i, (s, t) in enumerate(rows):
        length = t.shape[1]
        alone = RenoisingScheduler().add_noise(
            t, times[i : i + 1], keys=torch.tensor([i]), vocab_size=V
        )
        got = model(alone, times[i : i + 1], previous[i : i + 1, :length], source_ids=s)
        error = relative_error(together[i : i + 1, :length], got.last_hidden_state)
        assert error < 1e-6  # the mixed probabilities are float32


@pytest.mark.parametrize("encoding", ["causal", "joint"])
def test_label_shift_without_a_source_is_that_after_bos(encoding):
    model = shifting(source_encoding=encoding)
    sample, times = noised(torch.randint(5, V, (2, 4))), torch.tensor([0.5, 0.2])
    got = model(sample, times).last_hidden_state
    bos = torch.full((2, 1), model.config.backbone_config.bos_token_id)
    assert torch.equal(got, model(sample, times, source_ids=bos).last_hidden_state)
    other = model(sample, times, source_ids=bos + 1).last_hidden_state
    assert not torch.allclose(got, other)


def test_label_shift_refuses_what_lacks_the_token_before_the_target():
    model = make(label_shift=True)
    source, times = torch.randint(5, V, (2, 3)), torch.tensor([0.5, 0.5])
    sample = noised(torch.randint(5, V, (2, 4)))
    with pytest.raises(ValueError, match="^label_shift needs source_ids beside the cache[^\n]*$"):
        model(sample, times, cache=model.encode_source(source, None))
    right_padded = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="^label_shift needs a left-padded source[^\n]*$"):
        model(sample, times, source_ids=source, source_mask=right_padded)
    model.config.backbone_config.bos_token_id = None
    with pytest.raises(ValueError, match="^label_shift without a source needs a bos_[^\n]*None$"):
        model(sample, times)


def test_label_shift_is_off_by_default_and_its_flag_reaches_the_config():
    assert not TessConfig(backbone_config=backbone()).label_shift
    assert "label_shift" not in DiffusionArguments().denoiser_overrides()
    for chosen in (True, False):
        fields = DiffusionArguments(label_shift=chosen).denoiser_overrides()
        assert TessConfig(backbone_config=backbone(), **fields).label_shift is chosen


# --- checkpoints and mistakes ---


@pytest.mark.parametrize("tie, kind", [(True, "logits_mean"), (False, "logits"), (True, "logits")])
def test_checkpoint_comes_back_equal(tmp_path, tie, kind):
    model = make(
        tie=tie, self_conditioning=kind, source_encoding="bidirectional", num_target_positions=8
    )
    model.save_pretrained(tmp_path)
    loaded = TessDenoiser.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.backbone_config.hybrid_override_pattern == PATTERN
    assert isinstance(loaded.config.backbone_config, HybridConfig)
    assert loaded.config.source_encoding == "bidirectional"
    assert loaded.config.self_conditioning == kind
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    sample, times = noised(torch.randint(5, V, (2, 4))), torch.tensor([0.2, 0.8])
    assert torch.equal(model(sample, times).logits, loaded(sample, times).logits)


@pytest.mark.parametrize("label_shift", [False, True])
def test_label_shift_comes_back_with_the_checkpoint(tmp_path, label_shift):
    model = make(label_shift=label_shift)
    model.save_pretrained(tmp_path)
    loaded = TessDenoiser.from_pretrained(tmp_path)
    assert loaded.config.label_shift is label_shift
    sample, times = noised(torch.randint(5, V, (2, 4))), torch.tensor([0.2, 0.8])
    source = torch.randint(5, V, (2, 3))
    got = [m(sample, times, source_ids=source).logits for m in (model, loaded)]
    assert torch.equal(*got)


def test_checkpoint_with_missing_or_unknown_tensors_is_refused_by_name(tmp_path):
    make(tie=False, num_target_positions=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks source_positions.weight"):
        TessDenoiser.from_pretrained(
            tmp_path, config=make(tie=False, num_target_positions=8, num_source_positions=12).config
        )
    with pytest.raises(ValueError, match="has unknown lm_head.weight, target_positions.weight"):
        TessDenoiser.from_pretrained(tmp_path, config=make(tie=True).config)
    with pytest.raises(ValueError, match="wrongly shaped target_positions.weight"):
        TessDenoiser.from_pretrained(
            tmp_path, config=make(tie=False, num_target_positions=9).config
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"self_conditioning": "mean"}, "self_conditioning must be one of None, logits, .*'mean'"),
        ({"source_encoding": "both"}, "source_encoding must be one of causal, bidirectional"),
        ({"simplex_value": 0.0}, "simplex_value must be above 0"),
        ({"self_conditioning": "logits", "self_conditioning_mix": "logits"}, "needs .*embeddings"),
        ({"self_conditioning": None, "deepmind_conditional": True}, "needs self_conditioning"),
        ({"self_conditioning_mlp": True}, "self_conditioning_mlp works with"),
        (
            {"label_shift": True, "source_encoding": "bidirectional"},
            "label_shift .* needs source_encoding 'causal' or 'joint', got 'bidirectional'",
        ),
        ({"label_shift": True, "deepmind_conditional": True}, "excludes deepmind_conditional"),
        (
            {
                "self_conditioning_mix": "logits",
                "self_conditioning_zeros_after_softmax": True,
            },
            "excludes the 'logits' mix",
        ),
        ({"num_target_positions": 8, "max_target_length": 9}, "more than num_target_positions=8"),
        ({"max_source_length": 1}, "max_source_length must be at least 2"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TessConfig(backbone_config=backbone(), **settings)


def test_a_canvas_beyond_the_learned_positions_is_refused():
    model = make(num_target_positions=8)
    with pytest.raises(ValueError, match="the target has 9 positions"):
        model(noised(torch.zeros(1, 9, dtype=torch.long)), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="go together"):
        model(
            noised(torch.zeros(1, 4, dtype=torch.long)),
            torch.tensor([0.5]),
            clean_ids=torch.zeros(1, 4, dtype=torch.long),
        )


@pytest.mark.parametrize(
    ("settings", "absent", "dense"),
    [
        ({"self_conditioning": None}, True, False),
        ({"self_conditioning": "logits_mean"}, True, False),
        ({"self_conditioning": "logits"}, False, False),
        ({"self_conditioning": "logits_mean"}, False, True),
    ],
)
def test_only_kinds_that_mix_over_the_vocabulary_ask_for_the_dense_simplex(settings, absent, dense):
    class Watched(DenseSimplex):
        def probabilities(self):
            asked.append(True)
            return super().probabilities()

        def embedding(self, weight_VH):
            return DenseSimplex(self.values).embedding(weight_VH)

    asked = []
    module = SelfConditioning(TessConfig(backbone_config=backbone(), **settings))
    simplex, weight = Watched(torch.randn(2, 3, V)), torch.randn(V, H)
    module(simplex, None if absent else torch.randn(2, 3, V), weight)
    assert bool(asked) == dense
