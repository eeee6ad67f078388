"""State-space duality (Mamba-2) scan in chunks: causal, reverse, or both directions in one pass.

The formula is `kernels/reference.py:ssd_scan`; `kernels/ssd_chunks.py` computes it by matrix
products (arXiv 2405.21060, section 6), without repeating b and c for every head.

Letters: B batch, L length, H heads, G groups, P head width, N state width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tess.kernels.dispatch import use_triton
from tess.kernels.norms import wide_dtype
from tess.kernels.ssd_chunks import ScanOptions
from tess.kernels.ssd_gradient import chunked_scan

DIRECTIONS = ("forward", "reverse", "bidirectional")
NO_LIMITS = (0.0, math.inf)
WIDEST_HEAD, WIDEST_STATE = 128, 256  # of the Triton kernels: one head's state stays on the chip


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
    d_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limits: tuple[float, float] = NO_LIMITS,
    mask_BL: Tensor | None = None,
    sequence_ids_BL: Tensor | None = None,
    chunk_size: int = 64,
    direction: str = "forward",
    reverse_scale_H: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> SSDOutput:
    """Scan a block of positions, optionally from a state, optionally in both directions.

    Args:
        x_BLHP: inputs.
        dt_BLH: step sizes, >= 0 after what `step_sizes` makes of them with the `dt_` arguments.
            A position with step 0 leaves the state untouched.
        a_H: negative decay rates.
        b_BLGN, c_BLGN: input and output maps, one per group of H / G heads.
        d_H: factor of the term d x_t that is added to y_t (once, in every direction).
        dt_bias_H, dt_softplus, dt_limits: as in `step_sizes`.
        mask_BL: bool, False at padding, which takes no step.
        sequence_ids_BL: integers that never fall along L; positions of different ids do not
            interact. An initial state belongs to the row's first sequence, the final state to its
            last one ("reverse": the other way round).
        chunk_size: positions handled by one matrix product; changes speed and rounding only.
        direction: "forward"; "reverse" from the last position to the first; or "bidirectional":
            both are added with the current token counted once.
        reverse_scale_H: factor on the reverse part, one per head (bidirectional only).
        initial_state_BHPN: state before the first position ("reverse": after the last); in both
            directions at once the reverse scan starts empty.
        return_final_state: also return the forward scan's state after the last position
            ("reverse": after the first).
        backend: "torch", "triton" or "auto" (`kernels/dispatch.py`).

    Matrix products run in the dtype of x; decays and states in float32 (float64 for float64 x).

    Raises:
        ValueError: unknown direction, a head count that the groups do not divide, L = 0, or a
            reverse scale in one direction only.
    """
    _check(x_BLHP, b_BLGN, direction, reverse_scale_H)
    if use_triton(x_BLHP, backend, unsupported=_too_wide(x_BLHP, b_BLGN)):
        from tess.kernels.triton.ssd import ssd_scan as run

        return SSDOutput(
            *run(
                x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN,
                d_H=d_H, dt_bias_H=dt_bias_H, dt_softplus=dt_softplus, dt_limits=dt_limits,
                mask_BL=mask_BL, sequence_ids_BL=sequence_ids_BL, direction=direction,
                reverse_scale_H=reverse_scale_H, initial_state_BHPN=initial_state_BHPN,
                return_final_state=return_final_state,
            )
        )
    with torch.autocast(x_BLHP.device.type, enabled=False):
        dt_BLH = step_sizes(dt_BLH, wide_dtype(x_BLHP), dt_bias_H, dt_softplus, dt_limits, mask_BL)
        options = ScanOptions(chunk_size, direction == "bidirectional", return_final_state)
        b_BLGN, c_BLGN = b_BLGN.to(x_BLHP.dtype), c_BLGN.to(x_BLHP.dtype)
        if direction == "reverse":  # the forward scan of the flipped block
            block = (tensor.flip(1) for tensor in (x_BLHP, dt_BLH, b_BLGN, c_BLGN))
            x_BLHP, dt_BLH, b_BLGN, c_BLGN = block
            if sequence_ids_BL is not None:
                sequence_ids_BL = sequence_ids_BL.flip(1)
        y_BLHP, final_state = chunked_scan(
            x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN,
            d_H, reverse_scale_H, initial_state_BHPN, sequence_ids_BL, options,
        )
        if direction == "reverse":
            y_BLHP = y_BLHP.flip(1)
    return SSDOutput(y_BLHP, final_state)


def step_sizes(
    dt: Tensor,
    dtype: torch.dtype,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limits: tuple[float, float] = NO_LIMITS,
    mask: Tensor | None = None,
) -> Tensor:
    """Step sizes [..., H] in `dtype`: dt + bias, softplus if asked for, clamp, zero at padding.

    `mask` [...] is False at padding. Limits clamp what comes after the softplus.
    """
    dt = dt.to(dtype)
    if dt_bias_H is not None:
        dt = dt + dt_bias_H.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if tuple(dt_limits) != NO_LIMITS:
        dt = dt.clamp(*dt_limits)
    return dt if mask is None else dt.masked_fill(~mask[..., None], 0)


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    a_H: Tensor,
    b_BGN: Tensor,
    c_BGN: Tensor,
    state_BHPN: Tensor,
    *,
    d_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limits: tuple[float, float] = NO_LIMITS,
    mask_B: Tensor | None = None,
    backend: str | None = None,
) -> SSDOutput:
    """One position of the causal scan: y [B, H, P] and the state after it; arguments as there."""
    wanting = (x_BHP, dt_BH, a_H, b_BGN, c_BGN, state_BHPN, d_H, dt_bias_H)
    obstacle = _too_wide(x_BHP, b_BGN) or _needs_gradient(*wanting)
    if use_triton(x_BHP, backend, unsupported=obstacle):
        from tess.kernels.triton.ssd_step import ssd_step as run

        return SSDOutput(
            *run(
                x_BHP, dt_BH, a_H, b_BGN, c_BGN, state_BHPN,
                d_H=d_H, dt_bias_H=dt_bias_H, dt_softplus=dt_softplus, dt_limits=dt_limits,
                mask_B=mask_B,
            )
        )
    with torch.autocast(x_BHP.device.type, enabled=False):
        dt_BH = step_sizes(dt_BH, state_BHPN.dtype, dt_bias_H, dt_softplus, dt_limits, mask_B)
        return _step(x_BHP, dt_BH, a_H, b_BGN, c_BGN, d_H, state_BHPN)


def _step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    a_H: Tensor,
    b_BGN: Tensor,
    c_BGN: Tensor,
    d_H: Tensor | None,
    state_BHPN: Tensor,
) -> SSDOutput:
    batch, heads, width = x_BHP.shape
    groups, states = b_BGN.shape[1:]
    wide = state_BHPN.dtype
    grouped = (batch, groups, heads // groups, width)
    dt_x = (x_BHP.to(wide) * dt_BH[..., None]).view(*grouped, 1)
    decay = (dt_BH * a_H.to(wide)).exp().view(*grouped[:3], 1, 1)
    state = state_BHPN.view(*grouped, states)
    state = decay * state + dt_x * b_BGN.to(wide)[:, :, None, None, :]
    y = (state @ c_BGN.to(wide)[:, :, None, :, None]).view(batch, heads, width)
    if d_H is not None:
        y = y + x_BHP * d_H.to(wide)[:, None]
    return SSDOutput(y.to(x_BHP.dtype), state.view_as(state_BHPN))


def ssd_advance(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    state_BHPN: Tensor,
    counts_B: Tensor,
    backend: str | None = None,
) -> Tensor:
    """The causal scan's state [B, H, P, N] after the first `counts_B` positions of each row.

    Arguments as in `ssd_scan`, dt being final; counts in [0, L] may differ between rows. One
    product, no outputs: this is how speculative decoding takes back rejected tokens without a
    state per position. PyTorch operations serve every backend.
    """
    use_triton(x_BLHP, backend)  # an unknown or impossible backend is an error here too
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
        raise ValueError(
            f"reverse_scale_H scales the reverse part of two; direction is {direction!r}"
        )


def _needs_gradient(*tensors: Tensor | None) -> str | None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "the single step is for decoding and has no gradient; use torch.no_grad()"
    return None


def _too_wide(x: Tensor, b: Tensor) -> str | None:
    if x.shape[-1] <= WIDEST_HEAD and b.shape[-1] <= WIDEST_STATE:
        return None
    return (
        f"the scan takes heads of up to {WIDEST_HEAD} channels and {WIDEST_STATE} states, "
        f"got {x.shape[-1]} and {b.shape[-1]}"
    )
