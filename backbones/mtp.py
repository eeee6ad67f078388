"""Multi-token prediction: a small stack that looks one token further than the backbone.

Letters: B batch, L positions of the block, H hidden.
"""

import torch
from torch import Tensor, nn

from tess.backbones.block import HybridBlock, RMSNorm, run_layers
from tess.backbones.cache import HybridCache
from tess.backbones.config import HybridConfig


class MultiTokenPredictor(nn.Module):
    """The `mtp` part of Nemotron 3 Super and Ultra (arXiv 2512.20856, section 2.3; Megatron-LM).

    At position t it joins the state h_t of the backbone with the embedding of the next token
    x_(t+1) and gives the state whose logits, under the backbone's own head, predict x_(t+2):
    layers(W_eh [enorm(E x_(t+1)); hnorm(h_t)]) and a final norm. Its attention has keys and values
    of its own, so it reads the whole text, not the last position alone.

    A checkpoint holds one such block. It is used again for every further token, with its own output
    in the place of h_t.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_epsilon
        self.layers = nn.ModuleList(
            HybridBlock(config, letter, index)
            for index, letter in enumerate(config.mtp_hybrid_override_pattern)
        )
        # released files keep what belongs to the whole block in its first and its last layer
        first, last = self.layers[0], self.layers[-1]
        first.enorm, first.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        first.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        last.final_layernorm = RMSNorm(hidden, eps)

    def forward(
        self,
        embeds_BLH: Tensor,
        state_BLH: Tensor,
        attention_mask: Tensor | None = None,
        cache: HybridCache | None = None,
    ) -> Tensor:
        """States [B, L, H] that predict the token after the given ones; the head comes after.

        Args:
            embeds_BLH: word embeddings of the tokens x_(t+1).
            state_BLH: for the first prediction the backbone's h_t, else this module's own output.
            attention_mask: [B, L], 1 at real positions, left-padded.
            cache: this module's own cache, read and extended.
        """
        first = self.layers[0]
        joined = torch.cat([first.enorm(embeds_BLH), first.hnorm(state_BLH)], dim=-1)
        hidden, _ = run_layers(
            self.layers, first.eh_proj(joined), attention_mask, cache, "causal"
        )
        return self.layers[-1].final_layernorm(hidden)
