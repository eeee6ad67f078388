"""The largest of N standard normals without drawing N numbers, and which tokens they belong to.

Everything is counter-based (`random.py`): a row's values follow from its key, position and draw,
whatever other rows are computed with it. Sums and logarithms are float64.
"""

# R rows (a position of an example each), K top values of a row, N values they are the largest of

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tess.kernels import random

# Below this many values per drawn id a whole shuffle is cheaper than drawing again.
SHUFFLE_BELOW = 4


class TopNormals(NamedTuple):
    """What `top_normals` draws; float64."""

    top_RK: Tensor
    """The K largest of N standard normals, falling."""

    pair_R2: Tensor
    """Two more standard normals, independent of these and of each other."""


def top_normals(
    keys_R: Tensor, positions_R: Tensor, draw: int, count: int, num_top: int
) -> TopNormals:
    """The `num_top` largest of `count` independent standard normals, in their exact joint law.

    Renyi's representation (A. Renyi, "On the theory of order statistics", Acta Math. Acad. Sci.
    Hungar. 4, 1953): with E_i independent and exponential, the j-th largest of N uniforms is
    exp(-(E_1 / N + E_2 / (N - 1) + ... + E_j / (N - j + 1))). So no remainder has to be drawn,
    and it holds for every N and up to j = N.
    """
    blocks = 1 + -(-num_top // 4)
    words_RW = random.words_at(keys_R, positions_R, draw, 0, blocks, random.SPACING_STREAM)
    # half a step off both ends, so that no logarithm is 0 and no value infinite
    uniform_RW = (words_RW.double() + 0.5) * 2.0**-32
    spacing_RK = uniform_RW[:, 4 : 4 + num_top].log().neg()
    left_K = torch.arange(count, count - num_top, -1, device=keys_R.device)
    sums_RK = (spacing_RK / left_K).cumsum(dim=1).contiguous()
    above_RK, below_RK = -torch.expm1(-sums_RK), torch.exp(-sums_RK)
    # whichever of the two probabilities is small keeps its digits
    side_RK = torch.special.ndtri(torch.minimum(above_RK, below_RK))
    top_RK = torch.where(above_RK < below_RK, -side_RK, side_RK)
    radius_R = (-2.0 * uniform_RW[:, 0].contiguous().log()).sqrt()
    angle_R = (2.0 * math.pi) * uniform_RW[:, 1].contiguous()
    return TopNormals(top_RK, torch.stack([radius_R * angle_R.cos(), radius_R * angle_R.sin()], 1))


def truncated_moments(limit_R: Tensor, sigma_R: Tensor) -> tuple[Tensor, Tensor]:
    """log E[e^(sigma g)] and Var[e^(sigma g)] / E[e^(sigma g)]^2 of a normal g known to be < limit.

    With Phi the normal distribution function, E[e^(s g)] = e^(s^2 / 2) Phi(limit - s) / Phi(limit).
    """
    base_R = torch.special.log_ndtr(limit_R)
    log_first_R = sigma_R**2 / 2 + (torch.special.log_ndtr(limit_R - sigma_R) - base_R)
    log_second_R = 2 * sigma_R**2 + (torch.special.log_ndtr(limit_R - 2 * sigma_R) - base_R)
    return log_first_R, torch.expm1(log_second_R - 2 * log_first_R).clamp(min=0)


def distinct_ids(
    keys_R: Tensor, positions_R: Tensor, draw: int, count: int, num_ids: int
) -> Tensor:
    """`num_ids` different ids of 0 .. count - 1 in each row [R, K]: every ordered choice as likely.

    Ids are drawn uniformly, and of equal ones all but the first are drawn again until none are
    equal. That favours no id: the rule looks only at which ids are equal, so renaming the ids
    renames the result, and a law over ordered choices that no renaming changes is uniform. Single
    draws are exactly uniform too (`_candidates`). For few ids per choice the row is a shuffle: ids
    in the order of 63-bit random words, uniform up to ties (N^2 / 2^64).
    """
    if count < SHUFFLE_BELOW * num_ids:
        blocks = -(-2 * count // 4)
        words_RW = random.words_at(keys_R, positions_R, draw, 0, blocks, random.DISTINCT_STREAM)
        order_RN = (words_RW[:, : 2 * count : 2] << 31) | (words_RW[:, 1 : 2 * count : 2] >> 1)
        return order_RN.argsort(dim=1)[:, :num_ids]

    ids_RK = _candidates(keys_R, positions_R, draw, count, num_ids, attempt=0)
    rows = _drawn_again(ids_RK).any(dim=1).nonzero()[:, 0]
    attempt = 0
    while rows.numel():
        attempt += 1
        fresh = _candidates(keys_R[rows], positions_R[rows], draw, count, num_ids, attempt)
        kept = ids_RK[rows]
        kept = torch.where(_drawn_again(kept), fresh, kept)
        ids_RK[rows] = kept
        rows = rows[_drawn_again(kept).any(dim=1)]
    return ids_RK


def _candidates(
    keys_R: Tensor, positions_R: Tensor, draw: int, count: int, num_ids: int, attempt: int
) -> Tensor:
    """Independent ids [R, K], uniform where not negative; a negative one is to be drawn again.

    The high word of word * count, refused where the low word is below 2^32 mod count (D. Lemire,
    "Fast random integer generation in an interval", ACM TOMACS 29, 2019).
    """
    blocks = -(-num_ids // 4)
    words_RW = random.words_at(
        keys_R, positions_R, draw, attempt * blocks, blocks, random.DISTINCT_STREAM
    )
    product_RK = words_RW[:, :num_ids] * count
    refused_RK = (product_RK & random.WORD) < (random.WORD + 1) % count
    marks_K = -1 - torch.arange(num_ids, device=keys_R.device)
    return torch.where(refused_RK, marks_K, product_RK >> 32)


def _drawn_again(ids_RK: Tensor) -> Tensor:
    """True where an id is negative or equals one further left in its row."""
    sorted_RK, order_RK = ids_RK.sort(dim=1, stable=True)
    again_RK = ids_RK < 0
    repeated = again_RK.gather(1, order_RK)[:, 1:] | (sorted_RK[:, 1:] == sorted_RK[:, :-1])
    return again_RK.scatter(1, order_RK[:, 1:], repeated)
