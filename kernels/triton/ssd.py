"""The Mamba-2 scan as one operation for autograd and torch.compile: causal, reverse or both.

The kernels are in `ssd_forward.py` and `ssd_backward.py`, and in the files these name.
Letters: B batch, L length, H heads, P head width, G groups, N state width.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tess.kernels.triton.ssd_backward import scan_backward
from tess.kernels.triton.ssd_forward import (
    CHUNK,
    chunk_products,
    kernel_limits,
    steps_forward,
    sweep_forward,
)
from tess.kernels.triton.ssd_inputs import ScanInputs

LARGEST_STRIDE = 2**31 // 256  # offsets inside a chunk of positions have 32 bits


def scan_forward(
    x_BLHP: Tensor, raw_BLH: Tensor, a_H: Tensor, b_BLGN: Tensor, c_BLGN: Tensor,
    d_H: Tensor | None, bias_H: Tensor | None, mask_BL: Tensor | None, sequence_BL: Tensor | None,
    scale_H: Tensor | None, initial_BHPN: Tensor | None, direction: str, softplus: bool,
    low: float, high: float, want_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, final state (of size 0 unless wanted), and for the backward pass dt, decays and C B^T."""
    dt_BHL, incl_BHL = steps_forward(raw_BLH, a_H, bias_H, mask_BL, softplus, low, high)
    cb = chunk_products(c_BLGN, b_BLGN)
    y_BLHP, final = sweep_forward(
        x_BLHP, dt_BHL, incl_BHL, b_BLGN, c_BLGN, cb, d_H, scale_H, sequence_BL, initial_BHPN,
        direction, want_final,
    )
    return y_BLHP, dt_BHL.new_empty(0) if final is None else final, dt_BHL, incl_BHL, cb


def scan_backward_all(
    x_BLHP: Tensor, raw_BLH: Tensor, a_H: Tensor, b_BLGN: Tensor, c_BLGN: Tensor,
    d_H: Tensor | None, bias_H: Tensor | None, mask_BL: Tensor | None, sequence_BL: Tensor | None,
    scale_H: Tensor | None, initial_BHPN: Tensor | None, dt_BHL: Tensor, incl_BHL: Tensor,
    cb: Tensor, dy_BLHP: Tensor, dfinal_BHPN: Tensor | None, direction: str, softplus: bool,
    low: float, high: float,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """Gradients by x, raw steps, decay rates, B, C, D, bias, reverse scale and initial state."""
    inputs = ScanInputs(
        x_BLHP, raw_BLH, a_H, b_BLGN, c_BLGN, d_H, bias_H, mask_BL, sequence_BL, scale_H,
        initial_BHPN, dt_BHL, incl_BHL, cb,
    )
    dfinal = None if dfinal_BHPN is None else dfinal_BHPN.contiguous()
    return tuple(
        scan_backward(inputs, _rows_last(dy_BLHP), dfinal, direction, softplus, low, high)
    )


def _rows_last(x: Tensor) -> Tensor:
    """As it is where the last axis is dense and strides are moderate, or else a copy."""
    fits = x.stride(-1) == 1 and all(stride < LARGEST_STRIDE for stride in x.stride()[1:])
    return x if fits else x.contiguous()


_forward_op = torch.library.custom_op("tess::ssd_scan", scan_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "tess::ssd_scan_backward", scan_backward_all, mutates_args=()
)


@_forward_op.register_fake
def _(
    x, raw, a, b, c, d, bias, mask, sequence, scale, initial, direction, softplus, low, high,
    want_final,
):
    batch, length, heads, width = x.shape
    groups, states = b.shape[2:]
    chunks = -(-length // CHUNK)
    wide = torch.float64 if raw.dtype == torch.float64 else torch.float32
    dt = raw.new_empty((batch, heads, chunks * CHUNK), dtype=wide)
    final = (batch, heads, width, states) if want_final else (0,)
    cb = c.new_empty((batch, chunks, groups, CHUNK, CHUNK))
    return x.new_empty(x.shape), dt.new_empty(final), dt, torch.empty_like(dt), cb


@_backward_op.register_fake
def _(
    x, raw, a, b, c, d, bias, mask, sequence, scale, initial, dt, incl, cb, dy, dfinal,
    direction, softplus, low, high,
):
    head = dt.new_empty(x.shape[2])
    state = dt.new_empty((x.shape[0], x.shape[2], x.shape[3], b.shape[3]))
    return (
        x.new_empty(x.shape), raw.new_empty(raw.shape), head, b.new_empty(b.shape),
        c.new_empty(c.shape), *(torch.empty_like(head) for _ in range(3)), state,
    )


def _save(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:11], inputs[11:15]
    ctx.has_final = inputs[15]
    ctx.save_for_backward(*tensors, *output[2:])


def _gradients(ctx, dy, dfinal, *_):
    *tensors, dt, incl, cb = ctx.saved_tensors
    x, raw, a, b, c, d, bias, mask, sequence, scale, initial = tensors
    if dy is None:
        dy = torch.zeros_like(x)
    grads = _backward_op(
        *tensors, dt, incl, cb, dy, dfinal if ctx.has_final else None, *ctx.options
    )
    dx, draw, da, db, dc, dd, dbias, dscale, dinitial = grads
    cast = lambda grad, like: None if like is None else grad.to(like.dtype)  # noqa: E731
    return (
        dx, draw, cast(da, a), db, dc, cast(dd, d), cast(dbias, bias), None, None,
        cast(dscale, scale), cast(dinitial, initial), None, None, None, None, None,
    )


_forward_op.register_autograd(_gradients, setup_context=_save)


def ssd_scan(
    x_BLHP: Tensor, dt_BLH: Tensor, a_H: Tensor, b_BLGN: Tensor, c_BLGN: Tensor, *,
    d_H: Tensor | None = None, dt_bias_H: Tensor | None = None, dt_softplus: bool = False,
    dt_limits: tuple[float, float] = (0.0, math.inf), mask_BL: Tensor | None = None,
    sequence_ids_BL: Tensor | None = None, direction: str = "forward",
    reverse_scale_H: Tensor | None = None, initial_state_BHPN: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `tess.kernels.ssd.ssd_scan`, which checks the arguments."""
    x = _rows_last(x_BLHP)
    b, c = (_rows_last(tensor.to(x.dtype)) for tensor in (b_BLGN, c_BLGN))
    mask = None if mask_BL is None else mask_BL.to(torch.int8).contiguous()
    sequence = None if sequence_ids_BL is None else sequence_ids_BL.to(torch.int32).contiguous()
    initial = None if initial_state_BHPN is None else initial_state_BHPN.contiguous()
    per_head = (d_H, dt_bias_H, reverse_scale_H)
    d, bias, scale = (None if tensor is None else tensor.contiguous() for tensor in per_head)
    limits = kernel_limits(dt_limits)
    y, final, *_ = _forward_op(
        x, dt_BLH, a_H.contiguous(), b, c, d, bias, mask, sequence, scale, initial, direction,
        dt_softplus, *limits, return_final_state,
    )
    return y, final if return_final_state else None


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """The scan of Nemotron-3-Nano and of the shipped model, forward and backward."""
    nano, shipped = (64, 64, 8, 128), (8, 32, 2, 32)
    for name, sizes, dtype, directions in (
        ("3-nano", nano, torch.bfloat16, ("forward", "reverse", "bidirectional")),
        ("shipped", shipped, torch.bfloat16, ("bidirectional",)),
        ("shipped", shipped, torch.float32, ("bidirectional",)),
    ):
        heads, width, groups, states = sizes
        x, raw = make(8, 4096, heads, width, dtype=dtype), make(8, 4096, heads, dtype=dtype)
        b, head = make(8, 4096, groups, states, dtype=dtype), make(heads, dtype=torch.float32)
        for direction in directions:
            scale = head if name == "shipped" else None
            tensors = (x, raw, head, b, b, head, head, None, None, scale, None)
            options = (direction, True, 0.0, math.inf)

            def both(tensors=tensors, options=options) -> None:
                y, _, *saved = scan_forward(*tensors, *options, False)
                scan_backward_all(*tensors, *saved, y, None, *options)

            yield f"scan {direction} {name} {str(dtype)[6:]}", dtype == torch.bfloat16, both
