"""The embedding softmax(x) E of a re-noised one-hot simplex x, without the vocabulary dimension.

x = signal S(id) + noise eps, with S(w) = +1 at token w and -1 elsewhere. Up to a shift, which
softmax does not see, the logits are gap + sigma eps at the true token and sigma eps elsewhere, with
gap = 2 signal and sigma = noise: Derrida's random-energy model (B. Derrida, Phys. Rev. B 24, 1981)
with one planted level. When sigma is large few tokens carry the weight, when it is small all do.
`noise="order_statistics"` draws the K largest noises exactly, whom they belong to, and what all
others add up to as one Gaussian vector of the right mean and covariance; the cost does not depend
on the vocabulary. `noise="dense"` draws all of them, tile by tile.
"""

# B examples, L positions, V vocabulary, H width of the embedding; R rows (positions of examples),
# K top tokens of a row, J = K + 1 with the true token first, T tokens of one vocabulary tile,
# U different tokens

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tess.kernels import order_statistics, random

NOISES = ("order_statistics", "dense")

# On the CPU a product always has this many rows, of one example: then its bits do not depend on
# what else is in the batch. Whole groups of rows also keep vectorised functions off their tails.
SLAB_ROWS = 16
DEVICE_SLAB_ROWS = 1024
VOCABULARY_TILE = 4096  # a multiple of 64, as random.normal_at wants it
DRAWN_VALUES = 16_384  # top values per piece of work, below torch's grain for threads
GATHERED_VALUES = 1 << 21  # 8 MiB of float32

FIRST_JITTER = 1e-6
LAST_JITTER = 1e-2


@dataclass(frozen=True, eq=False)
class EmbeddingMoments:
    """What the sampler knows of all rows of E at once; detached from the graph."""

    sums: Tensor
    """[H], the sum of the rows."""

    factor: Tensor
    """[H, H], lower: L L^T is the sum over rows of (E_i - mean)(E_i - mean)^T, plus the jitter."""


class TopTokens(NamedTuple):
    """One draw of the sampler: x = sum_j weights_j E_(ids_j) + share sum_i E_i + spread L z."""

    ids_RJ: Tensor
    weights_RJ: Tensor
    """softmax weight less `share`, which the sum over all rows gives every token."""
    share_R: Tensor
    """Mean weight of a token that is neither the true one nor among the top."""
    spread_R: Tensor


def simplex_embedding(
    token_ids_BL: Tensor,
    signal_BL: Tensor,
    noise_BL: Tensor,
    weight_VH: Tensor,
    *,
    keys_B: Tensor,
    counter: int = 0,
    noise: str = "order_statistics",
    num_top: int = 32,
    moments: EmbeddingMoments | None = None,
) -> Tensor:
    """softmax(x) E of the noised simplex x = signal S(ids) + noise eps, [B, L, H] in E's dtype.

    Args:
        token_ids_BL: int64 token of each position.
        signal_BL, noise_BL: scales times the simplex value, k sqrt(alpha_bar) and
            k sqrt(1 - alpha_bar), [B, 1] or [B, L] float32. They receive no gradient.
        weight_VH: E; receives gradients.
        keys_B: int64, one per example. With the counter and the position they settle all noise, so
            an example has the same embedding in any batch and at any padded length (on a CPU to the
            last bit).
        counter: which of the keys' draws this is, in [0, 2^32).
        noise: "order_statistics", or "dense" for the noise of `random.normal` in vocabulary tiles.
        num_top: K, how many noises are drawn exactly; with K = V - 1 the law is exact.
        moments: of E, for order statistics; computed here when None, which reads all of E. Those of
            a slightly older E do, since they only shape what is left after the top tokens.

    Products and sums are float32, or float64 when E is; noise and weights float64. Raises
    ValueError for shapes, ids, scales, K, moments and noise names that do not fit.
    """
    _check_shapes(token_ids_BL, signal_BL, noise_BL, weight_VH, keys_B)
    _check_values(token_ids_BL, noise_BL, weight_VH)
    _check_settings(noise, num_top, moments, weight_VH)
    if token_ids_BL.numel() == 0:
        return weight_VH.new_zeros(*token_ids_BL.shape, weight_VH.shape[1])
    scales = (2 * signal_BL.expand_as(token_ids_BL), noise_BL.expand_as(token_ids_BL))
    rows = _Rows(token_ids_BL, *scales, keys_B, counter)
    with torch.autocast(weight_VH.device.type, enabled=False):
        if noise == "dense":
            x_RH = _DenseEmbedding.apply(weight_VH, rows)
        else:
            x_RH = _sampled(weight_VH, rows, num_top, moments)
    return x_RH.view(*token_ids_BL.shape, -1)


@torch.no_grad()
def embedding_moments(weight_VH: Tensor) -> EmbeddingMoments:
    """Sum and centred second moment of E's rows, in vocabulary tiles; float64 if E is, or float32.

    Tiles are added up in float64. To the second moment 1e-6 of its mean diagonal is added so that
    rounding leaves it positive, and ten times as much as long as it does not. Costs 2 V H^2
    operations; ValueError if E is not finite.
    """
    dtype, width = _maths_dtype(weight_VH), weight_VH.shape[1]
    tiles = weight_VH.detach().split(VOCABULARY_TILE)
    sums_H = torch.zeros(width, dtype=torch.float64, device=weight_VH.device)
    for tile_TH in tiles:
        sums_H += tile_TH.to(dtype).sum(0)
    mean_H = (sums_H / len(weight_VH)).to(dtype)
    second_HH = sums_H.new_zeros(width, width)
    with torch.autocast(weight_VH.device.type, enabled=False):
        for tile_TH in tiles:
            centred_TH = tile_TH.to(dtype) - mean_H
            second_HH += centred_TH.T @ centred_TH
    return EmbeddingMoments(sums_H.to(dtype), _cholesky(second_HH).to(dtype))


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


class _Rows:
    """The positions of all examples in a row, and what is known of each."""

    def __init__(
        self, ids_BL: Tensor, gap_BL: Tensor, sigma_BL: Tensor, keys_B: Tensor, counter: int
    ) -> None:
        self.batch, self.length = ids_BL.shape
        self.counter = counter
        self.ids_R = ids_BL.reshape(-1)
        self.gap_R = gap_BL.detach().reshape(-1)
        self.sigma_R = sigma_BL.detach().reshape(-1)
        self.keys_R = keys_B.repeat_interleave(self.length)
        self.positions_R = torch.arange(self.length, device=keys_B.device).repeat(self.batch)

    def slabs(self) -> Iterator[slice]:
        """Rows of one product: of one example on the CPU, of any elsewhere."""
        if self.ids_R.device.type != "cpu":
            for first in range(0, len(self.ids_R), DEVICE_SLAB_ROWS):
                yield slice(first, min(first + DEVICE_SLAB_ROWS, len(self.ids_R)))
            return
        for start in range(0, len(self.ids_R), self.length):
            for first in range(start, start + self.length, SLAB_ROWS):
                yield slice(first, min(first + SLAB_ROWS, start + self.length))


def _pad_rows(x: Tensor, multiple: int = SLAB_ROWS) -> Tensor:
    """Zero rows behind x up to the next multiple."""
    missing = -len(x) % multiple
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


# ---- order statistics ----


def _sampled(
    weight_VH: Tensor, rows: _Rows, num_top: int, moments: EmbeddingMoments | None
) -> Tensor:
    moments = embedding_moments(weight_VH) if moments is None else moments
    with torch.no_grad():
        tokens = _draw_tokens(rows, len(weight_VH), num_top)
    return _SampledEmbedding.apply(weight_VH, rows, tokens, moments)


def _draw_tokens(rows: _Rows, vocabulary: int, num_top: int) -> TopTokens:
    """The sampler's draw for every row, a bounded number of rows at a time."""
    step = max(1, DRAWN_VALUES // (num_top * SLAB_ROWS)) * SLAB_ROWS
    padded = [
        _pad_rows(x) for x in (rows.keys_R, rows.positions_R, rows.ids_R, rows.gap_R, rows.sigma_R)
    ]
    pieces = []
    for keys_R, positions_R, ids_R, gap_R, sigma_R in zip(*(x.split(step) for x in padded)):
        place = (keys_R, positions_R, rows.counter, vocabulary - 1, num_top)
        top_RK, pair_R2 = order_statistics.top_normals(*place)
        others_RK = order_statistics.distinct_ids(*place)
        ids_R1 = ids_R[:, None]
        ids_RJ = torch.cat([ids_R1, others_RK + (others_RK >= ids_R1)], dim=1)
        pieces.append(
            TopTokens(
                ids_RJ, *_softmax(gap_R.double(), sigma_R.double(), top_RK, pair_R2, vocabulary)
            )
        )
    return TopTokens(*(torch.cat(x)[: len(rows.ids_R)] for x in zip(*pieces)))


def _softmax(
    gap_R: Tensor, sigma_R: Tensor, top_RK: Tensor, pair_R2: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [R, J], share [R] and spread [R] of `TopTokens`, float64.

    Given the K-th largest noise a, the n others are independent normals below a (order statistics
    are a Markov chain). Their weights add up to n share with a Gaussian share, kept positive. Given
    that sum, what is left of their part of x is Gaussian too, of mean n share (mean of their
    rows) and covariance v (n - 1) / (V - 1) L L^T: the second moment of n rows drawn from V.
    """
    bulk = vocabulary - 1 - top_RK.shape[1]
    own_R1 = gap_R[:, None] + sigma_R[:, None] * pair_R2[:, :1]
    logits_RJ = torch.cat([own_R1, sigma_R[:, None] * top_RK], dim=1)
    # a value above all others too: they have smaller noise than the K-th largest
    shift_R1 = logits_RJ.max(dim=1, keepdim=True).values
    weights_RJ = torch.exp(logits_RJ - shift_R1)
    if bulk == 0:
        zero_R = torch.zeros_like(gap_R)
        return weights_RJ / weights_RJ.sum(dim=1, keepdim=True), zero_R, zero_R
    log_mean_R, variance_R = order_statistics.truncated_moments(top_RK[:, -1].contiguous(), sigma_R)
    mean_R = torch.exp(log_mean_R - shift_R1[:, 0])
    share_R = mean_R * (1 + (variance_R / bulk).sqrt() * pair_R2[:, 1]).clamp(min=0)
    spread_R = mean_R * (variance_R * ((bulk - 1) / (vocabulary - 1))).sqrt()
    total_R = weights_RJ.sum(dim=1) + bulk * share_R
    weights_RJ = (weights_RJ - share_R[:, None]) / total_R[:, None]
    return weights_RJ, share_R / total_R, spread_R / total_R


class _SampledEmbedding(torch.autograd.Function):
    """Backward takes ids, weights and shares as given and the Gaussian part as a constant.

    A row i outside the top has the unknown weight w_i; its mean given everything drawn is the
    share, so the gradient share * dx to every row is unbiased.
    """

    @staticmethod
    def forward(ctx, weight_VH, rows, tokens, moments):
        dtype = _maths_dtype(weight_VH)
        weights_RJ, share_R, spread_R = (x.to(dtype) for x in tokens[1:])
        x_RH = _weighted_rows(weight_VH, tokens.ids_RJ, weights_RJ)
        x_RH.addcmul_(share_R[:, None], moments.sums.to(dtype))
        if weights_RJ.shape[1] < len(weight_VH):
            x_RH.addcmul_(spread_R[:, None], _bulk_noise(rows, moments.factor.to(dtype)))
        ctx.save_for_backward(tokens.ids_RJ, weights_RJ, share_R)
        ctx.like = weight_VH.shape, weight_VH.dtype
        return x_RH.to(weight_VH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RH):
        ids_RJ, weights_RJ, share_R = ctx.saved_tensors
        (vocabulary, _), dtype = ctx.like
        dx_RH = dx_RH.to(share_R.dtype).contiguous()
        with torch.autocast(dx_RH.device.type, enabled=False):
            gradient_VH = (share_R @ dx_RH).repeat(vocabulary, 1)
            step = max(1, GATHERED_VALUES // (ids_RJ.shape[1] * dx_RH.shape[1]))
            for piece in zip(ids_RJ.split(step), weights_RJ.split(step), dx_RH.split(step)):
                _add_rows(gradient_VH, *piece)
        return gradient_VH.to(dtype), None, None, None


def _bulk_noise(rows: _Rows, factor_HH: Tensor) -> Tensor:
    """L z for every row, z standard normal, [R, H]."""
    z_RH = random.normal_at(
        rows.keys_R, rows.positions_R, rows.counter, 0, len(factor_HH), random.BULK_STREAM
    ).to(factor_HH.dtype)
    on_cpu = z_RH.device.type == "cpu"
    products = []
    for slab in rows.slabs():
        part_RH = _pad_rows(z_RH[slab]) if on_cpu else z_RH[slab]
        products.append((part_RH @ factor_HH.T)[: slab.stop - slab.start])
    return torch.cat(products)


def _weighted_rows(weight_VH: Tensor, ids_RJ: Tensor, weights_RJ: Tensor) -> Tensor:
    """sum_j weights_j E_(ids_j), [R, H] in the weights' dtype."""
    if weight_VH.dtype == weights_RJ.dtype:
        # the gathered rows [R, J, H] never exist
        return F.embedding_bag(ids_RJ, weight_VH, per_sample_weights=weights_RJ, mode="sum")
    step = max(1, GATHERED_VALUES // (ids_RJ.shape[1] * weight_VH.shape[1]))
    sums = [
        torch.bmm(weights_RJ1.mT, weight_VH[ids].to(weights_RJ.dtype))[:, 0]
        for ids, weights_RJ1 in zip(ids_RJ.split(step), weights_RJ[..., None].split(step))
    ]
    return torch.cat(sums)


def _add_rows(gradient_VH: Tensor, ids_RJ: Tensor, weights_RJ: Tensor, dx_RH: Tensor) -> None:
    """Adds weights_j dx to row ids_j of the gradient, in the same order every time.

    The transposed gather: each token that occurs takes the rows it occurs in.
    """
    sorted_ids, order = ids_RJ.flatten().sort(stable=True)
    ids_U, counts_U = torch.unique_consecutive(sorted_ids, return_counts=True)
    sums_UH = F.embedding_bag(
        order // ids_RJ.shape[1],
        dx_RH,
        counts_U.cumsum(0) - counts_U,
        per_sample_weights=weights_RJ.flatten()[order],
        mode="sum",
    )
    gradient_VH.index_add_(0, ids_U, sums_UH)


# ---- dense ----


class _DenseEmbedding(torch.autograd.Function):
    """Streams over vocabulary tiles, and draws the tiles again in the backward pass."""

    @staticmethod
    def forward(ctx, weight_VH, rows):
        dtype = _maths_dtype(weight_VH)
        x_RH = torch.empty(
            len(rows.ids_R), weight_VH.shape[1], dtype=dtype, device=weight_VH.device
        )
        log_sum_R = x_RH.new_empty(len(x_RH))
        for slab in rows.slabs():
            x, log_sum = _stream(weight_VH.detach(), rows, slab, dtype)
            size = slab.stop - slab.start
            x_RH[slab], log_sum_R[slab] = x[:size], log_sum[:size]
        ctx.rows = rows
        ctx.save_for_backward(log_sum_R)
        ctx.like = weight_VH.shape, weight_VH.dtype
        return x_RH.to(weight_VH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RH):
        (log_sum_R,) = ctx.saved_tensors
        shape, dtype = ctx.like
        dx_RH = dx_RH.to(log_sum_R.dtype)
        gradient_VH = dx_RH.new_zeros(shape)
        with torch.autocast(dx_RH.device.type, enabled=False):
            for slab in ctx.rows.slabs():
                for tile in _tiles(shape[0]):
                    logits_RT = _tile_logits(ctx.rows, slab, tile, log_sum_R.dtype)
                    p_RT = (logits_RT - log_sum_R[slab, None]).exp_()
                    gradient_VH[tile].addmm_(p_RT.T, dx_RH[slab])
        return gradient_VH.to(dtype), None


def _stream(
    weight_VH: Tensor, rows: _Rows, slab: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """softmax(x) E and log-sum-exp of a slab's rows, with a running maximum and sum."""
    sums_RH = total_R1 = top_R1 = None
    for tile in _tiles(len(weight_VH)):
        logits_RT = _tile_logits(rows, slab, tile, dtype)
        if logits_RT.device.type == "cpu":
            logits_RT = _pad_rows(logits_RT)
        new_R1 = logits_RT.max(dim=1, keepdim=True).values
        if top_R1 is None:
            top_R1, total_R1 = new_R1, torch.zeros_like(new_R1)
            sums_RH = new_R1.new_zeros(len(new_R1), weight_VH.shape[1])
        new_R1 = torch.maximum(top_R1, new_R1)
        decay_R1 = torch.exp(top_R1 - new_R1)
        p_RT = (logits_RT - new_R1).exp_()
        total_R1 = total_R1 * decay_R1 + p_RT.sum(dim=1, keepdim=True)
        sums_RH = (sums_RH * decay_R1).addmm_(p_RT, weight_VH[tile].to(dtype))
        top_R1 = new_R1
    return sums_RH / total_R1, (top_R1 + total_R1.log())[:, 0]


def _tiles(vocabulary: int) -> Iterator[slice]:
    for start in range(0, vocabulary, VOCABULARY_TILE):
        yield slice(start, min(start + VOCABULARY_TILE, vocabulary))


def _tile_logits(rows: _Rows, slab: slice, tile: slice, dtype: torch.dtype) -> Tensor:
    """The logits [R, T], up to the shift that leaves -signal out."""
    width = tile.stop - tile.start
    place = (rows.keys_R[slab], rows.positions_R[slab], rows.counter)
    normals_RT = random.normal_at(*place, tile.start, width).to(dtype)
    logits_RT = normals_RT * rows.sigma_R[slab, None].to(dtype)
    column_R = rows.ids_R[slab] - tile.start
    gap_R = rows.gap_R[slab].to(dtype) * ((column_R >= 0) & (column_R < width))
    column_R1 = column_R.clamp(0, width - 1)[:, None]
    return logits_RT.scatter_add_(1, column_R1, gap_R[:, None])


# ---- checks ----


def _maths_dtype(weight_VH: Tensor) -> torch.dtype:
    return torch.float64 if weight_VH.dtype == torch.float64 else torch.float32


def _check_shapes(
    ids_BL: Tensor, signal_BL: Tensor, noise_BL: Tensor, weight_VH: Tensor, keys_B: Tensor
) -> None:
    if ids_BL.ndim != 2 or ids_BL.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64 [B, L], got {ids_BL.dtype} {list(ids_BL.shape)}")
    if weight_VH.ndim != 2 or len(weight_VH) < 2:
        raise ValueError(f"the embedding must be [V, H] with V >= 2, got {list(weight_VH.shape)}")
    batch, length = ids_BL.shape
    for name, scale in (("signal", signal_BL), ("noise", noise_BL)):
        if tuple(scale.shape) not in ((batch, 1), (batch, length)):
            raise ValueError(
                f"the {name} scale must be [{batch}, 1] or [{batch}, {length}], "
                f"got {list(scale.shape)}"
            )
    if tuple(keys_B.shape) != (batch,) or keys_B.dtype != torch.int64:
        raise ValueError(f"keys must be int64 [{batch}], got {keys_B.dtype} {list(keys_B.shape)}")


def _check_values(ids_BL: Tensor, noise_BL: Tensor, weight_VH: Tensor) -> None:
    if ids_BL.numel() == 0:
        return
    low, high = int(ids_BL.min()), int(ids_BL.max())
    if low < 0 or high >= len(weight_VH):
        raise ValueError(f"token ids must be in 0..{len(weight_VH) - 1}, got {low}..{high}")
    if not bool((noise_BL >= 0).all()):
        raise ValueError(f"the noise scale must not be negative, got {float(noise_BL.min())}")


def _check_settings(
    noise: str, num_top: int, moments: EmbeddingMoments | None, weight_VH: Tensor
) -> None:
    vocabulary, width = weight_VH.shape
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
    if noise == "order_statistics" and not 1 <= num_top <= vocabulary - 1:
        raise ValueError(f"num_top must be in 1..{vocabulary - 1}, got {num_top}")
    if moments is not None and moments.factor.shape != (width, width):
        raise ValueError(f"the moments must be of width {width}, got {list(moments.factor.shape)}")
