"""Laws and golden values of the denoiser's input, its source layouts, and its checkpoints."""

import math

import pytest
import torch

from tess.backbones.causal_lm import HybridForCausalLM
from tess.backbones.config import HybridConfig
from tess.config import SELF_CONDITIONING, TessConfig
from tess.denoiser import TessDenoiser
from tess.schedulers.renoising import RenoisingScheduler
from tess.self_conditioning import Prediction
from tiny import DENOISER

V, H, K = 40, 32, 5.0
PATTERN = "M*-E"


def backbone(pattern: str = PATTERN, **settings) -> dict:
    sizes = {"vocab_size": V, "hybrid_override_pattern": pattern, "initializer_range": 0.3}
    return DENOISER | sizes | {"mamba_direction": "forward"} | settings


def make(pattern: str = PATTERN, tie: bool = True, direction: str = "bidirectional", **settings):
    config = TessConfig(
        backbone_config=HybridConfig(
            **backbone(pattern, tie_word_embeddings=tie, mamba_direction=direction)
        ),
        **{"max_source_length": 12, "max_target_length": 8, "simplex_value": K} | settings,
    )
    return TessDenoiser(config).eval()


SCHEDULERS = {
    noise: RenoisingScheduler(vocab_size=V, simplex_value=K, noise=noise)
    for noise in ("order_statistics", "dense")
}


def noised(ids: torch.Tensor, t: float = 0.4, noise: str = "order_statistics"):
    times = torch.full((len(ids),), t)
    return SCHEDULERS[noise].add_noise(ids, times, keys=torch.arange(len(ids)))


def logits(model: TessDenoiser, *inputs, **more) -> torch.Tensor:
    """The head's logits of one evaluation."""
    return model.logits(model(*inputs, **more).last_hidden_state)


def guess(model: TessDenoiser, batch: int, length: int) -> Prediction:
    """A previous prediction, from random states."""
    return model.predict(torch.randn(batch, length, H, dtype=model.dtype))


def rows_of(prediction: Prediction, row: int, length: int) -> Prediction:
    """One example of it, shortened."""
    fields = {name: getattr(prediction, name) for name in ("token_ids", "embedding", "logits")}
    cut = {n: None if t is None else t[row : row + 1, :length] for n, t in fields.items()}
    return Prediction(**cut)


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


def test_time_is_added_to_noised_positions_only_and_context_is_the_clean_embedding():
    model = make(num_target_positions=8)
    ids = torch.randint(5, V, (2, 5))
    noise_mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    times = torch.tensor([0.25, 0.75])
    sample = noised(ids, noise="dense")
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
        cached = model(sample, cache=cache, **inputs).last_hidden_state
        fresh = model(sample, source_ids=source, source_mask=source_mask, **inputs)
        torch.testing.assert_close(cached, fresh.last_hidden_state, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == length
        previous = model.predict(cached)


@pytest.mark.parametrize("encoding", ["causal", "bidirectional", "joint"])
@pytest.mark.parametrize("noise", SCHEDULERS)
def test_prediction_of_an_example_ignores_its_neighbours(encoding, noise):
    model = make(
        "M*-EM*", source_encoding=encoding, num_source_positions=12, num_target_positions=8
    )
    rows, source, source_mask, target, target_mask = batch_of([(5, 4), (9, 7), (2, 8)])
    times = torch.tensor([0.3, 0.6, 0.9])
    sample = SCHEDULERS[noise].add_noise(target, times, keys=torch.arange(3))
    previous = guess(model, 3, 8)
    together = logits(
        model, sample, times, previous, None, source, source_mask, target_mask=target_mask
    )
    for i, (s, t) in enumerate(rows):
        length = t.shape[1]
        alone = SCHEDULERS[noise].add_noise(t, times[i : i + 1], keys=torch.tensor([i]))
        own = rows_of(previous, i, length)
        got = logits(model, alone, times[i : i + 1], own, source_ids=s)
        torch.testing.assert_close(together[i : i + 1, :length], got, rtol=1e-4, atol=1e-4)


def test_joint_layout_lets_the_source_see_the_target_and_has_no_cache():
    model = make(source_encoding="joint")
    source = torch.randint(5, V, (1, 6))
    assert model.encode_source(source, None) is None
    ids = torch.randint(5, V, (1, 4))
    out = model(noised(ids), torch.tensor([0.5]), source_ids=source).last_hidden_state
    assert out.shape == (1, 4, H) and model.logits(out).shape == (1, 4, V)
    other = model(noised(ids), torch.tensor([0.5]), source_ids=source.flip(1)).last_hidden_state
    assert not torch.allclose(out, other)


def test_source_changes_the_prediction_and_may_be_missing():
    model = make()
    ids, times = torch.randint(5, V, (2, 4)), torch.tensor([0.5, 0.5])
    alone = logits(model, noised(ids), times)
    read = logits(model, noised(ids), times, source_ids=torch.randint(5, V, (2, 6)))
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
    sample = noised(torch.randint(5, V, (2, 4)), noise="dense")
    times = torch.tensor([0.2, 0.8])
    got, want = (model(x, times).last_hidden_state for x in (sample, sample.logits()))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    half = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(half, sample, times).dtype == torch.float32
        assert sample.logits().dtype == sample.probabilities().dtype == torch.float32


def test_a_prediction_is_what_the_logits_say():
    model = make(tie=False).double()
    hidden = torch.randn(2, 4, H, dtype=torch.float64)
    got, want = model.predict(hidden), model.logits(hidden).log_softmax(-1)
    assert torch.equal(got.token_ids, want.argmax(-1)) and got.logits is None
    torch.testing.assert_close(got.log_probs, want.amax(-1))
    torch.testing.assert_close(got.entropies, -(want.exp() * want).sum(-1))
    expected = want.exp().double() @ model.backbone.embeddings.weight
    torch.testing.assert_close(got.embedding, expected, rtol=1e-5, atol=1e-5)
    assert not got.embedding.requires_grad

    # guidance chooses and measures by another state, and self-conditioning reads the own one
    other = torch.randn(2, 4, H, dtype=torch.float64)
    guided = model.predict(hidden, choice_BLH=other)
    chosen = model.predict(other)
    assert torch.equal(guided.token_ids, chosen.token_ids)
    assert torch.equal(guided.entropies, chosen.entropies)
    assert torch.equal(guided.embedding, got.embedding)
    with pytest.raises(ValueError, match="logits must be finite; 1 of 8 rows have NaN"):
        model.predict(hidden.masked_fill(torch.arange(8).view(2, 4, 1) == 1, math.nan))


def test_a_prediction_has_what_the_self_conditioning_reads():
    hidden = torch.randn(1, 3, H)
    for kind, has in (
        ("logits_mean", "embedding"), ("logits", "embedding"), ("logits_max", "logits"),
        ("logits_with_projection", None), (None, None),
    ):
        model = make(self_conditioning=kind)
        got = model.predict(hidden)
        for name in ("embedding", "logits"):
            assert (getattr(got, name) is not None) == (name == has), kind


def test_the_loss_is_the_weighted_mean_of_the_tokens_cross_entropy():
    model = make(tie=False)
    ids, weights = torch.randint(5, V, (2, 4)), torch.tensor([[1.0, 2, 0, 1], [0.5, 0, 0, 3]])
    inputs = (noised(ids), torch.tensor([0.2, 0.8]))
    out = model(*inputs, labels=ids, loss_weights=weights)
    each = -logits(model, *inputs).log_softmax(-1).gather(-1, ids[..., None])[..., 0] * weights
    torch.testing.assert_close(out.token_losses, each)
    torch.testing.assert_close(out.loss, each.sum() / weights.sum())
    assert out.loss.requires_grad and not out.token_losses.requires_grad
    plain = model(*inputs, labels=ids)
    unweighted = model(*inputs, labels=ids, loss_weights=torch.ones(2, 4))
    torch.testing.assert_close(plain.loss, unweighted.loss)
    assert model(*inputs).loss is None


def test_a_model_that_mixes_over_the_vocabulary_asks_for_dense_noise():
    for settings in (
        {"self_conditioning": "logits_max"}, {"self_conditioning": "logits_multiply"},
        {"self_conditioning_mix": "logits"},
    ):
        model = make(**settings)
        ids, times = torch.randint(5, V, (2, 4)), torch.tensor([0.5, 0.5])
        with pytest.raises(ValueError, match='needs the whole simplex, which only noise="dense"'):
            model(noised(ids), times)
        assert model(noised(ids, noise="dense"), times).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("encoding", ["causal", "bidirectional", "joint"])
@pytest.mark.parametrize("kind", [None, *SELF_CONDITIONING, "deepmind"])
def test_every_parameter_is_trained_and_the_previous_prediction_is_not(kind, encoding):
    settings = {"self_conditioning": kind}
    if kind == "deepmind":
        settings = {"deepmind_conditional": True}
    model = make(
        tie=False, source_encoding=encoding, num_source_positions=12, num_target_positions=8,
        **settings,
    ).train()
    _, source, source_mask, target, target_mask = batch_of([(5, 4), (12, 8)])
    sample = SCHEDULERS["dense"].add_noise(target, torch.tensor([0.3, 0.7]), keys=torch.arange(2))
    hidden = torch.randn(2, 8, H, requires_grad=True)
    previous = model.predict(hidden)
    noise_mask = target_mask.clone()
    noise_mask[:, 1] = 0
    out = model(
        sample, torch.tensor([0.3, 0.7]), previous, None, source, source_mask,
        target_mask=target_mask, clean_ids=target, noise_mask=noise_mask,
        labels=target, loss_weights=target_mask.float(),
    )
    out.loss.backward()
    assert hidden.grad is None
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
    out.last_hidden_state.square().mean().backward()
    used = model.source_positions.weight.grad[:9].abs().sum(-1)
    assert (used > 0).all() and model.source_positions.weight.grad[9:].abs().sum() == 0


def test_head_is_the_word_embedding_when_tied():
    tied, own = make(tie=True), make(tie=False)
    assert tied.lm_head is None and own.lm_head.weight.shape == (V, H)
    out = tied(noised(torch.randint(5, V, (1, 3))), torch.tensor([0.5]))
    expected = out.last_hidden_state @ tied.get_input_embeddings().weight.T
    got = tied.logits(out.last_hidden_state)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


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
    )
    # a gate of zero and no attention: denoising reads forward only, as the causal model
    shifted = make("M-M", label_shift=True, **settings).double()
    plain = make("M-M", **settings).double()
    plain.load_state_dict(shifted.state_dict())
    rows, source, source_mask, target, target_mask = batch_of(lengths)
    inputs = dict(
        sample=noised(target), timesteps=torch.rand(len(rows)), source_ids=source,
        source_mask=source_mask, target_mask=target_mask, clean_ids=target,
        noise_mask=torch.zeros_like(target),
    )
    got, unshifted = shifted(**inputs), plain(**inputs)
    for i, (s, t) in enumerate(rows):
        states, want = causal_states(shifted, s, t)
        own = got.last_hidden_state[i : i + 1, : t.shape[1]]
        assert relative_error(own, states) < 1e-10
        # logits are rounded to float32
        assert relative_error(shifted.logits(own), want) < 1e-6
        other = unshifted.last_hidden_state[i : i + 1, : t.shape[1]]
        assert relative_error(plain.logits(other), want) > 0.1


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
        )
        cached = model(cache=cache, **inputs)
        fresh = model(**inputs)
        assert relative_error(cached.last_hidden_state, fresh.last_hidden_state) < 1e-12
        assert cached.last_hidden_state.shape == (*target.shape, H)
        assert cache.get_seq_length() == length
        previous = model.predict(cached.last_hidden_state)


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
    times, previous = torch.tensor([0.3, 0.6, 0.9, 0.1]), guess(model, 4, 8)
    scheduler = SCHEDULERS["order_statistics"]
    sample = scheduler.add_noise(target, times, keys=torch.arange(4))
    together = model(
        sample, times, previous, None, source, source_mask, target_mask=target_mask
    ).last_hidden_state
    for i, (s, t) in enumerate(rows):
        length = t.shape[1]
        alone = scheduler.add_noise(t, times[i : i + 1], keys=torch.tensor([i]))
        own = rows_of(previous, i, length)
        got = model(alone, times[i : i + 1], own, source_ids=s)
        error = relative_error(together[i : i + 1, :length], got.last_hidden_state)
        assert error < 1e-10


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
    assert torch.equal(logits(model, sample, times), logits(loaded, sample, times))


@pytest.mark.parametrize("label_shift", [False, True])
def test_label_shift_comes_back_with_the_checkpoint(tmp_path, label_shift):
    model = make(label_shift=label_shift)
    model.save_pretrained(tmp_path)
    loaded = TessDenoiser.from_pretrained(tmp_path)
    assert loaded.config.label_shift is label_shift
    sample, times = noised(torch.randint(5, V, (2, 4))), torch.tensor([0.2, 0.8])
    source = torch.randint(5, V, (2, 3))
    got = [logits(m, sample, times, source_ids=source) for m in (model, loaded)]
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
