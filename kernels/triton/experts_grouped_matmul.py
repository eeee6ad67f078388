"""Products of token rows with the weights of their experts, what surrounds them fused in.

Rows are in the order of `experts_token_sort.py`; a row tile has rows of one expert. The gather of
token rows is part of the loads, activation and routing weight are part of the stores, and a product
that ends the layer writes each row to its own (token, slot): no two programs add to one number, so
that results do not depend on timing.

Letters: T tokens, S top-k, N = T S sorted pairs (token, slot), E experts, D width, F expert inner
width; a matrix has O rows (outputs) and I columns (inputs).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.experts_token_sort import SortedPairs
from tess.kernels.triton.launch import Config, Table, dot_precision, launch, wide_type


def grouped_config(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    """Tile m x n in steps of k."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    return Config(blocks, num_warps, num_stages)


# Pairs per expert, on average, up to which a regime is used; None: any number. At few the weights'
# bytes are the cost and larger row tiles would be empty; at many it is the products.
REGIMES = {"few": 16, "some": 64, "many": None}
# 16-bit operands; what is fixed fits the 99 KiB of shared memory that the smallest devices have
GROUPED = {
    "few": Table("grouped_matmul_few", {"sm_80": grouped_config(16, 64, 128, 4, 4)}),
    "some": Table("grouped_matmul_some", {"sm_80": grouped_config(64, 128, 64, 4, 3)}),
    "many": Table(
        "grouped_matmul_many",
        {"sm_80": grouped_config(128, 128, 32, 8, 4), "sm_90": grouped_config(128, 128, 64, 8, 3)},
        (grouped_config(128, 256, 64, 8, 3),),
    ),
}
# float32 operands
GROUPED_WIDE = {
    "few": Table("grouped_matmul_wide_few", {"sm_80": grouped_config(16, 64, 64, 4, 3)}),
    "many": Table("grouped_matmul_wide", {"sm_80": grouped_config(64, 64, 32, 4, 3)}),
}
SUM_COPIES = Table("sum_copies", {"sm_80": Config({"BLOCK": 1024}, num_warps=4, num_stages=1)})


# ---- kernels ----


@triton.jit
def place(tiles, columns, GROUP: tl.constexpr):
    """Row and column tile of this program; GROUP row tiles at a time share weights in the cache."""
    program = tl.program_id(0)
    per_group = GROUP * columns
    first = program // per_group * GROUP
    height = tl.minimum(tiles - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def _rows(tiles_ptr, tile, tiles, BLOCK_M: tl.constexpr):
    """Sorted positions of a row tile, and which of them are rows of its expert."""
    position = tl.load(tiles_ptr + tiles + tile) + tl.arange(0, BLOCK_M)
    return position.to(tl.int64), position < tl.load(tiles_ptr + 2 * tiles + tile)


@triton.jit
def _product(
    rows_ptr, row, valid, matrix_ptr, column, inside, width, row_stride, k_stride, n_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Rows times one expert's matrix [BLOCK_M, BLOCK_N]; EVEN: BLOCK_K divides the width."""
    k = tl.arange(0, BLOCK_K)
    left_ptr = rows_ptr + row[:, None] * row_stride + k[None, :]
    right_ptr = matrix_ptr + k.to(tl.int64)[:, None] * k_stride + column[None, :] * n_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            left = tl.load(left_ptr, mask=valid[:, None], other=0.0)
            right = tl.load(right_ptr, mask=inside[None, :], other=0.0)
        else:
            left_k = valid[:, None] & (start + k < width)[None, :]
            left = tl.load(left_ptr, mask=left_k, other=0.0)
            right_k = (start + k < width)[:, None] & inside[None, :]
            right = tl.load(right_ptr, mask=right_k, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=WIDE)
        left_ptr += BLOCK_K
        right_ptr += BLOCK_K * k_stride
    return total


@triton.jit
def _expert_up(
    x_ptr, up_ptr, order_ptr, tiles_ptr, hidden_ptr, x_stride, up_stride, n_stride, k_stride,
    tiles, experts, outs, width, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """hidden = relu(up x)^2, rows of x gathered by token."""
    tile, column_tile = place(tiles, tl.cdiv(outs, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert == experts:
        return
    position, valid = _rows(tiles_ptr, tile, tiles, BLOCK_M)
    token = (tl.load(order_ptr + position, mask=valid, other=0) // TOP_K).to(tl.int64)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(
        x_ptr, token, valid, up_ptr + expert * up_stride, column, column < outs, width,
        x_stride, k_stride, n_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, WIDE, PRECISION,
    )
    total = tl.where(total < 0, 0.0, total)  # NaN stays NaN
    out = hidden_ptr + position[:, None] * outs + column[None, :]
    inside = valid[:, None] & (column < outs)[None, :]
    tl.store(out, (total * total).to(hidden_ptr.dtype.element_ty), inside)


@triton.jit
def _rows_to_slots(
    rows_ptr, matrix_ptr, weights_ptr, order_ptr, tiles_ptr, copies_ptr,
    row_stride, matrix_stride, n_stride, k_stride, tiles, experts, outs, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sorted rows times matrices, times routing weight where given; stored at (token, slot)."""
    tile, column_tile = place(tiles, tl.cdiv(outs, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert == experts:
        return
    position, valid = _rows(tiles_ptr, tile, tiles, BLOCK_M)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(
        rows_ptr, position, valid, matrix_ptr + expert * matrix_stride, column, column < outs,
        width, row_stride, k_stride, n_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN, WIDE, PRECISION,
    )
    pair = tl.load(order_ptr + position, mask=valid, other=0).to(tl.int64)
    if weights_ptr is not None:
        total *= tl.load(weights_ptr + pair, mask=valid, other=0.0).to(WIDE)[:, None]
    out = copies_ptr + pair[:, None] * outs + column[None, :]
    inside = valid[:, None] & (column < outs)[None, :]
    tl.store(out, total.to(copies_ptr.dtype.element_ty), inside)


@triton.jit
def _through_activation(
    gradient, weight, valid, row, column, hidden_ptr, dup_ptr, weighted_ptr, outs
):
    """Store a tile's gradient by up x, and w hidden; return <hidden, g> of each row.

    With hidden = r^2 and r = relu(up x), the gradient is w g 2 r, and r is the root of hidden.
    """
    # one 64-bit number and small offsets instead of 64 bits for each of the tile's numbers
    base = row * outs + column
    down, across = tl.arange(0, gradient.shape[0]), tl.arange(0, gradient.shape[1])
    at = down[:, None] * outs + across[None, :]
    inside = valid[:, None] & (column + across < outs)[None, :]
    hidden = tl.load(hidden_ptr + base + at, mask=inside, other=0.0).to(gradient.dtype)
    weighted = weight[:, None] * hidden
    tl.store(weighted_ptr + base + at, weighted.to(weighted_ptr.dtype.element_ty), inside)
    before = gradient * weight[:, None] * (2.0 * tl.sqrt(hidden))
    tl.store(dup_ptr + base + at, before.to(dup_ptr.dtype.element_ty), inside)
    return tl.sum(gradient * hidden, axis=1)


@triton.jit
def _hidden_gradient(
    dout_ptr, down_ptr, weights_ptr, hidden_ptr, order_ptr, tiles_ptr, dup_ptr, weighted_ptr,
    dweights_ptr, dout_stride, down_stride, n_stride, k_stride, tiles, experts, outs, width, pairs,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """From g = down^T dout: the gradient by up x, w hidden, and this column tile's <hidden, g>."""
    tile, column_tile = place(tiles, tl.cdiv(outs, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert == experts:
        return
    position, valid = _rows(tiles_ptr, tile, tiles, BLOCK_M)
    pair = tl.load(order_ptr + position, mask=valid, other=0)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product(
        dout_ptr, (pair // TOP_K).to(tl.int64), valid, down_ptr + expert * down_stride, column,
        column < outs, width, dout_stride, k_stride, n_stride, BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
        WIDE, PRECISION,
    )
    pair = pair.to(tl.int64)
    weight = tl.load(weights_ptr + pair, mask=valid, other=0.0).to(WIDE)
    # half of the columns after the other: what each needs in registers would not fit at once
    halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    first_half, second_half = tl.split(halves)
    row = tl.load(tiles_ptr + tiles + tile).to(tl.int64)
    column = column_tile.to(tl.int64) * BLOCK_N
    dweight = _through_activation(
        first_half, weight, valid, row, column, hidden_ptr, dup_ptr, weighted_ptr, outs
    )
    dweight += _through_activation(
        second_half, weight, valid, row, column + BLOCK_N // 2, hidden_ptr, dup_ptr, weighted_ptr,
        outs,
    )
    tl.store(dweights_ptr + column_tile.to(tl.int64) * pairs + pair, dweight, valid)


@triton.jit
def _sum_copies(copies_ptr, out_ptr, copies, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), WIDE)
    for copy in range(0, copies):
        at = (row * copies + copy) * width + column
        total += tl.load(copies_ptr + at, mask=inside, other=0.0).to(WIDE)
    tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), inside)


# ---- launches ----


def table(x: Tensor, pairs: SortedPairs) -> Table:
    """The table of the grouped products, by what the host knows: dtype, pairs and experts."""
    tables = GROUPED if x.element_size() == 2 else GROUPED_WIDE
    count, experts = len(pairs.order_N), len(pairs.ends_E)
    return next(
        tables[name]
        for name, most in REGIMES.items()
        if name in tables and (most is None or count <= most * experts)
    )


def expert_up(x_TD: Tensor, up_EFD: Tensor, pairs: SortedPairs) -> Tensor:
    """relu(up x)^2 of every pair [N, F], in sorted order and in the dtype of x."""
    count, inner = len(pairs.order_N), up_EFD.shape[1]
    hidden_NF = torch.empty((count, inner), dtype=x_TD.dtype, device=x_TD.device)
    x_TD = dense_rows(x_TD)

    def run(config: Config) -> None:
        grid, shape, constants = _grouped(config, up_EFD, pairs, x_TD)
        launch(
            _expert_up, grid, x_TD, up_EFD, pairs.order_N, pairs.tiles(config.blocks["BLOCK_M"]),
            hidden_NF, x_TD.stride(0), *up_EFD.stride(), *shape,
            config=config, TOP_K=pairs.top_k, **constants,
        )

    table(x_TD, pairs).run(x_TD, ("up", *key(pairs, up_EFD)), run)
    return hidden_NF


def rows_to_slots(
    rows_NI: Tensor, matrix_EOI: Tensor, weights_TS: Tensor | None, pairs: SortedPairs
) -> Tensor:
    """Each sorted row times its expert's matrix and its weight, then summed per token [T, O]."""
    count, outs = len(rows_NI), matrix_EOI.shape[1]
    copies_NO = torch.empty((count, outs), dtype=rows_NI.dtype, device=rows_NI.device)
    weights_TS = None if weights_TS is None else weights_TS.contiguous()

    def run(config: Config) -> None:
        grid, shape, constants = _grouped(config, matrix_EOI, pairs, rows_NI)
        launch(
            _rows_to_slots, grid, rows_NI, matrix_EOI, weights_TS, pairs.order_N,
            pairs.tiles(config.blocks["BLOCK_M"]), copies_NO, rows_NI.stride(0),
            *matrix_EOI.stride(), *shape, config=config, **constants,
        )

    table(rows_NI, pairs).run(rows_NI, ("slots", *key(pairs, matrix_EOI)), run)
    return sum_copies(copies_NO.view(-1, pairs.top_k, outs))


def hidden_gradient(
    dout_TD: Tensor, down_EDF: Tensor, weights_TS: Tensor, hidden_NF: Tensor, pairs: SortedPairs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient by up x [N, F], hidden times routing weight [N, F], gradient by the weights [T, S].

    The last needs no output of the experts: w enters as w <dout, down h> = w <down^T dout, h>.
    """
    count, inner = hidden_NF.shape
    down_EFD = down_EDF.transpose(1, 2)
    dup_NF, weighted_NF = torch.empty_like(hidden_NF), torch.empty_like(hidden_NF)
    dout_TD, weights_TS = dense_rows(dout_TD), weights_TS.contiguous()
    partial: list[Tensor] = []  # per column tile

    def run(config: Config) -> None:
        columns = triton.cdiv(inner, config.blocks["BLOCK_N"])
        partial[:] = [torch.empty((1, columns, count), dtype=_wide(dout_TD), device=dout_TD.device)]
        grid, shape, constants = _grouped(config, down_EFD, pairs, dout_TD)
        launch(
            _hidden_gradient, grid, dout_TD, down_EDF, weights_TS, hidden_NF, pairs.order_N,
            pairs.tiles(config.blocks["BLOCK_M"]), dup_NF, weighted_NF, partial[0],
            dout_TD.stride(0), *down_EFD.stride(), *shape, count,
            config=config, TOP_K=pairs.top_k, **constants,
        )

    table(dout_TD, pairs).run(dout_TD, ("hidden", *key(pairs, down_EFD)), run)
    dweights = sum_copies(partial[0]).view(weights_TS.shape).to(weights_TS.dtype)
    return dup_NF, weighted_NF, dweights


def sum_copies(copies_TSD: Tensor) -> Tensor:
    """Sum over the middle axis, in float32, in a fixed order."""
    rows, copies, width = copies_TSD.shape
    out_TD = torch.empty((rows, width), dtype=copies_TSD.dtype, device=copies_TSD.device)

    def run(config: Config) -> None:
        grid = (rows, triton.cdiv(width, config.blocks["BLOCK"]))
        constants = {"WIDE": wide_type(copies_TSD)}
        launch(_sum_copies, grid, copies_TSD, out_TD, copies, width, config=config, **constants)

    SUM_COPIES.run(copies_TSD, (copies, width), run)
    return out_TD


def dense_rows(x_RD: Tensor) -> Tensor:
    """Rows may lie apart (slices of a wider tensor), their columns may not."""
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def _grouped(
    config: Config, matrix_EOI: Tensor, pairs: SortedPairs, like: Tensor
) -> tuple[tuple[int], tuple[int, ...], dict]:
    """Program grid, the sizes that all grouped kernels take, and their constants."""
    blocks = config.blocks
    experts, outs, width = matrix_EOI.shape
    tiles = pairs.tiles(blocks["BLOCK_M"]).shape[1]
    grid = (tiles * triton.cdiv(outs, blocks["BLOCK_N"]),)
    constants = {
        "EVEN": width % blocks["BLOCK_K"] == 0, "WIDE": wide_type(like),
        "PRECISION": dot_precision(like),
    }
    return grid, (tiles, experts, outs, width), constants


def key(pairs: SortedPairs, matrix: Tensor) -> tuple[int, ...]:
    """What a choice by timing depends on; the number of pairs coarsely, each call has another."""
    return triton.next_power_of_2(len(pairs.order_N)), pairs.top_k, *matrix.shape


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
