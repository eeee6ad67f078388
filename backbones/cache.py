"""What a hybrid model remembers of the tokens it has read: keys, values, conv windows, SSM states.

Letters: B batch, S tokens seen, L positions of a block, K conv taps, D conv channels, H heads,
P head width, G groups, N state width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tess.kernels.ssd import ssd_advance


class MambaState(NamedTuple):
    """One Mamba layer: last conv inputs [B, K-1, D] and SSM state [B, H, P, N] in float32."""

    conv_window: Tensor
    ssm_state: Tensor


class KeyValues(NamedTuple):
    """One attention layer: keys and values [B, kv heads, S, head width]."""

    keys: Tensor
    values: Tensor


class MambaInputs(NamedTuple):
    """What one Mamba layer read in a block: enough to recompute its state after any part of it.

    conv_in [B, L, D] before the convolution; x [B, L, H, P] and b [B, L, G, N] after it; dt
    [B, L, H]; decay [H].
    """

    conv_in: Tensor
    x: Tensor
    dt: Tensor
    b: Tensor
    decay: Tensor


class HybridCache:
    """State of a sequence batch after a prefill, read by denoising and extended by AR decoding.

    Stored tensors are replaced, never written into: a `snapshot` is therefore free and exact, and
    several decoders can start from one cache without seeing each other.
    """

    # what transformers' generate() asks of a cache
    is_compileable = False  # tensors grow with the sequence
    is_croppable = False  # a Mamba state cannot go back; `advance` is the way
    is_linear = (False,)  # it takes the positions that it has not read, not one at a time

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

    def advance(self, record: dict[int, MambaInputs | KeyValues], counts_B: Tensor) -> None:
        """Move past the first `counts_B` [B] positions of a block that was run in "verify" mode.

        Rows may differ. Keys of what a row leaves out become padding; a Mamba state is recomputed
        from the state before the block over the positions that count, so that no state per position
        is kept. The result is that of reading only those positions.
        """
        if not record:  # neither Mamba nor attention: there is no state
            return
        some = next(iter(record.values()))
        batch, device = len(some[0]), some[0].device
        counts_B = counts_B.to(device)
        width, least = int(counts_B.max()), int(counts_B.min())
        self.layers = {
            index: self._append(index, block, width)
            if isinstance(block, KeyValues)
            else self._replay(index, block, counts_B)
            for index, block in record.items()
        }
        mask = None
        if least < width:
            mask = torch.arange(width, device=device) < counts_B[:, None]
        self.extend_mask(mask, batch, width, device)

    def _append(self, index: int, block: KeyValues, width: int) -> KeyValues:
        before = self.layers.get(index)
        new = KeyValues(*(tensor[:, :, :width] for tensor in block))
        if before is None:
            return new
        return KeyValues(*(torch.cat([a.to(b.dtype), b], dim=2) for a, b in zip(before, new)))

    def _replay(self, index: int, block: MambaInputs, counts_B: Tensor) -> MambaState:
        before = self.layers[index]
        state = ssd_advance(block.x, block.dt, block.decay, block.b, before.ssm_state, counts_B)
        joined = torch.cat([before.conv_window.to(block.conv_in.dtype), block.conv_in], dim=1)
        taps = torch.arange(before.conv_window.shape[1], device=joined.device)
        place_BK1 = (counts_B[:, None] + taps)[..., None].expand(-1, -1, joined.shape[-1])
        return MambaState(joined.gather(1, place_BK1), state)

    def compact(self) -> None:
        """Drop columns of padding: left-pad every row again, as narrow as the longest allows.

        Attention here knows no positions, so keys may move. Mamba states do not change.
        """
        if self.key_mask is None:
            return
        width = int(self.key_mask.sum(dim=1).max())
        if width == self.length:
            return
        order_BS = self.key_mask.byte().argsort(dim=1, stable=True)[:, self.length - width :]
        place = order_BS[:, None, :, None]
        for index, state in self.layers.items():
            if isinstance(state, KeyValues):
                size = (-1, state.keys.shape[1], -1, state.keys.shape[3])
                self.layers[index] = KeyValues(*(t.gather(2, place.expand(size)) for t in state))
        self.key_mask = self.key_mask.gather(1, order_BS)
        if bool(self.key_mask.all()):
            self.key_mask = None
        self.length = width

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
