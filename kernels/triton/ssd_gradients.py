"""Gradients of the scan inside all chunks at once, given the states at their borders.

Letters: B batch, L length, Q chunk length, C chunks, H heads, P head width, G groups, N states.
"""

import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, launch
from tess.kernels.triton.ssd_forward import (
    chunk_decays,
    chunk_weights,
    incoming_sequence,
    outgoing_sequence,
)
from tess.kernels.triton.ssd_inputs import (
    PositionParts,
    ScanGradients,
    ScanInputs,
    block_constants,
    sizes,
    strides,
)

HEADS = Table("ssd_head_gradients", {"sm_80": Config({}, num_warps=8, num_stages=1)})
MAPS = Table(
    "ssd_map_gradients",
    {
        "sm_80": Config({"BLOCK_N": 64}, num_warps=4, num_stages=2),
        "sm_100": Config({"BLOCK_N": 128}, num_warps=8, num_stages=1),
    },
    float32={"sm_80": Config({"BLOCK_N": 32}, num_warps=8, num_stages=1)},
)


@triton.jit
def source_weights(incl, before, q, scale, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """The transpose of `chunk_weights`: rows s, columns t."""
    later = q[None, :] >= q[:, None]
    forward = incl[None, :] - incl[:, None]
    backward = before[:, None] - before[None, :]
    if FORWARD and REVERSE:
        weights = tl.exp2(tl.where(later, forward, backward))
        weights = tl.where(later, weights, weights * scale)
    elif FORWARD:
        weights = tl.exp2(tl.where(later, forward, float("-inf")))
    else:
        weights = tl.exp2(tl.where(q[None, :] <= q[:, None], backward, float("-inf")))
    return weights


@triton.jit
def _head_gradients(
    dy_ptr, x_ptr, b_ptr, c_ptr, cb_ptr, dt_ptr, incl_ptr, d_ptr, scale_ptr, sequence_ptr,
    left_ptr, right_ptr, to_right_ptr, to_left_ptr, dx_ptr, ddt_ptr, sum_ptr, excl_ptr, over_ptr,
    dd_ptr, dscale_ptr, dy_b, dy_l, dy_h, x_b, x_l, x_h, b_b, b_l, b_g, c_b, c_l, c_g,
    length, chunks, heads, per_group, width, states,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, FORWARD: tl.constexpr,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Of one chunk and head: dx, and for each position its part of all other gradients.

    Matrices have rows s (inputs) and columns t (outputs). Sums over positions are left to
    `_steps_backward`: Triton 3.6 and 3.7 fail to compile them behind a product for sm_100.
    """
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    head = tl.program_id(1).to(tl.int64)
    group, groups = head // per_group, heads // per_group
    q, p, n = tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start, t = (chunk * Q).to(tl.int64), chunk * Q + q
    t_in, p_in, n_in = t < length, p < width, n < states
    tile_in = t_in[:, None] & p_in[None, :]
    x = tl.load(
        x_ptr + row * x_b + start * x_l + head * x_h + q[:, None] * x_l + p[None, :],
        mask=tile_in, other=0.0,
    )
    low = x.dtype
    dy = tl.load(
        dy_ptr + row * dy_b + start * dy_l + head * dy_h + q[:, None] * dy_l + p[None, :],
        mask=tile_in, other=0.0,
    ).to(low)
    first = (row * heads + head) * (chunks * Q) + chunk * Q
    dt, incl, before, total = chunk_decays(dt_ptr, incl_ptr, first, Q)
    scale = tl.full((), 1.0, WIDE)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + head).to(WIDE)
    if sequence_ptr is not None:
        sequence_ptr += row * length
        ids = tl.load(sequence_ptr + tl.minimum(t, length - 1))
    border = ((row * chunks + chunk) * heads + head) * states * width
    border_place = n[:, None] * width + p[None, :]
    state_in = n_in[:, None] & p_in[None, :]
    map_in = t_in[:, None] & n_in[None, :]

    # within the chunk; `passed` is the gradient by log W: a pair s < t lies on the decays behind s
    # up to t, a pair t < s on those from t up to before s
    weights = source_weights(incl, before, q, scale, FORWARD, REVERSE)
    if sequence_ptr is not None:
        weights = tl.where(ids[:, None] == ids[None, :], weights, 0.0)
    cb_start = cb_ptr + ((row * chunks + chunk) * groups + group) * (Q * Q)
    mixed = weights * tl.load(cb_start + q[None, :] * Q + q[:, None]).to(WIDE)
    dtx = tl.dot(mixed.to(low), dy, out_dtype=WIDE, input_precision=PRECISION)
    pairs = tl.dot(x, tl.trans(dy), out_dtype=WIDE, input_precision=PRECISION)
    passed = mixed * pairs * dt[:, None]
    incl_sum = tl.zeros((Q,), WIDE)
    excl_sum = tl.zeros((Q,), WIDE)
    over = tl.zeros((Q,), WIDE)
    if FORWARD:
        later = tl.where(q[None, :] > q[:, None], passed, 0.0)
        incl_sum += tl.sum(later, axis=0) - tl.sum(later, axis=1)
    if REVERSE:
        earlier = tl.where(q[None, :] < q[:, None], passed, 0.0)
        excl_sum += tl.sum(earlier, axis=1) - tl.sum(earlier, axis=0)
        if dscale_ptr is not None:  # the scale may be 0, so the plain weights once more
            plain = source_weights(incl, before, q, scale * 0 + 1, True, True) * dt[:, None]
            if sequence_ptr is not None:
                plain = tl.where(ids[:, None] == ids[None, :], plain, 0.0)
            plain = plain * tl.load(cb_start + q[None, :] * Q + q[:, None]).to(WIDE) * pairs
            dscale = tl.sum(tl.where(q[None, :] < q[:, None], plain, 0.0), axis=1)

    # what the states at the borders give to y, and take from x
    c_QN = tl.load(
        c_ptr + row * c_b + group * c_g + start * c_l + q[:, None] * c_l + n[None, :],
        mask=map_in, other=0.0,
    )
    if FORWARD:
        read = tl.exp2(incl)
        if sequence_ptr is not None:
            own = incoming_sequence(sequence_ptr, chunk, chunks, length, Q, False)
            read = tl.where(ids == own, read, 0.0)
        state = tl.load(left_ptr + border + border_place, mask=state_in, other=0.0)
        y = tl.dot(c_QN, state, out_dtype=WIDE, input_precision=PRECISION)
        incl_sum += read * tl.sum(y * dy.to(WIDE), axis=1)
    if REVERSE:
        read = tl.exp2(total - before)
        if sequence_ptr is not None:
            own = incoming_sequence(sequence_ptr, chunk, chunks, length, Q, True)
            read = tl.where(ids == own, read, 0.0)
        state = tl.load(right_ptr + border + border_place, mask=state_in, other=0.0)
        y = tl.dot(c_QN, state, out_dtype=WIDE, input_precision=PRECISION)
        from_right = read * tl.sum(y * dy.to(WIDE), axis=1)
        excl_sum -= scale * from_right
        over += scale * from_right
        if dscale_ptr is not None:
            tl.store(dscale_ptr + first + q, dscale + from_right)
    b_QN = tl.load(
        b_ptr + row * b_b + group * b_g + start * b_l + q[:, None] * b_l + n[None, :],
        mask=map_in, other=0.0,
    )
    if FORWARD:
        gain = tl.exp2(total - incl)
        if sequence_ptr is not None:
            own = outgoing_sequence(sequence_ptr, chunk, chunks, length, Q, False)
            gain = tl.where(ids == own, gain, 0.0)
        state = tl.load(to_right_ptr + border + border_place, mask=state_in, other=0.0)
        out = tl.dot(b_QN, state, out_dtype=WIDE, input_precision=PRECISION) * gain[:, None]
        leaving = dt * tl.sum(out * x.to(WIDE), axis=1)
        incl_sum -= leaving
        over += leaving
        dtx += out
    if REVERSE:
        gain = tl.exp2(before)
        if sequence_ptr is not None:
            own = outgoing_sequence(sequence_ptr, chunk, chunks, length, Q, True)
            gain = tl.where(ids == own, gain, 0.0)
        state = tl.load(to_left_ptr + border + border_place, mask=state_in, other=0.0)
        out = tl.dot(b_QN, state, out_dtype=WIDE, input_precision=PRECISION) * gain[:, None]
        excl_sum += dt * tl.sum(out * x.to(WIDE), axis=1)
        dtx += out

    tl.store(ddt_ptr + first + q, tl.sum(dtx * x.to(WIDE), axis=1))
    tl.store(sum_ptr + first + q, incl_sum + excl_sum)
    tl.store(over_ptr + first + q, over)
    if REVERSE:
        tl.store(excl_ptr + first + q, excl_sum)
    dx = dtx * dt[:, None]
    if d_ptr is not None:
        dx += tl.load(d_ptr + head).to(WIDE) * dy.to(WIDE)
        tl.store(dd_ptr + first + q, tl.sum(dy.to(WIDE) * x.to(WIDE), axis=1))
    dx_start = dx_ptr + ((row * length + start) * heads + head) * width
    dx_place = q[:, None] * (heads * width) + p[None, :]
    tl.store(dx_start + dx_place, dx.to(dx_ptr.dtype.element_ty), mask=tile_in)


@triton.jit
def _map_gradients(
    u_ptr, v_ptr, k_ptr, dt_ptr, incl_ptr, scale_ptr, sequence_ptr, left_ptr, right_ptr, out_ptr,
    u_b, u_l, u_h, v_b, v_l, v_h, k_b, k_l, k_g,
    length, chunks, heads, per_group, width, states,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TARGET: tl.constexpr,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """dC (TARGET: u = dy, v = x, k = B, states that enter from the left and the right) or dB
    (u = x, v = dy, k = C, gradients by the states that leave to them) of one chunk and group."""
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    group = tl.program_id(1).to(tl.int64)
    q, p = tl.arange(0, Q), tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, t = (chunk * Q).to(tl.int64), chunk * Q + q
    t_in, p_in, n_in = t < length, p < width, n < states
    k_QN = tl.load(
        k_ptr + row * k_b + group * k_g + start * k_l + q[:, None] * k_l + n[None, :],
        mask=t_in[:, None] & n_in[None, :], other=0.0,
    )
    sums = tl.zeros((Q, BLOCK_N), WIDE)
    if sequence_ptr is not None:
        sequence_ptr += row * length
        ids = tl.load(sequence_ptr + tl.minimum(t, length - 1))
        if TARGET:
            of_left = ids == incoming_sequence(sequence_ptr, chunk, chunks, length, Q, False)
            of_right = ids == incoming_sequence(sequence_ptr, chunk, chunks, length, Q, True)
        else:
            of_right = ids == outgoing_sequence(sequence_ptr, chunk, chunks, length, Q, False)
            of_left = ids == outgoing_sequence(sequence_ptr, chunk, chunks, length, Q, True)

    for i in range(0, per_group):
        head = group * per_group + i
        u = tl.load(
            u_ptr + row * u_b + start * u_l + head * u_h + q[:, None] * u_l + p[None, :],
            mask=t_in[:, None] & p_in[None, :], other=0.0,
        )
        v_PQ = tl.load(
            v_ptr + row * v_b + start * v_l + head * v_h + q[None, :] * v_l + p[:, None],
            mask=p_in[:, None] & t_in[None, :], other=0.0,
        )
        low = k_QN.dtype
        decay_place = (row * heads + head) * (chunks * Q)
        dt, incl, before, total = chunk_decays(dt_ptr, incl_ptr, decay_place + chunk * Q, Q)
        scale = tl.full((), 1.0, WIDE)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + head).to(WIDE)
        if TARGET:
            weights = chunk_weights(incl, before, incl, before, q, q, scale, FORWARD, REVERSE)
            weights *= dt[None, :]
            by_left, by_right = tl.exp2(incl), scale * tl.exp2(total - before)
        else:
            weights = source_weights(incl, before, q, scale, FORWARD, REVERSE) * dt[:, None]
            by_left, by_right = dt * tl.exp2(before), dt * tl.exp2(total - incl)
        if sequence_ptr is not None:
            weights = tl.where(ids[:, None] == ids[None, :], weights, 0.0)
            by_left = tl.where(of_left, by_left, 0.0)
            by_right = tl.where(of_right, by_right, 0.0)
        pairs = tl.dot(u.to(low), v_PQ.to(low), out_dtype=WIDE, input_precision=PRECISION)
        mixed = (weights * pairs).to(low)
        sums += tl.dot(mixed, k_QN, out_dtype=WIDE, input_precision=PRECISION)
        border = ((row * chunks + chunk) * heads + head) * states * width
        border_place = n[None, :] * width + p[:, None]
        border_in = p_in[:, None] & n_in[None, :]
        if left_ptr is not None:
            state_PN = tl.load(left_ptr + border + border_place, mask=border_in, other=0.0)
            part = (u.to(WIDE) * by_left[:, None]).to(low)
            sums += tl.dot(part, state_PN, out_dtype=WIDE, input_precision=PRECISION)
        if right_ptr is not None:
            state_PN = tl.load(right_ptr + border + border_place, mask=border_in, other=0.0)
            part = (u.to(WIDE) * by_right[:, None]).to(low)
            sums += tl.dot(part, state_PN, out_dtype=WIDE, input_precision=PRECISION)

    out = out_ptr + ((row * length + start) * (heads // per_group) + group) * states
    out_place = q[:, None] * ((heads // per_group) * states) + n[None, :]
    out_in = t_in[:, None] & n_in[None, :]
    tl.store(out + out_place, sums.to(out_ptr.dtype.element_ty), mask=out_in)


def launch_heads(
    inputs: ScanInputs, dy: Tensor, borders: tuple[Tensor | None, ...], parts: PositionParts,
    out: ScanGradients,
) -> None:
    x, b, c = inputs.x_BLHP, inputs.b_BLGN, inputs.c_BLGN
    heads = (inputs.d_H, inputs.scale_H, inputs.sequence_BL)
    dd = None if inputs.d_H is None else parts.d
    dscale = None if inputs.scale_H is None else parts.scale
    block = max(16, triton.next_power_of_2(x.shape[3]))
    forward, reverse = borders[0] is not None, borders[1] is not None

    def run(config: Config) -> None:
        launch(
            _head_gradients, (len(x) * inputs.cb.shape[1], x.shape[2]), dy, x, b, c, inputs.cb,
            inputs.dt_BHL, inputs.incl_BHL, *heads, *borders, out.x_BLHP, *parts[:2],
            parts.excl if reverse else None, parts.over, dd, dscale, *strides(dy, x, b, c),
            *sizes(inputs), config=config, BLOCK_P=block, FORWARD=forward, REVERSE=reverse,
            **block_constants(inputs),
        )

    HEADS.run(x, (forward, reverse, block), run)


def launch_maps(
    inputs: ScanInputs, factors: tuple[Tensor, Tensor, Tensor], left: Tensor | None,
    right: Tensor | None, direction: str, out: Tensor, target: bool,
) -> None:
    x = inputs.x_BLHP
    decays = (inputs.dt_BHL, inputs.incl_BHL, inputs.scale_H, inputs.sequence_BL)
    block = max(16, triton.next_power_of_2(x.shape[3]))
    groups, states = inputs.b_BLGN.shape[2:]

    def run(config: Config) -> None:
        constants = block_constants(inputs)
        constants["BLOCK_N"] = min(config.blocks["BLOCK_N"], constants["BLOCK_N"])
        grid = (len(x) * inputs.cb.shape[1], groups, -(-states // constants["BLOCK_N"]))
        launch(
            _map_gradients, grid, *factors, *decays, left, right, out, *strides(*factors),
            *sizes(inputs), config=config, BLOCK_P=block, TARGET=target,
            FORWARD=direction != "reverse", REVERSE=direction != "forward", **constants,
        )

    MAPS.run(x, (direction, target, block), run)
