"""What every operation of this folder means, written to be read; slow on purpose, float64-capable.

Tests hold the fast paths against these functions. Nothing outside tests and benchmarks calls them.

Letters: B batch, L length, H heads, P head width, G groups of B/C, N state width, D channels,
K window, T tokens, E experts, S top-k, F expert inner width.
"""

import math

import torch
from torch import Tensor


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
    dt_limits: tuple[float, float] = (0.0, math.inf),
    mask_BL: Tensor | None = None,
    sequence_ids_BL: Tensor | None = None,
    direction: str = "forward",
    reverse_scale_H: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Mamba-2 recurrence as a loop over time (arXiv 2405.21060, section 2).

    S_t = exp(dt_t a) S_(t-1) + dt_t x_t b_t^T and y_t = S_t c_t + d x_t, where the state is zero
    again at the first position of every sequence but the row's first. dt_t is clamp(softplus(raw +
    bias)), 0 at padding. `direction="reverse"` runs the same recurrence from the last position to
    the first; "bidirectional" adds both with the current token counted once, the reverse part times
    `reverse_scale_H` when that is given.

    Returns y [B, L, H, P] and the state after the last position of the forward scan [B, H, P, N]
    (for "reverse": after the first position).
    """
    dt_BLH = step_sizes(dt_BLH, dt_bias_H, dt_softplus, dt_limits, mask_BL)
    skip_BLHP = 0.0 if d_H is None else d_H[:, None] * x_BLHP
    ids_BL = sequence_ids_BL
    if ids_BL is None:
        ids_BL = torch.zeros(x_BLHP.shape[:2], dtype=torch.long, device=x_BLHP.device)
    block = (x_BLHP, dt_BLH, b_BLGN, c_BLGN, ids_BL)
    flipped = [tensor.flip(1) for tensor in block]
    if direction == "forward":
        y, state = _recurrence(*block, a_H, initial_state_BHPN)
        return y + skip_BLHP, state
    if direction == "reverse":
        y, state = _recurrence(*flipped, a_H, initial_state_BHPN)
        return y.flip(1) + skip_BLHP, state
    forward, state = _recurrence(*block, a_H, initial_state_BHPN)
    backward = _recurrence(*flipped, a_H, None)[0].flip(1)
    heads = x_BLHP.shape[2] // b_BLGN.shape[2]
    cb_BLH = (b_BLGN * c_BLGN).sum(-1).repeat_interleave(heads, dim=-1)
    backward = backward - (dt_BLH * cb_BLH)[..., None] * x_BLHP
    if reverse_scale_H is not None:
        backward = backward * reverse_scale_H[:, None]
    return forward + backward + skip_BLHP, state


def step_sizes(
    dt: Tensor,
    dt_bias_H: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limits: tuple[float, float] = (0.0, math.inf),
    mask: Tensor | None = None,
) -> Tensor:
    """Step sizes [..., H] of the scan: dt + bias, log(1 + e^dt) if asked for, clamp, padding 0."""
    if dt_bias_H is not None:
        dt = dt + dt_bias_H
    if dt_softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    dt = dt.clamp(*dt_limits)
    return dt if mask is None else torch.where(mask[..., None], dt, 0.0)


def _recurrence(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    b_BLGN: Tensor,
    c_BLGN: Tensor,
    ids_BL: Tensor,
    a_H: Tensor,
    state_BHPN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x_BLHP.shape
    repeat = heads // b_BLGN.shape[2]
    b_BLHN, c_BLHN = (tensor.repeat_interleave(repeat, dim=2) for tensor in (b_BLGN, c_BLGN))
    state = state_BHPN
    if state is None:
        state = x_BLHP.new_zeros(batch, heads, width, b_BLGN.shape[-1])
    outputs = []
    for t in range(length):
        if t > 0:
            same = ids_BL[:, t] == ids_BL[:, t - 1]
            state = torch.where(same[:, None, None, None], state, 0.0)
        decay = (dt_BLH[:, t] * a_H).exp()[..., None, None]
        update = (dt_BLH[:, t, :, None] * x_BLHP[:, t])[..., None] * b_BLHN[:, t, :, None, :]
        state = decay * state + update
        outputs.append((state * c_BLHN[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else x_BLHP.clone()
    return y, state


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    window_BKD: Tensor | None = None,
    *,
    sequence_ids_BL: Tensor | None = None,
    mask_BL: Tensor | None = None,
) -> Tensor:
    """SiLU of a depthwise causal convolution; tap K-1 multiplies the current position.

    `window_BKD` holds the K-1 inputs before the block (zeros when None), which belong to the row's
    first sequence. Taps do not reach into another sequence; where the mask is False x counts as 0.
    """
    batch, length, _ = x_BLD.shape
    taps = weight_DK.shape[1]
    rows = []
    for i in range(batch):
        ids = [0] * length if sequence_ids_BL is None else sequence_ids_BL[i].tolist()
        for t in range(length):
            total = torch.zeros_like(x_BLD[i, t]) if bias_D is None else bias_D
            for k in range(taps):
                place = t - (taps - 1) + k
                if place < 0:
                    seen = window_BKD is not None and ids[t] == ids[0]
                    value = window_BKD[i, taps - 1 + place] if seen else None
                else:
                    seen = ids[t] == ids[place] and (mask_BL is None or bool(mask_BL[i, place]))
                    value = x_BLD[i, place] if seen else None
                if value is not None:
                    total = total + weight_DK[:, k] * value
            rows.append(total)
    out = torch.stack(rows).view(x_BLD.shape) if rows else x_BLD
    return out * torch.sigmoid(out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def gated_group_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float
) -> Tensor:
    """Mamba-2's gated norm, gate first: g = x SiLU(gate), each group of channels by its own RMS."""
    gated = x * gate * torch.sigmoid(gate)
    grouped = gated.unflatten(-1, (num_groups, -1))
    normed = grouped / (grouped.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return normed.flatten(-2) * weight


def route_tokens(
    logits_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sigmoid router with grouped top-k (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), by loops.

    The bias takes part in the choice only; weights are the plain sigmoid scores of the chosen.
    Returns ids [T, S] in falling order of biased score and weights [T, S].
    """
    scores_TE = torch.sigmoid(logits_TE)
    ids, weights = [], []
    for scores, biased in zip(scores_TE, scores_TE + bias_E):
        members = biased.view(num_groups, -1)
        best_two = members.sort(dim=-1, descending=True).values[:, :2].sum(-1)
        allowed = best_two.argsort(descending=True)[:top_groups].tolist()
        size = members.shape[1]
        order = [e for e in biased.argsort(descending=True).tolist() if e // size in allowed]
        chosen = torch.tensor(order[:top_k], device=logits_TE.device)
        weight = scores[chosen]
        if normalize:
            weight = weight / (weight.sum() + 1e-20)
        ids.append(chosen)
        weights.append(weight * scaling)
    return torch.stack(ids), torch.stack(weights)


def experts(
    x_TD: Tensor, ids_TS: Tensor, weights_TS: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's experts of weight * down relu(up x)^2, token by token."""
    out = torch.zeros_like(x_TD)
    for t in range(x_TD.shape[0]):
        for expert, weight in zip(ids_TS[t].tolist(), weights_TS[t]):
            hidden = torch.relu(up_EFD[expert] @ x_TD[t]).square()
            out[t] = out[t] + weight * (down_EDF[expert] @ hidden)
    return out


def accept_drafts(
    drafts_BK: Tensor,
    draft_probs_BKV: Tensor,
    target_probs_BLV: Tensor,
    accept_BK: Tensor,
    choose_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative rejection sampling (arXiv 2211.17192, algorithm 1), one draft at a time."""
    counts, tokens = [], []
    for row, drafts in enumerate(drafts_BK.tolist()):
        kept = 0
        weights = target_probs_BLV[row, -1]
        for i, token in enumerate(drafts):
            p, q = target_probs_BLV[row, i], draft_probs_BKV[row, i]
            if accept_BK[row, i] >= p[token] / q[token]:
                weights = torch.relu(p - q)
                break
            kept += 1
        point, total = choose_B[row] * weights.sum(), 0.0
        for token, weight in enumerate(weights.tolist()):
            total += weight
            if point < total:
                break
        counts.append(kept)
        tokens.append(token)
    return torch.tensor(counts), torch.tensor(tokens)


def ssd_advance(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    state_BHPN: Tensor,
    counts_B: Tensor,
) -> Tensor:
    """State after each row's first `counts_B` positions: the recurrence, row by row."""
    rows = []
    for i, count in enumerate(counts_B.tolist()):
        x, dt, b = (tensor[i : i + 1, :count] for tensor in (x_BLHP, dt_BLH, b_BLGN))
        _, state = ssd_scan(x, dt, a_H, b, b, initial_state_BHPN=state_BHPN[i : i + 1])
        rows.append(state)
    return torch.cat(rows)


def simplex_embedding(
    token_ids_BL: Tensor,
    signal_BL: Tensor,
    noise_BL: Tensor,
    weight_VH: Tensor,
    normals_BLV: Tensor,
) -> Tensor:
    """softmax(signal S(ids) + noise eps) E, with S(w) = +1 at w and -1 elsewhere, written out."""
    rows = []
    for b in range(token_ids_BL.shape[0]):
        for t in range(token_ids_BL.shape[1]):
            x_V = noise_BL.expand_as(token_ids_BL)[b, t] * normals_BLV[b, t]
            sign_V = -torch.ones_like(x_V)
            sign_V[token_ids_BL[b, t]] = 1.0
            x_V = x_V + signal_BL.expand_as(token_ids_BL)[b, t] * sign_V
            rows.append(x_V.softmax(-1) @ weight_VH)
    return torch.stack(rows).view(*token_ids_BL.shape, -1)
