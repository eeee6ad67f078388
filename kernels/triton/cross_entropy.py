"""Cross-entropy of a linear head: a kernel turns each slab of logits into losses and gradients.

A slab is written by the matrix product in the products' dtype, read by the kernel, and turned into
its gradient where it stands; no wide copy of it exists.

Letters: N tokens that count, R rows of a slab, V vocabulary, H width of the head.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.head import slab_rows
from tess.kernels.triton.head import OnceTable
from tess.kernels.triton.launch import Config, launch, wide_type

# A thread has EACH neighbouring logits of a tile, so that a tile needs no exchange between threads.
LOSSES = OnceTable("row_losses", {"sm_80": Config({"LANES": 1024, "EACH": 8}, 16, 1)})


# ---- kernel ----


@triton.jit
def _row_losses(
    logits_ptr, ids_ptr, losses_ptr, row_stride, width,
    SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A row's loss; with GRADIENT its logits become softmax - target, in place."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    place = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    peak = tl.full((LANES,), -float("inf"), WIDE)
    total, plain = tl.zeros((LANES,), WIDE), tl.zeros((LANES,), WIDE)
    for start in range(0, width, LANES * EACH):
        inside = start + place < width
        x = tl.load(logits_ptr + start + place, mask=inside, other=-float("inf")).to(WIDE)
        if SMOOTHING > 0:
            plain += tl.sum(tl.where(inside, x, 0.0), axis=1)
        higher = tl.maximum(peak, tl.max(x, axis=1))
        level = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(peak - level) + tl.sum(tl.exp(x - level[:, None]), axis=1)
        peak = higher
    token = tl.load(ids_ptr + row)
    own = tl.load(logits_ptr + token).to(WIDE)
    tl.debug_barrier()  # no thread may write a gradient before all have read that logit
    top = tl.max(peak, axis=0)
    total = tl.sum(total * tl.exp(peak - top), axis=0)
    above = top - own
    if SMOOTHING > 0:
        above = (1 - SMOOTHING) * above + SMOOTHING * (top - tl.sum(plain, axis=0) / width)
    tl.store(losses_ptr + row, above + tl.log(total))
    if GRADIENT:
        scale, spread = 1.0 / total, (total * 0 + SMOOTHING) / width
        for start in range(0, width, LANES * EACH):
            inside = start + place < width
            x = tl.load(logits_ptr + start + place, mask=inside, other=-float("inf")).to(WIDE)
            p = tl.exp(x - top) * scale
            if SMOOTHING > 0:
                p -= spread
            p = tl.where(start + place == token, p + (SMOOTHING - 1.0), p)
            tl.store(logits_ptr + start + place, p.to(logits_ptr.dtype.element_ty), inside)


def row_losses(logits_RV: Tensor, ids_R: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """Losses [R] in float32 (float64 for float64); with `gradient` the logits become theirs."""
    rows, width = logits_RV.shape
    wide = torch.float64 if logits_RV.dtype == torch.float64 else torch.float32
    losses_R = torch.empty(rows, dtype=wide, device=logits_RV.device)
    constants = {"SMOOTHING": float(smoothing), "GRADIENT": gradient, "WIDE": wide_type(logits_RV)}

    def run(config: Config) -> None:
        launch(
            _row_losses, (rows,), logits_RV, ids_R, losses_R, logits_RV.stride(0), width,
            config=config, **constants,
        )

    LOSSES.run(logits_RV, width, run)
    return losses_R


# ---- the sweep over slabs ----


def sweep(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, factors_N: Tensor, dtype: torch.dtype,
    smoothing: float, slab_bytes: int, by_hidden: bool, by_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor times loss [N], and the gradients of their sum, empty where they are not asked for.

    dtype: of the products; factors have that of the losses. The gradient by hidden [N, H] has its
    dtype, that by weight [V, H] the precision of the losses.
    """
    wide, width, count = factors_N.dtype, len(weight_VH), len(hidden_NH)
    rows = slab_rows(width, slab_bytes, dtype.itemsize)
    head_VH, ids_N = weight_VH.to(dtype), ids_N.contiguous()
    slab_RV = hidden_NH.new_empty((min(rows, count), width), dtype=dtype)
    losses_N = torch.empty_like(factors_N)
    grad_NH = hidden_NH.new_empty(hidden_NH.shape if by_hidden else 0)
    shape = weight_VH.shape if by_weight else 0
    grad_VH = torch.zeros(shape, dtype=wide, device=weight_VH.device)
    with torch.autocast(hidden_NH.device.type, enabled=False):  # the dtypes are settled
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            hidden_RH, factors_R1 = hidden_NH[part].to(dtype), factors_N[part, None]
            logits_RV = slab_RV[: len(hidden_RH)]
            torch.mm(hidden_RH, head_VH.T, out=logits_RV)
            losses_R = row_losses(logits_RV, ids_N[part], smoothing, by_hidden or by_weight)
            losses_N[part] = losses_R * factors_R1[:, 0]
            if by_hidden:
                grad_NH[part] = (logits_RV @ head_VH) * factors_R1
            if by_weight:
                add_product(grad_VH, logits_RV.T, (hidden_RH * factors_R1).to(dtype))
    return losses_N, grad_NH, grad_VH


def add_product(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """sum += left right, the sum in its own precision whatever the product has."""
    if sum_MN.dtype == left_MK.dtype:
        sum_MN.addmm_(left_MK, right_KN)
    elif sum_MN.device.type == "cuda" and _adds_wide(sum_MN.device, left_MK.dtype):
        torch.addmm(sum_MN, left_MK, right_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN.add_((left_MK @ right_KN).to(sum_MN.dtype))


@cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds narrow products to a float32 sum in one pass; older ones do not."""
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


# ---- operations for autograd and torch.compile ----


def summed_cross_entropy_forward(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, factors_N: Tensor, dtype: torch.dtype,
    smoothing: float, slab_bytes: int, by_hidden: bool, by_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of factor times loss, and what `sweep` gives."""
    arguments = (dtype, smoothing, slab_bytes, by_hidden, by_weight)
    losses_N, *gradients = sweep(hidden_NH, weight_VH, ids_N, factors_N, *arguments)
    return losses_N.sum(), losses_N, *gradients


def each_cross_entropy_forward(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, factors_N: Tensor, dtype: torch.dtype,
    smoothing: float, slab_bytes: int,
) -> Tensor:
    """Factor times loss of every row [N]."""
    arguments = (dtype, smoothing, slab_bytes, False, False)
    return sweep(hidden_NH, weight_VH, ids_N, factors_N, *arguments)[0]


def scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in a dtype; not in place, since a graph that is kept may be run again."""
    return (gradient * scale).to(dtype)


_sum_op = torch.library.custom_op(
    "tess::summed_cross_entropy", summed_cross_entropy_forward, mutates_args=()
)
_each_op = torch.library.custom_op(
    "tess::each_cross_entropy", each_cross_entropy_forward, mutates_args=()
)
_sweep_op = torch.library.custom_op("tess::cross_entropy_sweep", sweep, mutates_args=())
# neither of these two has a derivative, so that a second derivative of the loss is an error
_scale_op = torch.library.custom_op("tess::scale_gradient", scale_gradient, mutates_args=())


@_sum_op.register_fake
def _(hidden_NH, weight_VH, ids_N, factors_N, *arguments):
    outputs = _fake_sweep(hidden_NH, weight_VH, ids_N, factors_N, *arguments)
    return factors_N.new_empty(()), *outputs


@_each_op.register_fake
def _(hidden_NH, weight_VH, ids_N, factors_N, *arguments):
    return torch.empty_like(factors_N)


@_sweep_op.register_fake
def _fake_sweep(hidden_NH, weight_VH, ids_N, factors_N, dtype, smoothing, slab_bytes, *needs):
    shapes = [x.shape if need else 0 for x, need in zip((hidden_NH, weight_VH), needs)]
    grad_VH = weight_VH.new_empty(shapes[1], dtype=factors_N.dtype)
    return torch.empty_like(factors_N), hidden_NH.new_empty(shapes[0]), grad_VH


@_scale_op.register_fake
def _(gradient, scale, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _save_sum(ctx, inputs, output):
    ctx.dtypes, ctx.needs = (inputs[0].dtype, inputs[1].dtype), inputs[7:9]
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or the backward pass starts with zeros as large as the head


def _scale(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    parts = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs)
    return *(_scale_op(g, grad, dtype) if need else None for g, dtype, need in parts), *(None,) * 7


def _save_each(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.arguments = inputs[4:]


def _again(ctx, grad_N):
    hidden_NH, weight_VH, ids_N, factors_N = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    factors_N = factors_N * grad_N
    _, *gradients = _sweep_op(hidden_NH, weight_VH, ids_N, factors_N, *ctx.arguments, *needs)
    dtypes = (hidden_NH.dtype, weight_VH.dtype)
    parts = zip(gradients, dtypes, needs)
    return *(g.to(dtype) if need else None for g, dtype, need in parts), *(None,) * 5


_sum_op.register_autograd(_scale, setup_context=_save_sum)
_each_op.register_autograd(_again, setup_context=_save_each)


def summed_loss(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, factors_N: Tensor, dtype: torch.dtype,
    smoothing: float, slab_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The sum of factor times loss, and those losses [N] without gradient."""
    needs = (x.requires_grad and torch.is_grad_enabled() for x in (hidden_NH, weight_VH))
    arguments = (dtype, smoothing, slab_bytes, *needs)
    total, losses_N, _, _ = _sum_op(hidden_NH, weight_VH, ids_N, factors_N, *arguments)
    return total, losses_N


def each_loss(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, factors_N: Tensor, dtype: torch.dtype,
    smoothing: float, slab_bytes: int,
) -> Tensor:
    """Factor times loss of every row [N]; the logits are computed again for the backward pass."""
    return _each_op(hidden_NH, weight_VH, ids_N, factors_N, dtype, smoothing, slab_bytes)


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, hot, call) at shipped shapes; `make(*shape, dtype=...)`: a tensor without data."""
    ids = make(64, dtype=torch.int64)
    for dtype, smoothing, gradient in (
        (torch.bfloat16, 0.0, True), (torch.bfloat16, 0.1, True), (torch.bfloat16, 0.0, False),
        (torch.float32, 0.0, True),
    ):
        hot, logits = dtype == torch.bfloat16, make(64, 131_072, dtype=dtype)
        name = f"losses {str(dtype).removeprefix('torch.')}{' smooth' if smoothing else ''}"
        yield (
            name + (" gradient" if gradient else ""), hot,
            lambda a=(logits, ids, smoothing, gradient): row_losses(*a),
        )
