"""The embedding drawn by order statistics has the dense law: two-sample tests over all times.

Each has wrong samplers beside it that the same statistics must reject. The vocabularies are 400,
4,096 (the shipped checkpoint's matrix), 32,000 and 131,072.
"""

# V vocabulary, H width, N samples

import math
from dataclasses import dataclass
from functools import cache, cached_property

import pytest
import torch
from safetensors.torch import save_file

from tess.benchmarks.doors import law
from tess.benchmarks.law.order_statistics import (
    benchmark_law,
    incomplete_samples,
    median_token,
    read_matrix,
)
from tess.benchmarks.law.two_sample import (
    Probes,
    classifier_accuracy,
    compare,
    energy_deviations,
    kolmogorov_smirnov,
    kolmogorov_smirnov_bound,
    law_samples,
    trained_like,
)
from tess.cli import DEFAULT_CHECKPOINT
from tess.errors import UserError
from tess.kernels.order_statistics import embedding_moments
from tess.schedulers.noise import alpha_bar
from tess.schedulers.recoverability import auto_simplex_value

TIMES = (0.05, 0.2, 0.3, 0.5, 1.0)
# samples a side: a dense one costs 0.04, 0.12, 0.8 and 3 ms
SIZES = {400: 8_192, 4_096: 4_096, 32_000: 1_536, 131_072: 512}


@dataclass(frozen=True, eq=False)
class Matrix:
    """An embedding matrix, the token that is noised, and the simplex value."""

    weight: torch.Tensor
    simplex_value: float
    token: int
    size: int

    @cached_property
    def moments(self):
        return embedding_moments(self.weight)

    @cached_property
    def probes(self):
        return Probes.of(self.weight, self.token)

    def arguments(self, t):
        share = float(alpha_bar(t))
        scales = self.simplex_value * share**0.5, self.simplex_value * (1 - share) ** 0.5
        return (self.weight, *scales, self.size)

    def right(self, t, seed, **options):
        return law_samples(*self.arguments(t), token=self.token, seed=seed, **options)

    def wrong(self, t, seed, **options):
        options |= {"token": self.token, "seed": seed, "moments": self.moments}
        return incomplete_samples(*self.arguments(t), **options)


@cache
def matrix(vocabulary):
    if vocabulary == 4_096:
        weight = read_matrix(DEFAULT_CHECKPOINT / "tess" / "denoiser")
    else:
        weight = trained_like(vocabulary, 16 if vocabulary > 100_000 else 24)
    k = 5.0 if vocabulary == 400 else auto_simplex_value(vocabulary)  # 5: few tokens at t = 1
    return Matrix(weight, k, median_token(weight), SIZES[vocabulary])


@cache
def dense_samples(vocabulary, t):
    return matrix(vocabulary).right(t, 1, noise="dense")


# ---- the law ----


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("vocabulary", SIZES)
def test_sampled_embeddings_have_the_dense_law(vocabulary, t):
    case, dense = matrix(vocabulary), dense_samples(vocabulary, t)
    for seed, num_top in ((2, 16), (3, 32)):
        sampled = case.right(t, seed, num_top=num_top, moments=case.moments)
        assert compare(sampled, dense, case.probes).worst < 1


# Where a part of the law matters: the bulk's weight until few tokens carry everything, its noise
# while many tokens share the weight, the true token's noise while that token is not yet lost; a
# trained matrix has correlations. The statistics are at least 1.3 times their bounds there.
TOLD_APART = [
    ("bulk", 32, 400, TIMES[:3]), ("bulk", 32, 4_096, TIMES), ("bulk", 32, 32_000, TIMES),
    ("bulk", 32, 131_072, TIMES[:4]), ("bulk", 16, 131_072, TIMES[4:]),
    ("bulk noise", 32, 400, TIMES[:1]), ("bulk noise", 32, 4_096, TIMES[:3]),
    ("bulk noise", 32, 32_000, TIMES[:2]), ("bulk noise", 32, 131_072, TIMES[:2]),
    ("own noise", 32, 400, TIMES[:3]), ("own noise", 32, 4_096, TIMES[:4]),
    ("own noise", 32, 32_000, TIMES[:3]), ("own noise", 32, 131_072, TIMES[:3]),
    ("correlations", 32, 4_096, TIMES[:3]),
]


@pytest.mark.parametrize(
    "without, num_top, vocabulary, t", [(*case, t) for *case, times in TOLD_APART for t in times]
)
def test_samplers_that_leave_something_out_are_told_apart(without, num_top, vocabulary, t):
    case, dense = matrix(vocabulary), dense_samples(vocabulary, t)
    wrong = case.wrong(t, 4, without=without, num_top=num_top)
    assert compare(wrong, dense, case.probes).worst > 1


@pytest.mark.parametrize("vocabulary", [2, 3, 6, 40])
def test_with_all_tokens_on_top_the_law_is_the_dense_one(vocabulary):
    weight = trained_like(vocabulary).double()  # nearly one-hot: float32 would round to one value
    token = 7 % vocabulary
    for sigma in (2.3, 5.0):
        scales = (math.sqrt(25 - sigma**2), sigma)
        dense, sampled = (
            law_samples(weight, *scales, 4_096, token=token, seed=seed, **options)
            for seed, options in ((1, {"noise": "dense"}), (2, {"num_top": vocabulary - 1}))
        )
        assert compare(sampled, dense, Probes.of(weight, token)).worst < 1


def test_ids_drawn_with_replacement_are_told_apart():
    weight, scales = trained_like(6), (0.0, 1.0)
    probes, options = Probes.of(weight, 1), {"token": 1, "num_top": 5}
    dense = law_samples(weight, *scales, 4_096, token=1, seed=1, noise="dense")
    for without, differ in ((None, False), ("distinct ids", True)):
        sampled = incomplete_samples(weight, *scales, 4_096, without=without, seed=2, **options)
        assert (compare(sampled, dense, probes).worst > 1) == differ


@pytest.mark.parametrize("num_top", [1, 16, 299])
def test_with_nothing_left_out_the_samples_are_those_of_the_kernel(num_top):
    weight = trained_like(300, 7)
    options = {"token": 150, "seed": 3, "num_top": num_top}
    got = incomplete_samples(weight, 2.0, 1.5, 101, without=None, **options)
    want = law_samples(weight, 2.0, 1.5, 101, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="one of bulk, bulk noise, .*, got 'all'"):
        incomplete_samples(weight, 2.0, 1.5, 101, without="all", **options)


# ---- the statistics ----


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_kolmogorov_smirnov_is_the_largest_difference_of_distribution_functions():
    one, other = (normals(50) * 4).round(), (normals(31, seed=1) * 4 + 1).round()  # with ties
    at = torch.cat([one, other])
    functions = [(x[None] <= at[:, None]).double().mean(1) for x in (one, other)]
    want = (functions[0] - functions[1]).abs().max() * math.sqrt(50 * 31 / 81)
    assert kolmogorov_smirnov(one, other) == pytest.approx(float(want), rel=1e-12)
    assert kolmogorov_smirnov(one, one) == 0


def test_kolmogorov_smirnov_passes_its_bound_as_often_as_it_says():
    one, other = normals(2_000, 300), normals(2_000, 300, seed=1)
    found = torch.tensor([kolmogorov_smirnov(*pair) for pair in zip(one, other)])
    assert 0.03 < (found > kolmogorov_smirnov_bound(1, 0.05)).double().mean() < 0.06
    assert kolmogorov_smirnov_bound(1, 0.05) == pytest.approx(1.358, abs=1e-3)  # Smirnov's table
    assert kolmogorov_smirnov_bound(10, 0.5) == kolmogorov_smirnov_bound(1, 0.05)


def test_energy_deviations_are_those_of_the_definition():
    one, other = normals(8, 3), normals(8, 3, seed=1) + 2.0
    both = torch.cat([one, other]) / torch.cat([one, other]).std(0)

    def distance(order):
        x, y = both[order[:8]], both[order[8:]]
        mean = [torch.cdist(*pair).mean() for pair in ((x, y), (x, x), (y, y))]
        return 2 * mean[0] - mean[1] - mean[2]

    generator = torch.Generator().manual_seed(2)
    orders = [torch.randperm(16, generator=generator) for _ in range(4_000)]
    null = torch.stack([distance(order) for order in orders])
    want = (distance(torch.arange(16)) - null.mean()) / null.std()
    got = energy_deviations(one, other, permutations=4_000)
    assert want > 4 and got == pytest.approx(float(want), rel=0.1)
    moved = energy_deviations(one + 1e6, other + 1e6, permutations=4_000)
    assert moved == pytest.approx(got, rel=1e-3)


def test_a_classifier_is_as_good_as_it_can_be_and_no_better_than_chance():
    one = normals(20_000, 4)
    for shift in (0.0, 1.0):
        other = normals(20_000, 4, seed=1)
        other[:, 2] += shift
        accuracy, tested = classifier_accuracy(one, other)
        best = torch.special.ndtr(torch.tensor(shift / 2))  # of a half-way plane
        assert tested == 20_000 and accuracy == pytest.approx(float(best), abs=0.012)
    wide = normals(20_000, 4, seed=1) * torch.tensor([1.0, 1.0, 1.5, 1.0])
    assert classifier_accuracy(one, wide)[0] > 0.55  # no plane in x itself sees that


def test_equal_laws_pass_and_small_changes_of_any_kind_do_not():
    weight = trained_like(50, 6)
    probes = Probes.of(weight, 3)
    for seed in range(8):
        one, other = (normals(1_000, 6, seed=s) for s in (2 * seed, 2 * seed + 1))
        assert compare(one, other, probes).worst < 1
    for changed in (other + 0.3, other * 1.25, other.clamp(-1, 1), other.roll(1, 1) + other):
        assert compare(one, changed, probes).worst > 1


# ---- the benchmark ----


def small_benchmark(**options):
    return benchmark_law(60, 5, times=(0.3, 1.0), num_tops=(8, 16), n=512, **options)


def test_the_benchmark_compares_every_sampler_at_every_time():
    result = small_benchmark(seed=1)
    assert (result["benchmark"], result["embedding"], result["n"]) == ("law", "synthetic", 512)
    assert result["simplex_value"] == auto_simplex_value(60)
    names = ["dense", "K=8", "K=16"]
    names += [f"K=16 without {part}" for part in ("bulk", "bulk noise", "own noise")]
    rows = {(row["time"], row["sampler"]): row for row in result["rows"]}
    assert list(rows) == [(t, name) for t in (0.3, 1.0) for name in names]
    assert not any(row["rejected"] for (_, name), row in rows.items() if "without" not in name)
    wrong = rows[0.3, "K=16 without bulk"]
    assert wrong["rejected"] and wrong["ks_share"] > 1 and 0.5 < wrong["accuracy"] <= 1
    assert small_benchmark(seed=1)["rows"] == result["rows"] != small_benchmark()["rows"]

    lines = law.table(result).splitlines()
    assert lines[0].startswith("law: synthetic embedding 60 x 5, k = 1.64, 512 samples a side")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert table[0] == ["t", "sigma", *names]
    assert [line[0] for line in table[2:]] == ["0.3", "1", "largest"]
    figures = f"{wrong['ks_share']:.2f} / {wrong['energy']:.1f} / {wrong['accuracy']:.3f} *"
    assert table[2][names.index("K=16 without bulk") + 2] == figures


def test_a_matrix_is_read_from_a_file_or_a_folder_by_its_name(tmp_path):
    weight = normals(60, 5).bfloat16()
    others = {
        "bert.position_embeddings.weight": torch.ones(7, 5),
        "time_embedding.weight": torch.ones(5, 1),
    }
    for name in ("bert.word_embeddings.weight", "model.embed_tokens.weight", "embeddings.weight"):
        save_file({**others, name: weight}, tmp_path / "part.safetensors")
        for path in (tmp_path, tmp_path / "part.safetensors"):
            assert torch.equal(read_matrix(path), weight.float())
    result = small_benchmark(embedding=tmp_path / "part.safetensors", simplex_value=2.0, token=4)
    found = [result[key] for key in ("embedding", "vocab_size", "width", "simplex_value", "token")]
    assert found == ["part.safetensors", 60, 5, 2.0, 4]  # the file's name, not where it lies

    save_file({**others, "embeddings.weight": weight}, tmp_path / "more.safetensors")
    message = "one floating-point matrix named .*, got embeddings.weight, embeddings.weight in 2"
    with pytest.raises(UserError, match=message):
        read_matrix(tmp_path)
    save_file(others, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match="got none in 1 safetensors files"):
        read_matrix(tmp_path / "more.safetensors")
    (tmp_path / "more.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="more.safetensors is no readable safetensors file"):
        read_matrix(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 15}, "n must be at least 16 samples a side, got 15"),
        ({"token": 60}, r"token must be in 0\.\.59, got 60"),
        ({"num_tops": (16, 60)}, r"num_tops must be in 1\.\.59, got 60"),
        ({"times": (0.5, 0.0)}, "times must be above 0 and at most 1, got 0.0"),
        ({"vocab_size": 1, "token": 0}, "vocab_size must be at least 3, got 1"),
    ],
)
def test_a_request_that_does_not_fit_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        benchmark_law(**{"vocab_size": 60, "width": 5, "num_tops": (16,), **options})
