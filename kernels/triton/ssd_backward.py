"""Gradients of the Mamba-2 scan: states at the chunks' borders first, then all chunks at once.

With the states that enter a chunk from the left and from the right, and the gradients by those that
leave it to the right and to the left, all gradients of a chunk follow from its own positions.
`ssd_states.py` walks over the chunks and leaves these in memory, some rows of the batch at a time;
`ssd_gradients.py` then runs for all chunks at once. Nothing is added up by atomics, so results are
the same every time.

The gradient by a decay a_u is what passes over position u. It is summed from its parts (within the
chunk, into it, out of it, over it), not as y . dy - x . dx behind u, whose terms cancel over the
whole sequence and lose digits.

Letters: B batch, L length, Q chunk length, C chunks, H heads, P head width, G groups, N states.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tess.kernels.triton.launch import Config, Table, launch, wide_type
from tess.kernels.triton.ssd_forward import CHUNK, softplus_steps
from tess.kernels.triton.ssd_gradients import launch_heads, launch_maps
from tess.kernels.triton.ssd_inputs import PositionParts, ScanGradients, ScanInputs
from tess.kernels.triton.ssd_states import border_states

STATE_BYTES = 256 * 2**20  # of border states at a time; at least those of one row of the batch

STEPS_BACKWARD = Table(
    "ssd_steps_backward", {"sm_80": Config({"BLOCK_H": 8}, num_warps=4, num_stages=1)}
)


@triton.jit
def _steps_backward(
    raw_ptr, bias_ptr, a_ptr, mask_ptr, dt_ptr, ddt_ptr, sum_ptr, excl_ptr, over_ptr, carry_ptr,
    draw_ptr, da_ptr, dbias_ptr, stride_b, stride_l, stride_h, length, chunks, heads, low, high,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr,
):
    """Gradients by the raw steps, and each chunk's part of those by the rates and biases."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = chunk * Q + tl.arange(0, Q)
    known = head < heads
    inside = known[:, None] & (t < length)[None, :]
    place = (row * heads + head)[:, None].to(tl.int64) * (chunks * Q) + t[None, :]
    # the decay at u is in every sum up to u or a place behind it, and in every sum up to before a
    # place behind it; behind a short last chunk nothing decays, and nothing was written but zeros
    whole = known[:, None] & (t >= 0)[None, :]
    log = tl.cumsum(tl.load(sum_ptr + place, mask=whole, other=0.0), axis=1, reverse=True)
    if excl_ptr is not None:
        log -= tl.load(excl_ptr + place, mask=whole, other=0.0)
    partial = (row * chunks + chunk) * heads + head
    over = tl.sum(tl.load(over_ptr + place, mask=whole, other=0.0), axis=1)
    log += (over + tl.load(carry_ptr + partial, mask=known, other=0.0))[:, None]
    dt = tl.load(dt_ptr + place, mask=inside, other=0.0)
    tl.store(da_ptr + partial, tl.sum(log * dt, axis=1), mask=known)
    a = tl.load(a_ptr + head, mask=known, other=0.0).to(WIDE)
    ddt = tl.load(ddt_ptr + place, mask=inside, other=0.0) + log * a[:, None]
    raw_place = raw_ptr + row * stride_b + t[None, :].to(tl.int64) * stride_l
    raw = tl.load(raw_place + head[:, None].to(tl.int64) * stride_h, mask=inside, other=0.0)
    z = raw.to(WIDE)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + head, mask=known, other=0.0).to(WIDE)[:, None]
    free = softplus_steps(z, 0.0, float("-inf"), float("inf"), SOFTPLUS)
    if SOFTPLUS:
        small = tl.exp(-tl.abs(z))
        ddt *= tl.where(z >= 0, 1.0, small) / (1.0 + small)
    counts = inside & (free >= low) & (free <= high)
    if mask_ptr is not None:
        real = tl.load(mask_ptr + row * length + t, mask=t < length, other=0)
        counts = counts & (real != 0)[None, :]
    ddt = tl.where(counts, ddt, 0.0)
    out = (row * length + t[None, :]) * heads + head[:, None]
    tl.store(draw_ptr + out, ddt.to(draw_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + partial, tl.sum(ddt, axis=1), mask=known)


def scan_backward(
    inputs: ScanInputs, dy_BLHP: Tensor, dfinal_BHPN: Tensor | None, direction: str,
    softplus: bool, low: float, high: float,
) -> ScanGradients:
    """Gradients of the scan, for some rows of the batch at a time (STATE_BYTES)."""
    x, b = inputs.x_BLHP, inputs.b_BLGN
    batch, length, heads, width = x.shape
    chunks, states = inputs.cb.shape[1], b.shape[3]
    wide = {"dtype": inputs.dt_BHL.dtype, "device": x.device}
    out = ScanGradients(
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty((batch, length, heads), dtype=inputs.raw_BLH.dtype, device=x.device),
        torch.empty((batch, chunks, heads), **wide),
        *(torch.empty(b.shape, dtype=b.dtype, device=x.device) for _ in range(2)),
        *(torch.zeros((batch, chunks, heads), **wide) for _ in range(3)),
        torch.zeros((batch, heads, width, states), **wide),
    )
    walks = 4 if direction == "bidirectional" else 2
    row_bytes = walks * chunks * heads * states * width * x.element_size()
    rows = max(1, STATE_BYTES // row_bytes)
    for first in range(0, batch, rows):
        part = slice(first, min(first + rows, batch))
        _backward_rows(
            inputs.rows(part), dy_BLHP[part], None if dfinal_BHPN is None else dfinal_BHPN[part],
            ScanGradients(*(tensor[part] for tensor in out)), direction, softplus, low, high,
        )
    sums = {name: getattr(out, name).sum((0, 1)) for name in ("a_H", "d_H", "bias_H", "scale_H")}
    return out._replace(**sums)


def _backward_rows(
    inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, out: ScanGradients, direction: str,
    softplus: bool, low: float, high: float,
) -> None:
    """Fill the gradients of some rows; those of numbers per head by chunk."""
    forward, reverse = direction != "reverse", direction != "forward"
    left = right = to_right = to_left = None
    carry = torch.zeros_like(out.a_H)
    ends = (inputs.initial_BHPN, dfinal, out.initial_BHPN)
    none = (None, None, None)
    if forward:
        left, to_right, carried = border_states(inputs, dy, False, *ends)
        carry += carried
    if reverse:
        right, to_left, carried = border_states(inputs, dy, True, *(none if forward else ends))
        carry += carried
    borders = (left, right, to_right, to_left)
    parts = PositionParts(*(torch.empty_like(inputs.dt_BHL) for _ in range(6)))
    launch_heads(inputs, dy, borders, parts, out)
    x, b, c = inputs.x_BLHP, inputs.b_BLGN, inputs.c_BLGN
    launch_maps(inputs, (dy, x, b), left, right, direction, out.c_BLGN, target=True)
    launch_maps(inputs, (x, dy, c), to_left, to_right, direction, out.b_BLGN, target=False)
    _launch_steps(inputs, out, parts, reverse, carry, softplus, low, high)
    if inputs.d_H is not None:
        out.d_H.copy_(_by_chunk(parts.d))
    if inputs.scale_H is not None:
        out.scale_H.copy_(_by_chunk(parts.scale))


def _by_chunk(part_BHL: Tensor) -> Tensor:
    """[B, C, H]: the sum over each chunk."""
    return part_BHL.unflatten(2, (-1, CHUNK)).sum(3).transpose(1, 2)


def _launch_steps(
    inputs: ScanInputs, out: ScanGradients, parts: PositionParts, reverse: bool, carry: Tensor,
    softplus: bool, low: float, high: float,
) -> None:
    batch, length, heads = inputs.raw_BLH.shape
    chunks = inputs.cb.shape[1]

    def run(config: Config) -> None:
        launch(
            _steps_backward, (batch * chunks, -(-heads // config.blocks["BLOCK_H"])),
            inputs.raw_BLH, inputs.bias_H, inputs.a_H, inputs.mask_BL, inputs.dt_BHL, *parts[:2],
            parts.excl if reverse else None, parts.over, carry, out.dt_BLH, out.a_H, out.bias_H,
            *inputs.raw_BLH.stride(), length, chunks, heads, low, high, config=config, Q=CHUNK,
            SOFTPLUS=softplus, WIDE=wide_type(inputs.dt_BHL),
        )

    STEPS_BACKWARD.run(inputs.raw_BLH, (heads, length), run)
