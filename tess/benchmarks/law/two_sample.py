"""Are two sets of embeddings drawn from the same law? Three statistics, each with its null.

- Kolmogorov-Smirnov over projections: sup |F_1 - F_2| of the values along directions that matter to
  an embedding matrix, and of the distance from its mean row. Sees any change of one projection's
  law, its tails least.
- Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| (G. Szekely and M. Rizzo, "Energy statistics: a
  class of statistics based on distances", J. Stat. Plan. Inference 143, 2013): 0 only for equal
  laws, with its law under permutation of the labels. Sees all dimensions at once.
- A classifier trained on one half and tested on the other (D. Lopez-Paz and M. Oquab, "Revisiting
  classifier two-sample tests", arXiv 1610.06545): accuracy 0.5 is indistinguishable. Sees small
  changes spread over many coordinates.

Samples of the two sides are independent of each other, and the rows of one side too.
"""

# V vocabulary, H width, N and M samples a side, D directions, P permutations, F features

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tess.errors import UserError
from tess.kernels.simplex_embedding import simplex_embedding

LEADING, RANDOM = 3, 5  # directions; with the token's own and the distance that makes 10 tests
KS_LEVEL = 1e-3
# The null of the energy distance is skewed, a sum of scaled chi-squares. Were it one with a single
# degree of freedom, 6 deviations would be passed with probability 0.002; of many it is far less.
ENERGY_BOUND = 6.0
ACCURACY_BOUND = 4.5  # one-sided normal: 3e-6
ENERGY_ROWS = 1_024
PERMUTATIONS = 200
RIDGE = 1e-3
KEYS = 8


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds in two sets of samples."""

    ks: float
    """Largest sup |F_1 - F_2| of the projections and the distance from the mean, in [0, 1]."""

    ks_share: float
    """The same over its bound: above 1 with probability `KS_LEVEL` for equal laws."""

    energy: float
    """Energy distance less its mean under permutation, in standard deviations of that null."""

    accuracy: float
    """Of the classifier on held-out rows; 0.5 is chance."""

    accuracy_deviations: float
    """(accuracy - 0.5), in standard deviations of a coin thrown as often."""

    @property
    def worst(self) -> float:
        """The largest of the three statistics, each over its bound; above 1 the laws differ."""
        return max(
            self.ks_share, self.energy / ENERGY_BOUND, self.accuracy_deviations / ACCURACY_BOUND
        )


@dataclass(frozen=True)
class Probes:
    """What is measured of an embedding of one token in the matrix E; all float64.

    The token's own noise moves an embedding along one line and would drown all else on most axes,
    so that line is kept apart.
    """

    mean_H: Tensor
    """E's mean row."""

    axes_HH: Tensor
    """In columns: E's principal axes across that line, which is their first one; leading last."""

    directions_DH: Tensor
    """Leading axes, random directions, and the token's own from the mean."""

    @classmethod
    def of(cls, weight_VH: Tensor, token: int) -> "Probes":
        """Those of E and of the token that is noised."""
        mean_H = weight_VH.double().mean(0)
        centred_VH = weight_VH.double() - mean_H
        own_H = centred_VH[token]
        unit_H = own_H / own_H.norm().clamp(min=1e-30)
        across_VH = centred_VH - (centred_VH @ unit_H)[:, None] * unit_H
        axes_HH = torch.linalg.eigh(across_VH.T @ across_VH).eigenvectors
        generator = torch.Generator().manual_seed(5)
        some = torch.randn(RANDOM, len(mean_H), generator=generator, dtype=torch.float64)
        return cls(mean_H, axes_HH, torch.cat([axes_HH[:, -LEADING:].T, some, own_H[None]]))

    def projections(self, x_NH: Tensor) -> list[Tensor]:
        """The values [N] along every direction, and the distance from the mean."""
        return [*(self.directions_DH @ x_NH.T), (x_NH - self.mean_H).norm(dim=1)]


def compare(
    one_NH: Tensor, other_MH: Tensor, probes: Probes, *, energy_rows: int = ENERGY_ROWS
) -> Comparison:
    """All three statistics of two sets of float64 embeddings, the last two along the axes.

    energy_rows: so many rows of each side, from the first on, make the energy distance, whose cost
    is their square.
    """
    pairs = list(zip(probes.projections(one_NH), probes.projections(other_MH)))
    ks = max(kolmogorov_smirnov(one_N, other_M) for one_N, other_M in pairs)
    one_NH, other_MH = one_NH @ probes.axes_HH, other_MH @ probes.axes_HH
    accuracy, tested = classifier_accuracy(one_NH, other_MH)
    return Comparison(
        ks=ks / _effective_root(len(one_NH), len(other_MH)),
        ks_share=ks / kolmogorov_smirnov_bound(len(pairs)),
        energy=energy_deviations(one_NH[:energy_rows], other_MH[:energy_rows]),
        accuracy=accuracy,
        accuracy_deviations=(accuracy - 0.5) * 2 * math.sqrt(tested),
    )


# ---- Kolmogorov-Smirnov ----


def kolmogorov_smirnov(one_N: Tensor, other_M: Tensor) -> float:
    """sup |F_1 - F_2| times sqrt(N M / (N + M)), of two sets of numbers; ties are allowed.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise UserError("laws need scipy: pip install 'tess-diffusion[bench]'") from error
    found = ks_2samp(one_N.numpy(), other_M.numpy(), method="asymp")  # whose p-value is not used
    return float(found.statistic) * _effective_root(len(one_N), len(other_M))


def _effective_root(one: int, other: int) -> float:
    return math.sqrt(one * other / (one + other))


def kolmogorov_smirnov_bound(tests: int, level: float = KS_LEVEL) -> float:
    """What the largest of so many `kolmogorov_smirnov` exceeds with probability `level` at most.

    Smirnov's limit, 1 - P = 2 sum_i (-1)^(i-1) exp(-2 i^2 x^2), by its first term, which is above
    it, and Bonferroni's inequality: the tests may depend on each other.
    """
    return math.sqrt(-math.log(level / tests / 2) / 2)


# ---- energy distance ----


def energy_deviations(
    one_NH: Tensor, other_NH: Tensor, permutations: int = PERMUTATIONS, seed: int = 0
) -> float:
    """Energy distance of as many rows a side, in standard deviations around its null's mean.

    Coordinates are standardised over both sides together, which no permutation changes. The
    distance is -s^T D s / N^2 with the distances D of all pairs and s = +1 and -1 for the two
    sides, so that all permutations together are one product.
    """
    both = torch.cat([one_NH, other_NH])
    # centred first: a mean far above the deviation would leave float32 no digits of a distance
    both = ((both - both.mean(0)) / both.std(0).clamp(min=1e-30)).float()
    sign = torch.ones(len(both))
    sign[len(one_NH) :] = -1
    generator = torch.Generator().manual_seed(seed)
    shuffled = [sign[torch.randperm(len(both), generator=generator)] for _ in range(permutations)]
    signs = torch.stack([sign, *shuffled], dim=1)
    value, *null = -(signs * (torch.cdist(both, both) @ signs)).sum(0).double()
    null_P = torch.stack(null)
    return ((value - null_P.mean()) / null_P.std()).item()


# ---- classifier ----


def classifier_accuracy(one_NH: Tensor, other_MH: Tensor) -> tuple[float, int]:
    """Held-out accuracy of a least-squares classifier and the number of rows it was tested on.

    Features are the standardised coordinates, their squares and the norm; the first half of each
    side trains. Sides of one size are expected, so that chance is 0.5.
    """
    both = torch.cat([one_NH, other_MH])
    mean, deviation = both.mean(0), both.std(0).clamp(min=1e-30)

    def features(x_NH: Tensor) -> Tensor:
        x_NH = (x_NH - mean) / deviation
        rest = [x_NH.clamp(-4, 4) ** 2, x_NH.norm(dim=1, keepdim=True), x_NH.new_ones(len(x_NH), 1)]
        return torch.cat([x_NH, *rest], dim=1)

    one_NF, other_MF = features(one_NH), features(other_MH)
    half, other_half = len(one_NF) // 2, len(other_MF) // 2
    train = torch.cat([one_NF[:half], other_MF[:other_half]])
    label = torch.cat([train.new_ones(half), -train.new_ones(other_half)])
    ridge = RIDGE * len(train) * torch.eye(train.shape[1], dtype=train.dtype)
    plane_F = torch.linalg.solve(train.T @ train + ridge, train.T @ label)
    right = (one_NF[half:] @ plane_F > 0).sum() + (other_MF[other_half:] @ plane_F < 0).sum()
    tested = len(both) - half - other_half
    return right.item() / tested, tested


# ---- what is compared ----


def trained_like(vocab_size: int, width: int = 24) -> Tensor:
    """An embedding matrix [V, H] with what trained ones have, the same one every time.

    Clusters, a falling spectrum, heavy-tailed norms and a common direction.
    """
    generator = torch.Generator().manual_seed(1)
    clusters = torch.randn(40, width, generator=generator)
    member = clusters[torch.randint(40, (vocab_size,), generator=generator)]
    noise = torch.randn(vocab_size, width, generator=generator)
    spectrum = 3 * torch.arange(1, width + 1).float() ** -0.7
    norms = torch.exp(0.5 * torch.randn(vocab_size, 1, generator=generator))
    common = torch.randn(1, width, generator=generator)
    return (0.7 * member + noise) * spectrum * norms + 0.5 * common


def sample_keys(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys [B] for `size` samples of a seed, apart from every other seed's, and positions [L]."""
    return torch.arange(KEYS) + 1_000 * seed, torch.arange(-(-size // KEYS))


def law_samples(
    weight_VH: Tensor,
    signal: float,
    sigma: float,
    size: int,
    *,
    token: int,
    seed: int,
    **options: Any,
) -> Tensor:
    """Independent embeddings of one noised token, [N, H] float64.

    signal, sigma: the scales signal_BL and noise_BL of `simplex_embedding`, which gets `options`.
    """
    keys_B, positions_L = sample_keys(size, seed)
    ids_BL = torch.full((len(keys_B), len(positions_L)), token)
    signal_B1, sigma_B1 = (torch.full((len(keys_B), 1), float(x)) for x in (signal, sigma))
    x_BLH = simplex_embedding(ids_BL, signal_B1, sigma_B1, weight_VH, keys_B=keys_B, **options)
    return x_BLH.double().flatten(0, 1)[:size]
