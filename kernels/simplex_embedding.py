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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tess.kernels import random
from tess.kernels.dispatch import use_triton
from tess.kernels.order_statistics import (
    EmbeddingMoments,
    TokenWeights,
    embedding_moments,
    largest_normals,
    maths_dtype,
    token_weights,
)

NOISES = ("order_statistics", "dense")

# On the CPU a product always has this many rows, of one example: then its bits do not depend on
# what else is in the batch. Whole groups of rows also keep vectorised functions off their tails.
SLAB_ROWS = 16
DEVICE_SLAB_ROWS = 1024
VOCABULARY_TILE = 4096  # a multiple of 64, as random.normal_at wants it

# Values per piece of work. Top values on the CPU stay below torch's grain for threads, for the
# bits; what is gathered takes 8 MiB of float32 there, and 256 MiB elsewhere.
DRAWN_VALUES, DEVICE_DRAWN_VALUES = 1 << 14, 1 << 20
GATHERED_VALUES, DEVICE_GATHERED_VALUES = 1 << 21, 1 << 26


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
    backend: str | None = None,
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
        backend: "torch", "triton" or "auto" (None: see `dispatch.py`); both draw the same tokens.

    Products and sums are float32, or float64 when E is; Triton rounds the operands of L z, the
    Gaussian part of what is left, to a narrower E's dtype. Raises ValueError for shapes, ids,
    scales, K, moments and noise names that do not fit.
    """
    _check_shapes(token_ids_BL, signal_BL, noise_BL, weight_VH, keys_B)
    _check_values(token_ids_BL, noise_BL, weight_VH)
    _check_settings(noise, num_top, moments, weight_VH)
    if token_ids_BL.numel() == 0:
        return weight_VH.new_zeros(*token_ids_BL.shape, weight_VH.shape[1])
    scales = (2 * signal_BL.expand_as(token_ids_BL), noise_BL.expand_as(token_ids_BL))
    rows = Rows(token_ids_BL, *scales, keys_B, counter, use_triton(weight_VH, backend))
    with torch.autocast(weight_VH.device.type, enabled=False):
        if noise == "dense":
            x_RH = _DenseEmbedding.apply(weight_VH, rows)
        else:
            moments = embedding_moments(weight_VH) if moments is None else moments
            x_RH = _sampled(weight_VH, rows, num_top, moments)
    return x_RH.view(*token_ids_BL.shape, -1)


class Rows:
    """The positions of all examples in a row, and what is known of each."""

    def __init__(
        self,
        ids_BL: Tensor,
        gap_BL: Tensor,
        sigma_BL: Tensor,
        keys_B: Tensor,
        counter: int,
        triton: bool = False,
    ) -> None:
        self.batch, self.length = ids_BL.shape
        self.counter = counter
        self.triton = triton  # whether kernels take these rows
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


def pad_rows(x: Tensor, multiple: int = SLAB_ROWS) -> Tensor:
    """Zero rows behind x up to the next multiple."""
    missing = -len(x) % multiple
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


# ---- order statistics ----


def _sampled(weight_VH: Tensor, rows: Rows, num_top: int, moments: EmbeddingMoments) -> Tensor:
    if rows.triton:
        from tess.kernels.triton.simplex_embedding import simplex_embedding as run

        return run(weight_VH, rows, num_top, moments)
    tokens = draw_tokens(rows, len(weight_VH), num_top)
    return _SampledEmbedding.apply(weight_VH, rows, *tokens, moments)


def draw_tokens(rows: Rows, vocabulary: int, num_top: int) -> tuple[Tensor, TokenWeights]:
    """Ids [R, J] and weights of the true token and the top ones, some rows at a time."""
    values = DRAWN_VALUES if rows.ids_R.device.type == "cpu" else DEVICE_DRAWN_VALUES
    step = max(1, values // (num_top * SLAB_ROWS)) * SLAB_ROWS
    fields = (rows.keys_R, rows.positions_R, rows.ids_R, rows.gap_R, rows.sigma_R)
    pieces = []
    for keys_R, positions_R, ids_R, gap_R, sigma_R in zip(
        *(pad_rows(field).split(step) for field in fields)
    ):
        largest = largest_normals(keys_R, positions_R, rows.counter, vocabulary - 1, num_top)
        weights = token_weights(gap_R.double(), sigma_R.double(), largest, vocabulary - 1)
        # id i of the others is token i, or i + 1 from the true token on
        others_RK = largest.ids_RK + (largest.ids_RK >= ids_R[:, None])
        pieces.append((torch.cat([ids_R[:, None], others_RK], dim=1), *weights))
    ids_RJ, *weights = (torch.cat(parts)[: len(rows.ids_R)] for parts in zip(*pieces))
    return ids_RJ, TokenWeights(*weights)


class _SampledEmbedding(torch.autograd.Function):
    """Backward takes ids, weights and shares as given and the Gaussian part as a constant.

    A row i outside the top has the unknown weight w_i; its mean given everything drawn is the
    share, so the gradient share * dx to every row is unbiased.
    """

    @staticmethod
    def forward(ctx, weight_VH, rows, ids_RJ, tokens, moments):
        dtype = maths_dtype(weight_VH)
        # the sum over all rows gives every token its share, so these tokens get the rest
        excess_RJ = (tokens.weights_RJ - tokens.share_R[:, None]).to(dtype)
        share_R, spread_R = tokens.share_R.to(dtype), tokens.spread_R.to(dtype)
        x_RH = weighted_rows(weight_VH, ids_RJ, excess_RJ)
        x_RH.addcmul_(share_R[:, None], moments.sums.to(dtype))
        if ids_RJ.shape[1] < len(weight_VH):
            x_RH.addcmul_(spread_R[:, None], bulk_noise(rows, moments.factor.to(dtype)))
        ctx.save_for_backward(ids_RJ, excess_RJ, share_R)
        ctx.like = weight_VH.shape, weight_VH.dtype
        return x_RH.to(weight_VH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RH):
        ids_RJ, excess_RJ, share_R = ctx.saved_tensors
        (vocabulary, _), dtype = ctx.like
        dx_RH = dx_RH.to(share_R.dtype).contiguous()
        with torch.autocast(dx_RH.device.type, enabled=False):
            gradient_VH = (share_R @ dx_RH).repeat(vocabulary, 1)
            step = _gathered_rows(ids_RJ, dx_RH)
            for piece in zip(ids_RJ.split(step), excess_RJ.split(step), dx_RH.split(step)):
                _add_rows(gradient_VH, *piece)
        return gradient_VH.to(dtype), None, None, None, None


def bulk_noise(rows: Rows, factor_HH: Tensor) -> Tensor:
    """L z for every row, z standard normal, [R, H]."""
    z_RH = random.normal_at(
        rows.keys_R, rows.positions_R, rows.counter, 0, len(factor_HH), random.BULK_STREAM
    ).to(factor_HH.dtype)
    on_cpu = z_RH.device.type == "cpu"
    products = []
    for slab in rows.slabs():
        part_RH = pad_rows(z_RH[slab]) if on_cpu else z_RH[slab]
        products.append((part_RH @ factor_HH.T)[: slab.stop - slab.start])
    return torch.cat(products)


def _gathered_rows(ids_RJ: Tensor, x_RH: Tensor) -> int:
    values = GATHERED_VALUES if x_RH.device.type == "cpu" else DEVICE_GATHERED_VALUES
    return max(1, values // (ids_RJ.shape[1] * x_RH.shape[1]))


def weighted_rows(weight_VH: Tensor, ids_RJ: Tensor, weights_RJ: Tensor) -> Tensor:
    """sum_j weights_j E_(ids_j), [R, H] in the weights' dtype."""
    if weight_VH.dtype == weights_RJ.dtype:
        # the gathered rows [R, J, H] never exist
        return F.embedding_bag(ids_RJ, weight_VH, per_sample_weights=weights_RJ, mode="sum")
    step = _gathered_rows(ids_RJ, weight_VH)
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
        dtype = maths_dtype(weight_VH)
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
    weight_VH: Tensor, rows: Rows, slab: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """softmax(x) E and log-sum-exp of a slab's rows, with a running maximum and sum."""
    sums_RH = total_R1 = top_R1 = None
    for tile in _tiles(len(weight_VH)):
        logits_RT = _tile_logits(rows, slab, tile, dtype)
        if logits_RT.device.type == "cpu":
            logits_RT = pad_rows(logits_RT)
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


def _tile_logits(rows: Rows, slab: slice, tile: slice, dtype: torch.dtype) -> Tensor:
    """The logits [R, T], up to the shift that leaves -signal out."""
    width = tile.stop - tile.start
    if rows.triton:
        from tess.kernels.triton.simplex_embedding import tile_logits

        fields = (rows.keys_R, rows.positions_R, rows.ids_R, rows.gap_R, rows.sigma_R)
        part = (field[slab] for field in fields)
        return tile_logits(*part, rows.counter, tile.start, width, dtype)
    place = (rows.keys_R[slab], rows.positions_R[slab], rows.counter)
    normals_RT = random.normal_at(*place, tile.start, width).to(dtype)
    logits_RT = normals_RT * rows.sigma_R[slab, None].to(dtype)
    column_R = rows.ids_R[slab] - tile.start
    gap_R = rows.gap_R[slab].to(dtype) * ((column_R >= 0) & (column_R < width))
    column_R1 = column_R.clamp(0, width - 1)[:, None]
    return logits_RT.scatter_add_(1, column_R1, gap_R[:, None])


# ---- checks ----


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
