"""Cross-entropy of a linear head that never holds its logits: they pass in slabs of rows.

A row with logits z = W h costs w ((1 - s)(L - z_y) + s (L - mean z)): L is log sum exp z, w the
weight of the row, s the label smoothing. Its gradient by z is w (softmax(z) - (1 - s) onehot(y) -
s / V): while a slab is at hand it is turned into that and multiplied into both gradients, so that
three products do it all (Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989). Only where
every row's own loss is returned (reduction "none") must the backward pass compute the logits
again, a fourth product.
"""

# T tokens, N tokens that count, R rows of a slab, V vocabulary, H width

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tess.kernels.dispatch import use_triton
from tess.kernels.head import check_head, choose_slab_bytes, product_dtype, slab_rows
from tess.kernels.norms import wide_dtype

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class _Settings:
    dtype: torch.dtype  # of the products
    smoothing: float
    slab_bytes: int
    triton: bool = False  # whether a kernel takes the slabs


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    ids_T: Tensor,
    *,
    weights_T: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_token_losses: bool = False,
    slab_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(hidden W^T) with the tokens' ids, in nats.

    Args:
        hidden_TH: float; products run in its dtype, or autocast's where that is on.
        weight_VH: the head; its gradient is summed in float32 over the slabs.
        ids_T: integer ids in [0, V), or ignore_index.
        weights_T: a factor for every token, at least 0, no gradient; None stands for ones. Rows
            with weight 0 or the ignored id cost nothing: they are not computed.
        label_smoothing: s in [0, 1], the target's share that is spread over all V tokens.
        reduction: "mean" divides by the sum of the weights of the rows that count, and the mean of
            nothing is 0, with gradients of zeros; "sum"; "none" gives weighted losses [T].
        return_token_losses: beside the mean or sum give the weighted losses [T] without gradient,
            which costs nothing.
        slab_bytes: bounds one slab of logits, at least one row (None: `choose_slab_bytes`). The
            PyTorch path needs a second slab for products below float32, in their own dtype.
        backend: "torch", "triton" or "auto" (None: see `dispatch.py`).

    Returns float32 (float64 for float64 products): a scalar, or [T]. Softmax and loss have that
    precision whatever the products have. There is no second derivative.

    Raises ValueError for shapes, options, ids or weights that do not fit.
    """
    _check(hidden_TH, weight_VH, ids_T, weights_T, label_smoothing, reduction)
    triton = use_triton(hidden_TH, backend)
    slab_bytes = choose_slab_bytes(slab_bytes, hidden_TH, triton)
    settings = _Settings(product_dtype(hidden_TH), float(label_smoothing), slab_bytes, triton)
    if not torch.is_grad_enabled():
        hidden_TH, weight_VH = hidden_TH.detach(), weight_VH.detach()
    rows_N, factors_N = _counted(ids_T, weights_T, ignore_index, wide_dtype(hidden_TH))
    whole = len(rows_N) == len(ids_T)
    hidden_NH = hidden_TH if whole else hidden_TH.index_select(0, rows_N)
    ids_N = ids_T.long()[rows_N]
    if len(ids_N) and not (0 <= ids_N.min() and ids_N.max() < len(weight_VH)):
        raise ValueError(
            f"ids must be in [0, {len(weight_VH)}) or {ignore_index}, got values from "
            f"{int(ids_N.min())} to {int(ids_N.max())}"
        )
    if reduction == "none":
        losses_N = _each_loss(hidden_NH, weight_VH, ids_N, factors_N, settings)
        losses_T = losses_N.new_zeros(len(ids_T)).index_copy(0, rows_N, losses_N)
        return (losses_T, losses_T.detach()) if return_token_losses else losses_T
    total, losses_N = _summed_loss(hidden_NH, weight_VH, ids_N, factors_N, settings)
    if reduction == "mean":
        # the division comes last, so that narrow dtypes hold gradients of order 1 until the end
        total = total / (factors_N.sum() if len(rows_N) else 1)
    if not return_token_losses:
        return total
    return total, losses_N.new_zeros(len(ids_T)).index_copy(0, rows_N, losses_N)


def _check(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    ids_T: Tensor,
    weights_T: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_head(hidden_TH, weight_VH)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    for name, tensor in (("ids_T", ids_T), ("weights_T", weights_T)):
        if tensor is not None and tensor.shape != hidden_TH.shape[:1]:
            raise ValueError(f"{name} must be [{len(hidden_TH)}], got {list(tensor.shape)}")
    if weights_T is not None and weights_T.requires_grad:
        raise ValueError("weights_T gets no gradient; detach it")
    if weights_T is not None and not (weights_T >= 0).all():
        raise ValueError("weights_T must be at least 0")


def _counted(
    ids_T: Tensor, weights_T: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Which rows count [N], and their weights."""
    counts_T = ids_T != ignore_index
    if weights_T is not None:
        counts_T = counts_T & (weights_T > 0)
    rows_N = counts_T.nonzero()[:, 0]
    if weights_T is None:
        return rows_N, torch.ones(len(rows_N), dtype=dtype, device=ids_T.device)
    return rows_N, weights_T[rows_N].to(dtype)


def _summed_loss(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, factors_N: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    if settings.triton:
        from tess.kernels.triton.cross_entropy import summed_loss as run

        options = (settings.dtype, settings.smoothing, settings.slab_bytes)
        return run(hidden_NH, weight_VH, ids_N, factors_N, *options)
    return _SummedLoss.apply(hidden_NH, weight_VH, ids_N, factors_N, settings)


def _each_loss(
    hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, factors_N: Tensor, settings: _Settings
) -> Tensor:
    if settings.triton:
        from tess.kernels.triton.cross_entropy import each_loss as run

        options = (settings.dtype, settings.smoothing, settings.slab_bytes)
        return run(hidden_NH, weight_VH, ids_N, factors_N, *options)
    return _EachLoss.apply(hidden_NH, weight_VH, ids_N, factors_N, settings)


class _SummedLoss(torch.autograd.Function):
    """The sum of factor times loss; both gradients are ready before the backward pass asks."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, ids_N, factors_N, settings):
        needs = ctx.needs_input_grad[:2]
        losses_N, *gradients = _sweep(hidden_NH, weight_VH, ids_N, factors_N, settings, needs)
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        # not in place: a graph that is kept may be run again
        scaled = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *_cast(scaled, ctx.dtypes), None, None, None


class _EachLoss(torch.autograd.Function):
    """Factor times loss of every row; the logits are computed again for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, ids_N, factors_N, settings):
        ctx.settings = settings
        ctx.save_for_backward(hidden_NH, weight_VH, ids_N, factors_N)
        return _sweep(hidden_NH, weight_VH, ids_N, factors_N, settings, (False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        hidden_NH, weight_VH, ids_N, factors_N = ctx.saved_tensors
        needs, factors_N = ctx.needs_input_grad[:2], factors_N * grad_N
        _, *gradients = _sweep(hidden_NH, weight_VH, ids_N, factors_N, ctx.settings, needs)
        return *_cast(gradients, (hidden_NH.dtype, weight_VH.dtype)), None, None, None


def _cast(gradients: list[Tensor | None], dtypes: tuple[torch.dtype, ...]) -> list[Tensor | None]:
    return [None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes)]


def _sweep(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    ids_N: Tensor,
    factors_N: Tensor,
    settings: _Settings,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Factor times loss [N], and the gradients of their sum where needed.

    That by hidden [N, H] has its dtype, that by weight [V, H] the precision of the losses.
    """
    dtype, wide, width = settings.dtype, factors_N.dtype, len(weight_VH)
    rows = slab_rows(width, settings.slab_bytes, wide.itemsize)
    head_VH = weight_VH.to(dtype)
    logits_RV = hidden_NH.new_empty(min(rows, len(hidden_NH)), width, dtype=wide)
    product_RV = logits_RV if dtype == wide else torch.empty_like(logits_RV, dtype=dtype)
    losses_N = torch.empty_like(factors_N)
    grad_NH = torch.empty_like(hidden_NH) if needs[0] else None
    grad_VH = torch.zeros_like(weight_VH, dtype=wide) if needs[1] else None
    with torch.autocast(hidden_NH.device.type, enabled=False):  # the dtypes are settled
        for start in range(0, len(hidden_NH), rows):
            part = slice(start, start + rows)
            hidden_RH, factors_R1 = hidden_NH[part].to(dtype), factors_N[part, None]
            count = len(hidden_RH)
            slabs = (logits_RV[:count], product_RV[:count])
            torch.mm(hidden_RH, head_VH.T, out=slabs[1])
            losses_R1 = _losses(*slabs, ids_N[part, None], settings.smoothing, any(needs))
            losses_N[part] = (losses_R1 * factors_R1)[:, 0]
            if needs[0]:
                grad_NH[part] = (slabs[1] @ head_VH) * factors_R1
            if needs[1]:
                _add_product(grad_VH, slabs[1], (hidden_RH * factors_R1).to(dtype))
    return losses_N, grad_NH, grad_VH


def _losses(
    logits_RV: Tensor, product_RV: Tensor, ids_R1: Tensor, smoothing: float, gradient: bool
) -> Tensor:
    """Losses [R, 1] of the logits in `product_RV`, which become their gradient where wanted.

    logits_RV: workspace in the precision of the softmax; the same tensor as product_RV, or not.
    """
    narrow = logits_RV.dtype != product_RV.dtype
    if narrow:
        logits_RV.copy_(product_RV)
    peak_R1 = logits_RV.amax(dim=1, keepdim=True)
    above_R1 = peak_R1 - logits_RV.gather(1, ids_R1)
    if smoothing:
        mean_R1 = logits_RV.mean(dim=1, keepdim=True)
        above_R1 = (1 - smoothing) * above_R1 + smoothing * (peak_R1 - mean_R1)
    sums_R1 = logits_RV.sub_(peak_R1).exp_().sum(dim=1, keepdim=True)
    if gradient:
        logits_RV.div_(sums_R1)
        if smoothing:
            logits_RV.sub_(smoothing / logits_RV.shape[1])
        logits_RV.scatter_add_(1, ids_R1, torch.full_like(sums_R1, smoothing - 1))
        if narrow:
            product_RV.copy_(logits_RV)
    return above_R1 + sums_R1.log()


def _add_product(sum_VH: Tensor, grad_RV: Tensor, hidden_RH: Tensor) -> None:
    """sum += grad^T hidden, the sum in its own precision whatever the product has."""
    if sum_VH.dtype == grad_RV.dtype:
        sum_VH.addmm_(grad_RV.T, hidden_RH)
    else:
        # an addition of two dtypes is not vectorised on a CPU
        sum_VH.add_((grad_RV.T @ hidden_RH).to(sum_VH.dtype))
