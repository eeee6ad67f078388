"""Speculative decoding's decision: how many drafted tokens stay, and which token follows them.

Letters: B batch, K drafted tokens, V vocabulary. Targets have K + 1 positions: one for each draft
and one after the last.
"""

import torch
from torch import Tensor


def match_drafts(drafts_BK: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy decision: the drafts stay as far as they are the target model's own choices.

    targets_BL: [B, K+1] the target model's choice at every position of the block.
    Returns the number of drafts kept [B] and the choice that follows them [B].
    """
    agree_BK = (drafts_BK == targets_BL[:, :-1]).long()
    counts_B = agree_BK.cumprod(dim=1).sum(dim=1)
    return counts_B, targets_BL.gather(1, counts_B[:, None])[:, 0]


def accept_drafts(
    drafts_BK: Tensor,
    draft_probs_BKV: Tensor,
    target_probs_BLV: Tensor,
    accept_BK: Tensor,
    choose_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative rejection sampling (arXiv 2211.17192, algorithm 1; arXiv 2302.01318).

    Draft i stays with probability min(1, p_i / q_i), where p and q are what target and draft model
    give it, as long as those before it did. After the first that does not stay, the next token is
    drawn from max(0, p - q), normalised; after all K, from the target's last distribution. What
    comes out has the target's distribution, whatever q is.

    Args:
        drafts_BK: tokens drawn from q.
        draft_probs_BKV: q, float32 or wider.
        target_probs_BLV: p, [B, K+1, V].
        accept_BK, choose_B: uniforms in [0, 1).

    Returns the number of drafts kept [B] and the token that follows them [B].
    """
    drafts = drafts_BK[..., None]
    p_BK = target_probs_BLV[:, :-1].gather(-1, drafts)[..., 0]
    q_BK = draft_probs_BKV.gather(-1, drafts)[..., 0]
    stays_BK = (accept_BK * q_BK < p_BK).long()
    counts_B = stays_BK.cumprod(dim=1).sum(dim=1)

    rows = torch.arange(len(drafts_BK), device=drafts_BK.device)
    p_BV = target_probs_BLV[rows, counts_B]
    after_all_B = counts_B == drafts_BK.shape[1]
    q_BV = draft_probs_BKV[rows, counts_B.clamp(max=drafts_BK.shape[1] - 1)]
    rest_BV = (p_BV - q_BV.masked_fill(after_all_B[:, None], 0.0)).clamp_(min=0)
    # q = p up to rounding: there is nothing left over, and p is what is wanted
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
    return counts_B, draw_tokens(rest_BV, choose_B)


def draw_tokens(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token [B] per row with probability in proportion to its weight, by inversion.

    Sums are float64, so that no token of weight 0 is drawn.
    """
    sums_BV = weights_BV.double().cumsum(dim=-1)
    point_B1 = (uniform_B.double() * sums_BV[:, -1])[:, None]
    tokens_B = torch.searchsorted(sums_BV, point_B1, right=True)[:, 0]
    last_B = (sums_BV < sums_BV[:, -1:]).sum(dim=-1)  # where the sums reach their end
    return torch.minimum(tokens_B, last_B)
