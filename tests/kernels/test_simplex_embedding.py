"""The embedding of a noised simplex: dense in tiles, drawn by order statistics, and gradients.

That both are equal in law is tested in test_simplex_law.py.
"""

# B examples, L positions, V vocabulary, H width, K top tokens, N samples

import math

import pytest
import torch

from tess.benchmarks.law.two_sample import (
    kolmogorov_smirnov,
    kolmogorov_smirnov_bound,
    law_samples,
    trained_like,
)
from tess.kernels import random, reference
from tess.kernels import simplex_embedding as module
from tess.kernels.order_statistics import (
    LargestNormals,
    _candidates,
    largest_normals,
    token_weights,
)
from tess.kernels.simplex_embedding import EmbeddingMoments, embedding_moments, simplex_embedding
from tess.schedulers.simplex import NoisedSimplex

NOISES = ("order_statistics", "dense")
SIMPLEX_VALUE = 5.0
TOKEN = 7


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def inputs(batch=3, length=21, vocabulary=300, width=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(batch, length, generator=generator)
    return {
        "token_ids_BL": torch.randint(vocabulary, (batch, length), generator=generator),
        "signal_BL": SIMPLEX_VALUE * alpha.sqrt(),
        "noise_BL": SIMPLEX_VALUE * (1 - alpha).sqrt(),
        "weight_VH": torch.randn(vocabulary, width, generator=generator).to(dtype),
        "keys_B": torch.arange(batch) * 7919 - 3,
        "counter": 4,
    }


def value_and_gradient(arguments, **options):
    weight = arguments["weight_VH"].detach().clone().requires_grad_()
    x = simplex_embedding(**{**arguments, "weight_VH": weight}, **options)
    direction = torch.linspace(-1, 2, x.numel()).view(x.shape).to(x.dtype).cos()
    (x * direction).sum().backward()
    return x.detach(), weight.grad, direction


# ---- dense ----


@pytest.mark.parametrize("vocabulary", [2, 3, 65, 4095, 4096, 4097, 8300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_embedding_equals_the_softmax_of_the_dense_simplex(vocabulary, dtype):
    arguments = inputs(2, 19, vocabulary, dtype=dtype)
    ids, signal, noise = (arguments[x] for x in ("token_ids_BL", "signal_BL", "noise_BL"))
    got, gradient, direction = value_and_gradient(arguments, noise="dense")

    normals = random.normal(arguments["keys_B"], 4, 19, vocabulary).double()
    weight = arguments["weight_VH"].double().requires_grad_()
    want = reference.simplex_embedding(ids, signal.double(), noise.double(), weight, normals)
    (want * direction).sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert got.dtype == dtype
    assert relative(got, want) < tolerance and relative(gradient, weight.grad) < tolerance

    simplex = NoisedSimplex(
        ids, signal / SIMPLEX_VALUE, noise / SIMPLEX_VALUE, SIMPLEX_VALUE, vocabulary,
        keys=arguments["keys_B"], counter=4, noise="dense",
    )
    assert relative(got, simplex.embedding(arguments["weight_VH"])) < 3e-6


def test_rows_of_normals_are_those_of_the_whole_tensor():
    keys = torch.tensor([3, -(2**63), 2**62 + 1])
    whole = random.normal(keys, 9, 5, 1_000)
    rows = random.normal_at(keys.repeat_interleave(5), torch.arange(5).repeat(3), 9, 128, 700)
    assert torch.equal(rows.view(3, 5, 700), whole[..., 128:828])
    one = random.normal_at(keys[2:], torch.tensor([4]), 9, 960, 40)
    assert torch.equal(one[0], whole[2, 4, 960:])
    other = random.normal_at(keys[2:], torch.tensor([4]), 9, 960, 40, random.BULK_STREAM)
    assert not (other == one).any()
    streams = [getattr(random, name) for name in dir(random) if name.endswith("_STREAM")]
    assert len(set(streams)) == len(streams) == 6
    with pytest.raises(ValueError, match="start must be a multiple of 64"):
        random.normal_at(keys, torch.arange(3), 9, 4, 40)


# ---- both ----


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("vocabulary, width", [(70, 3), (5_000, 133)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_example_has_the_same_embedding_in_every_batch_and_at_every_length(
    noise, vocabulary, width, dtype
):
    arguments = inputs(5, 37, vocabulary, width, dtype)
    weight = arguments.pop("weight_VH")
    options = {"weight_VH": weight, "counter": arguments.pop("counter"), "noise": noise}
    together = simplex_embedding(**arguments, **options)
    for row, length in ((0, 1), (2, 15), (3, 16), (4, 37)):
        cut = {k: v[row : row + 1, :length] if v.ndim == 2 else v[row : row + 1]
               for k, v in arguments.items()}
        assert torch.equal(simplex_embedding(**cut, **options)[0], together[row, :length])
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {k: v[order] for k, v in arguments.items()}
    assert torch.equal(simplex_embedding(**shuffled, **options), together[order])


@pytest.mark.parametrize("noise", NOISES)
def test_key_counter_and_position_each_change_the_noise(noise):
    arguments = inputs(2, 4)
    arguments["token_ids_BL"].fill_(TOKEN)
    arguments |= {"signal_BL": torch.ones(2, 1), "noise_BL": torch.full((2, 1), 3.0)}
    base = simplex_embedding(**arguments, noise=noise)
    assert torch.equal(base, simplex_embedding(**arguments, noise=noise))
    assert len(base.flatten(0, 1)[:, 0].unique()) == 8
    for change in ({"counter": 5}, {"keys_B": torch.tensor([11, 12])}):
        assert not (simplex_embedding(**{**arguments, **change}, noise=noise) == base).any()


@pytest.mark.parametrize("noise", NOISES)
def test_layout_and_precision_of_the_embedding_matrix_do_not_matter(noise):
    arguments = inputs(2, 18, 4_500, 6)
    want, gradient, _ = value_and_gradient(arguments, noise=noise)
    wide = torch.zeros(9, 9_000)
    wide[2:8, ::2] = arguments["weight_VH"].T
    strided = {**arguments, "weight_VH": wide[2:8, ::2].T.requires_grad_()}
    got = simplex_embedding(**strided, noise=noise)
    assert not strided["weight_VH"].is_contiguous() and relative(got, want) < 2e-6

    half = {**arguments, "weight_VH": arguments["weight_VH"].bfloat16()}
    rounded = {**arguments, "weight_VH": half["weight_VH"].float()}
    want, gradient, _ = value_and_gradient(rounded, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, half_gradient, _ = value_and_gradient(half, noise=noise)
        again, _, _ = value_and_gradient(rounded, noise=noise)
    assert got.dtype == half_gradient.dtype == torch.bfloat16
    assert torch.equal(again, want)
    assert relative(got, want) < 3e-3 and relative(half_gradient, gradient) < 6e-3


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("gap", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_the_embedding_is_the_clean_one(noise, gap, dtype):
    arguments = inputs(2, 9, 500, dtype=dtype)
    arguments |= {"signal_BL": torch.full((2, 1), gap / 2), "noise_BL": torch.zeros(2, 1)}
    weight = arguments["weight_VH"].double()
    own = weight[arguments["token_ids_BL"]]
    want = ((math.exp(gap) - 1) * own + weight.sum(0)) / (math.exp(gap) + 499)
    got = simplex_embedding(**arguments, noise=noise)
    assert relative(got, want) < (1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("noise", NOISES)
def test_nothing_in_gives_nothing_out(noise):
    arguments = inputs(2, 0)
    assert simplex_embedding(**arguments, noise=noise).shape == (2, 0, 5)


# ---- the order statistics themselves ----


def rows_of(count, seed=0):
    return torch.full((count,), 12_345 + seed), torch.arange(count)


@pytest.mark.parametrize("count, num_top", [(50, 6), (6, 6), (1, 1)])
def test_top_normals_have_the_law_of_sorted_normals(count, num_top):
    size = 20_000
    want = torch.randn(size, count, dtype=torch.float64).topk(num_top).values

    def worst(top):
        columns = list(zip(top.T, want.T)) + list(zip(top.diff(dim=1).T, want.diff(dim=1).T))
        return max(kolmogorov_smirnov(one, other) for one, other in columns)

    top = largest_normals(*rows_of(size), 3, count, num_top).top_RK
    assert (top.diff(dim=1) <= 0).all() and top.isfinite().all()
    assert worst(top) < kolmogorov_smirnov_bound(2 * num_top)
    wrong = largest_normals(*rows_of(size), 3, count + 1 + count // 10, num_top).top_RK
    assert worst(wrong) > kolmogorov_smirnov_bound(2 * num_top)


def test_tail_probabilities_of_top_normals_follow_the_beta_law_at_any_size():
    size, count, num_top = 8_192, 131_071, 64
    top = largest_normals(*rows_of(size), 0, count, num_top).top_RK
    tail = torch.special.erfc(top / math.sqrt(2)) / 2  # the j-th is Beta(j, N + 1 - j)
    j = torch.arange(1, num_top + 1, dtype=torch.float64)
    mean = j / (count + 1)
    variance = mean * (1 - mean) / (count + 2)
    assert ((tail.mean(0) - mean).abs() < 5 * (variance / size).sqrt()).all()
    spread = ((tail - mean) ** 2).mean(0) / variance
    kurtosis = 3 + 6 / j  # a Gamma's, the limit of this Beta
    assert ((spread - 1).abs() < 5 * ((kurtosis - 1) / size).sqrt()).all()
    uniform = torch.expm1(count * torch.log1p(-tail[:, 0])) + 1
    assert kolmogorov_smirnov(uniform, torch.rand(size)) < kolmogorov_smirnov_bound(1)


def chi_squared(ids_NK, count):
    """How far counts of the ordered choices are from equal, in standard deviations."""
    code_N = torch.zeros(len(ids_NK), dtype=torch.int64)
    for column in ids_NK.T:
        code_N = code_N * count + column
    cells = math.perm(count, ids_NK.shape[1])
    expected = len(ids_NK) / cells
    seen = code_N.unique(return_counts=True)[1].double()
    statistic = ((seen - expected) ** 2).sum() / expected + (cells - len(seen)) * expected
    return abs(statistic - (cells - 1)).item() / math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("count", [5, 12, 13])
def test_every_ordered_choice_of_ids_is_as_likely(count):
    ids = largest_normals(*rows_of(100_000), 1, count, 3).ids_RK
    assert ids.min() == 0 and ids.max() == count - 1
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    assert chi_squared(ids, count) < 5

    probed = torch.randint(count, (100_000, 3))  # wrong: an id that is taken gives way to the next
    for j in (1, 2, 2):
        for i in range(j):
            probed[:, j] = (probed[:, j] + (probed[:, j] == probed[:, i]).long()) % count
    distinct = (probed.sort(dim=1).values.diff(dim=1) > 0).all(dim=1)
    assert chi_squared(probed[distinct], count) > 10


def test_every_id_has_the_same_number_of_random_words():
    """Below 2^32 / count words to an id are refused, whatever the count."""
    for count in (3 << 29, 1_000_003 * 999):
        ids = _candidates(torch.arange(30_000)[:, None], count).flatten()
        words = torch.bincount(ids[ids >= 0])[:-1]
        assert (words == 2**32 // count).all() and len(words) > 5_000


def test_ids_are_distinct_and_uniform_in_a_large_vocabulary():
    ids = largest_normals(*rows_of(4_000), 1, 6_000, 64).ids_RK
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(ids.flatten() // 60, minlength=100).double()
    expected = 4_000 * 64 / 100
    assert abs(((counts - expected) ** 2).sum() / expected - 99) < 5 * math.sqrt(2 * 99)
    rank = torch.arange(64).expand_as(ids).double()  # a large id is no more often a large noise
    assert abs(torch.corrcoef(torch.stack([ids.flatten().double(), rank.flatten()]))[0, 1]) < 0.01


@pytest.mark.parametrize("vocabulary, num_top", [(2, 1), (3, 1), (3, 2), (40, 7), (40, 39)])
def test_the_true_token_is_never_among_the_top(vocabulary, num_top):
    ids = torch.arange(vocabulary).repeat(40)[None]
    rows = module.Rows(ids, torch.ones(ids.shape), torch.ones(ids.shape), torch.tensor([5]), 0)
    drawn, _ = module.draw_tokens(rows, vocabulary, num_top)
    assert torch.equal(drawn[:, 0], ids[0])
    assert (drawn[:, 1:] != drawn[:, :1]).all()
    assert drawn.min() == 0 and drawn.max() == vocabulary - 1
    if vocabulary > 2:
        assert len(drawn[drawn[:, 0] == 1][:, 1:].unique()) == vocabulary - 1


@pytest.mark.parametrize("num_top", [1, 2, 16, 299])
def test_weights_are_probabilities_for_any_scales(num_top):
    gap, sigma = torch.meshgrid(
        torch.tensor([0.0, 1.0, 20.0, 300.0]), torch.tensor([0.0, 1e-4, 1.0, 5.0, 10.0, 60.0]),
        indexing="ij",
    )
    gap, sigma = (x.double().flatten().repeat(200) for x in (gap, sigma))
    largest = largest_normals(*rows_of(len(gap)), 0, 299, num_top)
    weights, share, spread = token_weights(gap, sigma, largest, 299)
    assert all(x.isfinite().all() and (x >= 0).all() for x in (weights, share, spread))
    total = weights.sum(dim=1) + (299 - num_top) * share
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_top", [1, 60])
@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_what_is_not_on_top_has_the_mean_and_covariance_of_truncated_normals(num_top, sigma):
    size, vocabulary = 10_000, 200
    weight = trained_like(vocabulary, 3).double()
    top = largest_normals(*rows_of(1), 0, vocabulary - 1, num_top).top_RK.expand(size, -1)
    largest = LargestNormals(top, None, torch.randn(size, 2, dtype=torch.float64))
    zero = torch.zeros(size, dtype=torch.float64)
    p, share, spread = token_weights(zero, zero + sigma, largest, vocabulary - 1)
    total = torch.exp(sigma * top[:, 0]) / p[:, 1]
    bulk = vocabulary - 1 - num_top
    got = share * total * bulk

    below = torch.rand(size, bulk, dtype=torch.float64) * torch.special.ndtr(top[0, -1])
    w = torch.exp(sigma * torch.special.ndtri(below))
    want = w.sum(1)
    assert abs(got.mean() - want.mean()) < 5 * (2 * want.var() / size).sqrt()
    assert abs(got.var() / want.var() - 1) < 0.1

    which = torch.rand(size, vocabulary).argsort(dim=1)[:, :bulk]
    around = torch.einsum("nb,nbh->nh", w - w.mean(1, keepdim=True), weight[which])
    factor = embedding_moments(weight).factor
    got = (spread * total).square().mean() * factor @ factor.T
    assert relative(got, around.T @ around / size) < 0.1


# ---- gradients ----


@pytest.mark.parametrize("num_top", [1, 4, 11])
def test_backward_of_fixed_noise_is_the_derivative(num_top):
    """The sums follow the weights, as they do when moments are fresh; the factor is a constant."""
    arguments = inputs(2, 3, 12, 4, torch.float64)
    weight = arguments.pop("weight_VH").requires_grad_()
    factor = embedding_moments(weight).factor

    def embedding(weight):
        moments = EmbeddingMoments(weight.detach().sum(0), factor)
        return simplex_embedding(**arguments, weight_VH=weight, num_top=num_top, moments=moments)

    assert torch.autograd.gradcheck(embedding, weight)


def test_dense_backward_is_the_derivative():
    arguments = inputs(2, 3, 12, 4, torch.float64)
    weight = arguments.pop("weight_VH").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda weight: simplex_embedding(**arguments, weight_VH=weight, noise="dense"), weight
    )


@pytest.mark.parametrize("sigma", [0.8, 2.3, 3.5])
def test_the_mean_gradient_is_the_dense_one(sigma):
    """Of a curved loss, over runs that say by how much two means of dense runs would differ."""
    weight = 0.3 * trained_like(600, 12)
    mixing = torch.randn(12, 12, dtype=torch.float64) / 3
    signal = math.sqrt(SIMPLEX_VALUE**2 - sigma**2)

    def gradient(seed, **options):
        leaf = weight.clone().requires_grad_()
        x = law_samples(leaf, signal, sigma, 4_096, token=TOKEN, seed=seed, **options)
        (x @ mixing).tanh().square().sum().backward()
        return leaf.grad.double()

    dense = torch.stack([gradient(seed, noise="dense") for seed in range(8)])
    sampled = torch.stack([gradient(seed, num_top=16) for seed in range(8, 16)])
    two_dense_runs = (2 * dense.var(0) / 8).sum(1)
    difference = sampled.mean(0) - dense.mean(0)
    others = torch.arange(600) != TOKEN
    assert difference[others].norm() < 1.5 * two_dense_runs[others].sum().sqrt()
    assert difference[TOKEN].norm() < 4 * two_dense_runs[TOKEN].sqrt()  # one direction, mostly
    shared = sampled.mean(0)[others].mean(0)  # wrong: without the row that every token gets
    assert (difference[others] - shared).norm() > 2 * two_dense_runs[others].sum().sqrt()


def test_a_token_in_many_positions_gathers_all_their_gradients():
    arguments = inputs(3, 40, 9, 5, torch.float64)
    _, whole, direction = value_and_gradient(arguments, num_top=8)
    parts = torch.zeros_like(whole)
    for b in range(3):
        for t in range(40):
            rows = module.Rows(
                *(arguments[name][b : b + 1, t : t + 1] * factor
                  for name, factor in (("token_ids_BL", 1), ("signal_BL", 2), ("noise_BL", 1))),
                arguments["keys_B"][b : b + 1], 4,
            )
            rows.positions_R += t
            ids, tokens = module.draw_tokens(rows, 9, 8)
            for token, p in zip(ids[0], tokens.weights_RJ[0]):
                parts[token] += p * direction[b, t]
    assert relative(whole, parts) < 1e-12


def test_scales_get_no_gradient():
    arguments = inputs(2, 3)
    arguments["signal_BL"].requires_grad_()
    assert not simplex_embedding(**arguments).requires_grad


# ---- moments ----


def test_moments_are_the_sum_and_the_centred_second_moment():
    weight = trained_like(9_001)
    moments = embedding_moments(weight)
    centred = weight.double() - weight.double().mean(0)
    assert relative(moments.sums, weight.double().sum(0)) < 1e-6
    assert relative(moments.factor @ moments.factor.T, centred.T @ centred) < 1e-5
    arguments = inputs(2, 3, 9_001, 24)
    arguments["weight_VH"] = weight
    assert torch.equal(
        simplex_embedding(**arguments), simplex_embedding(**arguments, moments=moments)
    )


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_an_embedding_of_low_rank_has_moments_too(rank):
    weight = torch.randn(5_000, rank) @ torch.randn(rank, 300) + torch.ones(300)
    factor = embedding_moments(weight).factor.double()
    centred = weight.double() - weight.double().mean(0)
    error = (factor @ factor.T - centred.T @ centred).norm()
    assert factor.isfinite().all() and error <= 1e-4 * centred.norm() ** 2 + 1e-6


def test_an_embedding_that_is_not_finite_has_no_moments():
    with pytest.raises(ValueError, match="the embedding must be finite"):
        embedding_moments(torch.full((10, 3), float("nan")))


# ---- errors ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_top": 0}, r"num_top must be in 1\.\.299, got 0"),
        ({"num_top": 300}, r"num_top must be in 1\.\.299, got 300"),
        ({"noise": "sparse"}, "noise must be one of order_statistics, dense, got 'sparse'"),
        ({"token_ids_BL": torch.full((3, 21), 300)}, r"token ids must be in 0\.\.299, got 300\.\."),
        ({"token_ids_BL": torch.full((3, 21), -1)}, r"token ids must be in 0\.\.299, got -1\.\."),
        (
            {"token_ids_BL": torch.zeros(3, 21)},
            r"token_ids must be int64 \[B, L\], got torch.float",
        ),
        ({"token_ids_BL": torch.zeros(63).long()}, r"must be int64 \[B, L\], got .* \[63\]"),
        ({"signal_BL": torch.zeros(3)}, r"signal scale must be \[3, 1\] or \[3, 21\], got \[3\]"),
        ({"noise_BL": torch.zeros(1, 21)}, r"noise scale must be .*, got \[1, 21\]"),
        ({"noise_BL": torch.full((3, 1), -0.5)}, "noise scale must not be negative, got -0.5"),
        ({"noise_BL": torch.full((3, 1), math.nan)}, "noise scale must not be negative, got nan"),
        ({"keys_B": torch.arange(4)}, r"keys must be int64 \[3\], got torch.int64 \[4\]"),
        ({"keys_B": torch.zeros(3)}, r"keys must be int64 \[3\], got torch.float32"),
        ({"weight_VH": torch.zeros(1, 5)}, r"\[V, H\] with V >= 2, got \[1, 5\]"),
        ({"counter": 2**32}, "draw must be in"),
        ({"moments": EmbeddingMoments(torch.ones(4), torch.eye(4))}, r"width 5, got \[4, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        simplex_embedding(**{**inputs(), **change})
