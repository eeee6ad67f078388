"""One sweep over the vocabulary: the token, its log-probability, entropy and expected embedding.

The logits of a linear head are computed for a slab of rows at a time, all V of them, and used up
before the next slab; nothing of size [T, V] exists. For thousands of rows that beats computing the
logits again tile by tile, because one more product costs more than reading a slab twice.
"""

# T rows, V vocabulary, H width, G width of the embedding, R rows of a slab, M likeliest tokens,
# K leading entries of a ranking, N blocks of the vocabulary, B tokens of a block

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tess.kernels.dispatch import use_triton

SLAB_BYTES = 96 << 20
# On a GPU a slab's product has to have so many rows that it does not wait for the head's bytes, and
# the sum of the head's gradient is read and written once a slab.
DEVICE_SLAB_BYTES = 512 << 20
# Products take whole groups of rows. MKL sums the rows that are left over in another order, so that
# their last bits depend on the batch; over any number of whole groups a row's bits are the same
# (seen with 1 and 2 threads).
ROW_GROUP = 4
BLOCK = 512
FIRST_PREFIX = 256
PREFIX_GROWTH = 16
# Above the rounding of a float32 sum that ends at 1: no later token's mass before it is smaller.
MASS_MARGIN = 1e-6

Processors = Callable[[int, Tensor], Tensor]


class SweepOutput(NamedTuple):
    """What a sweep gives for every row.

    tokens_T: the chosen tokens, int64.
    log_prob_T: log-probability of that token in nats, float32.
    entropy_T: entropy of the row in nats, float32.
    log_sum_exp_T: float32.
    embedding_TH: expected embedding [T, G], or None when none was asked for.
    likeliest_ids_TM: the M likeliest tokens by falling probability, int64, or None likewise.
    likeliest_probs_TM: their probabilities, float32, or None.

    Log-probability, entropy, log-sum-exp and embedding belong to softmax(logits) as the head gives
    them: no temperature, no truncation, no processor. The likeliest tokens and their probabilities
    belong to softmax(processed logits): no temperature and no truncation.
    """

    tokens_T: Tensor
    log_prob_T: Tensor
    entropy_T: Tensor
    log_sum_exp_T: Tensor
    embedding_TH: Tensor | None
    likeliest_ids_TM: Tensor | None = None
    likeliest_probs_TM: Tensor | None = None


@dataclass(frozen=True)
class _Rule:
    """How a token is chosen from logits, and how many of the likeliest are wanted."""

    choose: str
    temperature: float
    top_k: int | None
    top_p: float | None
    processors: Processors | None
    num_likeliest: int | None


@torch.no_grad()
def vocabulary_sweep(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    *,
    choose: str = "argmax",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform_T: Tensor | None = None,
    expected_embedding_of: Tensor | None = None,
    processors: Processors | None = None,
    num_likeliest: int | None = None,
    slab_bytes: int | None = None,
    backend: str | None = None,
) -> SweepOutput:
    """Choose a token for every row of hidden W^T and measure the row, without gradient.

    "argmax" takes the lowest of the likeliest tokens; temperature, top_k and top_p cannot change
    it. "sample" inverts the cumulative distribution of softmax(logits / temperature) at the row's
    own uniform, so that a row's token depends on its own logits and its own number alone:

    - without top_k and top_p over the tokens in the order of the vocabulary;
    - with either over the tokens by falling probability, equal ones by rising id. top_k keeps
      exactly k. top_p keeps a token while the mass before it is below top_p (the first always), of
      what top_k has left. With top_p alone these are the tokens of
      `tess.schedulers.renoising.sample_nucleus`, top_p = 1 included, which has to sort every row.

    Args:
        hidden_TH: float, contiguous or not.
        weight_VH: the head; the product runs in the dtype of hidden, or autocast's.
        uniform_T: numbers in [0, 1), one a row; needed to sample.
        expected_embedding_of: [V, G], may be the head itself; gives softmax(logits) E, multiplied
            and returned in E's dtype, or autocast's.
        processors: called as (first row, float32 logits [R, V] of some rows) and gives the logits
            to choose from; it may write into its argument.
        num_likeliest: M, at least 1 (more than V means V): also give the M likeliest tokens and
            their probabilities, of softmax(processed logits) where there are processors. Which of
            the tokens that equal the M-th are among them, and the order of equals, is left open.
        slab_bytes: bounds one slab of float32 logits, at least four rows (None:
            `choose_slab_bytes`). Two slabs are kept; processors, a temperature, a narrow dtype and
            long nuclei need some more for a while. Triton keeps one, in the products' dtype.
        backend: "torch", "triton" or "auto" (None: see `dispatch.py`). Both choose the same tokens;
            in a draw without top_k and top_p they may differ where the uniform is within rounding
            of the border of two tokens.

    In float32 with MKL a row's results have the same bits in every batch and with every slab_bytes
    (an embedding of fewer than 12 numbers excepted).

    Raises ValueError for options out of range and for logits that are not finite.
    """
    rule = _Rule(choose, temperature, top_k, top_p, processors, num_likeliest)
    _check(hidden_TH, weight_VH, expected_embedding_of)
    _check_rule(rule, len(hidden_TH), uniform_T)
    triton = use_triton(hidden_TH, backend)
    slab_bytes = choose_slab_bytes(slab_bytes, hidden_TH, triton)
    head = weight_VH.to(product_dtype(hidden_TH))
    table = expected_embedding_of
    if table is not None:
        same = table is weight_VH and product_dtype(table) == head.dtype
        table = head if same else table.to(product_dtype(table))
    with torch.autocast(hidden_TH.device.type, enabled=False):
        if triton:
            from tess.kernels.triton.head import vocabulary_sweep as run

            parts = run(hidden_TH, head, table, uniform_T, rule, slab_bytes)
        else:
            parts = _sweep_slabs(hidden_TH, head, table, uniform_T, rule, slab_bytes)
    return _join(parts, hidden_TH, table, len(head), num_likeliest)


def _sweep_slabs(
    hidden_TH: Tensor,
    head: Tensor,
    table: Tensor | None,
    uniform_T: Tensor | None,
    rule: _Rule,
    slab_bytes: int,
) -> list[SweepOutput]:
    width = len(head)
    rows = whole_groups(slab_rows(width, slab_bytes) - ROW_GROUP + 1)
    most = min(rows, whole_groups(len(hidden_TH)))
    slabs = [hidden_TH.new_empty(most, width, dtype=torch.float32) for _ in range(2)]
    parts = []
    for start in range(0, len(hidden_TH), rows):
        hidden_RH = hidden_TH[start : start + rows].to(head.dtype)
        draw_R = None if uniform_T is None else uniform_T[start : start + rows]
        used = [slab_RV[: whole_groups(len(hidden_RH))] for slab_RV in slabs]
        parts.append(_sweep_slab(hidden_RH, head, table, used, start, draw_R, rule))
    return parts


def slab_rows(width: int, slab_bytes: int, item_bytes: int = 4) -> int:
    """How many rows of `width` numbers fit into a slab; at least one."""
    return max(1, slab_bytes // (width * item_bytes))


def choose_slab_bytes(slab_bytes: int | None, like: Tensor, triton: bool) -> int:
    """What was asked for, or else 96 MiB, and 512 MiB where kernels run on a GPU."""
    if slab_bytes is not None:
        return slab_bytes
    return DEVICE_SLAB_BYTES if triton and like.device.type == "cuda" else SLAB_BYTES


def whole_groups(rows: int) -> int:
    """The number of rows rounded up to whole groups, at least one."""
    return ROW_GROUP * max(1, -(-rows // ROW_GROUP))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply x: autocast's, where that is on."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check(hidden_TH: Tensor, weight_VH: Tensor, table_VG: Tensor | None) -> None:
    check_head(hidden_TH, weight_VH)
    if table_VG is not None and (table_VG.dim() != 2 or len(table_VG) != len(weight_VH)):
        raise ValueError(
            f"expected_embedding_of must be [{len(weight_VH)}, G], got {list(table_VG.shape)}"
        )


def _check_rule(rule: _Rule, rows: int, uniform_T: Tensor | None) -> None:
    if rule.choose not in ("argmax", "sample"):
        raise ValueError(f"choose must be 'argmax' or 'sample', got {rule.choose!r}")
    if not rule.temperature > 0:
        raise ValueError(f"temperature must be above 0, got {rule.temperature}")
    if rule.top_k is not None and rule.top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {rule.top_k}")
    if rule.top_p is not None and not 0 < rule.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {rule.top_p}")
    if rule.num_likeliest is not None and rule.num_likeliest < 1:
        raise ValueError(f"num_likeliest must be at least 1, got {rule.num_likeliest}")
    if rule.choose == "argmax":
        return
    if uniform_T is None:
        raise ValueError("sampling needs uniform_T, one number in [0, 1) for every row")
    if uniform_T.shape != (rows,):
        raise ValueError(f"uniform_T must be [{rows}], got {list(uniform_T.shape)}")
    if not ((uniform_T >= 0) & (uniform_T < 1)).all():
        raise ValueError("uniform_T must be in [0, 1)")


def check_head(hidden_TH: Tensor, weight_VH: Tensor) -> None:
    """Raise ValueError unless the shapes are [T, H] and [V, H]."""
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"expected hidden [T, H] and weight [V, H], got {list(hidden_TH.shape)} and "
            f"{list(weight_VH.shape)}"
        )


def _sweep_slab(
    hidden_RH: Tensor,
    head_VH: Tensor,
    table_VG: Tensor | None,
    slabs: list[Tensor],
    start: int,
    draw_R: Tensor | None,
    rule: _Rule,
) -> SweepOutput:
    """The outputs of one slab's rows; `slabs` are workspace for their logits and probabilities.

    The workspace has the rows of `whole_groups`, and those that are too many hold zeros' logits.
    """
    rows = len(hidden_RH)
    padded_RH = F.pad(hidden_RH, (0, 0, 0, len(slabs[0]) - rows))
    if head_VH.dtype == slabs[0].dtype:
        torch.mm(padded_RH, head_VH.T, out=slabs[0])
    else:
        slabs[0].copy_(padded_RH @ head_VH.T)
    torch.softmax(slabs[0], dim=-1, out=slabs[1])
    logits_RV, probs_RV = (slab_RV[:rows] for slab_RV in slabs)
    top_R1 = first_argmax(logits_RV)[:, None]
    tokens_R1, likeliest = _choose(logits_RV, probs_RV, top_R1, start, draw_R, rule)
    peak_R1, chosen_R1 = logits_RV.gather(1, top_R1), logits_RV.gather(1, tokens_R1)
    # log sum exp(logits - peak): the peak's probability is at least 1/V, so its log is safe
    spread_R1 = -probs_RV.gather(1, top_R1).log()
    embedding = None if table_VG is None else (slabs[1].to(table_VG.dtype) @ table_VG)[:rows]
    # both terms of the entropy are at least 0, so nothing cancels; the slabs are used up here
    surprise_R1 = probs_RV.mul_(logits_RV.sub_(peak_R1)).sum(dim=1, keepdim=True)
    columns = (tokens_R1, chosen_R1 - peak_R1 - spread_R1, spread_R1 - surprise_R1)
    return SweepOutput(*(c[:, 0] for c in (*columns, peak_R1 + spread_R1)), embedding, *likeliest)


def _choose(
    logits_RV: Tensor,
    probs_RV: Tensor,
    top_R1: Tensor,
    start: int,
    draw_R: Tensor | None,
    rule: _Rule,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Tokens [R, 1], and the likeliest [R, M] with their probabilities; the logits stay."""
    if rule.processors is not None:
        logits_RV = processed(rule.processors, start, logits_RV)
        top_R1 = first_argmax(logits_RV)[:, None]
        if rule.num_likeliest is not None or (rule.choose == "sample" and rule.temperature == 1):
            probs_RV = logits_RV.softmax(dim=-1)
    likeliest = (None, None)
    if rule.num_likeliest is not None:
        # by logits: probabilities may be equal where these are not
        ids_RM = likeliest_ids(logits_RV, rule.num_likeliest)
        likeliest = (ids_RM, probs_RV.gather(1, ids_RM))
    if rule.choose == "argmax":
        return top_R1, likeliest
    if rule.temperature != 1:
        probs_RV = (logits_RV / rule.temperature).softmax(dim=-1)
    if rule.top_k is None and rule.top_p is None:
        return draw_in_order(probs_RV, draw_R)[:, None], likeliest
    return draw_by_rank(probs_RV, draw_R, rule.top_k, rule.top_p)[:, None], likeliest


def likeliest_ids(logits_RV: Tensor, num_likeliest: int) -> Tensor:
    """The tokens [R, M] of the largest logits, falling; M is V if that is fewer."""
    return logits_RV.topk(min(num_likeliest, logits_RV.shape[1]), dim=-1).indices


def processed(processors: Processors, start: int, logits_RV: Tensor) -> Tensor:
    """The logits [R, V] that the processors make of a copy, in float32.

    Raises ValueError for another shape, and for a row without a token or with NaN.
    """
    out_RV = processors(start, logits_RV.clone())
    if out_RV.shape != logits_RV.shape:
        raise ValueError(
            f"processors must give logits {list(logits_RV.shape)}, got {list(out_RV.shape)}"
        )
    if not out_RV.amax(dim=1).isfinite().all():  # -inf is a token's ban, NaN nobody's wish
        raise ValueError("processors must leave every row at least one token and no NaN")
    return out_RV.float()


def _join(
    parts: list[SweepOutput],
    hidden_TH: Tensor,
    table_VG: Tensor | None,
    width: int,
    num_likeliest: int | None,
) -> SweepOutput:
    if not parts:
        none = hidden_TH.new_empty(0, dtype=torch.float32)
        embedding = None if table_VG is None else table_VG.new_empty(0, table_VG.shape[1])
        probs = None if num_likeliest is None else none.new_empty(0, min(num_likeliest, width))
        ids = None if probs is None else probs.long()
        return SweepOutput(none.long(), none, none, none, embedding, ids, probs)
    columns = [None if c[0] is None else torch.cat(c) for c in zip(*parts)]
    bad_T = ~columns[3].isfinite()
    if bad_T.any():
        raise ValueError(
            f"logits must be finite; {int(bad_T.sum())} of {len(bad_T)} rows have NaN or infinity "
            "in their hidden states or meet it in the head"
        )
    return SweepOutput(*columns)


def first_argmax(x_RV: Tensor) -> Tensor:
    """The lowest index [R] of each row's maximum.

    Over blocks, because torch's own arg-max is not vectorised on a CPU and its maximum is.
    """
    block_R = _reduce_blocks(x_RV, lambda x: x.amax(dim=-1)).argmax(dim=1)
    return block_R * BLOCK + _block_values(x_RV, block_R, -torch.inf).argmax(dim=1)


def draw_in_order(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """One token [R] a row by inversion over the vocabulary's order; no token of weight 0 is drawn.

    First the block that holds the point, then the token in it: no cumulative sum of a whole slab.
    """
    ends_RN = _reduce_blocks(probs_RV, lambda x: x.sum(dim=-1)).double().cumsum(dim=1)
    point_R1 = uniform_R.double()[:, None] * ends_RN[:, -1:]
    block_R1 = _place(ends_RN, point_R1)
    rest_R1 = point_R1 - F.pad(ends_RN, (1, 0)).gather(1, block_R1)
    inside_RB = _block_values(probs_RV, block_R1[:, 0], 0.0).double().cumsum(dim=1)
    return (block_R1 * BLOCK + _place(inside_RB, rest_R1))[:, 0]


def _place(ends_RN: Tensor, point_R1: Tensor) -> Tensor:
    """The first index [R, 1] with a sum above the point, at most where the sums stop rising."""
    last_R1 = (ends_RN < ends_RN[:, -1:]).sum(dim=1, keepdim=True)
    return torch.searchsorted(ends_RN, point_R1, right=True).minimum(last_R1)


def _reduce_blocks(x_RV: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` over the last axis of [R, N, BLOCK], the last block being shorter: [R, N]."""
    blocks = x_RV.shape[1] // BLOCK
    whole = blocks * BLOCK
    parts = [reduce(x_RV[:, :whole].unflatten(1, (blocks, BLOCK)))] if blocks else []
    if whole < x_RV.shape[1]:
        parts.append(reduce(x_RV[:, None, whole:]))
    return torch.cat(parts, dim=1)


def _block_values(x_RV: Tensor, block_R: Tensor, fill: float) -> Tensor:
    """Each row's values in its block [R, BLOCK]; past the end of the vocabulary `fill`."""
    width = x_RV.shape[1]
    index_B = torch.arange(min(BLOCK, width), device=x_RV.device)
    index_RB = block_R[:, None] * BLOCK + index_B
    values_RB = x_RV.gather(1, index_RB.clamp(max=width - 1))
    return values_RB.masked_fill(index_RB >= width, fill)


def draw_by_rank(
    probs_RV: Tensor,
    uniform_R: Tensor,
    top_k: int | None,
    top_p: float | None,
    size: int = FIRST_PREFIX,
) -> Tensor:
    """One token [R] a row by inversion over tokens in falling order, cut at top_k and top_p.

    The first `size` tokens of the order are taken; rows whose cut lies further on are done again
    with more, in the end with a full stable sort. The result is that of the sort in every case.
    """
    rows, width = probs_RV.shape
    top_k = None if top_k is None else min(top_k, width)
    size = max(size, min(2 * (top_k or 0), width))
    if 4 * size >= width:
        size = width
    tokens_R = torch.empty(rows, dtype=torch.long, device=probs_RV.device)
    decided_R = torch.empty(rows, dtype=torch.bool, device=probs_RV.device)
    step = max(1, rows * width // (4 * size))  # a sort's ids are int64: they too fit into a slab
    for start in range(0, rows, step):
        part = slice(start, start + step)
        ranking = _ranking(probs_RV[part], size)
        tokens_R[part], decided_R[part] = _draw_ranked(*ranking, uniform_R[part], top_k, top_p)
    if size < width and not decided_R.all():
        rest_R = (~decided_R).nonzero()[:, 0]
        arguments = (probs_RV[rest_R], uniform_R[rest_R], top_k, top_p, size * PREFIX_GROWTH)
        tokens_R[rest_R] = draw_by_rank(*arguments)
    return tokens_R


def _ranking(probs_RV: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first K = size of each row by falling value and rising id: values, ids [R, K].

    The third tensor [R, 1] says how many of them are certain: top-k leaves open which of the tokens
    that equal its last value it returns.
    """
    if size == probs_RV.shape[1]:
        values_RK, ids_RK = probs_RV.sort(dim=-1, descending=True, stable=True)
        return values_RK, ids_RK, torch.full_like(ids_RK[:, :1], size)
    values_RK, ids_RK = probs_RV.topk(size, dim=-1)
    certain_R1 = (values_RK > values_RK[:, -1:]).sum(dim=-1, keepdim=True)
    ids_RK, order_RK = ids_RK.sort(dim=-1)
    values_RK, order_RK = values_RK.gather(1, order_RK).sort(dim=-1, descending=True, stable=True)
    return values_RK, ids_RK.gather(1, order_RK), certain_R1


def _draw_ranked(
    values_RK: Tensor,
    ids_RK: Tensor,
    certain_R1: Tensor,
    uniform_R: Tensor,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor]:
    """A token [R] from each row's ranking, and whether the ranking went far enough for it [R]."""
    sums_RK = values_RK.cumsum(dim=-1)
    before_RK = sums_RK - values_RK
    if top_k is None:
        limit = top_p
        place_K = torch.arange(values_RK.shape[1], device=values_RK.device)
        closed_RK = (before_RK >= top_p + MASS_MARGIN) & (place_K < certain_R1)
        decided_R = closed_RK.any(dim=-1)
        kept_R1 = (before_RK < limit).sum(dim=-1, keepdim=True)
    else:
        decided_R = certain_R1[:, 0] >= top_k
        limit = (1.0 if top_p is None else top_p) * sums_RK[:, top_k - 1 : top_k]
        kept_R1 = (before_RK[:, :top_k] < limit).sum(dim=-1, keepdim=True)
        kept_R1 = torch.full_like(kept_R1, top_k) if top_p is None else kept_R1
    kept_R1 = kept_R1.clamp_(min=1)
    mass_R1 = sums_RK.gather(1, kept_R1 - 1)
    rank_R1 = (sums_RK <= uniform_R[:, None] * mass_R1).sum(dim=-1, keepdim=True)
    return ids_RK.gather(1, rank_R1.minimum(kept_R1 - 1))[:, 0], decided_R
