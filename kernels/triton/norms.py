"""RMS norms of rows or of groups of columns, optionally behind a SiLU gate, forward and backward.

A program holds a tile of whole rows of one group, so that narrow groups fill it with many rows.
Both norms run the same two kernels: the plain one has a single group and no gate.

Letters: R rows, D columns, G groups of D / G columns each; P programs of the backward pass on each
group, each with a run of rows.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.norms import wide_dtype
from tess.kernels.triton.launch import Config, Table, launch, wide_type

BACKWARD_PROGRAMS = 1024  # some rounds of an H100's 132 multiprocessors; each has partial sums
MOST_WARPS = 16

# TILE is how many values the warps hold; a wider group takes proportionally more warps
FORWARD = Table("rms_norm_forward", {"sm_80": Config({"TILE": 4096}, 4, 1)})
BACKWARD = Table("rms_norm_backward", {"sm_80": Config({"TILE": 2048}, 4, 1)})
GATED_BACKWARD = Table("gated_norm_backward", {"sm_80": Config({"TILE": 1024}, 4, 1)})


@triton.jit
def _silu(x):
    """SiLU(x) and its derivative; exp(-x) may be infinite, both results are then 0."""
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _norm_forward(
    x_ptr, gate_ptr, weight_ptr, y_ptr, scale_ptr, x_stride, gate_stride, rows, groups, width, eps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):
    group = (tl.program_id(0) % groups).to(tl.int64)
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width * UNIT)[None, :]
    place = group * (width * UNIT) + column
    x = tl.load(
        x_ptr + row[:, None] * x_stride * UNIT + place[None, :], mask=inside, other=0.0
    ).to(WIDE)
    if gate_ptr is not None:
        gate = tl.load(
            gate_ptr + row[:, None] * gate_stride * UNIT + place[None, :], mask=inside, other=0.0
        ).to(WIDE)
        x *= _silu(gate)[0]
    weight = tl.load(weight_ptr + place, mask=column < width * UNIT, other=0.0).to(WIDE)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / (width * UNIT) + eps)
    y = x * scale[:, None] * weight[None, :]
    y_place = row[:, None] * (groups * width * UNIT) + place[None, :]
    tl.store(y_ptr + y_place, y.to(y_ptr.dtype.element_ty), inside)
    tl.store(scale_ptr + row * groups + group, scale, row < rows)


@triton.jit
def _norm_backward(
    x_ptr, gate_ptr, weight_ptr, scale_ptr, dy_ptr, dx_ptr, dgate_ptr, partial_ptr,
    x_stride, gate_stride, dy_stride, rows, groups, width, steps,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):
    group = (tl.program_id(0) % groups).to(tl.int64)
    program = (tl.program_id(0) // groups).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width * UNIT
    place = group * (width * UNIT) + column
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(WIDE)
    weight_gradient = tl.zeros((ROWS, BLOCK), WIDE)
    for step in range(0, steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & inside[None, :]
        x = tl.load(
            x_ptr + row[:, None] * x_stride * UNIT + place[None, :], mask=here, other=0.0
        ).to(WIDE)
        dy = tl.load(
            dy_ptr + row[:, None] * dy_stride * UNIT + place[None, :], mask=here, other=0.0
        ).to(WIDE)
        scale = tl.load(scale_ptr + row * groups + group, mask=row < rows, other=0.0)[:, None]
        out = row[:, None] * (groups * width * UNIT) + place[None, :]
        if gate_ptr is not None:
            gate = tl.load(
                gate_ptr + row[:, None] * gate_stride * UNIT + place[None, :], mask=here,
                other=0.0,
            ).to(WIDE)
            silu, slope = _silu(gate)
            normed = x * silu * scale
        else:
            normed = x * scale
        weight_gradient += dy * normed
        dy *= weight[None, :]
        mean = tl.sum(dy * normed, axis=1) / (width * UNIT)
        dx = scale * (dy - normed * mean[:, None])
        if gate_ptr is not None:
            dgate = dx * x * slope
            tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), here)
            dx *= silu
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), here)
    partial = partial_ptr + program * (groups * width * UNIT) + place
    tl.store(partial, tl.sum(weight_gradient, axis=0), inside)


def group_norm_forward(
    x_RD: Tensor, gate_RD: Tensor | None, weight_D: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalised rows [R, D] in the dtype of x, and 1 / RMS of each row and group [R, G]."""
    rows, columns = x_RD.shape
    y_RD = torch.empty((rows, columns), dtype=x_RD.dtype, device=x_RD.device)
    scale_RG = torch.empty((rows, groups), dtype=wide_dtype(x_RD), device=x_RD.device)
    x, gate, weight = dense_rows(x_RD), dense_rows(gate_RD), weight_D.contiguous()
    width, strides = columns // groups, (x.stride(0), 0 if gate is None else gate.stride(0))
    unit, (*strides, in_units) = in_common_units(*strides, width)

    def run(config: Config) -> None:
        config = _shaped(config, width)
        tiles = triton.cdiv(rows, config.blocks["ROWS"])
        launch(
            _norm_forward, (tiles * groups,), x, gate, weight, y_RD, scale_RG, *strides, rows,
            groups, in_units, eps, config=config, UNIT=unit, WIDE=wide_type(x),
        )

    FORWARD.run(x, (columns, groups, gate is None), run)
    return y_RD, scale_RG


def group_norm_backward(
    x_RD: Tensor, gate_RD: Tensor | None, weight_D: Tensor, scale_RG: Tensor, dy_RD: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by the gate (of size 0 without one) and by the weight, in their dtypes."""
    rows, columns = x_RD.shape
    dx_RD = torch.empty((rows, columns), dtype=x_RD.dtype, device=x_RD.device)
    dgate = x_RD.new_empty(0) if gate_RD is None else torch.empty_like(dx_RD, dtype=gate_RD.dtype)
    x, gate, dy = dense_rows(x_RD), dense_rows(gate_RD), dense_rows(dy_RD)
    weight, width = weight_D.contiguous(), columns // groups
    strides = (x.stride(0), 0 if gate is None else gate.stride(0), dy.stride(0))
    unit, (*strides, in_units) = in_common_units(*strides, width)
    sums = []

    def run(config: Config) -> None:
        config = _shaped(config, width)
        tiles = triton.cdiv(rows, config.blocks["ROWS"])
        steps = max(1, triton.cdiv(tiles * groups, BACKWARD_PROGRAMS))
        partial_PD = scale_RG.new_empty((triton.cdiv(tiles, steps), columns))
        launch(
            _norm_backward, (len(partial_PD) * groups,), x, gate, weight, scale_RG, dy, dx_RD,
            None if gate is None else dgate, partial_PD, *strides, rows, groups, in_units, steps,
            config=config, UNIT=unit, WIDE=wide_type(x),
        )
        sums[:] = [partial_PD.sum(0).to(weight_D.dtype)]

    table = BACKWARD if gate is None else GATED_BACKWARD
    table.run(x, (columns, groups), run)
    return dx_RD, dgate, sums[0]


def _shaped(config: Config, width: int) -> Config:
    """Block of columns for a group of this width; rows that fill the tile, or warps for one row."""
    block, tile = triton.next_power_of_2(width), config.blocks["TILE"]
    warps = min(MOST_WARPS, config.num_warps * max(1, block // tile))
    return Config({"ROWS": max(1, tile // block), "BLOCK": block}, warps, config.num_stages)


def dense_rows(x: Tensor | None) -> Tensor | None:
    """Rows may lie apart (slices of a wider tensor), the values of one may not: then a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def in_common_units(*sizes: int) -> tuple[int, tuple[int, ...]]:
    """8 and the sizes divided by it where all are multiples, or else 1 and the sizes.

    Triton itself only looks for multiples of 16, and loads value by value where a stride has none;
    16-byte loads need multiples of 8 for 2-byte values.
    """
    unit = 8 if all(size % 8 == 0 for size in sizes) else 1
    return unit, tuple(size // unit for size in sizes)


# ---- operations for autograd and torch.compile ----

_forward_op = torch.library.custom_op("tess::group_rms_norm", group_norm_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "tess::group_rms_norm_backward", group_norm_backward, mutates_args=()
)


@_forward_op.register_fake
def _(x_RD, gate_RD, weight_D, groups, eps):
    return x_RD.new_empty(x_RD.shape), x_RD.new_empty((len(x_RD), groups), dtype=wide_dtype(x_RD))


@_backward_op.register_fake
def _(x_RD, gate_RD, weight_D, scale_RG, dy_RD, groups):
    dgate = x_RD.new_empty(0) if gate_RD is None else gate_RD.new_empty(gate_RD.shape)
    return x_RD.new_empty(x_RD.shape), dgate, weight_D.new_empty(weight_D.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.groups, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx, dy_RD, _):
    *tensors, scale_RG = ctx.saved_tensors
    dx, dgate, dweight = _backward_op(*tensors, scale_RG, dy_RD, ctx.groups)
    return dx, None if tensors[1] is None else dgate, dweight, None, None


_forward_op.register_autograd(_gradients, setup_context=_save)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `tess.kernels.norms.rms_norm`, which checks the arguments."""
    return _forward_op(_rows(x), None, weight_D, 1, eps)[0].view(x.shape)


def gated_group_rms_norm(
    x: Tensor, gate: Tensor, weight_D: Tensor, num_groups: int, eps: float
) -> Tensor:
    """As `tess.kernels.norms.gated_group_rms_norm`, which checks the arguments."""
    return _forward_op(_rows(x), _rows(gate), weight_D, num_groups, eps)[0].view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """The norms of Nemotron-3-Nano and of the shipped model; gates are slices of a projection."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    for name, columns, groups, projection, dtype in (
        ("rms_norm 3-nano", 2688, 1, None, bfloat16),
        ("rms_norm 3-nano", 2688, 1, None, float32),
        ("rms_norm shipped", 192, 1, None, bfloat16),
        ("gated norm 3-nano", 4096, 8, 10304, bfloat16),
        ("gated norm 3-nano", 4096, 8, 10304, float32),
        ("gated norm shipped", 384, 2, 904, bfloat16),
        ("rms_norm widest", 16384, 1, None, bfloat16),
        ("gated norm one group", 4096, 1, 10304, bfloat16),
    ):
        x, weight = make(32768, columns, dtype=dtype), make(columns, dtype=dtype)
        gate = projection and make(32768, projection, dtype=dtype)[:, :columns]

        def both(x=x, gate=gate, weight=weight, groups=groups) -> None:
            y, scale = group_norm_forward(x, gate, weight, groups, 1e-5)
            group_norm_backward(x, gate, weight, scale, y, groups)

        hot = dtype == bfloat16 and "widest" not in name
        yield f"{name} {str(dtype)[6:]}", hot, both
