"""Expert routing and the expert products: tokens sorted by expert, one grouped matmul each way.

Letters: T tokens, E experts, S top-k, D width, F expert inner width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPED_MM_ALIGNMENT = 16  # bytes of a row of any operand


def route_tokens(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores, biased and grouped top-k choice (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    The bias (`e_score_correction_bias`) steers the choice and is left out of the weights.

    Returns expert ids [T, S] (int64) and weights [T, S] in the dtype of the logits, which must be
    float32 or wider: the released biases differ by less than bfloat16 can hold.
    """
    if logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"router logits must be float32 or float64, got {logits_TE.dtype}")
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
    x_TD: Tensor, ids_TS: Tensor, weights_TS: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over each token's experts of weight * down relu(up x)^2 -> [T, D] in the dtype of x."""
    num_experts, top_k = up_EFD.shape[0], ids_TS.shape[1]
    flat_ids = ids_TS.flatten()
    order = flat_ids.argsort(stable=True)
    ends_E = torch.bincount(flat_ids, minlength=num_experts).cumsum(0).to(torch.int32)
    gathered = x_TD[order // top_k]
    hidden = _grouped_linear(gathered, up_EFD.to(x_TD.dtype), ends_E).relu().square()
    out = _grouped_linear(hidden, down_EDF.to(x_TD.dtype), ends_E)
    out = out * weights_TS.flatten()[order, None].to(out.dtype)
    # back to token order, then a sum over the S copies: deterministic, unlike a scatter-add
    unsorted = torch.empty_like(order)
    unsorted[order] = torch.arange(order.numel(), device=order.device)
    return out[unsorted].view(-1, top_k, x_TD.shape[1]).sum(1)


def _grouped_linear(x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """x W^T with the expert's own W for each run of rows; run e ends before row ends_E[e]."""
    row_bytes = [size * x_TI.element_size() for size in weight_EOI.shape[1:]]
    aligned = all(size % GROUPED_MM_ALIGNMENT == 0 for size in row_bytes)
    if x_TI.dtype != torch.float64 and aligned:
        return F.grouped_mm(x_TI, weight_EOI.transpose(-1, -2), offs=ends_E)
    # grouped_mm has no float64, the precision of references, and takes no odd widths
    runs = torch.tensor_split(x_TI, ends_E[:-1].long().cpu())
    return torch.cat([run @ weight_OI.T for run, weight_OI in zip(runs, weight_EOI)])
