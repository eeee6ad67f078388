"""The sigmoid router: scores, biased and grouped choice, weights, in one pass over the logits.

Letters: T tokens, E experts, S top-k.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, launch, wide_type

# a row of scores stays in the registers of one warp: no reduction over experts crosses warps
ROUTE = Table("route_tokens", {"sm_80": Config({"ROWS": 2}, num_warps=1, num_stages=1)})
ROUTE_BACKWARD = Table("route_tokens_backward", {"sm_80": Config({"ROWS": 4}, 1, 1)})


@triton.jit
def _best(value, free, index, NONE: tl.constexpr):
    """Per row the largest value of the free entries and its index, the lowest where they tie."""
    best = tl.max(tl.where(free, value, float("-inf")), axis=1)
    return best, tl.min(tl.where(free & (value == best[:, None]), index[None, :], NONE), axis=1)


@triton.jit
def _group_scores(
    biased, inside, expert, group_size,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """The sum of the two best biased scores of each group [ROWS, BLOCK_G]."""
    group = tl.arange(0, BLOCK_G)
    scores = tl.full((ROWS, BLOCK_G), float("-inf"), biased.dtype)
    for g in range(0, GROUPS):
        member = inside & (expert // group_size == g)[None, :]
        best, first = _best(biased, member, expert, BLOCK_E)
        second, _ = _best(biased, member & (expert[None, :] != first[:, None]), expert, BLOCK_E)
        score = best + tl.where(group_size > 1, second, 0.0)
        scores = tl.where(group[None, :] == g, score[:, None], scores)
    return scores


@triton.jit
def _in_best_groups(
    biased, inside, expert, group_size, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """Whether an expert's group is one of the TOP_GROUPS best of its row [ROWS, BLOCK_E]."""
    scores = _group_scores(biased, inside, expert, group_size, GROUPS, ROWS, BLOCK_E, BLOCK_G)
    scores = tl.where(scores == scores, scores, float("-inf"))  # inf - inf of infinite biases
    group = tl.arange(0, BLOCK_G)
    free = tl.broadcast_to((group < GROUPS)[None, :], (ROWS, BLOCK_G))
    allowed = expert[None, :] < tl.zeros((ROWS, 1), tl.int32)
    for _ in range(0, TOP_GROUPS):
        _best_score, chosen = _best(scores, free, group, BLOCK_G)
        allowed = allowed | ((expert // group_size)[None, :] == chosen[:, None])
        free = free & (group[None, :] != chosen[:, None])
    return inside & allowed


@triton.jit
def _route(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, row_stride, rows, experts, group_size, scaling,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    inside = (row < rows)[:, None] & (expert < experts)[None, :]
    logits_row = logits_ptr + row[:, None] * row_stride
    logits = tl.load(logits_row + expert[None, :], mask=inside, other=0.0).to(WIDE)
    bias = tl.load(bias_ptr + expert, mask=expert < experts, other=0.0).to(WIDE)
    biased = 1.0 / (1.0 + tl.exp(-logits)) + bias[None, :]
    # NaN equals nothing and would never be found: such experts come last, their weights stay NaN
    biased = tl.where(biased == biased, biased, float("-inf"))
    free = inside
    if TOP_GROUPS < GROUPS:
        free = _in_best_groups(
            biased, inside, expert, group_size, GROUPS, TOP_GROUPS, ROWS, BLOCK_E, BLOCK_G
        )
    slot = tl.arange(0, BLOCK_S)
    ids = tl.zeros((ROWS, BLOCK_S), tl.int32)
    for s in range(0, TOP_K):
        _value, chosen = _best(biased, free, expert, BLOCK_E)
        ids = tl.where(slot[None, :] == s, chosen[:, None], ids)
        free = free & (expert[None, :] != chosen[:, None])
    inside = (row < rows)[:, None] & (slot < TOP_K)[None, :]
    chosen_logits = tl.load(logits_row + ids, mask=inside, other=0.0).to(WIDE)
    weights = tl.where(inside, 1.0 / (1.0 + tl.exp(-chosen_logits)), 0.0)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    out = row[:, None] * TOP_K + slot[None, :]
    tl.store(ids_ptr + out, ids.to(tl.int64), inside)
    tl.store(weights_ptr + out, (weights * scaling).to(weights_ptr.dtype.element_ty), inside)


@triton.jit
def _route_backward(
    logits_ptr, ids_ptr, dweights_ptr, dlogits_ptr, row_stride, dweights_stride, rows, experts,
    scaling, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, BLOCK_S)
    chosen = (row < rows)[:, None] & (slot < TOP_K)[None, :]
    ids = tl.load(ids_ptr + row[:, None] * TOP_K + slot[None, :], mask=chosen, other=0)
    logits = tl.load(logits_ptr + row[:, None] * row_stride + ids, mask=chosen, other=0.0).to(WIDE)
    gradient = tl.load(
        dweights_ptr + row[:, None] * dweights_stride + slot[None, :], mask=chosen, other=0.0
    ).to(WIDE)
    score = tl.where(chosen, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    if NORMALIZE:
        total = tl.sum(score, axis=1)[:, None] + 1e-20
        gradient = (gradient - tl.sum(gradient * score / total, axis=1)[:, None]) / total
    gradient = scaling * gradient * score * (1.0 - score)
    expert = tl.arange(0, BLOCK_E)
    dlogits = tl.zeros((ROWS, BLOCK_E), WIDE)
    for s in range(0, TOP_K):  # each row in full, zeros too: no memory to clear first
        at_slot = chosen & (slot == s)[None, :]
        where = tl.sum(tl.where(at_slot, ids, 0), axis=1)
        value = tl.sum(tl.where(at_slot, gradient, 0.0), axis=1)
        dlogits = tl.where(expert[None, :] == where[:, None], value[:, None], dlogits)
    inside = (row < rows)[:, None] & (expert < experts)[None, :]
    out = dlogits_ptr + row[:, None] * experts + expert[None, :]
    tl.store(out, dlogits.to(dlogits_ptr.dtype.element_ty), inside)


def route_tokens_forward(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, num_groups: int, top_groups: int,
    normalize: bool, scaling: float,
) -> tuple[Tensor, Tensor]:
    """Weights [T, S] and expert ids [T, S] int64, in falling order of biased score.

    The weights come first because `torch.library.opcheck` adds up outputs and starts with one.
    """
    rows, experts = logits_TE.shape
    logits_TE, bias_E = _dense_rows(logits_TE), bias_E.contiguous()
    ids_TS = torch.empty((rows, top_k), dtype=torch.int64, device=logits_TE.device)
    weights_TS = torch.empty((rows, top_k), dtype=logits_TE.dtype, device=logits_TE.device)
    constants = {
        "TOP_K": top_k, "GROUPS": num_groups, "TOP_GROUPS": top_groups, "NORMALIZE": normalize,
        "BLOCK_E": triton.next_power_of_2(experts), "BLOCK_S": triton.next_power_of_2(top_k),
        "BLOCK_G": triton.next_power_of_2(num_groups), "WIDE": wide_type(logits_TE),
    }

    def run(config: Config) -> None:
        launch(
            _route, (triton.cdiv(rows, config.blocks["ROWS"]),), logits_TE, bias_E, ids_TS,
            weights_TS, logits_TE.stride(0), rows, experts, experts // num_groups, float(scaling),
            config=config, **constants,
        )

    ROUTE.run(logits_TE, (experts, top_k), run)
    return weights_TS, ids_TS


def route_tokens_backward(
    logits_TE: Tensor, ids_TS: Tensor, dweights_TS: Tensor, normalize: bool, scaling: float
) -> Tensor:
    """Gradient by the logits [T, E]; the choice has none."""
    rows, experts = logits_TE.shape
    top_k = ids_TS.shape[1]
    logits_TE, dweights_TS = _dense_rows(logits_TE), _dense_rows(dweights_TS)
    ids_TS = ids_TS.contiguous()
    dlogits_TE = torch.empty((rows, experts), dtype=logits_TE.dtype, device=logits_TE.device)
    constants = {
        "TOP_K": top_k, "NORMALIZE": normalize, "BLOCK_E": triton.next_power_of_2(experts),
        "BLOCK_S": triton.next_power_of_2(top_k), "WIDE": wide_type(logits_TE),
    }

    def run(config: Config) -> None:
        launch(
            _route_backward, (triton.cdiv(rows, config.blocks["ROWS"]),), logits_TE, ids_TS,
            dweights_TS, dlogits_TE, logits_TE.stride(0), dweights_TS.stride(0), rows, experts,
            float(scaling), config=config, **constants,
        )

    ROUTE_BACKWARD.run(logits_TE, (experts, top_k), run)
    return dlogits_TE


def _dense_rows(x_RD: Tensor) -> Tensor:
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


# ---- operations for autograd and torch.compile ----

_forward_op = torch.library.custom_op("tess::route_tokens", route_tokens_forward, mutates_args=())
_backward_op = torch.library.custom_op(
    "tess::route_tokens_backward", route_tokens_backward, mutates_args=()
)


@_forward_op.register_fake
def _(logits_TE, bias_E, top_k, num_groups, top_groups, normalize, scaling):
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape), logits_TE.new_empty(shape, dtype=torch.int64)


@_backward_op.register_fake
def _(logits_TE, ids_TS, dweights_TS, normalize, scaling):
    return logits_TE.new_empty(logits_TE.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.options = inputs[5:]


def _gradients(ctx, dweights_TS, _):
    logits_TE, ids_TS = ctx.saved_tensors
    dlogits_TE = _backward_op(logits_TE, ids_TS, dweights_TS, *ctx.options)
    return dlogits_TE, None, None, None, None, None, None


_forward_op.register_autograd(_gradients, setup_context=_save)


def route_tokens(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, *, num_groups: int, top_groups: int,
    normalize: bool, scaling: float,
) -> tuple[Tensor, Tensor]:
    """As `tess.kernels.experts.route_tokens`; of equal scores the lowest expert id comes first."""
    weights_TS, ids_TS = _forward_op(
        logits_TE, bias_E, top_k, num_groups, top_groups, normalize, float(scaling)
    )
    return ids_TS, weights_TS


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, hot, call) at shipped shapes; `make(*shape, dtype=...)`: a tensor without data."""
    for experts, top_k, groups in ((8, 2, 1), (128, 6, 1), (512, 22, 1), (256, 8, 8)):
        logits, bias = (make(*shape, dtype=torch.float32) for shape in ((64, experts), (experts,)))
        ids, weights = make(64, top_k, dtype=torch.int64), make(64, top_k, dtype=torch.float32)
        name, options = f"route {experts} top {top_k}", (top_k, groups, min(groups, 4), True, 2.5)
        yield name, True, lambda a=(logits, bias, *options): route_tokens_forward(*a)
        if groups == 1:
            yield (
                f"{name} backward", True,
                lambda a=(logits, ids, weights, True, 2.5): route_tokens_backward(*a),
            )
