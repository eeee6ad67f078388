"""What a hybrid model remembers of the tokens it has read: keys, values, conv windows, SSM states.

Letters: B batch, S tokens seen, K conv taps, D conv channels, H heads, P head width, N state width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MambaState(NamedTuple):
    """One Mamba layer: last conv inputs [B, K-1, D] and SSM state [B, H, P, N] in float32."""

    conv_window: Tensor
    ssm_state: Tensor


class KeyValues(NamedTuple):
    """One attention layer: keys and values [B, kv heads, S, head width]."""

    keys: Tensor
    values: Tensor


class HybridCache:
    """State of a sequence batch after a prefill, read by denoising and extended by AR decoding.

    Stored tensors are replaced, never written into: a `snapshot` is therefore free and exact, and
    several decoders can start from one cache without seeing each other.
    """

    is_compileable = False  # asked by transformers' generate(): tensors grow with the sequence

    def __init__(self) -> None:
        self.layers: dict[int, MambaState | KeyValues] = {}
        self.key_mask: Tensor | None = None  # [B, S] bool, False at left padding; None: no padding
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions read so far, padding included (the name transformers asks for)."""
        return self.length

    @property
    def batch_size(self) -> int | None:
        """Rows of the batch, None while nothing has been read."""
        for state in self.layers.values():
            return state[0].shape[0]
        return None

    def snapshot(self) -> "HybridCache":
        """A second cache at the same point; extending one leaves the other as it is."""
        return self._map(lambda tensor: tensor)

    def restore(self, saved: "HybridCache") -> None:
        """Go back (or over) to the point where `saved` was taken."""
        self.layers, self.key_mask, self.length = dict(saved.layers), saved.key_mask, saved.length

    def select(self, rows: Tensor) -> "HybridCache":
        """A cache of the given rows [B'] int64, in that order; rows may repeat."""
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat(self, times: int) -> "HybridCache":
        """A cache with every row `times` times in a row (several candidates of one source)."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows in place, as beam search asks for."""
        self.restore(self.select(beam_idx))

    def extend_mask(self, mask_BL: Tensor | None, batch: int, length: int, device) -> None:
        """Account for a block about to be written; a mask appears once the first padding does."""
        if mask_BL is not None or self.key_mask is not None:
            blocks = [self.key_mask, mask_BL]
            sizes = (self.length, length)
            filled = [
                torch.ones(batch, size, dtype=torch.bool, device=device) if block is None else block
                for block, size in zip(blocks, sizes)
            ]
            self.key_mask = torch.cat(filled, dim=1)
        self.length += length

    def num_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(t.numel() * t.element_size() for state in self.layers.values() for t in state)

    def _map(self, function) -> "HybridCache":
        other = HybridCache()
        other.layers = {
            index: type(state)(*map(function, state)) for index, state in self.layers.items()
        }
        other.key_mask = None if self.key_mask is None else function(self.key_mask)
        other.length = self.length
        return other
