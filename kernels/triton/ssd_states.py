"""States at the borders of the chunks, for the gradients of the scan.

Letters: B batch, L length, Q chunk length, C chunks, H heads, P head width, G groups, N states.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, launch
from tess.kernels.triton.ssd_forward import (
    chunk_decays,
    incoming_sequence,
    narrow_heads,
    outgoing_sequence,
)
from tess.kernels.triton.ssd_inputs import ScanInputs, block_constants, sizes

STATES = Table(
    "ssd_states",
    {"sm_80": Config({"BLOCK_P": 32}, num_warps=4, num_stages=2)},
    float32={"sm_80": Config({"BLOCK_P": 16}, num_warps=8, num_stages=1)},
)


@triton.jit
def _states(
    u_ptr, k_ptr, dt_ptr, incl_ptr, scale_ptr, sequence_ptr, initial_ptr, other_ptr,
    states_ptr, final_ptr, carry_ptr, u_b, u_l, u_h, k_b, k_l, k_g,
    length, chunks, heads, per_group, width, states,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """The state that enters each chunk [B, C, H, N, P], walking from the start or from the end.

    GRADIENT False: of the scan in this direction (u = x, k = B). True: the gradient by the states
    of the scan in the other direction (u = dy, k = C); then also what the decay of a whole chunk
    carries over, <other state, this one> exp(total), [B, C, H, programs].
    """
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    p_in, n_in = p < width, n < states
    u_ptr += row * u_b + head * u_h
    k_ptr += row * k_b + (head // per_group) * k_g
    decay_place = (row * heads + head) * (chunks * Q)
    edge_place = ((row * heads + head) * width + p[None, :]) * states + n[:, None]
    border_place = n[:, None] * width + p[None, :]
    state_in = n_in[:, None] & p_in[None, :]
    u_place = q[:, None] * u_l + p[None, :]
    k_place = q[None, :] * k_l + n[:, None]
    scale = tl.full((), 1.0, WIDE)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + head).to(WIDE)
    if sequence_ptr is not None:
        sequence_ptr += row * length
    if initial_ptr is not None:
        state = tl.load(initial_ptr + edge_place, mask=state_in, other=0.0).to(WIDE)
    else:
        state = tl.zeros((BLOCK_N, BLOCK_P), WIDE)

    for i in range(0, chunks):
        chunk = chunks - 1 - i if REVERSE else i
        start = (tl.program_id(0) * 0 + chunk * Q).to(tl.int64)
        t = chunk * Q + q
        t_in = t < length
        u = tl.load(u_ptr + start * u_l + u_place, t_in[:, None] & p_in[None, :], other=0.0)
        k_NQ = tl.load(k_ptr + start * k_l + k_place, n_in[:, None] & t_in[None, :], other=0.0)
        dt, incl, before, total = chunk_decays(dt_ptr, incl_ptr, decay_place + chunk * Q, Q)
        keep = tl.exp2(total)
        # a scan gains dt times the decay to its exit, a gradient the decay of the scan's read
        if GRADIENT:
            gain = tl.exp2(incl) if REVERSE else scale * tl.exp2(total - before)
        else:
            gain = tl.exp2(before) if REVERSE else tl.exp2(total - incl)
            gain *= dt
        if sequence_ptr is not None:
            ids = tl.load(sequence_ptr + tl.minimum(t, length - 1))
            way: tl.constexpr = REVERSE != GRADIENT  # of the scan, not of this walk
            entering = incoming_sequence(sequence_ptr, chunk, chunks, length, Q, way)
            leaving = outgoing_sequence(sequence_ptr, chunk, chunks, length, Q, way)
            gain = tl.where(ids == (entering if GRADIENT else leaving), gain, 0.0)
            keep = tl.where(entering == leaving, keep, 0.0)
        border = ((row * chunks + chunk) * heads + head) * states * width
        tl.store(
            states_ptr + border + border_place, state.to(states_ptr.dtype.element_ty), state_in
        )
        if other_ptr is not None:
            other = tl.load(other_ptr + border + border_place, mask=state_in, other=0.0).to(WIDE)
            carried = keep * tl.sum(tl.sum(other * state, axis=1), axis=0)
            place = ((row * chunks + chunk) * heads + head) * tl.num_programs(1) + tl.program_id(1)
            tl.store(carry_ptr + place, carried)
        gained = (u.to(WIDE) * gain[:, None]).to(u.dtype)
        state = state * keep + tl.dot(k_NQ, gained, out_dtype=WIDE, input_precision=PRECISION)

    if final_ptr is not None:
        tl.store(final_ptr + edge_place, state, mask=state_in)


def border_states(
    inputs: ScanInputs, dy: Tensor, reverse: bool, initial: Tensor | None, dfinal: Tensor | None,
    dinitial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one scan: states entering each chunk, gradients by those leaving, and what decays carry.

    The first two are [B, C, H, N, P] in the dtype of x, the last is [B, C, H].
    """
    x, b, c = inputs.x_BLHP, inputs.b_BLGN, inputs.c_BLGN
    length, chunks, heads, _, width, states = sizes(inputs)
    shape = (len(x), chunks, heads, states, width)
    entering, leaving = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    fewest = min(c.blocks["BLOCK_P"] for c in STATES.candidates())
    most = -(-width // min(fewest, max(16, triton.next_power_of_2(width))))
    carried = torch.zeros((len(x), chunks, heads, most), dtype=inputs.dt_BHL.dtype, device=x.device)
    decays = (inputs.dt_BHL, inputs.incl_BHL)
    scale, sequence = inputs.scale_H, inputs.sequence_BL

    def run(config: Config) -> None:
        config = narrow_heads(config, width)
        programs = -(-width // config.blocks["BLOCK_P"])
        grid = (len(x) * heads, programs)
        strides = (*x.stride()[:3], *b.stride()[:3])
        launch(
            _states, grid, x, b, *decays, None, sequence, initial, None, entering, None, None,
            *strides, *sizes(inputs), config=config, REVERSE=reverse, GRADIENT=False,
            **block_constants(inputs),
        )
        strides = (*dy.stride()[:3], *c.stride()[:3])
        part = carried.view(-1)[: carried.numel() // most * programs]
        launch(
            _states, grid, dy, c, *decays, scale if reverse else None, sequence, dfinal, entering,
            leaving, dinitial, part, *strides, *sizes(inputs), config=config,
            REVERSE=not reverse, GRADIENT=True, **block_constants(inputs),
        )
        used.append(programs)

    used: list[int] = []
    STATES.run(x, (reverse, width, states), run)
    parts = carried.view(-1)[: carried.numel() // most * used[-1]]
    return entering, leaving, parts.view(*carried.shape[:3], used[-1]).sum(-1)
