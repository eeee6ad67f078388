"""The embedding of a noised simplex in kernels: K + 1 rows of E, and a Gaussian for all others.

The noise of the others, L z, is made for some rows at a time, so that it is still in the cache when
the rows of E are added to it. One program has a whole row, or a tile of a product whose size does
not depend on the batch: a row's bits are the same in every batch.

Letters: R rows (positions of examples), J tokens of a row, V vocabulary, H width of the embedding,
T tokens of one vocabulary tile.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels import random
from tess.kernels import simplex_embedding as public
from tess.kernels.order_statistics import EmbeddingMoments, maths_dtype
from tess.kernels.triton.launch import Config, Table, dot_precision, launch, wide_type
from tess.kernels.triton.order_statistics import can_draw, draw_tokens
from tess.kernels.triton.random import normal_at, normal_tile
from tess.kernels.triton.simplex_embedding_gradient import embedding_gradient

WORKSPACE_BYTES = 64 << 20  # of normals and their products
NARROW = 512  # up to this width one warp takes a row

NORMAL_STREAM = tl.constexpr(random.NORMAL_STREAM)


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps, num_stages)


PRODUCT = Table(
    "bulk_product",
    {"sm_80": _tile(128, 128, 32, 8, 4), "sm_90": _tile(128, 128, 64, 8, 3)},
    (_tile(128, 256, 64, 8, 3),),
    {"sm_80": _tile(64, 64, 32, 4, 3)},
)
# STEP rows are under way at once; a warp's loads of 16 bytes each cover 256 numbers of bfloat16
GATHER = Table(
    "weighted_rows",
    {"sm_80": Config({"BLOCK_H": 1024, "STEP": 8}, 4, 1)},
    (Config({"BLOCK_H": 512, "STEP": 8}, 2, 1),),
)
GATHER_NARROW = Table("weighted_rows_narrow", {"sm_80": Config({"BLOCK_H": 256, "STEP": 8}, 1, 1)})
LOGITS = Table("tile_logits", {"sm_80": Config({"BLOCK": 128}, num_warps=2, num_stages=1)})


# ---- kernels ----


@triton.jit
def _bulk_product(
    z_ptr, factor_ptr, out_ptr, rows, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """z L^T for a lower triangular L, of which nothing right of a tile's diagonal is read."""
    columns = tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0)
    column_tile = columns - 1 - program % columns  # the longest sums first
    row = (program // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, k = column_tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_in, n_in = row < rows, n < width
    z_ptrs = z_ptr + row[:, None] * width + k[None, :]
    factor_ptrs = factor_ptr + n.to(tl.int64)[None, :] * width + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for start in range(0, tl.minimum(width, (column_tile + 1) * BLOCK_N), BLOCK_K):
        if EVEN:
            z = tl.load(z_ptrs + start, mask=row_in[:, None], other=0.0)
            factor = tl.load(factor_ptrs + start, mask=n_in[None, :], other=0.0)
        else:
            k_in = start + k < width
            z = tl.load(z_ptrs + start, mask=row_in[:, None] & k_in[None, :], other=0.0)
            factor = tl.load(factor_ptrs + start, mask=k_in[:, None] & n_in[None, :], other=0.0)
        total = tl.dot(z, factor, total, input_precision=PRECISION, out_dtype=WIDE)
    inside = row_in[:, None] & n_in[None, :]
    tl.store(out_ptr + row[:, None] * width + n[None, :], total, inside)


@triton.jit
def _weighted_rows(
    weight_ptr, ids_ptr, excess_ptr, share_ptr, spread_ptr, sums_ptr, noise_ptr, x_ptr, row_stride,
    width, J: tl.constexpr, BLOCK_H: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):
    """x = share * sums + spread * noise + sum_j excess_j E_(ids_j)."""
    row = tl.program_id(0).to(tl.int64)
    h, step = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, STEP)
    inside = h < width
    x = tl.load(share_ptr + row) * tl.load(sums_ptr + h, mask=inside, other=0.0).to(WIDE)
    if noise_ptr is not None:
        x += tl.load(spread_ptr + row) * tl.load(noise_ptr + row * width + h, inside, other=0.0)
    for start in range(0, J, STEP):
        j = start + step
        ids = tl.load(ids_ptr + row * J + j, mask=j < J, other=0).to(tl.int64)
        excess = tl.load(excess_ptr + row * J + j, mask=j < J, other=0.0)
        rows = weight_ptr + ids[:, None] * row_stride + h[None, :]
        rows = tl.load(rows, mask=(j < J)[:, None] & inside[None, :], other=0.0).to(WIDE)
        x += tl.sum(excess[:, None] * rows, axis=0)
    tl.store(x_ptr + row * width + h, x.to(x_ptr.dtype.element_ty), inside)


@triton.jit
def _tile_logits(
    keys_ptr, positions_ptr, ids_ptr, gap_ptr, sigma_ptr, out_ptr, draw, start, width,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    column = 4 * first + tl.arange(0, 4 * BLOCK)
    key, position = tl.load(keys_ptr + row), tl.load(positions_ptr + row)
    z = normal_tile(start // 4 + first, position, key, draw, NORMAL_STREAM, BLOCK).to(WIDE)
    gap, sigma = tl.load(gap_ptr + row).to(WIDE), tl.load(sigma_ptr + row).to(WIDE)
    logits = z * sigma + tl.where(start + column == tl.load(ids_ptr + row), gap, 0.0)
    tl.store(out_ptr + row * width + column, logits, column < width)


# ---- launches ----


def bulk_product(z_RH: Tensor, factor_HH: Tensor) -> Tensor:
    """z L^T [R, H] in float32 (float64 for float64) for a lower triangular L of z's dtype."""
    rows, width = z_RH.shape
    out_RH = torch.empty((rows, width), dtype=maths_dtype(z_RH), device=z_RH.device)
    constants = {"WIDE": wide_type(z_RH), "PRECISION": dot_precision(z_RH)}

    def run(config: Config) -> None:
        blocks = config.blocks
        tiles = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(width, blocks["BLOCK_N"])
        launch(
            _bulk_product, (tiles,), z_RH, factor_HH, out_RH, rows, width, config=config,
            EVEN=width % blocks["BLOCK_K"] == 0, **constants,
        )

    PRODUCT.run(z_RH, width, run)
    return out_RH


def weighted_rows(
    weight_VH: Tensor, ids_RJ: Tensor, excess_RJ: Tensor, share_R: Tensor, spread_R: Tensor,
    sums_H: Tensor, noise_RH: Tensor | None, x_RH: Tensor,
) -> None:
    """Fills x [R, H] with share * sums + spread * noise + sum_j excess_j E_(ids_j)."""
    (rows, width), constants = x_RH.shape, {"J": ids_RJ.shape[1], "WIDE": wide_type(weight_VH)}

    def run(config: Config) -> None:
        launch(
            _weighted_rows, (rows, triton.cdiv(width, config.blocks["BLOCK_H"])), weight_VH,
            ids_RJ, excess_RJ, share_R, spread_R, sums_H, noise_RH, x_RH, weight_VH.stride(0),
            width, config=config, **constants,
        )

    table = GATHER if width > NARROW else GATHER_NARROW
    table.run(weight_VH, (width, ids_RJ.shape[1]), run)


def sampled_embedding_forward(
    weight_VH: Tensor, ids_RJ: Tensor, excess_RJ: Tensor, share_R: Tensor, spread_R: Tensor,
    sums_H: Tensor, factor_HH: Tensor, keys_R: Tensor, positions_R: Tensor, draw: int,
) -> Tensor:
    """The embedding [R, H] in E's dtype of tokens that were drawn.

    The product L z has operands in E's dtype; where that is narrow L is scaled to the size of one
    row of E first, by a power of two. excess, share, spread and sums: `maths_dtype(weight)`.
    """
    (vocabulary, width), dtype = weight_VH.shape, weight_VH.dtype
    weight_VH = _dense_rows(weight_VH)
    x_RH = torch.empty((len(ids_RJ), width), dtype=dtype, device=weight_VH.device)
    fields = [x.contiguous() for x in (ids_RJ, excess_RJ, share_R, spread_R)]
    if ids_RJ.shape[1] >= vocabulary:  # nothing is left over
        weighted_rows(weight_VH, *fields, sums_H.contiguous(), None, x_RH)
        return x_RH
    if dtype != factor_HH.dtype:
        scale = 2.0 ** round(math.log2(vocabulary) / 2)
        factor_HH, fields[3] = (factor_HH / scale).to(dtype), fields[3] * scale
    factor_HH = factor_HH.contiguous()
    for rows in _slabs(len(x_RH), width, dtype):
        z_RH = normal_at(
            keys_R[rows], positions_R[rows], draw, 0, width, random.BULK_STREAM, dtype
        )
        noise_RH = bulk_product(z_RH, factor_HH)
        part = (*(field[rows] for field in fields), sums_H.contiguous(), noise_RH, x_RH[rows])
        weighted_rows(weight_VH, *part)
    return x_RH


def _slabs(rows: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Rows whose normals and products fill the workspace, in whole tiles."""
    step = max(1, WORKSPACE_BYTES // (width * (dtype.itemsize + 4)) // 128) * 128
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def tile_logits_forward(
    keys_R: Tensor, positions_R: Tensor, ids_R: Tensor, gap_R: Tensor, sigma_R: Tensor, draw: int,
    start: int, width: int, dtype: torch.dtype,
) -> Tensor:
    """Logits [R, T] of tokens start .. start + width - 1, up to a shift; start a multiple of 64."""
    logits_RT = torch.empty((len(keys_R), width), dtype=dtype, device=keys_R.device)
    fields = [x.contiguous() for x in (keys_R, positions_R, ids_R, gap_R, sigma_R)]

    def run(config: Config) -> None:
        launch(
            _tile_logits, (len(keys_R), triton.cdiv(width, 4 * config.blocks["BLOCK"])), *fields,
            logits_RT, draw, start, width, config=config, WIDE=wide_type(logits_RT),
        )

    LOGITS.run(logits_RT, width, run)
    return logits_RT


# ---- operations for autograd and torch.compile ----

tile_logits = torch.library.custom_op("tess::tile_logits", tile_logits_forward, mutates_args=())
_forward_op = torch.library.custom_op(
    "tess::sampled_embedding", sampled_embedding_forward, mutates_args=()
)
_backward_op = torch.library.custom_op(
    "tess::sampled_embedding_backward", embedding_gradient, mutates_args=()
)


@tile_logits.register_fake
def _(keys_R, positions_R, ids_R, gap_R, sigma_R, draw, start, width, dtype):
    return gap_R.new_empty((keys_R.shape[0], width), dtype=dtype)


@_forward_op.register_fake
def _(weight_VH, ids_RJ, *others):
    return weight_VH.new_empty((ids_RJ.shape[0], weight_VH.shape[1]))


@_backward_op.register_fake
def _(dx_RH, ids_RJ, excess_RJ, share_R, vocabulary):
    return dx_RH.new_empty((vocabulary, dx_RH.shape[1]))


def _save(ctx, inputs, output):
    ctx.vocabulary = inputs[0].shape[0]
    ctx.save_for_backward(*inputs[1:4])


def _gradients(ctx, dx_RH):
    return _backward_op(dx_RH, *ctx.saved_tensors, ctx.vocabulary), *(None,) * 9


_forward_op.register_autograd(_gradients, setup_context=_save)


def simplex_embedding(
    weight_VH: Tensor, rows: "public.Rows", num_top: int, moments: EmbeddingMoments
) -> Tensor:
    """The embedding [R, H] by order statistics, as `tess.kernels.simplex_embedding` gives it."""
    vocabulary, dtype = len(weight_VH), maths_dtype(weight_VH)
    place = (rows.keys_R, rows.positions_R)
    if can_draw(vocabulary, num_top):
        fields = (*place, rows.ids_R, rows.gap_R, rows.sigma_R)
        ids_RJ, *tokens = draw_tokens(*fields, rows.counter, vocabulary, num_top)
    else:
        ids_RJ, tokens = public.draw_tokens(rows, vocabulary, num_top)
        ids_RJ = ids_RJ.int()
    weights_RJ, share_R, spread_R = tokens
    # the sum over all rows gives every token its share, so these tokens get the rest
    numbers = [x.to(dtype) for x in (weights_RJ - share_R[:, None], share_R, spread_R)]
    shape = (moments.sums.to(dtype), moments.factor.to(dtype))
    return _forward_op(weight_VH, ids_RJ, *numbers, *shape, *place, rows.counter)


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, hot, call) at shipped shapes; `make(*shape, dtype=...)`: a tensor without data."""
    for vocabulary, width, dtype in (
        (131_072, 2688, torch.bfloat16), (131_072, 2688, torch.float32),
        (8192, 192, torch.bfloat16),
    ):
        hot, rows, top = dtype == torch.bfloat16, 4096, 32
        label = f"embed {width}" + ("" if hot else " float32")
        weight, x = make(vocabulary, width, dtype=dtype), make(rows, width, dtype=dtype)
        keys, ids = make(rows, dtype=torch.int64), make(rows, top + 1, dtype=torch.int32)
        excess, share = make(rows, top + 1, dtype=torch.float32), make(rows, dtype=torch.float32)
        sums, factor = (make(*s, dtype=torch.float32) for s in ((width,), (width, width)))
        inputs = (weight, ids, excess, share, share, sums, factor, keys, keys, 3)
        yield label, hot, lambda a=inputs: sampled_embedding_forward(*a)
        gradient = (x, ids, excess, share, vocabulary)
        yield f"{label} backward", hot, lambda a=gradient: embedding_gradient(*a)
    yield (
        "tile logits", True,
        lambda: tile_logits_forward(keys, keys, keys, share, share, 3, 4096, 4096, torch.float32),
    )
