"""State-space duality (Mamba-2) scan in chunks: causal, or both directions in one pass.

The formula is `kernels/reference.py:ssd_scan`; this file computes it by matrix products
(arXiv 2405.21060, section 6), without repeating b and c for every head.

Letters: B batch, L length, C chunks, Q chunk length, H heads, R heads per group, G groups,
P head width, N state width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DIRECTIONS = ("forward", "bidirectional")


class SSDOutput(NamedTuple):
    """y [B, L, H, P] in the dtype of x; final_state [B, H, P, N] float32, None unless asked for."""

    y: Tensor
    final_state: Tensor | None


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    c_BLGN: Tensor,
    *,
    chunk_size: int = 64,
    direction: str = "forward",
    reverse_scale_H: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    return_final_state: bool = False,
) -> SSDOutput:
    """Scan a block of positions, optionally from a state, optionally in both directions.

    Args:
        x_BLHP: inputs.
        dt_BLH: step sizes after bias and softplus, >= 0. A position with dt = 0 leaves the state
            untouched, which is how padding is skipped.
        a_H: negative decay rates.
        b_BLGN, c_BLGN: input and output maps, one per group of H / G heads.
        chunk_size: positions handled by one matrix product; changes speed and rounding only.
        direction: "forward", or "bidirectional": a second scan from the block's end is added with
            the current token counted once.
        reverse_scale_H: factor on the reverse part, one per head (bidirectional only).
        initial_state_BHPN: state before the first position (the reverse scan always starts empty).
        return_final_state: also return the forward scan's state after the last position.

    Matrix products run in the dtype of x; decays and states in float32 (float64 for float64 x).

    Raises:
        ValueError: unknown direction, a head count that the groups do not divide, L = 0, or a
            reverse scale without a reverse scan.
    """
    _check(x_BLHP, b_BLGN, direction, reverse_scale_H)
    with torch.autocast(x_BLHP.device.type, enabled=False):
        return _scan(
            x_BLHP, dt_BLH, a_H, b_BLGN.to(x_BLHP.dtype), c_BLGN.to(x_BLHP.dtype),
            chunk_size, direction == "bidirectional", reverse_scale_H,
            initial_state_BHPN, return_final_state,
        )  # fmt: skip


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BGN: Tensor, c_BGN: Tensor, state_BHPN: Tensor
) -> SSDOutput:
    """One position of the causal scan: the state and y [B, H, P] after it."""
    batch, heads, width = x_BHP.shape
    groups, states = b_BGN.shape[1:]
    wide = state_BHPN.dtype
    grouped = (batch, groups, heads // groups, width)
    dt_x = (x_BHP.to(wide) * dt_BH.to(wide)[..., None]).view(*grouped, 1)
    decay = (dt_BH.to(wide) * a_H.to(wide)).exp().view(*grouped[:3], 1, 1)
    state = state_BHPN.view(*grouped, states)
    state = decay * state + dt_x * b_BGN.to(wide)[:, :, None, None, :]
    y = state @ c_BGN.to(wide)[:, :, None, :, None]
    return SSDOutput(y.view(batch, heads, width).to(x_BHP.dtype), state.view_as(state_BHPN))


def ssd_advance(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    state_BHPN: Tensor,
    counts_B: Tensor,
) -> Tensor:
    """The causal scan's state [B, H, P, N] after the first `counts_B` positions of each row.

    Arguments as in `ssd_scan`; counts in [0, L] may differ between rows. One product, no outputs:
    this is how speculative decoding takes back rejected tokens without a state per position.
    """
    batch, length, heads, width = x_BLHP.shape
    groups, states = b_BLGN.shape[2:]
    wide = state_BHPN.dtype
    counted_BL1 = (torch.arange(length, device=x_BLHP.device) < counts_B[:, None])[..., None]
    dt_BLH = dt_BLH.to(wide) * counted_BL1
    incl_BLH = (dt_BLH * a_H.to(wide)).cumsum(dim=1)
    total_BH = incl_BLH[:, -1]
    weight_BLH = (total_BH[:, None] - incl_BLH).exp() * dt_BLH
    weighted = (x_BLHP.to(wide) * weight_BLH[..., None]).view(batch, length, groups, -1)
    gained = weighted.permute(0, 2, 3, 1) @ b_BLGN.to(wide).transpose(1, 2)  # [B, G, H/G P, N]
    return total_BH.exp()[..., None, None] * state_BHPN + gained.view(batch, heads, width, states)


def _check(x: Tensor, b: Tensor, direction: str, reverse_scale: Tensor | None) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if x.shape[1] == 0:
        raise ValueError("ssd_scan needs at least one position, got length 0")
    if x.shape[2] % b.shape[2]:
        raise ValueError(f"{b.shape[2]} groups do not divide {x.shape[2]} heads")
    if reverse_scale is not None and direction != "bidirectional":
        raise ValueError("reverse_scale_H scales a reverse scan; direction is 'forward'")


def _scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    chunk_size: int,
    bidirectional: bool,
    reverse_scale: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> SSDOutput:
    batch, length, heads, width = x.shape
    groups, states = b.shape[2:]
    per_group = heads // groups
    low, wide = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32

    chunk = min(chunk_size, length)
    chunks = -(-length // chunk)
    if pad := chunks * chunk - length:
        x, b, c = (F.pad(tensor, (0, 0, 0, 0, 0, pad)) for tensor in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, pad))

    # [B, C, H, Q]: log decays, their inclusive sum from the chunk's start
    dt_BCHQ = dt.to(wide).view(batch, chunks, chunk, heads).transpose(2, 3)
    log_BCHQ = dt_BCHQ * a.to(wide)[:, None]
    incl_BCHQ = log_BCHQ.cumsum(-1)
    total_BCH = incl_BCHQ[..., -1]

    x_BCHQP = x.view(batch, chunks, chunk, heads, width).transpose(2, 3)
    dtx_BCHQP = x_BCHQP * dt_BCHQ[..., None].to(low)
    b_BCGQN = b.view(batch, chunks, chunk, groups, states).transpose(2, 3)
    c_BCGQN = c.view(batch, chunks, chunk, groups, states).transpose(2, 3)

    # inside the chunk: (C B^T * decay) (dt x); C B^T is shared by the heads of a group
    weight = _decay_matrix(incl_BCHQ, log_BCHQ, bidirectional, reverse_scale).to(low)
    cb_BCGQQ = c_BCGQN @ b_BCGQN.transpose(-1, -2)
    mixed = cb_BCGQQ[:, :, :, None] * weight.unflatten(2, (groups, per_group))
    y_BCHQP = mixed.flatten(2, 3) @ dtx_BCHQP

    def group_product(left_BCHQP: Tensor) -> Tensor:  # sum over Q of left x b -> [B, C, H, P, N]
        stacked = left_BCHQP.unflatten(2, (groups, per_group)).transpose(-1, -2).flatten(3, 4)
        return (stacked @ b_BCGQN).unflatten(3, (per_group, width)).flatten(2, 3).to(wide)

    def read_out(state_BCHPN: Tensor) -> Tensor:  # c_q . state -> [B, C, H, Q, P]
        stacked = state_BCHPN.to(low).unflatten(2, (groups, per_group)).flatten(3, 4)
        out = c_BCGQN @ stacked.transpose(-1, -2)
        return out.unflatten(-1, (per_group, width)).movedim(3, 4).flatten(2, 3)

    final_state = None
    if chunks > 1 or initial_state is not None or return_final_state:
        to_end = (total_BCH[..., None] - incl_BCHQ).exp()
        gained = group_product(dtx_BCHQP * to_end[..., None].to(low))
        before, final_state = _carry(gained, total_BCH, initial_state)
        if chunks > 1 or initial_state is not None:
            y_BCHQP = y_BCHQP + read_out(before) * incl_BCHQ.exp()[..., None].to(low)

    if bidirectional and chunks > 1:
        excl_BCHQ = incl_BCHQ - log_BCHQ
        gained = group_product(dtx_BCHQP * excl_BCHQ.exp()[..., None].to(low))
        after, _ = _carry(gained.flip(1), total_BCH.flip(1), None)
        from_start = (total_BCH[..., None] - excl_BCHQ).exp()
        if reverse_scale is not None:
            from_start = from_start * reverse_scale.to(wide)[:, None]
        y_BCHQP = y_BCHQP + read_out(after.flip(1)) * from_start[..., None].to(low)

    y = y_BCHQP.transpose(2, 3).reshape(batch, chunks * chunk, heads, width)[:, :length]
    return SSDOutput(y, final_state if return_final_state else None)


def _decay_matrix(
    incl_BCHQ: Tensor, log_BCHQ: Tensor, bidirectional: bool, reverse_scale: Tensor | None
) -> Tensor:
    """exp of the summed log decays between output position t (rows) and input position s.

    For s <= t the sum runs over (s, t]; for s > t, as the flipped scan has it, over [t, s).
    """
    length = incl_BCHQ.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=incl_BCHQ.device).tril()
    forward = incl_BCHQ[..., :, None] - incl_BCHQ[..., None, :]
    if not bidirectional:  # masked before exp: above the diagonal the exponent is positive
        return forward.masked_fill(~causal, -torch.inf).exp()
    excl_BCHQ = incl_BCHQ - log_BCHQ
    backward = excl_BCHQ[..., None, :] - excl_BCHQ[..., :, None]
    weight = torch.where(causal, forward, backward).exp()
    if reverse_scale is None:
        return weight
    return torch.where(causal, weight, weight * reverse_scale.to(weight.dtype)[:, None, None])


def _carry(
    gained_BCHPN: Tensor, total_BCH: Tensor, initial_BHPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pass states from chunk to chunk: the state before each chunk and the one after the last."""
    chunks = gained_BCHPN.shape[1]
    state = initial_BHPN
    if state is None:
        state = torch.zeros_like(gained_BCHPN[:, 0])
    state = state.to(gained_BCHPN.dtype)
    decay_BCH11 = total_BCH.exp()[..., None, None]
    before = []
    for i in range(chunks):
        before.append(state)
        state = decay_BCH11[:, i] * state + gained_BCHPN[:, i]
    return torch.stack(before, dim=1), state
