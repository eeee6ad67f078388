"""The gradient of weighted sums of embedding rows: each token adds up the rows it occurs in.

Pairs (row, token of it) are sorted by token, stably, so that each token has a run of pairs; one
program sums a run and writes the token's gradient, once. A token that is in most rows would keep
its program busy alone, so whole chunks of one run are summed by programs of their own first. No
atomics: the same input gives the same bits.

Letters: R rows, J tokens of a row, P = R J pairs, C chunks of pairs, V vocabulary, H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, launch, wide_type

CHUNK = 256  # pairs; a token's own program sums fewer than two chunks one by one
SHARE_ROWS = 128
NARROW = 512  # up to this width one warp takes a row


def _tables(name: str) -> tuple[Table, Table]:
    """For wide and for narrow rows. STEP rows are under way at once."""
    wide = Config({"BLOCK_H": 1024, "STEP": 8}, num_warps=4, num_stages=1)
    narrow = Config({"BLOCK_H": 256, "STEP": 8}, num_warps=1, num_stages=1)
    return Table(name, {"sm_80": wide}), Table(f"{name}_narrow", {"sm_80": narrow})


SHARES, PARTS, TOKENS = _tables("share_row"), _tables("run_parts"), _tables("token_rows")


@triton.jit
def _add_pairs(
    total, order_ptr, excess_ptr, dx_ptr, first, last, h, inside, dx_stride,
    J: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):
    """total + the sum of excess * dx over the sorted pairs first .. last - 1."""
    for start in range(first, last, STEP):
        place = start + tl.arange(0, STEP)
        valid = place < last
        pair = tl.load(order_ptr + place, mask=valid, other=0).to(tl.int64)
        excess = tl.load(excess_ptr + pair, mask=valid, other=0.0)
        rows = dx_ptr + (pair // J)[:, None] * dx_stride + h[None, :]
        rows = tl.load(rows, mask=valid[:, None] & inside[None, :], other=0.0).to(WIDE)
        total += tl.sum(excess[:, None] * rows, axis=0)
    return total


@triton.jit
def _share_row(
    share_ptr, dx_ptr, out_ptr, dx_stride, rows, width,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):
    """The sum of share * dx over ROWS rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), WIDE)
    for start in range(0, ROWS, STEP):
        row = first + start + tl.arange(0, STEP)
        share = tl.load(share_ptr + row, mask=row < rows, other=0.0)
        inside = (row < rows)[:, None] & (h < width)[None, :]
        dx = tl.load(dx_ptr + row[:, None] * dx_stride + h[None, :], mask=inside, other=0.0)
        total += tl.sum(share[:, None] * dx.to(WIDE), axis=0)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * width + h, total, h < width)


@triton.jit
def _run_parts(
    sorted_ptr, order_ptr, excess_ptr, dx_ptr, part_ptr, dx_stride, width,
    CHUNK: tl.constexpr, J: tl.constexpr, BLOCK_H: tl.constexpr, STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sum over a chunk of pairs, if they all have one token."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    if tl.load(sorted_ptr + first) != tl.load(sorted_ptr + first + CHUNK - 1):
        return
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = _add_pairs(
        tl.zeros((BLOCK_H,), WIDE), order_ptr, excess_ptr, dx_ptr, first, first + CHUNK, h,
        h < width, dx_stride, J, STEP, WIDE,
    )
    tl.store(part_ptr + chunk * width + h, total, h < width)


@triton.jit
def _token_rows(
    begin_ptr, order_ptr, excess_ptr, dx_ptr, part_ptr, shared_ptr, out_ptr, dx_stride, width,
    CHUNK: tl.constexpr, J: tl.constexpr, BLOCK_H: tl.constexpr, STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A token's gradient: what every token gets, then its run, whole chunks of it as parts."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < width
    begin, end = tl.load(begin_ptr + token), tl.load(begin_ptr + token + 1)
    first, last = (begin + CHUNK - 1) // CHUNK, end // CHUNK
    first = tl.minimum(first, last)
    before = tl.where(first < last, first * CHUNK, end)
    after = tl.where(first < last, last * CHUNK, end)
    total = tl.load(shared_ptr + h, mask=inside, other=0.0)
    total = _add_pairs(
        total, order_ptr, excess_ptr, dx_ptr, begin, before, h, inside, dx_stride, J, STEP, WIDE
    )
    for start in range(first, last, STEP):
        chunk = start + tl.arange(0, STEP)
        parts = part_ptr + chunk[:, None] * width + h[None, :]
        parts = tl.load(parts, mask=(chunk < last)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(parts, axis=0)
    total = _add_pairs(
        total, order_ptr, excess_ptr, dx_ptr, after, end, h, inside, dx_stride, J, STEP, WIDE
    )
    tl.store(out_ptr + token * width + h, total.to(out_ptr.dtype.element_ty), inside)


def embedding_gradient(
    dx_RH: Tensor, ids_RJ: Tensor, excess_RJ: Tensor, share_R: Tensor, vocabulary: int
) -> Tensor:
    """Gradient [V, H] by E in the dtype of dx: excess_j dx to row ids_j, and share dx to each row.

    Sums are float32 (float64 for float64). ids: int32, in 0 .. V - 1.
    """
    sorted_P, order_P = ids_RJ.flatten().sort(stable=True)
    tokens_V1 = torch.arange(vocabulary + 1, dtype=ids_RJ.dtype, device=ids_RJ.device)
    begin_V1 = torch.searchsorted(sorted_P, tokens_V1)
    dx_RH = dx_RH if dx_RH.stride(1) == 1 else dx_RH.contiguous()
    pairs = (order_P, excess_RJ.contiguous(), dx_RH)
    parts_CH = _parts(sorted_P, pairs, ids_RJ.shape[1])
    shared_H = _shared(share_R, dx_RH)
    gradient_VH = torch.empty((vocabulary, dx_RH.shape[1]), dtype=dx_RH.dtype, device=dx_RH.device)
    _run(
        TOKENS, _token_rows, vocabulary, dx_RH, begin_V1, *pairs, parts_CH, shared_H, gradient_VH,
        dx_RH.stride(0), dx_RH.shape[1], CHUNK=CHUNK, J=ids_RJ.shape[1],
    )
    return gradient_VH


def _parts(sorted_P: Tensor, pairs: tuple[Tensor, Tensor, Tensor], top: int) -> Tensor:
    """Sums [C, H] of the chunks that lie within one run; the others are not written."""
    dx_RH = pairs[2]
    shape = (len(sorted_P) // CHUNK, dx_RH.shape[1])
    parts_CH = torch.empty(shape, dtype=pairs[1].dtype, device=dx_RH.device)
    _run(
        PARTS, _run_parts, shape[0], dx_RH, sorted_P, *pairs, parts_CH, dx_RH.stride(0), shape[1],
        CHUNK=CHUNK, J=top,
    )
    return parts_CH


def _shared(share_R: Tensor, dx_RH: Tensor) -> Tensor:
    """The sum [H] of share * dx."""
    (rows, width), programs = dx_RH.shape, triton.cdiv(len(dx_RH), SHARE_ROWS)
    out_WH = torch.empty((programs, width), dtype=share_R.dtype, device=dx_RH.device)
    _run(
        SHARES, _share_row, programs, dx_RH, share_R.contiguous(), dx_RH, out_WH, dx_RH.stride(0),
        rows, width, ROWS=SHARE_ROWS,
    )
    return out_WH.sum(0)


def _run(tables: tuple[Table, Table], kernel, programs: int, dx_RH: Tensor, *args, **constants):
    """Launch `programs` times as many programs as a row has tiles."""
    width = dx_RH.shape[1]

    def run(config: Config) -> None:
        grid = (programs, triton.cdiv(width, config.blocks["BLOCK_H"]))
        launch(kernel, grid, *args, config=config, WIDE=wide_type(dx_RH), **constants)

    tables[width <= NARROW].run(dx_RH, (width, constants.get("J")), run)
