"""One position of the Mamba-2 scan for decoding: the state is read and written once.

Letters: B batch, H heads, P head width, G groups, N state width.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, launch, wide_type
from tess.kernels.triton.ssd_forward import kernel_limits, softplus_steps

STEP = Table("ssd_step", {"sm_80": Config({"BLOCK_P": 16}, num_warps=4, num_stages=1)})


@triton.jit
def _step(
    x_ptr, raw_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, mask_ptr, state_ptr, y_ptr, out_ptr,
    x_b, x_h, dt_b, dt_h, b_b, b_g, c_b, c_g, heads, per_group, width, states, low, high,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
):
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    p_in, n_in = p < width, n < states
    x = tl.load(x_ptr + row * x_b + head * x_h + p, mask=p_in, other=0.0).to(WIDE)
    b = tl.load(b_ptr + row * b_b + group * b_g + n, mask=n_in, other=0.0).to(WIDE)
    c = tl.load(c_ptr + row * c_b + group * c_g + n, mask=n_in, other=0.0).to(WIDE)
    raw = tl.load(raw_ptr + row * dt_b + head * dt_h).to(WIDE)
    bias = tl.zeros((), WIDE)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + head).to(WIDE)
    dt = softplus_steps(raw, bias, low, high, SOFTPLUS)
    if mask_ptr is not None:
        dt = tl.where(tl.load(mask_ptr + row) != 0, dt, 0.0)
    decay = tl.exp(dt * tl.load(a_ptr + head).to(WIDE))
    place = ((row * heads + head) * width + p[:, None]) * states + n[None, :]
    inside = p_in[:, None] & n_in[None, :]
    state = tl.load(state_ptr + place, mask=inside, other=0.0).to(WIDE)
    state = decay * state + (dt * x)[:, None] * b[None, :]
    tl.store(out_ptr + place, state, mask=inside)
    y = tl.sum(state * c[None, :], axis=1)
    if d_ptr is not None:
        y += tl.load(d_ptr + head).to(WIDE) * x
    y_place = y_ptr + (row * heads + head) * width + p
    tl.store(y_place, y.to(y_ptr.dtype.element_ty), mask=p_in)


def step_forward(
    x_BHP: Tensor, raw_BH: Tensor, a_H: Tensor, b_BGN: Tensor, c_BGN: Tensor, state_BHPN: Tensor,
    d_H: Tensor | None, bias_H: Tensor | None, mask_B: Tensor | None, softplus: bool, low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """y [B, H, P] in the dtype of x and the new state in that of the old one."""
    batch, heads, width = x_BHP.shape
    groups, states = b_BGN.shape[1:]
    y_BHP = torch.empty(x_BHP.shape, dtype=x_BHP.dtype, device=x_BHP.device)
    state_BHPN, out_BHPN = state_BHPN.contiguous(), torch.empty_like(state_BHPN)
    x, b, c = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_BHP, b_BGN, c_BGN))
    strides = (*x.stride()[:2], *raw_BH.stride(), *b.stride()[:2], *c.stride()[:2])
    block = triton.next_power_of_2(states)

    def run(config: Config) -> None:
        launch(
            _step, (batch * heads, -(-width // config.blocks["BLOCK_P"])), x, raw_BH, a_H, b, c,
            d_H, bias_H, mask_B, state_BHPN, y_BHP, out_BHPN, *strides, heads, heads // groups,
            width, states, low, high, config=config, BLOCK_N=block, SOFTPLUS=softplus,
            WIDE=wide_type(state_BHPN),
        )

    STEP.run(x_BHP, (width, states), run)
    return y_BHP, out_BHPN


_step_op = torch.library.custom_op("tess::ssd_step", step_forward, mutates_args=())


@_step_op.register_fake
def _(x, raw, a, b, c, state, d, bias, mask, softplus, low, high):
    return x.new_empty(x.shape), state.new_empty(state.shape)


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BGN: Tensor, c_BGN: Tensor, state_BHPN: Tensor, *,
    d_H: Tensor | None = None, dt_bias_H: Tensor | None = None, dt_softplus: bool = False,
    dt_limits: tuple[float, float] = (0.0, math.inf), mask_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `tess.kernels.ssd.ssd_step`; without gradients, as decoding has none."""
    per_head = (d_H, dt_bias_H)
    d, bias = (None if tensor is None else tensor.contiguous() for tensor in per_head)
    mask = None if mask_B is None else mask_B.to(torch.int8).contiguous()
    return _step_op(
        x_BHP, dt_BH, a_H.contiguous(), b_BGN, c_BGN, state_BHPN, d, bias, mask, dt_softplus,
        *kernel_limits(dt_limits),
    )


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """One decoding step of Nemotron-3-Nano."""
    x, b = make(8, 64, 64), make(8, 8, 128)
    state, head = make(8, 64, 64, 128, dtype=torch.float32), make(64, dtype=torch.float32)
    options = (state, head, head, None, True, 0.0, math.inf)
    yield "scan step 3-nano", True, lambda: step_forward(x, make(8, 64), head, b, b, *options)
