"""The embedding softmax(x) E of x = sigma eps + a short list of tokens' logits; eps stays the same.

Deterministic samplers keep one noise over all steps and carry a sum of past predictions. With each
prediction cut to its likeliest tokens that sum is a list of token ids and logits per position, and
of eps the same is needed as in `simplex_embedding.py`: its K largest values with their tokens, and
what all others add up to.

At one sigma: a listed token among the K largest has that noise. Any other listed token's noise is
normal and below the smallest of them, whatever the others are (order statistics are a Markov
chain); it is drawn from a uniform number of its own, which its id settles, so it is the same in
every step. Both are exact. The bulk, all tokens that are neither, has the mean and the Gaussian of
`order_statistics.token_weights`, an approximation.

Over the steps: the noises of the K largest and of listed tokens stay the same, as in the dense
form. The bulk's two normals stay the same too. That correlates it fully between any two sigmas,
where the dense form's correlation falls with their distance, and it knows nothing of the noise
that a token had in it before it was listed. `python scripts/benchmark.py carried` measures both.
"""

# B examples, L positions, V vocabulary, H width of the embedding; R rows (positions of examples),
# W listed tokens of a position, K top tokens, J = K + W

from typing import NamedTuple

import torch
from torch import Tensor

from tess.kernels import random
from tess.kernels.order_statistics import (
    EmbeddingMoments,
    LargestNormals,
    embedding_moments,
    largest_normals,
    maths_dtype,
    truncated_moments,
)
from tess.kernels.simplex_embedding import (
    DEVICE_DRAWN_VALUES,
    DRAWN_VALUES,
    SLAB_ROWS,
    Rows,
    bulk_noise,
    pad_rows,
    weighted_rows,
)

EMPTY = -1
"""The id of a place in a list that holds no token."""


class CarriedWeights(NamedTuple):
    """What of a position's softmax its embedding needs; weights are float64."""

    ids_RJ: Tensor
    """Top tokens, then listed ones, int64."""

    excess_RJ: Tensor
    """Their weights less the share; 0 for a listed token that is on top and for empty places."""

    share_R: Tensor
    """Mean weight of the tokens of the bulk."""

    spread_R: Tensor
    """The bulk's part of an embedding has this times L z around its mean."""


@torch.no_grad()
def carried_embedding(
    ids_BLW: Tensor,
    logits_BLW: Tensor,
    sigma_BL: Tensor,
    weight_VH: Tensor,
    *,
    keys_B: Tensor,
    draw: int = 0,
    num_top: int = 32,
    moments: EmbeddingMoments | None = None,
) -> Tensor:
    """softmax(x) E, x = sigma eps + the listed tokens' logits, [B, L, H] in E's dtype.

    For sampling: nothing receives a gradient. Weights are computed in float64, products in float32
    (float64 when E is).

    Args:
        ids_BLW: int64, different tokens at each position, or `EMPTY`.
        logits_BLW: what each adds to x, of any sign; float. Tokens without an entry add 0.
        sigma_BL: the noise's scale, [B, 1] or [B, L].
        weight_VH: E.
        keys_B: int64, one per example. With `draw` and the position they settle eps, whatever the
            batch, the padded length, sigma and the list (on a CPU to the last bit).
        draw: which of the keys' draws eps is, in [0, 2^32).
        num_top: K, how many noises are drawn exactly, at most V; with V nothing is approximate.
        moments: of E; computed here when None, which reads all of E.

    Raises ValueError for shapes, ids, scales, K and moments that do not fit.
    """
    _check(ids_BLW, logits_BLW, sigma_BL, weight_VH, keys_B)
    _check_settings(num_top, moments, weight_VH)
    (batch, length), (vocabulary, width) = ids_BLW.shape[:2], weight_VH.shape
    if batch * length == 0:
        return weight_VH.new_zeros(batch, length, width)
    dtype = maths_dtype(weight_VH)
    sigma_BL = sigma_BL.expand(batch, length)
    rows = Rows(torch.zeros_like(sigma_BL, dtype=torch.int64), sigma_BL, sigma_BL, keys_B, draw)
    with torch.autocast(weight_VH.device.type, enabled=False):
        moments = embedding_moments(weight_VH) if moments is None else moments
        lists = (ids_BLW.flatten(0, 1), logits_BLW.flatten(0, 1).double())
        ids_RJ, *weights = _draw(rows, *lists, vocabulary, num_top)
        excess_RJ, share_R, spread_R = (x.to(dtype) for x in weights)
        x_RH = weighted_rows(weight_VH, ids_RJ, excess_RJ)
        x_RH.addcmul_(share_R[:, None], moments.sums.to(dtype))
        if num_top < vocabulary:
            x_RH.addcmul_(spread_R[:, None], bulk_noise(rows, moments.factor.to(dtype)))
    return x_RH.to(weight_VH.dtype).view(batch, length, width)


def _draw(
    rows: Rows, ids_RW: Tensor, logits_RW: Tensor, vocabulary: int, num_top: int
) -> CarriedWeights:
    """Ids and weights of all rows, some of them at a time."""
    values = DRAWN_VALUES if ids_RW.device.type == "cpu" else DEVICE_DRAWN_VALUES
    step = max(1, values // ((num_top + ids_RW.shape[1]) * SLAB_ROWS)) * SLAB_ROWS
    fields = (rows.keys_R, rows.positions_R, rows.sigma_R.double(), ids_RW, logits_RW)
    pieces = []
    for keys_R, positions_R, sigma_R, ids, logits in zip(
        *(pad_rows(field).split(step) for field in fields)
    ):
        place = (keys_R, positions_R, rows.counter)
        largest = largest_normals(*place, vocabulary, num_top)
        words_RW = random.words_of(*place, ids.clamp(min=0), random.LISTED_STREAM)
        uniform_RW = (words_RW.double() + 0.5) * 2.0**-32
        pieces.append(carried_weights(ids, logits, sigma_R, largest, uniform_RW, vocabulary))
    return CarriedWeights(*(torch.cat(parts)[: len(ids_RW)] for parts in zip(*pieces)))


def carried_weights(
    ids_RW: Tensor,
    logits_RW: Tensor,
    sigma_R: Tensor,
    largest: LargestNormals,
    uniform_RW: Tensor,
    vocabulary: int,
) -> CarriedWeights:
    """Softmax over `vocabulary` logits sigma g_i, plus what the list adds to some of them.

    largest: the K largest g. uniform: what settles a listed token's g if it is not one of those.
    The sum of the bulk's weights is taken as Gaussian, from the second extra normal, as in
    `order_statistics.token_weights`. All float64.
    """
    top_RK, top_ids_RK, pair_R2 = largest
    slot_RW, on_top_RW = _find(ids_RW, top_ids_RK)
    present_RW = (ids_RW != EMPTY) & ~on_top_RW
    added_RK = torch.zeros_like(top_RK)
    added_RK.scatter_add_(1, slot_RW, logits_RW.masked_fill(~on_top_RW, 0.0))

    limit_R = top_RK[:, -1].contiguous()
    noise_RJ = torch.cat([top_RK, _below(limit_R[:, None], uniform_RW)], dim=1)
    logits_RJ = sigma_R[:, None] * noise_RJ + torch.cat([added_RK, logits_RW], dim=1)
    present_RJ = torch.cat([torch.ones_like(top_ids_RK, dtype=torch.bool), present_RW], dim=1)
    logits_RJ = logits_RJ.masked_fill(~present_RJ, -torch.inf)

    bulk_R = (vocabulary - top_RK.shape[1] - present_RW.sum(dim=1)).double()
    log_mean_R, variance_R = truncated_moments(limit_R, sigma_R)
    log_mean_R = log_mean_R.masked_fill(bulk_R == 0, -torch.inf)
    shift_R = logits_RJ.amax(dim=1).maximum(log_mean_R)
    weights_RJ, mean_R = torch.exp(logits_RJ - shift_R[:, None]), torch.exp(log_mean_R - shift_R)
    deviation_R = (variance_R / bulk_R.clamp(min=1)).sqrt()
    share_R = mean_R * (1 + deviation_R * pair_R2[:, 1]).clamp(min=0)
    spread_R = mean_R * (variance_R * ((bulk_R - 1).clamp(min=0) / vocabulary)).sqrt()
    total_R = weights_RJ.sum(dim=1) + bulk_R * share_R
    excess_RJ = (weights_RJ - share_R[:, None]).masked_fill(~present_RJ, 0.0) / total_R[:, None]
    ids_RJ = torch.cat([top_ids_RK, ids_RW.clamp(min=0)], dim=1)
    return CarriedWeights(ids_RJ, excess_RJ, share_R / total_R, spread_R / total_R)


def _find(ids_RW: Tensor, top_ids_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Where each id would be among the top ones [R, W], and whether it is there."""
    sorted_RK, order_RK = top_ids_RK.sort(dim=1)
    place_RW = torch.searchsorted(sorted_RK, ids_RW.contiguous())
    place_RW = place_RW.clamp_(max=top_ids_RK.shape[1] - 1)
    return order_RK.gather(1, place_RW), sorted_RK.gather(1, place_RW) == ids_RW


def _below(limit_R1: Tensor, uniform_RW: Tensor) -> Tensor:
    """Standard normals known to be below the limit, by inversion at the uniforms."""
    share_R1 = torch.special.ndtr(limit_R1)
    return torch.special.ndtri(uniform_RW * share_R1).minimum(limit_R1)


# ---- lists ----


def merge_lists(
    ids_BLW: Tensor, weights_BLW: Tensor, more_ids_BLM: Tensor, more_weights_BLM: Tensor
) -> tuple[Tensor, Tensor]:
    """Both lists in one, [B, L, W + M], by rising id; an id of both has the sum of its weights.

    Within either list the ids of a position differ, `EMPTY` excepted.
    """
    ids = torch.cat([ids_BLW, more_ids_BLM], dim=-1)
    ids, order = ids.sort(dim=-1, stable=True)
    weights = torch.cat([weights_BLW, more_weights_BLM], dim=-1).gather(-1, order)
    # an id is there twice at most, so the second one's weight goes to its neighbour
    again = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] != EMPTY)
    weights[..., :-1] += weights[..., 1:].masked_fill(~again, 0.0)
    weights[..., 1:].masked_fill_(again, 0.0)
    ids[..., 1:].masked_fill_(again, EMPTY)
    return ids, weights


def largest_of_list(ids_BLW: Tensor, weights_BLW: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `most` entries with the largest |weight|, or all of them where W is no more than that.

    Empty places go first, then of equal entries the later ones.
    """
    if ids_BLW.shape[-1] <= most:
        return ids_BLW, weights_BLW
    sizes = weights_BLW.abs().masked_fill(ids_BLW == EMPTY, -1.0)
    kept = sizes.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    return ids_BLW.gather(-1, kept), weights_BLW.gather(-1, kept)


# ---- checks ----


def _check(
    ids_BLW: Tensor, logits_BLW: Tensor, sigma_BL: Tensor, weight_VH: Tensor, keys_B: Tensor
) -> None:
    if ids_BLW.ndim != 3 or ids_BLW.dtype != torch.int64:
        raise ValueError(
            f"listed ids must be int64 [B, L, W], got {ids_BLW.dtype} {list(ids_BLW.shape)}"
        )
    if logits_BLW.shape != ids_BLW.shape:
        raise ValueError(
            f"listed logits must be {list(ids_BLW.shape)}, got {list(logits_BLW.shape)}"
        )
    batch, length = ids_BLW.shape[:2]
    if tuple(sigma_BL.shape) not in ((batch, 1), (batch, length)):
        raise ValueError(
            f"the noise scale must be [{batch}, 1] or [{batch}, {length}], "
            f"got {list(sigma_BL.shape)}"
        )
    if weight_VH.ndim != 2 or len(weight_VH) < 2:
        raise ValueError(f"the embedding must be [V, H] with V >= 2, got {list(weight_VH.shape)}")
    if tuple(keys_B.shape) != (batch,) or keys_B.dtype != torch.int64:
        raise ValueError(f"keys must be int64 [{batch}], got {keys_B.dtype} {list(keys_B.shape)}")
    if not bool((sigma_BL >= 0).all()):
        raise ValueError(f"the noise scale must not be negative, got {float(sigma_BL.min())}")
    if ids_BLW.numel() and not EMPTY <= int(ids_BLW.min()) <= int(ids_BLW.max()) < len(weight_VH):
        raise ValueError(
            f"listed ids must be in 0..{len(weight_VH) - 1}, or {EMPTY} for none, "
            f"got {int(ids_BLW.min())}..{int(ids_BLW.max())}"
        )


def _check_settings(num_top: int, moments: EmbeddingMoments | None, weight_VH: Tensor) -> None:
    vocabulary, width = weight_VH.shape
    if not 1 <= num_top <= vocabulary:
        raise ValueError(f"num_top must be in 1..{vocabulary}, got {num_top}")
    if moments is not None and moments.factor.shape != (width, width):
        raise ValueError(f"the moments must be of width {width}, got {list(moments.factor.shape)}")
