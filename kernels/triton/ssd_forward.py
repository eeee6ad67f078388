"""The Mamba-2 scan by one program per head: the state stays on the chip from the first chunk on.

A program walks over a row's chunks of Q positions with its head's state in registers, so that x is
read and y written once, and no state goes through memory. Products within a chunk are those of
arXiv 2405.21060, section 6. In both directions at once y_t is

    sum over s of W_ts dt_s (C_t . B_s) x_s,   W_ts = exp(sum of a over (s, t]) for s <= t,
                                                      exp(sum of a over [t, s)) for s > t,

so the matrix inside a chunk serves both; a first walk from the end leaves what the reverse state
gives, a second one from the start adds the rest.

Letters: B batch, L length, Q chunk length, H heads, P head width, G groups, N state width.
Logarithms of decays are of base 2: `exp2` is one instruction.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, dot_precision, launch, wide_type

CHUNK = 64
LOG2_E = tl.constexpr(1.4426950408889634)

STEPS = Table("ssd_steps", {"sm_80": Config({"BLOCK_H": 8}, num_warps=4, num_stages=1)})
PRODUCTS = Table("ssd_chunk_products", {"sm_80": Config({}, num_warps=4, num_stages=1)})
SWEEP = Table(
    "ssd_sweep",
    {"sm_80": Config({"BLOCK_P": 64}, num_warps=8, num_stages=2)},
    others=(
        Config({"BLOCK_P": 32}, num_warps=4, num_stages=2),
        Config({"BLOCK_P": 64}, num_warps=8, num_stages=1),
    ),
    float32={
        "sm_80": Config({"BLOCK_P": 16}, num_warps=8, num_stages=1),
        "sm_90": Config({"BLOCK_P": 32}, num_warps=8, num_stages=1),
    },
)


@triton.jit
def softplus_steps(raw, bias, low, high, SOFTPLUS: tl.constexpr):
    """Step sizes from the raw ones: + bias, softplus, clamp."""
    dt = raw + bias
    if SOFTPLUS:
        # log(1 + e^z) = max(z, 0) + log(1 + e^-|z|): no overflow, and small values keep digits
        small = tl.exp(-tl.abs(dt))
        log = tl.where(small < 1e-4, small * (1.0 - 0.5 * small), tl.log(1.0 + small))
        dt = tl.maximum(dt, 0.0) + log
    return tl.minimum(tl.maximum(dt, low), high)


@triton.jit
def _steps(
    raw_ptr, bias_ptr, a_ptr, mask_ptr, dt_ptr, incl_ptr, stride_b, stride_l, stride_h,
    length, chunks, heads, low, high,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
):
    """dt [B, H, chunks Q] after bias, softplus, clamp and mask, and its decays summed by chunk."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = chunk * Q + tl.arange(0, Q)
    known = head < heads
    inside = known[:, None] & (t < length)[None, :]
    place = raw_ptr + row * stride_b + t[None, :].to(tl.int64) * stride_l
    raw = tl.load(place + head[:, None].to(tl.int64) * stride_h, mask=inside, other=0.0).to(WIDE)
    bias = tl.zeros((BLOCK_H,), WIDE)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + head, mask=known, other=0.0).to(WIDE)
    dt = softplus_steps(raw, bias[:, None], low, high, SOFTPLUS)
    if mask_ptr is not None:
        real = tl.load(mask_ptr + row * length + t, mask=t < length, other=0)
        inside = inside & (real != 0)[None, :]
    dt = tl.where(inside, dt, 0.0)
    a = tl.load(a_ptr + head, mask=known, other=0.0).to(WIDE)
    incl = tl.cumsum(dt * (a * LOG2_E)[:, None], axis=1)
    out = (row * heads + head)[:, None].to(tl.int64) * (chunks * Q) + t[None, :]
    tl.store(dt_ptr + out, dt, known[:, None])
    tl.store(incl_ptr + out, incl, known[:, None])


@triton.jit
def chunk_decays(dt_ptr, incl_ptr, first, Q: tl.constexpr):
    """Steps of the chunk that begins at `first`, its decays summed up to and before each position,
    and their sum."""
    dt_ptr += first
    incl_ptr += first
    q = tl.arange(0, Q)
    dt, incl, total = tl.load(dt_ptr + q), tl.load(incl_ptr + q), tl.load(incl_ptr + Q - 1)
    before = tl.where(q == 0, 0.0, tl.load(incl_ptr + q - 1, q > 0, 0.0))
    return dt, incl, before, total


@triton.jit
def chunk_weights(
    incl_t, excl_t, incl_s, excl_s, row, column, scale,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,
):
    """W_ts of one chunk, rows t and columns s: decays <= 1, masked before exp2.

    The part above the diagonal is times `scale`.
    """
    lower = row[:, None] >= column[None, :]
    forward = incl_t[:, None] - incl_s[None, :]
    backward = excl_s[None, :] - excl_t[:, None]
    if FORWARD and REVERSE:
        weights = tl.exp2(tl.where(lower, forward, backward))
        weights = tl.where(lower, weights, weights * scale)
    elif FORWARD:
        weights = tl.exp2(tl.where(lower, forward, float("-inf")))
    else:
        weights = tl.exp2(tl.where(row[:, None] <= column[None, :], backward, float("-inf")))
    return weights


@triton.jit
def incoming_sequence(sequence_ptr, chunk, chunks, length, Q: tl.constexpr, REVERSE: tl.constexpr):
    """Whose state enters a chunk: that of its neighbour's edge, at the row's end its own edge's."""
    if REVERSE:
        place = tl.minimum((chunk + 1) * Q, length - 1)
    else:
        place = tl.maximum(chunk * Q - 1, 0)
    return tl.load(sequence_ptr + place)


@triton.jit
def outgoing_sequence(sequence_ptr, chunk, chunks, length, Q: tl.constexpr, REVERSE: tl.constexpr):
    """Whose state leaves a chunk."""
    place = chunk * Q if REVERSE else tl.minimum((chunk + 1) * Q, length) - 1
    return tl.load(sequence_ptr + place)


@triton.jit
def _sweep(
    x_ptr, dt_ptr, incl_ptr, b_ptr, c_ptr, cb_ptr, d_ptr, scale_ptr, sequence_ptr, initial_ptr,
    y_ptr, final_ptr, x_b, x_l, x_h, b_b, b_l, b_g, c_b, c_l, c_g,
    length, chunks, heads, per_group, width, states,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REVERSE: tl.constexpr,
    WITHIN: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One walk. REVERSE: from the end. WITHIN: with the chunk's own matrix, of both directions if
    BOTH. ADD: y already holds what the other walk gave."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    p_in, n_in = p < width, n < states
    x_ptr += row * x_b + head * x_h
    b_ptr += row * b_b + group * b_g
    c_ptr += row * c_b + group * c_g
    y_ptr += (row * length * heads + head) * width
    decay_place = (row * heads + head) * (chunks * Q)
    state_place = ((row * heads + head) * width + p[None, :]) * states + n[:, None]
    state_in = n_in[:, None] & p_in[None, :]
    scale = tl.full((), 1.0, WIDE)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + head).to(WIDE)
    if sequence_ptr is not None:
        sequence_ptr += row * length
    if initial_ptr is not None:
        state = tl.load(initial_ptr + state_place, mask=state_in, other=0.0).to(WIDE)
    else:
        state = tl.zeros((BLOCK_N, BLOCK_P), WIDE)

    # offsets within a chunk have 32 bits, so that addresses take few registers
    x_place = q[:, None] * x_l + p[None, :]
    b_place = q[None, :] * b_l + n[:, None]
    c_place = q[:, None] * c_l + n[None, :]
    y_place = q[:, None] * (heads * width) + p[None, :]
    cb_place = q[:, None] * Q + q[None, :]
    groups_QQ = (heads // per_group) * (Q * Q)
    cb_ptr += row * chunks * groups_QQ + group * (Q * Q)
    for i in range(0, chunks):
        chunk = chunks - 1 - i if REVERSE else i
        start = (tl.program_id(0) * 0 + chunk * Q).to(tl.int64)
        t = chunk * Q + q
        t_in = t < length
        x_in = t_in[:, None] & p_in[None, :]
        x = tl.load(x_ptr + start * x_l + x_place, mask=x_in, other=0.0)
        b_NQ = tl.load(b_ptr + start * b_l + b_place, n_in[:, None] & t_in[None, :], other=0.0)
        c_QN = tl.load(c_ptr + start * c_l + c_place, t_in[:, None] & n_in[None, :], other=0.0)
        dt, incl, before, total = chunk_decays(dt_ptr, incl_ptr, decay_place + chunk * Q, Q)
        read = tl.exp2(total - before) if REVERSE else tl.exp2(incl)
        gain = dt * (tl.exp2(before) if REVERSE else tl.exp2(total - incl))
        keep = tl.exp2(total)
        if sequence_ptr is not None:
            ids = tl.load(sequence_ptr + tl.minimum(t, length - 1))
            entering = incoming_sequence(sequence_ptr, chunk, chunks, length, Q, REVERSE)
            leaving = outgoing_sequence(sequence_ptr, chunk, chunks, length, Q, REVERSE)
            read = tl.where(ids == entering, read, 0.0)
            gain = tl.where(ids == leaving, gain, 0.0)
            keep = tl.where(entering == leaving, keep, 0.0)
        if REVERSE:
            read *= scale

        low = x.dtype
        y = tl.dot(c_QN, state.to(low), out_dtype=WIDE, input_precision=PRECISION) * read[:, None]
        if WITHIN:
            weights = chunk_weights(
                incl, before, incl, before, q, q, scale, BOTH or (not REVERSE),
                BOTH or REVERSE,
            )
            if sequence_ptr is not None:
                weights = tl.where(ids[:, None] == ids[None, :], weights, 0.0)
            cb = tl.load(cb_ptr + chunk * groups_QQ + cb_place).to(WIDE)
            mixed = (cb * weights * dt[None, :]).to(low)
            y += tl.dot(mixed, x, out_dtype=WIDE, input_precision=PRECISION)
        if d_ptr is not None:
            y += tl.load(d_ptr + head).to(WIDE) * x.to(WIDE)
        y_start = y_ptr + start * (heads * width)
        if ADD:
            y += tl.load(y_start + y_place, mask=x_in, other=0.0).to(WIDE)
        tl.store(y_start + y_place, y.to(y_ptr.dtype.element_ty), mask=x_in)
        gained = (x.to(WIDE) * gain[:, None]).to(low)
        state = state * keep + tl.dot(b_NQ, gained, out_dtype=WIDE, input_precision=PRECISION)

    if final_ptr is not None:
        tl.store(final_ptr + state_place, state, mask=state_in)


@triton.jit
def _chunk_products(
    c_ptr, b_ptr, cb_ptr, c_b, c_l, c_g, b_b, b_l, b_g, length, chunks, groups, states,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):
    """C_t . B_s of all pairs of one chunk, for the heads of a group to share."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk, group = tl.program_id(0) % chunks, tl.program_id(1).to(tl.int64)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    t = (chunk * Q + q).to(tl.int64)
    t_in, n_in = t < length, n < states
    c_QN = tl.load(
        c_ptr + row * c_b + group * c_g + t[:, None] * c_l + n[None, :],
        mask=t_in[:, None] & n_in[None, :], other=0.0,
    )
    b_NQ = tl.load(
        b_ptr + row * b_b + group * b_g + t[None, :] * b_l + n[:, None],
        mask=n_in[:, None] & t_in[None, :], other=0.0,
    )
    cb_QQ = tl.dot(c_QN, b_NQ, out_dtype=WIDE, input_precision=PRECISION)
    out = cb_ptr + (tl.program_id(0).to(tl.int64) * groups + group) * (Q * Q)
    tl.store(out + q[:, None] * Q + q[None, :], cb_QQ.to(cb_ptr.dtype.element_ty))


def chunk_products(c_BLGN: Tensor, b_BLGN: Tensor) -> Tensor:
    """C_t . B_s within each chunk: [B, chunks, G, Q, Q] in the dtype of the arguments."""
    batch, length, groups, states = c_BLGN.shape
    chunks = -(-length // CHUNK)
    shape = (batch, chunks, groups, CHUNK, CHUNK)
    cb = torch.empty(shape, dtype=c_BLGN.dtype, device=c_BLGN.device)

    def run(config: Config) -> None:
        launch(
            _chunk_products, (batch * chunks, groups), c_BLGN, b_BLGN, cb, *c_BLGN.stride()[:3],
            *b_BLGN.stride()[:3], length, chunks, groups, states, config=config, Q=CHUNK,
            BLOCK_N=max(16, triton.next_power_of_2(states)), WIDE=wide_type(c_BLGN),
            PRECISION=dot_precision(c_BLGN),
        )

    PRODUCTS.run(c_BLGN, (groups, states), run)
    return cb


def steps_forward(
    dt_BLH: Tensor, a_H: Tensor, bias_H: Tensor | None, mask_BL: Tensor | None,
    softplus: bool, low: float, high: float,
) -> tuple[Tensor, Tensor]:
    """Step sizes [B, H, L'] and base-2 logarithms of the decays, summed from each chunk's start.

    L' is the length rounded up to whole chunks, with steps of 0; float32 (float64 for float64).
    """
    batch, length, heads = dt_BLH.shape
    chunks = -(-length // CHUNK)
    wide = torch.float64 if dt_BLH.dtype == torch.float64 else torch.float32
    dt_BHL = torch.empty((batch, heads, chunks * CHUNK), dtype=wide, device=dt_BLH.device)
    incl_BHL = torch.empty_like(dt_BHL)

    def run(config: Config) -> None:
        grid = (batch * chunks, -(-heads // config.blocks["BLOCK_H"]))
        launch(
            _steps, grid, dt_BLH, bias_H, a_H, mask_BL, dt_BHL, incl_BHL, *dt_BLH.stride(),
            length, chunks, heads, low, high, config=config, Q=CHUNK, SOFTPLUS=softplus,
            WIDE=wide_type(dt_BLH),
        )

    STEPS.run(dt_BLH, (heads, length), run)
    return dt_BHL, incl_BHL


def sweep_forward(
    x_BLHP: Tensor, dt_BHL: Tensor, incl_BHL: Tensor, b_BLGN: Tensor, c_BLGN: Tensor, cb: Tensor,
    d_H: Tensor | None, scale_H: Tensor | None, sequence_BL: Tensor | None,
    initial_BHPN: Tensor | None, direction: str, want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [B, L, H, P] in the dtype of x and the state after the last position, if wanted."""
    batch, length, heads, width = x_BLHP.shape
    groups, states = b_BLGN.shape[2:]
    y_BLHP = torch.empty(x_BLHP.shape, dtype=x_BLHP.dtype, device=x_BLHP.device)
    final = None
    if want_final:
        final = torch.empty((batch, heads, width, states), dtype=dt_BHL.dtype, device=x_BLHP.device)
    sizes = (length, dt_BHL.shape[2] // CHUNK, heads, heads // groups, width, states)
    strides = (*x_BLHP.stride()[:3], *b_BLGN.stride()[:3], *c_BLGN.stride()[:3])
    constants = {
        "Q": CHUNK, "BLOCK_N": max(16, triton.next_power_of_2(states)), "WIDE": wide_type(x_BLHP),
        "PRECISION": dot_precision(x_BLHP),
    }
    both = direction == "bidirectional"

    def walk(config: Config, backward: bool) -> None:
        first = both and backward  # the first of two walks: the reverse state's part alone
        tensors = (d_H, scale_H, sequence_BL, initial_BHPN, y_BLHP, final)
        if first:
            tensors = (None, scale_H, sequence_BL, None, y_BLHP, None)
        launch(
            _sweep, (batch * heads, -(-width // config.blocks["BLOCK_P"])),
            x_BLHP, dt_BHL, incl_BHL, b_BLGN, c_BLGN, cb, *tensors, *strides, *sizes, config=config,
            REVERSE=backward, WITHIN=not first, BOTH=both, ADD=both and not backward, **constants,
        )

    def run(config: Config) -> None:
        config = narrow_heads(config, width)
        if direction != "forward":
            walk(config, backward=True)
        if direction != "reverse":
            walk(config, backward=False)

    SWEEP.run(x_BLHP, (direction, width, states), run)
    return y_BLHP, final


def kernel_limits(dt_limits: tuple[float, float]) -> tuple[float, float]:
    """The clamp on step sizes; (0, inf) stands for none, as in `tess.kernels.ssd`."""
    low, high = (float(limit) for limit in dt_limits)
    return (-math.inf, high) if (low, high) == (0.0, math.inf) else (low, high)


def narrow_heads(config: Config, width: int) -> Config:
    """The configuration with a block no wider than the heads need."""
    block = min(config.blocks["BLOCK_P"], max(16, triton.next_power_of_2(width)))
    return config._replace(blocks=config.blocks | {"BLOCK_P": block})
