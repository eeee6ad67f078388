"""The largest of N standard normals without drawing all N, and the softmax that follows from them.

Draws are counter-based (`random.py`): a row's values follow from its key, position and draw,
whatever other rows are computed with it. Sums, logarithms and weights are float64.
"""

# R rows (a position of an example each), K top values of a row, N values they are the largest of,
# J = K + 1 tokens of a row, W words; V vocabulary, H width of the embedding, T tokens of a tile

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tess.kernels import random

# Below this many values per drawn id a whole shuffle is cheaper than drawing again.
SHUFFLE_BELOW = 4

MOMENT_TILE = 4096
FIRST_JITTER = 1e-6
LAST_JITTER = 1e-2


class LargestNormals(NamedTuple):
    """What `largest_normals` draws."""

    top_RK: Tensor
    """The K largest of N independent standard normals, falling, float64."""

    ids_RK: Tensor
    """Which of the N they are, in 0 .. N - 1, int64."""

    pair_R2: Tensor
    """Two more standard normals, independent of all these and of each other, float64."""


class TokenWeights(NamedTuple):
    """Softmax weights when the K largest noises are known and the others only in law; float64."""

    weights_RJ: Tensor
    """Of the true token and then of the top tokens."""

    share_R: Tensor
    """Mean weight of all other tokens."""

    spread_R: Tensor
    """The other tokens' part of an embedding has this times L z around its mean (`token_weights`).
    """


@dataclass(frozen=True, eq=False)
class EmbeddingMoments:
    """What the sampler knows of all rows of E at once; detached from the graph."""

    sums: Tensor
    """[H], the sum of the rows."""

    factor: Tensor
    """[H, H], lower: L L^T is the sum over rows of (E_i - mean)(E_i - mean)^T, plus the jitter."""


def largest_normals(
    keys_R: Tensor, positions_R: Tensor, draw: int, count: int, num_top: int
) -> LargestNormals:
    """The `num_top` largest of `count` independent standard normals, in their exact joint law.

    keys_R, positions_R: int64. On a CPU a number of rows divisible by 16, below 16 384 values in
    all, keeps a row's bits apart from what else is computed.
    """
    blocks = -(-num_top // 4)
    words_RW = random.words_at(keys_R, positions_R, draw, 0, 1 + 2 * blocks, random.LARGEST_STREAM)
    noise_RW, choice_RW = words_RW.split([4 + 4 * blocks, 4 * blocks], dim=1)
    # half a step off both ends, so that no logarithm is 0 and no value infinite
    uniform_RW = (noise_RW.double() + 0.5) * 2.0**-32
    radius_R = (-2.0 * uniform_RW[:, 0].log()).sqrt()
    angle_R = (2.0 * math.pi) * uniform_RW[:, 1]
    pair_R2 = torch.stack([radius_R * angle_R.cos(), radius_R * angle_R.sin()], dim=1)
    top_RK = _falling_normals(uniform_RW[:, 4 : 4 + num_top].contiguous(), count)
    ids_RK = _distinct_ids(choice_RW[:, :num_top], keys_R, positions_R, draw, count)
    return LargestNormals(top_RK, ids_RK, pair_R2)


def _falling_normals(uniform_RK: Tensor, count: int) -> Tensor:
    """The largest normals from one uniform each, by Renyi's representation.

    With E_i independent and exponential, the j-th largest of N uniforms is exp(-(E_1 / N +
    E_2 / (N - 1) + ... + E_j / (N - j + 1))), for every N and up to j = N (A. Renyi, "On the theory
    of order statistics", Acta Math. Acad. Sci. Hungar. 4, 1953). What is below needs no draw.
    """
    num_top = uniform_RK.shape[1]
    left_K = torch.arange(count, count - num_top, -1, device=uniform_RK.device)
    sums_RK = (uniform_RK.log().neg_() / left_K).cumsum(dim=1)
    above_RK, below_RK = torch.expm1(-sums_RK).neg_(), torch.exp(-sums_RK)
    # whichever of the two probabilities is small has all its digits
    side_RK = torch.special.ndtri(torch.minimum(above_RK, below_RK))
    return torch.where(above_RK < below_RK, -side_RK, side_RK)


def _distinct_ids(
    words_RK: Tensor, keys_R: Tensor, positions_R: Tensor, draw: int, count: int
) -> Tensor:
    """Different ids of 0 .. count - 1 in each row [R, K], every ordered choice as likely.

    Ids are drawn uniformly, and of equal ones all but the first are drawn again until none are
    equal. That favours no id: the rule looks only at which ids are equal, so renaming the ids
    renames the result, and a law of ordered choices that no renaming changes is uniform. Where many
    would be equal the ids are a shuffle instead: in the order of 63-bit random words, uniform up to
    ties (N^2 / 2^64).
    """
    num_ids = words_RK.shape[1]
    place = (keys_R, positions_R, draw)
    if count < SHUFFLE_BELOW * num_ids:
        words_RW = random.words_at(*place, 0, -(-count // 2), random.DISTINCT_STREAM)
        order_RN = (words_RW[:, : 2 * count : 2] << 31) | (words_RW[:, 1 : 2 * count : 2] >> 1)
        return order_RN.argsort(dim=1)[:, :num_ids]

    ids_RK = _candidates(words_RK, count)
    blocks, attempt = -(-num_ids // 4), 0
    rows = _drawn_again(ids_RK).any(dim=1).nonzero()[:, 0]
    while rows.numel():
        place = (keys_R[rows], positions_R[rows], draw)
        words = random.words_at(*place, attempt * blocks, blocks, random.DISTINCT_STREAM)
        kept = ids_RK[rows]
        kept = torch.where(_drawn_again(kept), _candidates(words[:, :num_ids], count), kept)
        ids_RK[rows] = kept
        rows, attempt = rows[_drawn_again(kept).any(dim=1)], attempt + 1
    return ids_RK


def _candidates(words_RK: Tensor, count: int) -> Tensor:
    """Ids [R, K] from random words: uniform where not negative, the others are to be drawn again.

    The high word of word * count, refused where the low word is below 2^32 mod count (D. Lemire,
    "Fast random integer generation in an interval", ACM TOMACS 29, 2019).
    """
    product_RK = words_RK * count
    refused_RK = (product_RK & random.WORD) < (random.WORD + 1) % count
    marks_K = -1 - torch.arange(words_RK.shape[1], device=words_RK.device)
    return torch.where(refused_RK, marks_K, product_RK >> 32)


def _drawn_again(ids_RK: Tensor) -> Tensor:
    """True where an id is negative or equals one further left in its row."""
    sorted_RK, order_RK = ids_RK.sort(dim=1, stable=True)
    equal_RK = (sorted_RK[:, 1:] == sorted_RK[:, :-1]) | (sorted_RK[:, 1:] < 0)
    return (ids_RK < 0).scatter(1, order_RK[:, 1:], equal_RK)


def truncated_moments(limit_R: Tensor, sigma_R: Tensor) -> tuple[Tensor, Tensor]:
    """log E[e^(s g)] and Var[e^(s g)] / E[e^(s g)]^2 of a standard normal g known to be < limit.

    E[e^(s g)] = e^(s^2 / 2) Phi(limit - s) / Phi(limit), Phi the normal distribution function; at
    s = 0 exactly log 1 and 0.
    """
    base_R = torch.special.log_ndtr(limit_R)
    log_first_R = sigma_R**2 / 2 + (torch.special.log_ndtr(limit_R - sigma_R) - base_R)
    log_second_R = 2 * sigma_R**2 + (torch.special.log_ndtr(limit_R - 2 * sigma_R) - base_R)
    return log_first_R, torch.expm1(log_second_R - 2 * log_first_R).clamp(min=0)


def token_weights(
    gap_R: Tensor, sigma_R: Tensor, largest: LargestNormals, count: int
) -> TokenWeights:
    """Softmax over one logit gap + sigma g and `count` logits sigma g_i, of which K are known.

    The known ones are `largest`, and g is its first extra normal. Given the smallest of them, a,
    the n others are independent normals below a (order statistics are a Markov chain). The sum of
    their weights is taken as Gaussian, from the second extra normal and kept positive: n share.
    Given that, their part of an embedding is taken as Gaussian, with mean n share times the mean of
    their rows, and the covariance of n rows drawn from all: spread^2 L L^T, L L^T being the centred
    second moment of all rows. Both errors are those of the central limit theorem for summands
    capped at e^(sigma a); with K = count nothing is approximate.
    """
    top_RK, _, pair_R2 = largest
    bulk = count - top_RK.shape[1]
    own_R1 = gap_R[:, None] + sigma_R[:, None] * pair_R2[:, :1]
    logits_RJ = torch.cat([own_R1, sigma_R[:, None] * top_RK], dim=1)
    shift_R1 = logits_RJ.max(dim=1, keepdim=True).values
    weights_RJ = torch.exp(logits_RJ - shift_R1)
    if bulk == 0:
        zero_R = torch.zeros_like(gap_R)
        return TokenWeights(weights_RJ / weights_RJ.sum(dim=1, keepdim=True), zero_R, zero_R)
    log_mean_R, variance_R = truncated_moments(top_RK[:, -1].contiguous(), sigma_R)
    mean_R = torch.exp(log_mean_R - shift_R1[:, 0])
    share_R = mean_R * (1 + (variance_R / bulk).sqrt() * pair_R2[:, 1]).clamp(min=0)
    spread_R = mean_R * (variance_R * ((bulk - 1) / count)).sqrt()
    total_R = weights_RJ.sum(dim=1) + bulk * share_R
    return TokenWeights(weights_RJ / total_R[:, None], share_R / total_R, spread_R / total_R)


@torch.no_grad()
def embedding_sums(weight_VH: Tensor, power: int = 1) -> Tensor:
    """The sum of E's rows or of their squares (power 1 or 2), [H] float64.

    Tiles are summed in float32 (float64 if E is).
    """
    dtype = maths_dtype(weight_VH)
    sums_H = torch.zeros(weight_VH.shape[1], dtype=torch.float64, device=weight_VH.device)
    for tile_TH in weight_VH.detach().split(MOMENT_TILE):
        tile_TH = tile_TH.to(dtype)
        sums_H += (tile_TH if power == 1 else tile_TH.square()).sum(0)
    return sums_H


@torch.no_grad()
def embedding_moments(weight_VH: Tensor) -> EmbeddingMoments:
    """Sum and centred second moment of E's rows, in vocabulary tiles; float64 if E is, or float32.

    Tiles are added up in float64. To the second moment 1e-6 of its mean diagonal is added so that
    rounding leaves it positive, and ten times as much as long as it does not. Costs 2 V H^2
    operations; ValueError if E is not finite.
    """
    dtype, width = maths_dtype(weight_VH), weight_VH.shape[1]
    sums_H = embedding_sums(weight_VH)
    mean_H = (sums_H / len(weight_VH)).to(dtype)
    second_HH = sums_H.new_zeros(width, width)
    with torch.autocast(weight_VH.device.type, enabled=False):
        for tile_TH in weight_VH.detach().split(MOMENT_TILE):
            centred_TH = tile_TH.to(dtype) - mean_H
            second_HH += centred_TH.T @ centred_TH
    return EmbeddingMoments(sums_H.to(dtype), _cholesky(second_HH).to(dtype))


class MomentsCache:
    """The moments of an embedding matrix, computed again only after it has changed.

    The sums of its columns and of their squares tell, by their bits: they cost two passes over E,
    the second moment H. So the moments are those of the matrix as it is, in training and in
    sampling, however it was changed, and nothing of them has to be saved with a run. (The squares
    are there because a softmax head's gradient leaves the sums where they are.)
    """

    def __init__(self) -> None:
        self._seen_2H: Tensor | None = None
        self._moments: EmbeddingMoments | None = None

    def of(self, weight_VH: Tensor) -> EmbeddingMoments:
        """As `embedding_moments`."""
        seen_2H = torch.stack([embedding_sums(weight_VH), embedding_sums(weight_VH, power=2)])
        known = self._seen_2H
        same = known is not None and known.device == seen_2H.device and known.equal(seen_2H)
        if not same or self._moments.factor.dtype != maths_dtype(weight_VH):
            self._moments, self._seen_2H = embedding_moments(weight_VH), seen_2H
        return self._moments


def _cholesky(second_HH: Tensor) -> Tensor:
    # never quite 0, so that rows that are all equal have a factor too
    unit = second_HH.diagonal().mean().clamp(min=1e-200)
    jitter = FIRST_JITTER
    while jitter <= LAST_JITTER:
        added_HH = torch.diag((unit * jitter).expand(len(second_HH)))
        factor_HH, failed = torch.linalg.cholesky_ex(second_HH + added_HH)
        if not failed and factor_HH.isfinite().all():
            return factor_HH
        jitter *= 10
    raise ValueError("the embedding must be finite, its second moment has no Cholesky factor")


def maths_dtype(weight_VH: Tensor) -> torch.dtype:
    """In what products and sums are done: float64 for a float64 embedding, or else float32."""
    return torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
