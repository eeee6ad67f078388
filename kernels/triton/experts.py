"""The expert layer as operations for autograd and torch.compile: sort, two products, sum per token.

Letters: T tokens, E experts, S top-k, N = T S sorted pairs (token, slot), D width, F expert inner
width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tess.kernels.triton.experts_grouped_matmul import expert_up, hidden_gradient, rows_to_slots
from tess.kernels.triton.experts_token_sort import SortedPairs, sort_by_expert
from tess.kernels.triton.experts_weight_gradient import weight_gradient


def experts_forward(
    x_TD: Tensor, ids_TS: Tensor, weights_TS: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T, D]; for the backward pass relu(up x)^2 [N, F], order [N] and expert ends [E].

    x and both matrices have one dtype.
    """
    ids_N = ids_TS.contiguous().view(-1)
    order_N, ends_E = sort_by_expert(ids_N, len(up_EFD))
    pairs = SortedPairs(order_N, ends_E, ids_TS.shape[1])
    hidden_NF = expert_up(x_TD, up_EFD, pairs)
    return rows_to_slots(hidden_NF, down_EDF, weights_TS, pairs), hidden_NF, order_N, ends_E


def experts_hidden_gradient(
    dout_TD: Tensor, weights_TS: Tensor, down_EDF: Tensor, hidden_NF: Tensor, order_N: Tensor,
    ends_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `experts_grouped_matmul.hidden_gradient`."""
    pairs = SortedPairs(order_N, ends_E, weights_TS.shape[1])
    return hidden_gradient(dout_TD, down_EDF, weights_TS, hidden_NF, pairs)


def experts_input_gradient(
    dup_NF: Tensor, up_EFD: Tensor, order_N: Tensor, ends_E: Tensor, top_k: int
) -> Tensor:
    """Gradient by x [T, D] from that by up x."""
    pairs = SortedPairs(order_N, ends_E, top_k)
    return rows_to_slots(dup_NF, up_EFD.transpose(1, 2), None, pairs)


def experts_weight_gradient(
    left: Tensor, right: Tensor, order_N: Tensor, ends_E: Tensor, top_k: int, gather_left: bool
) -> Tensor:
    """As `experts_weight_gradient.weight_gradient`."""
    pairs = SortedPairs(order_N, ends_E, top_k)
    return weight_gradient(left, right, pairs, gather_left=gather_left)


_forward_op = torch.library.custom_op("tess::experts", experts_forward, mutates_args=())
_hidden_op = torch.library.custom_op(
    "tess::experts_hidden_gradient", experts_hidden_gradient, mutates_args=()
)
_input_op = torch.library.custom_op(
    "tess::experts_input_gradient", experts_input_gradient, mutates_args=()
)
_weight_op = torch.library.custom_op(
    "tess::experts_weight_gradient", experts_weight_gradient, mutates_args=()
)


@_forward_op.register_fake
def _(x_TD, ids_TS, weights_TS, up_EFD, down_EDF):
    experts, inner, _ = up_EFD.shape
    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty((ids_TS.numel(), inner)),
        x_TD.new_empty(ids_TS.numel(), dtype=torch.int32),
        x_TD.new_empty(experts, dtype=torch.int32),
    )


@_hidden_op.register_fake
def _(dout_TD, weights_TS, down_EDF, hidden_NF, order_N, ends_E):
    dweights_TS = weights_TS.new_empty(weights_TS.shape)
    return torch.empty_like(hidden_NF), torch.empty_like(hidden_NF), dweights_TS


@_input_op.register_fake
def _(dup_NF, up_EFD, order_N, ends_E, top_k):
    return dup_NF.new_empty((dup_NF.shape[0] // top_k, up_EFD.shape[2]))


@_weight_op.register_fake
def _(left, right, order_N, ends_E, top_k, gather_left):
    return left.new_empty((ends_E.shape[0], left.shape[1], right.shape[1]))


def _save(ctx, inputs, output):
    x_TD, _, weights_TS, up_EFD, down_EDF = inputs
    ctx.save_for_backward(x_TD, weights_TS, up_EFD, down_EDF, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or the backward pass starts with zeros as large as hidden


def _gradients(ctx, dout_TD, *_):
    if dout_TD is None:
        return None, None, None, None, None
    x_TD, weights_TS, up_EFD, down_EDF, hidden_NF, order_N, ends_E = ctx.saved_tensors
    by_x, _, _, by_up, by_down = ctx.needs_input_grad
    top_k, dx_TD, dup_EFD, ddown_EDF = weights_TS.shape[1], None, None, None
    dup_NF, weighted_NF, dweights_TS = _hidden_op(
        dout_TD, weights_TS, down_EDF, hidden_NF, order_N, ends_E
    )
    # frozen experts cost no gradient of theirs
    if by_x:
        dx_TD = _input_op(dup_NF, up_EFD, order_N, ends_E, top_k)
    if by_up:
        dup_EFD = _weight_op(dup_NF, x_TD, order_N, ends_E, top_k, False)
    if by_down:
        ddown_EDF = _weight_op(dout_TD, weighted_NF, order_N, ends_E, top_k, True)
    return dx_TD, None, dweights_TS, dup_EFD, ddown_EDF


_forward_op.register_autograd(_gradients, setup_context=_save)


def experts(
    x_TD: Tensor, ids_TS: Tensor, weights_TS: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As `tess.kernels.experts.experts`."""
    up_EFD, down_EDF = up_EFD.to(x_TD.dtype), down_EDF.to(x_TD.dtype)
    return _forward_op(x_TD, ids_TS, weights_TS, up_EFD, down_EDF)[0]


# ---- what is compiled ahead of time ----


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, hot, call) at shipped shapes; `make(*shape, dtype=...)`: a tensor without data."""
    for name, tokens, experts, top_k, width, inner, backward in _SHAPES:
        for dtype in (torch.bfloat16, torch.float32)[: 2 if name == "small" else 1]:
            x, up, down = (
                make(*shape, dtype=dtype)
                for shape in ((tokens, width), (experts, inner, width), (experts, width, inner))
            )
            ids = make(tokens, top_k, dtype=torch.int64)
            weights = make(tokens, top_k, dtype=torch.float32)
            hot = dtype == torch.bfloat16
            label = f"experts {name}" + ("" if hot else " float32")
            yield label, hot, lambda a=(x, ids, weights, up, down): experts_forward(*a)
            if backward:
                yield f"{label} backward", hot, lambda a=(x, weights, up, down): _backward_case(*a)


# name, T, E, S, D, F, backward: released shapes at few and many tokens, and a small one
_SHAPES = (
    ("nano few", 32, 128, 6, 2688, 1856, False),
    ("nano some", 512, 128, 6, 2688, 1856, False),
    ("nano", 4096, 128, 6, 2688, 1856, True),
    ("latent", 4096, 512, 22, 1024, 2688, False),
    ("small", 4096, 8, 2, 192, 96, True),
)


def _backward_case(x_TD: Tensor, weights_TS: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> None:
    top_k, count = weights_TS.shape[1], weights_TS.numel()
    hidden_NF = x_TD.new_empty((count, up_EFD.shape[1]))
    order_N = x_TD.new_empty(count, dtype=torch.int32)
    ends_E = x_TD.new_empty(len(up_EFD), dtype=torch.int32)
    experts_hidden_gradient(x_TD, weights_TS, down_EDF, hidden_NF, order_N, ends_E)
    experts_input_gradient(hidden_NF, up_EFD, order_N, ends_E, top_k)
    experts_weight_gradient(hidden_NF, x_TD, order_N, ends_E, top_k, False)
    experts_weight_gradient(x_TD, hidden_NF, order_N, ends_E, top_k, True)
