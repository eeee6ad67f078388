"""Depthwise causal convolution with SiLU as one operation for autograd and torch.compile.

The kernels are in `conv_kernels.py`. Letters: B batch, L length, D channels, K taps, P runs of
positions, one program each.
"""

from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from tess.kernels.norms import wide_dtype
from tess.kernels.triton.conv_kernels import conv_backward_kernel, conv_forward_kernel
from tess.kernels.triton.launch import Config, Table, launch, wide_type
from tess.kernels.triton.norms import dense_rows, in_common_units

STEP = 4  # positions that a kernel loads at a time
PROGRAMS = 2048  # some rounds of an H100's 132 multiprocessors, unless the runs get too short
SHORTEST_RUN, LONGEST_RUN = 16, 256  # positions

FORWARD = Table("causal_conv_forward", {"sm_80": Config({"BLOCK": 512}, 2, 1)})
BACKWARD = Table("causal_conv_backward", {"sm_80": Config({"BLOCK": 512}, 4, 1)})


def conv_forward(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor | None,
    ids_BL: Tensor | None, mask_BL: Tensor | None,
) -> Tensor:
    """SiLU of the convolution [B, L, D] in the dtype of x; arguments as in the public function."""
    y_BLD = torch.empty(x_BLD.shape, dtype=x_BLD.dtype, device=x_BLD.device)
    x, others = dense_rows(x_BLD), _contiguous(weight_DK, bias_D, window_BKD, ids_BL, mask_BL)
    batch, length, width = x.shape
    unit, (*strides, in_units) = in_common_units(*x.stride()[:2], width)
    constants = {"UNIT": unit, "STEP": STEP, "K": weight_DK.shape[1], "WIDE": wide_type(x)}

    def run(config: Config) -> None:
        config, grid, sizes = _divided(config, batch, length, width)
        launch(
            conv_forward_kernel, grid, x, *others, y_BLD, *strides, length, in_units, *sizes,
            config=config, **constants,
        )

    FORWARD.run(x, (batch, length, width), run)
    return y_BLD


def conv_backward(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor | None,
    ids_BL: Tensor | None, mask_BL: Tensor | None, dy_BLD: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, weight, bias and window, of size 0 where one is absent, in their dtypes."""
    x, dy, taps = dense_rows(x_BLD), dense_rows(dy_BLD), weight_DK.shape[1]
    others = _contiguous(weight_DK, bias_D, window_BKD, ids_BL, mask_BL)
    batch, length, width = x.shape
    dx_BLD = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dwindow = x.new_empty(0) if window_BKD is None else torch.empty_like(others[2])
    unit, (*strides, in_units) = in_common_units(*x.stride()[:2], *dy.stride()[:2], width)
    constants = {"UNIT": unit, "STEP": STEP, "K": taps, "WIDE": wide_type(x)}
    sums = []

    def run(config: Config) -> None:
        config, grid, sizes = _divided(config, batch, length, width)
        make = {"dtype": wide_dtype(x), "device": x.device}
        dweight_PKD = torch.empty((batch * sizes[0], taps, width), **make)
        dbias_PD = None if bias_D is None else torch.empty((batch * sizes[0], width), **make)
        launch(
            conv_backward_kernel, grid, x, *others, dy, dx_BLD,
            None if window_BKD is None else dwindow, dweight_PKD, dbias_PD, *strides, length,
            in_units, *sizes, config=config, **constants,
        )
        dweight = dweight_PKD.sum(0).T.to(weight_DK.dtype).contiguous()
        sums[:] = dweight, dx_BLD.new_empty(0) if bias_D is None else dbias_PD.sum(0)

    BACKWARD.run(x, (batch, length, width), run)
    dweight, dbias = sums
    return dx_BLD, dweight, dbias if bias_D is None else dbias.to(bias_D.dtype), dwindow


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _divided(
    config: Config, batch: int, length: int, width: int
) -> tuple[Config, tuple[int], tuple[int, int, int]]:
    """Block of channels, grid, and the numbers of runs, of tiles of channels and of steps a run."""
    block = min(config.blocks["BLOCK"], triton.next_power_of_2(width))
    tiles = triton.cdiv(width, block)
    positions = min(max(batch * length * tiles // PROGRAMS, SHORTEST_RUN), LONGEST_RUN)
    steps = triton.cdiv(min(positions, max(length, 1)), STEP)
    runs = max(1, triton.cdiv(length, steps * STEP))  # one writes a window's gradient where L = 0
    return config._replace(blocks={"BLOCK": block}), (batch * runs * tiles,), (runs, tiles, steps)


# ---- operations for autograd and torch.compile ----

_forward_op = torch.library.custom_op("tess::causal_conv1d", conv_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "tess::causal_conv1d_backward", conv_backward, mutates_args=()
)


@_forward_op.register_fake
def _(x_BLD, weight_DK, bias_D, window_BKD, ids_BL, mask_BL):
    return x_BLD.new_empty(x_BLD.shape)


@_backward_op.register_fake
def _(x_BLD, weight_DK, bias_D, window_BKD, ids_BL, mask_BL, dy_BLD):
    return tuple(
        x_BLD.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (x_BLD, weight_DK, bias_D, window_BKD)
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy_BLD):
    tensors = ctx.saved_tensors
    gradients = _backward_op(*tensors, dy_BLD)
    present = (gradient if t is not None else None for t, gradient in zip(tensors, gradients))
    return *present, None, None


_forward_op.register_autograd(_gradients, setup_context=_save)


def causal_conv1d(
    x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, window_BKD: Tensor | None,
    sequence_ids_BL: Tensor | None, mask_BL: Tensor | None,
) -> Tensor:
    """As `tess.kernels.conv.causal_conv1d`, which checks the arguments."""
    mask = None if mask_BL is None else mask_BL.contiguous().view(torch.int8)
    return _forward_op(x_BLD, weight_DK, bias_D, window_BKD, sequence_ids_BL, mask)


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """The convolution of Nemotron-3-Nano and of the shipped model on a slice of the projection."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    for name, length, width, first, projection, dtype in (
        ("conv 3-nano", 4096, 6144, 4096, 10304, bfloat16),
        ("conv 3-nano", 4096, 6144, 4096, 10304, float32),
        ("conv 3-nano packed", 4096, 6144, 4096, 10304, bfloat16),
        ("conv 3-nano decoding", 1, 6144, 4096, 10304, bfloat16),
        ("conv shipped", 4096, 512, 384, 904, bfloat16),
    ):
        x = make(8, length, projection, dtype=dtype)[..., first : first + width]
        weight, bias = make(width, 4, dtype=dtype), make(width, dtype=dtype)
        options = (None, None, None)
        if "packed" in name:
            mask = make(8, length, dtype=torch.int8)
            options = (None, make(8, length, dtype=torch.int32), mask)
        elif "decoding" in name:
            options = (make(8, 3, width, dtype=dtype), None, None)

        def both(x=x, weight=weight, bias=bias, options=options) -> None:
            y = conv_forward(x, weight, bias, *options)
            conv_backward(x, weight, bias, *options, y)

        yield f"{name} {str(dtype)[6:]}", dtype == bfloat16, both
