"""Expert routing and the expert products: tokens sorted by expert, one grouped matmul each way.

Letters: T tokens, E experts, S top-k, D width, F expert inner width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tess.kernels.activation import squared_relu
from tess.kernels.dispatch import use_triton

GROUPED_MM_ALIGNMENT = 16  # bytes of a row of any operand
MOST_PADDED = 2  # rows of a padded batch of products, by the rows that count
MOST_ROUTED = 1024  # experts that the Triton router takes: it holds a row of scores in registers


def route_tokens(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scaling: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores, biased and grouped top-k choice (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    The bias (`e_score_correction_bias`) steers the choice and is left out of the weights.

    Returns expert ids [T, S] (int64) and weights [T, S] in the dtype of the logits, which must be
    float32 or wider: the released biases differ by less than bfloat16 can hold. Ids are in falling
    order of biased score. `backend`: see `tess.kernels.dispatch`; the Triton path takes the lowest
    id first where scores are equal.

    Raises:
        ValueError: another dtype, or groups that do not divide the experts or hold too few.
    """
    if logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"router logits must be float32 or float64, got {logits_TE.dtype}")
    count = logits_TE.shape[-1]
    reach = count // num_groups * top_groups
    if count % num_groups or not 1 <= top_groups <= num_groups or not 1 <= top_k <= reach:
        raise ValueError(
            f"{top_k} of {count} experts cannot be chosen in {top_groups} of {num_groups} groups"
        )
    many = f"it takes up to {MOST_ROUTED} experts, got {count}" if count > MOST_ROUTED else None
    if use_triton(logits_TE, backend, unsupported=many):
        from tess.kernels.triton.routing import route_tokens as run

        return run(
            logits_TE, bias_E, top_k, num_groups=num_groups, top_groups=top_groups,
            normalize=normalize, scaling=scaling,
        )
    scores_TE = logits_TE.sigmoid()
    choice_TE = scores_TE + bias_E
    if num_groups > 1:
        members = choice_TE.unflatten(-1, (num_groups, -1))
        group_score = members.topk(min(2, members.shape[-1]), dim=-1).values.sum(-1)
        kept = group_score.topk(top_groups, dim=-1).indices
        allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter_(-1, kept, True)
        choice_TE = members.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    ids_TS = choice_TE.topk(top_k, dim=-1).indices
    weights_TS = scores_TE.gather(-1, ids_TS)
    if normalize:
        weights_TS = weights_TS / (weights_TS.sum(-1, keepdim=True) + 1e-20)
    return ids_TS, weights_TS * scaling


def experts(
    x_TD: Tensor,
    ids_TS: Tensor,
    weights_TS: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sum over each token's experts of weight * down relu(up x)^2 -> [T, D] in the dtype of x.

    `ids_TS` are integers in [0, E), which nothing checks; matrices of another dtype are cast to
    that of x. `backend`: see `tess.kernels.dispatch`.
    """
    if use_triton(x_TD, backend):
        from tess.kernels.triton.experts import experts as run

        return run(x_TD, ids_TS, weights_TS, up_EFD, down_EDF)
    num_experts, top_k = up_EFD.shape[0], ids_TS.shape[1]
    sorted_ids, order = ids_TS.flatten().sort(stable=True)
    every_E = torch.arange(num_experts, device=order.device)
    ends_E = torch.searchsorted(sorted_ids, every_E, right=True, out_int32=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    if (most := _rows_if_padded(x_TD, counts_E, order.numel())) is not None:
        return _padded_experts(x_TD, ids_TS, weights_TS, up_EFD, down_EDF, order, counts_E, most)
    gathered = x_TD[order // top_k]
    hidden = squared_relu(_grouped_linear(gathered, up_EFD.to(x_TD.dtype), ends_E))
    out = _grouped_linear(hidden, down_EDF.to(x_TD.dtype), ends_E)
    out = out * weights_TS.flatten()[order, None].to(out.dtype)
    # back to token order, then a sum over the S copies: deterministic, unlike a scatter-add
    unsorted = torch.empty_like(order)
    unsorted[order] = torch.arange(order.numel(), device=order.device)
    return out[unsorted].view(-1, top_k, x_TD.shape[1]).sum(1)


def _rows_if_padded(x_TD: Tensor, counts_E: Tensor, total: int) -> int | None:
    """The rows of the fullest expert where it pays to give as many to every expert, else None.

    On a CPU a grouped product is one product after the other, and each has a fixed price that is
    high in bfloat16. One batched product over padded experts pays it once.
    """
    eligible = x_TD.device.type == "cpu" and x_TD.dtype in (torch.bfloat16, torch.float16)
    if not eligible or torch.compiler.is_compiling():
        return None
    most = int(counts_E.max())
    return most if most * len(counts_E) <= MOST_PADDED * total else None


def _padded_experts(
    x_TD: Tensor,
    ids_TS: Tensor,
    weights_TS: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    order: Tensor,
    counts_E: Tensor,
    most: int,
) -> Tensor:
    """As `experts`, every expert's tokens padded to `most`; `order` sorts tokens by expert."""
    dtype, (tokens, top_k), num_experts = x_TD.dtype, ids_TS.shape, len(counts_E)
    # row of the padded products for each sorted token: its expert's first row, and its own place
    shift_E = torch.arange(num_experts) * most - (counts_E.cumsum(0) - counts_E)
    rows = torch.arange(order.numel()) + shift_E.repeat_interleave(counts_E)
    token_of_row = torch.zeros(num_experts * most, dtype=torch.long)
    token_of_row[rows] = order // top_k
    gathered = x_TD[token_of_row].view(num_experts, most, -1)
    hidden = squared_relu(torch.bmm(gathered, up_EFD.to(dtype).mT))
    out = torch.bmm(hidden, down_EDF.to(dtype).mT).flatten(0, 1)
    row_of_token = torch.empty_like(order)
    row_of_token[order] = rows
    return (out[row_of_token].view(tokens, top_k, -1) * weights_TS[..., None].to(dtype)).sum(1)


def _grouped_linear(x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """x W^T with the expert's own W for each run of rows; run e ends before row ends_E[e]."""
    if torch.compiler.is_compiling():
        # torch's own shape rule for grouped_mm refuses float32, and the other way splits by values
        return _grouped_linear_op(x_TI, weight_EOI, ends_E)
    if _has_grouped_mm(x_TI, weight_EOI):
        return F.grouped_mm(x_TI, weight_EOI.transpose(-1, -2), offs=ends_E)
    return torch.cat([x @ w_OI.T for x, w_OI in zip(_runs(x_TI, ends_E), weight_EOI)])


def _has_grouped_mm(x_TI: Tensor, weight_EOI: Tensor) -> bool:
    """grouped_mm has no float64, the precision of references, and takes no odd widths."""
    row_bytes = [size * x_TI.element_size() for size in weight_EOI.shape[1:]]
    aligned = all(size % GROUPED_MM_ALIGNMENT == 0 for size in row_bytes)
    return x_TI.dtype != torch.float64 and aligned


def _runs(x_TI: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    return torch.tensor_split(x_TI, ends_E[:-1].long().cpu())


def _grouped_linear_gradients(
    dy_TO: Tensor, x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `_grouped_linear` by x and by the matrices."""
    if _has_grouped_mm(x_TI, weight_EOI):
        dx_TI = F.grouped_mm(dy_TO, weight_EOI, offs=ends_E)
        return dx_TI, F.grouped_mm(dy_TO.T.contiguous(), x_TI, offs=ends_E)
    runs = list(zip(_runs(dy_TO, ends_E), _runs(x_TI, ends_E), weight_EOI))
    dx_TI = torch.cat([dy @ w_OI for dy, _, w_OI in runs])
    return dx_TI, torch.stack([dy.T @ x for dy, x, _ in runs])


_grouped_linear_op = torch.library.custom_op(
    "tess::grouped_linear", _grouped_linear, mutates_args=()
)
_grouped_linear_gradients_op = torch.library.custom_op(
    "tess::grouped_linear_backward", _grouped_linear_gradients, mutates_args=()
)


@_grouped_linear_op.register_fake
def _(x_TI, weight_EOI, ends_E):
    return x_TI.new_empty(len(x_TI), weight_EOI.shape[1])


@_grouped_linear_gradients_op.register_fake
def _(dy_TO, x_TI, weight_EOI, ends_E):
    return x_TI.new_empty(x_TI.shape), weight_EOI.new_empty(weight_EOI.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy_TO):
    return *_grouped_linear_gradients_op(dy_TO.contiguous(), *ctx.saved_tensors), None


_grouped_linear_op.register_autograd(_differentiate, setup_context=_save)
