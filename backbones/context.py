"""How one forward pass runs: its mode, its masks and its cache, built once and read by every layer.

Letters: B batch, L positions of the block, S cached positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tess.backbones.cache import HybridCache, KeyValues, MambaInputs, MambaState

MODES = ("causal", "prefix", "denoise", "verify")


class LayerStates:
    """States by layer, `by_layer`, that the mixers write.

    An object of its own, since FSDP hands a layer copies of the dicts in its arguments.
    """

    def __init__(self) -> None:
        self.by_layer: dict[int, MambaState | KeyValues] = {}


@dataclass(frozen=True)
class BlockContext:
    """Everything a mixer needs besides its input.

    The incoming states are kept apart from the cache that is written: under gradient checkpointing
    a layer runs again in the backward pass, and has to see what it saw the first time.

    Attributes:
        bidirectional: Mamba layers follow `mamba_direction` and attention is not causal.
        incoming: each layer's state before the block; empty without a cache.
        update_cache: mixers leave the state after the block in `outgoing`.
        outgoing: the states after the block, per layer.
        record: what `HybridCache.advance` needs to move past a part of the block, per layer; None
            unless the mode is "verify".
        position_mask: [B, L] bool, False at padding of the block; None without padding.
        attention_mask: [B or 1, 1, L, S + L] bool for scaled_dot_product_attention, or None.
        is_causal: the plain causal triangle; then attention_mask is None.
    """

    bidirectional: bool
    incoming: Mapping[int, MambaState | KeyValues]
    update_cache: bool
    position_mask: Tensor | None
    attention_mask: Tensor | None
    is_causal: bool
    outgoing: LayerStates
    record: dict[int, MambaInputs | KeyValues] | None = None


def make_context(
    mode: str, hidden_BLH: Tensor, attention_mask: Tensor | None, cache: HybridCache | None
) -> BlockContext:
    """Check the request and build its masks.

    Raises:
        ValueError: unknown mode, mask of a wrong shape, right padding where a cache is written,
            prefix mode on a cache that already holds something, verify mode without one, or rows
            that differ in number.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    batch, length = hidden_BLH.shape[:2]
    seen = cache.get_seq_length() if cache is not None else 0
    if mode == "verify" and not seen:
        raise ValueError("verify mode reads a block after a cached text, got no cached position")
    if seen and mode == "prefix":
        raise ValueError(f"prefix mode starts a cache, but this one already holds {seen} positions")
    if seen and cache.batch_size not in (None, batch):
        raise ValueError(f"the cache holds {cache.batch_size} rows, the block has {batch}")

    update_cache = cache is not None and mode in ("causal", "prefix")
    position_mask = _block_mask(attention_mask, batch, length, seen)
    if update_cache and position_mask is not None:
        if bool((position_mask[:, 1:] < position_mask[:, :-1]).any()):
            raise ValueError("a block that enters the cache must be left-padded; got right padding")
    cached_mask = cache.key_mask if cache is not None else None
    bidirectional = mode in ("prefix", "denoise")
    mask = _attention_mask(
        batch, length, seen, position_mask, cached_mask, bidirectional, hidden_BLH.device
    )
    return BlockContext(
        bidirectional=bidirectional,
        incoming={} if cache is None else dict(cache.layers),
        update_cache=update_cache,
        position_mask=position_mask,
        attention_mask=mask,
        is_causal=mask is None and not bidirectional and length > 1,
        outgoing=LayerStates(),
        record={} if mode == "verify" else None,
    )


def _block_mask(mask: Tensor | None, batch: int, length: int, seen: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape not in ((batch, length), (batch, seen + length)):
        raise ValueError(
            f"attention_mask must be [{batch}, {length}] for the block or "
            f"[{batch}, {seen + length}] with the cached positions, got {list(mask.shape)}"
        )
    mask = mask[:, -length:].bool()
    return None if bool(mask.all()) else mask


def _attention_mask(
    batch: int,
    length: int,
    seen: int,
    block_mask: Tensor | None,
    cached_mask: Tensor | None,
    bidirectional: bool,
    device: torch.device,
) -> Tensor | None:
    padded = block_mask is not None or cached_mask is not None
    if not padded and (bidirectional or seen == 0 or length == 1):
        return None
    allowed = torch.ones(length, seen + length, dtype=torch.bool, device=device)
    if not bidirectional:
        allowed = allowed.tril(diagonal=seen)
    if not padded:
        return allowed[None, None]
    ones = torch.ones(batch, 1, dtype=torch.bool, device=device)
    keys = torch.cat(
        [
            ones.expand(-1, seen) if cached_mask is None else cached_mask,
            ones.expand(-1, length) if block_mask is None else block_mask,
        ],
        dim=1,
    )
    allowed = allowed & keys[:, None, None, :]
    # a padded query may look at itself: its result is never used, but a row without any key is NaN
    own = torch.eye(length, dtype=torch.bool, device=device)
    return allowed | torch.nn.functional.pad(own, (seen, 0))
