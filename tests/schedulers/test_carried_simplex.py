"""One noise in all steps beside a short list of token weights: the law of its embedding."""

# B examples, L positions, V vocabulary, H width, W listed tokens, N samples

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tess.benchmarks.law.two_sample import Probes, compare, sample_keys, trained_like
from tess.kernels import carried_embedding as kernel
from tess.kernels import random
from tess.kernels.carried_embedding import (
    EMPTY,
    carried_embedding,
    largest_of_list,
    merge_lists,
)
from tess.kernels.order_statistics import embedding_moments, largest_normals
from tess.schedulers.carried import CarriedSimplex
from tess.schedulers.simplex import DenseSimplex, SoftTokens

VOCABULARY, WIDTH, SAMPLES = 400, 12, 4_096
# the list of the tests of the law: likely tokens, less likely ones, and one pushed down
LISTED = (7, 3, 250, 11, 399)
LOGITS = (6.0, 3.0, 2.5, 1.0, -4.0)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def soft(batch, length, vocabulary, most, seed=0):
    """Soft predictions [B, L, M], the same whatever the batch."""
    keys, probs = torch.arange(batch), []
    probs = (3 * random.normal(keys, seed, length, vocabulary)).softmax(dim=-1)
    values, ids = probs.topk(most, dim=-1)
    return SoftTokens(ids, values)


def spread_out(ids, weights, vocabulary):
    """A list as a dense tensor [B, L, V]."""
    dense = torch.zeros(*ids.shape[:-1], vocabulary + 1, dtype=weights.dtype)
    return dense.scatter_add(-1, ids.clamp(min=0) + (ids == EMPTY) * vocabulary, weights)[..., :-1]


def dense_noise(keys, draw, length, vocabulary):
    """eps [B, L, V] float64 where all of it is on top."""
    rows = keys.repeat_interleave(length), torch.arange(length).repeat(len(keys))
    top, ids, _ = largest_normals(*rows, draw, vocabulary, vocabulary)
    return torch.zeros_like(top).scatter(1, ids, top).view(len(keys), length, vocabulary)


# ---- exact ----


@pytest.mark.parametrize("vocabulary", [2, 3, 40])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 5.0])
def test_with_all_tokens_on_top_the_embedding_is_the_dense_one(vocabulary, sigma):
    keys, weight = torch.tensor([5, -9, 77]), trained_like(vocabulary, 5).double()
    listed = min(vocabulary, 6)
    ids = torch.rand(3, 7, vocabulary).argsort(dim=-1)[..., :listed]
    ids[0, :, 1:], logits = EMPTY, 4 * torch.randn(3, 7, listed)
    logits[ids == EMPTY] = 50.0  # an empty place counts for nothing
    got = carried_embedding(
        ids, logits, torch.full((3, 1), sigma), weight, keys_B=keys, draw=4, num_top=vocabulary
    )
    x = sigma * dense_noise(keys, 4, 7, vocabulary) + spread_out(ids, logits, vocabulary).double()
    assert relative(got, x.softmax(dim=-1) @ weight) < 1e-6


def test_the_steps_are_those_of_the_dense_simplex():
    """Truncated at V nothing is cut, and with V tokens on top nothing is approximate."""
    vocabulary, k, keys = 30, 3.0, torch.tensor([1, 2])
    carried = CarriedSimplex.initial((2, 5), keys, vocabulary, k, num_top=99)
    dense = DenseSimplex(k * dense_noise(keys, 0, 5, vocabulary))
    weight = trained_like(vocabulary, 6)
    steps = [(0.9, [(0.3, 0)]), (0.8, [(0.5, 1), (-0.2, 0)]), (0.5, [(0.7, 2), (-0.1, 1)])]
    for scale, additions in steps:
        pairs = [(factor, soft(2, 5, vocabulary, vocabulary, seed)) for factor, seed in additions]
        carried = carried.moved(scale, pairs)
        dense = dense.moved(scale, [(c, 2 * k * spread_out(*p, vocabulary) - k) for c, p in pairs])
        assert relative(carried.embedding(weight), dense.embedding(weight)) < 1e-5
    assert carried.counter == 3 and carried.draw == 0
    assert math.isclose(float(carried.noise_scale[0, 0]), 0.36, rel_tol=1e-6)


def listed_noise(num_top, sigma, order, draw=0):
    """eps_i - eps_0 [N, V - 1] of 9 listed tokens, read from the softmax."""
    keys, positions = sample_keys(SAMPLES, 3)
    ids = order.expand(len(keys), len(positions), 9)
    logits = torch.linspace(-1, 1, 9).expand_as(ids)
    scale = torch.full((len(keys), 1), sigma)
    unit = torch.eye(9, dtype=torch.float64)
    options = {"keys_B": keys, "draw": draw, "num_top": num_top}
    log_probs = carried_embedding(ids, logits, scale, unit, **options).flatten(0, 1).log()
    noise = (log_probs - spread_out(ids, logits, 9).flatten(0, 1)) / sigma
    return noise[:, 1:] - noise[:, :1]


def normal_differences():
    noise = torch.randn(SAMPLES, 9, dtype=torch.float64)
    return noise[:, 1:] - noise[:, :1]


DIFFERENCES = Probes.of(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), 0)


@pytest.mark.parametrize("num_top", [1, 4, 8, 9])
def test_the_noise_of_listed_tokens_is_normal_whatever_is_on_top(num_top):
    got = listed_noise(num_top, 0.8, torch.arange(9))
    assert compare(got, normal_differences(), DIFFERENCES).worst < 1


def not_truncated(limit, uniform):
    return torch.special.ndtri(uniform)


def at_the_limit(limit, uniform):
    return limit.expand_as(uniform)


@pytest.mark.parametrize("wrong", [not_truncated, at_the_limit])
def test_noise_that_forgets_the_top_or_the_rest_is_told_apart(wrong, monkeypatch):
    monkeypatch.setattr(kernel, "_below", wrong)
    got = listed_noise(4, 0.8, torch.arange(9))
    assert compare(got, normal_differences(), DIFFERENCES).worst > 1


def test_the_noise_is_the_same_in_every_step_at_every_sigma_and_in_every_order():
    one = listed_noise(4, 0.8, torch.arange(9))
    assert (listed_noise(4, 1.9, torch.randperm(9)) - one).abs().max() < 1e-6
    assert (listed_noise(4, 0.8, torch.arange(9), draw=1) - one).abs().max() > 1


def test_a_word_named_by_its_block_is_that_of_the_whole_row():
    rows = torch.tensor([3, -8]), torch.tensor([0, 5])
    blocks = torch.tensor([[4, 0, 9], [1, 1, 7]])
    whole = random.words_at(*rows, 6, 0, 10, random.LISTED_STREAM)[:, ::4]
    got = random.words_of(*rows, 6, blocks, random.LISTED_STREAM)
    assert torch.equal(got, whole.gather(1, blocks))


# ---- in law ----


def case(sigma, seed, **options):
    """Embeddings [N, H] of one list at one sigma."""
    keys, positions = sample_keys(SAMPLES, seed)
    shape = len(keys), len(positions), len(LISTED)
    ids, logits = (torch.tensor(x).expand(shape) for x in (LISTED, LOGITS))
    scale = torch.full((len(keys), 1), sigma)
    x = carried_embedding(ids, logits, scale, WEIGHT, keys_B=keys, moments=MOMENTS, **options)
    return x.double().flatten(0, 1)


def dense_case(sigma, seed):
    keys, positions = sample_keys(SAMPLES, seed)
    x = sigma * random.normal(keys, 0, len(positions), VOCABULARY).flatten(0, 1)
    x[:, list(LISTED)] += torch.tensor(LOGITS)
    return (x.softmax(dim=-1) @ WEIGHT).double()


WEIGHT = trained_like(VOCABULARY, WIDTH)
MOMENTS = embedding_moments(WEIGHT)
PROBES = Probes.of(WEIGHT, LISTED[0])
SIGMAS = (0.3, 1.0, 2.0, 5.0)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_carried_embeddings_have_the_dense_law(sigma):
    dense = dense_case(sigma, 1)
    assert compare(dense_case(sigma, 4), dense, PROBES).worst < 1
    for seed, num_top in ((2, 16), (3, 32)):
        assert compare(case(sigma, seed, num_top=num_top), dense, PROBES).worst < 1


def never_on_top(ids, top_ids):
    return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)


def no_bulk(limit, sigma):
    return torch.full_like(limit, -torch.inf), torch.zeros_like(limit)


def bulk_without_noise(limit, sigma):
    log_mean, variance = truncated_moments(limit, sigma)
    return log_mean, torch.zeros_like(variance)


truncated_moments = kernel.truncated_moments
WRONG = [
    ("_find", never_on_top, SIGMAS[2:]),
    ("_below", not_truncated, SIGMAS[1:3]),
    ("_below", at_the_limit, SIGMAS[:3]),
    ("truncated_moments", no_bulk, SIGMAS[:3]),
    ("truncated_moments", bulk_without_noise, SIGMAS[:2]),
]


@pytest.mark.parametrize(
    "name, wrong, sigma", [(*one, sigma) for *one, sigmas in WRONG for sigma in sigmas]
)
def test_samplers_that_get_a_part_wrong_are_told_apart(name, wrong, sigma, monkeypatch):
    dense = dense_case(sigma, 1)
    monkeypatch.setattr(kernel, name, wrong)
    assert compare(case(sigma, 2, num_top=32), dense, PROBES).worst > 1


def correlations(one, other):
    """Of the embeddings of two steps along every probe."""
    pairs = zip(PROBES.projections(one), PROBES.projections(other))
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


# The bulk is fully correlated between two sigmas where it should be less: little in neighbouring
# steps, more between distant ones while the bulk has a share at both.
@pytest.mark.parametrize(
    "sigma, other, error", [(5.0, 4.0, 0.04), (2.0, 1.7, 0.04), (1.0, 0.8, 0.04), (2.0, 0.5, 0.15)]
)
def test_two_steps_are_correlated_as_the_dense_ones(sigma, other, error):
    dense = correlations(dense_case(sigma, 1), dense_case(other, 1))
    got = correlations(case(sigma, 2), case(other, 2))
    assert (got - dense).abs().max() < error
    apart = correlations(case(sigma, 2), case(other, 2, draw=1))  # a fresh noise is told apart
    assert (apart - dense).abs().max() > 4 * error


# ---- one example, whatever is beside it ----


def sampled(batch, length, most=5):
    """A sample of the first examples of all, after two steps."""
    keys = torch.tensor([3, 8, -2, 6])[:batch]
    start = CarriedSimplex.initial((batch, length), keys, 300, 4.0, num_top=8, max_list=7)
    first, second = (soft(batch, length, 300, most, seed) for seed in (1, 2))
    return start.moved(0.9, [(0.4, first)]).moved(0.7, [(0.6, second), (-0.2, first)])


def test_an_example_has_the_same_bits_in_every_batch_and_at_every_length():
    weight = trained_like(300, 24)
    together = sampled(4, 37)
    want = together.embedding(weight)
    for batch, length in ((1, 37), (2, 1), (3, 16), (4, 21)):
        part = sampled(batch, length)
        assert torch.equal(part.token_weights, together.token_weights[:batch, :length])
        assert torch.equal(part.embedding(weight), want[:batch, :length])
    for rows in ([2], [3, 0], torch.tensor([False, True, True, False])):
        kept = together.select(rows)
        assert torch.equal(kept.embedding(weight), want[rows])
        assert torch.equal(kept.uniforms(), together.uniforms()[rows])


def test_the_history_goes_with_the_rows_and_ends_with_the_step():
    past = soft(4, 3, 300, 5)
    sample = replace(sampled(4, 3), history=((0.25, past), (torch.arange(4), None)))
    (number, kept), (marks, nothing) = sample.select([3, 1]).history
    assert number == 0.25 and nothing is None and isinstance(kept, SoftTokens)
    assert all(torch.equal(one, other[[3, 1]]) for one, other in zip(kept, past))
    assert marks.tolist() == [3, 1]
    assert sample.moved(1.0, []).history == sample.renoised(1.0, []).history == ()


def test_fresh_noise_forgets_the_list_and_the_old_noise():
    sample, weight = sampled(2, 3), trained_like(300, 6)
    prediction = soft(2, 3, 300, 4, seed=5)
    fresh = sample.renoised(0.5, [(0.8, prediction)])
    assert fresh.counter == fresh.draw == sample.counter + 1 == 3 and sample.draw == 0
    assert spread_out(fresh.token_ids, fresh.token_weights, 300).equal(
        spread_out(prediction.token_ids, 0.8 * prediction.probabilities, 300)
    )
    assert torch.equal(fresh.noise_scale, torch.full((2, 1), 0.5))
    old = replace(fresh, draw=0)
    assert relative(fresh.embedding(weight), old.embedding(weight)) > 1e-2
    later = fresh.moved(0.5, [])
    assert later.counter == 4 and later.draw == 3
    assert not torch.equal(later.uniforms(), fresh.uniforms())
    scales = torch.tensor([[0.1], [0.2]])
    assert torch.equal(sample.renoised(scales, []).noise_scale, scales)


# ---- lists ----


def test_equal_ids_are_one_entry_with_the_sum():
    ids, more = torch.tensor([[[4, EMPTY, 2, 9]]]), torch.tensor([[[9, 1, EMPTY, 4]]])
    weights = torch.tensor([[[0.5, 7.0, -1.0, 0.25]]])
    extra = torch.tensor([[[0.5, 2.0, 7.0, -0.5]]])
    merged, sums = merge_lists(ids, weights, more, extra)
    found = {i: w for i, w in zip(merged[0, 0].tolist(), sums[0, 0].tolist()) if i != EMPTY}
    assert found == {1: 2.0, 2: -1.0, 4: 0.0, 9: 0.75}
    assert int((merged != EMPTY).sum()) == 4
    kept, sizes = largest_of_list(merged, sums, 3)
    assert dict(zip(kept[0, 0].tolist(), sizes[0, 0].tolist())) == {1: 2.0, 2: -1.0, 9: 0.75}
    assert largest_of_list(merged, sums, 8)[0] is merged


def test_a_long_list_loses_its_smallest_weights_and_no_id_is_there_twice():
    most, kept = 12, torch.zeros(2, 4, 50)
    sample = CarriedSimplex.initial((2, 4), torch.arange(2), 50, 4.0, max_list=most)
    for seed in range(6):
        prediction, factor = soft(2, 4, 50, 8, seed), -0.4 if seed == 2 else 0.6
        sample = sample.moved(0.8, [(factor, prediction)])
        sums = 0.8 * kept + factor * spread_out(*prediction, 50)
        bound = sums.abs().sort(dim=-1, descending=True).values[..., most - 1, None]
        kept = spread_out(sample.token_ids, sample.token_weights, 50)
        torch.testing.assert_close(kept, sums.where(sums.abs() >= bound, 0.0))
        assert sample.token_ids.shape == (2, 4, min(most, 8 * (seed + 1)))
        for ids in sample.token_ids.flatten(0, 1).tolist():
            ids = [i for i in ids if i != EMPTY]
            assert len(set(ids)) == len(ids)
    assert (sample.token_weights < 0).any()


@pytest.mark.parametrize("vocabulary", [2, 3, 6])
def test_small_vocabularies_have_room_for_every_token(vocabulary):
    sample = CarriedSimplex.initial((1, 2), torch.tensor([4]), vocabulary, 2.0, max_list=1_000)
    for seed in range(4):
        sample = sample.moved(0.9, [(0.5, soft(1, 2, vocabulary, vocabulary, seed))])
    assert sample.token_ids.shape == (1, 2, vocabulary)
    assert sample.embedding(trained_like(vocabulary, 3)).isfinite().all()


# ---- size, types and mistakes ----


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor that is made has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *(leaf.numel() for leaf in tensors)])
        return out


def test_nothing_with_a_vocabulary_dimension_is_made():
    vocabulary, most = 60_000, 30
    weight = torch.randn(vocabulary, 4)
    moments = embedding_moments(weight)
    predictions = [soft(2, 10, vocabulary, most, seed) for seed in range(3)]
    with Largest() as made:
        sample = CarriedSimplex.initial((2, 10), torch.arange(2), vocabulary, 5.0)
        for prediction in predictions:
            sample = sample.moved(0.9, [(0.5, prediction)])
            sample.embedding(weight, moments)
    assert 2 * 10 * 32 < made.numbers < vocabulary
    assert sample.shape == (2, 10, vocabulary) and sample.needs_moments


def test_the_embedding_has_the_matrix_s_type_and_records_no_gradient():
    weight = trained_like(300, 6)
    sample = sampled(2, 5)
    want = sample.embedding(weight.double())
    assert want.dtype == torch.float64
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        leaf = weight.to(dtype).requires_grad_()
        got = sample.embedding(leaf)
        assert got.dtype == dtype and not got.requires_grad
        moments = embedding_moments(leaf)
        assert relative(got, sample.embedding(weight.to(dtype).double(), moments)) < error
    empty = CarriedSimplex.initial((0, 5), torch.empty(0, dtype=torch.int64), 300, 4.0)
    assert empty.embedding(weight).shape == (0, 5, 6)


def test_a_carried_simplex_has_no_logits():
    with pytest.raises(ValueError, match="the whole simplex does not exist where soft"):
        sampled(1, 2).probabilities()


def test_mistakes_are_named():
    sample = sampled(2, 3)
    for message, change in {
        r"both, got \[2, 3, 7\] and \[2, 3, 6\]": {"token_weights": torch.ones(2, 3, 6)},
        r"noise_scale must be \[2, 1\], got \[2, 3\]": {"noise_scale": torch.ones(2, 3)},
        r"keys must be \[2\], got \[3\]": {"keys": torch.arange(3)},
        "max_list must be at least 1, got 0": {"max_list": 0},
        "num_top must be an integer of at least 1, got 0": {"num_top": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(sample, **change)
    with pytest.raises(ValueError, match="must have 300 rows, as the simplex has, got 299"):
        sample.embedding(torch.randn(299, 4))


def test_mistakes_in_the_embedding_are_named():
    weight, ids = torch.randn(9, 4), torch.zeros(2, 3, 1, dtype=torch.int64)
    right = {
        "ids_BLW": ids, "logits_BLW": ids.float(), "sigma_BL": torch.ones(2, 1),
        "weight_VH": weight, "keys_B": torch.arange(2), "num_top": 4,
    }
    assert carried_embedding(**right).isfinite().all()
    for message, change in {
        r"must be int64 \[B, L, W\], got torch.float32 \[2, 3, 1\]": {"ids_BLW": ids.float()},
        r"listed logits must be \[2, 3, 1\], got \[2, 3, 2\]": {"logits_BLW": torch.ones(2, 3, 2)},
        r"must be \[2, 1\] or \[2, 3\], got \[2\]": {"sigma_BL": torch.ones(2)},
        "must not be negative, got -1.0": {"sigma_BL": -torch.ones(2, 1)},
        r"\[V, H\] with V >= 2, got \[9\]": {"weight_VH": torch.ones(9)},
        r"keys must be int64 \[2\], got torch.float32": {"keys_B": torch.ones(2)},
        r"ids must be in 0..8, or -1 for none, got 9..9": {"ids_BLW": ids + 9},
        r"got -2..-2": {"ids_BLW": ids - 2},
        r"num_top must be in 1..9, got 10": {"num_top": 10},
        "moments must be of width 4, got": {"moments": embedding_moments(torch.randn(9, 3))},
    }.items():
        with pytest.raises(ValueError, match=message):
            carried_embedding(**right | change)


def test_a_noise_of_no_size_leaves_the_softmax_of_the_list():
    sample = CarriedSimplex.initial((1, 1), torch.tensor([0]), 5_000, 3.0)
    prediction = SoftTokens(torch.tensor([[[17, 40]]]), torch.tensor([[[0.9, 0.05]]]))
    got = sample.moved(0.0, [(1.0, prediction)]).embedding(trained_like(5_000, 6))
    x = torch.zeros(5_000, dtype=torch.float64)
    x[17], x[40] = 6 * 0.9, 6 * 0.05
    assert relative(got[0, 0], x.softmax(0) @ trained_like(5_000, 6).double()) < 1e-5
    assert math.isclose(float(sample.noise_scale), 1.0)
