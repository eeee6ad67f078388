"""Rows of token ids made equally long."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_sources(sources: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """`source_ids` and `source_mask` [B, S], left padded."""
    width = max(map(len, sources))
    source_ids_BS = torch.full((len(sources), width), pad_id)
    source_mask_BS = torch.zeros_like(source_ids_BS)
    for i, source in enumerate(sources):
        source_ids_BS[i, width - len(source) :] = torch.tensor(list(source), dtype=torch.long)
        source_mask_BS[i, width - len(source) :] = 1
    return {"source_ids": source_ids_BS, "source_mask": source_mask_BS}


def right_mask(lengths: Sequence[int]) -> Tensor:
    """[B, max] int64, 1 at the first lengths[b] positions of row b."""
    positions = torch.arange(max(lengths))
    return (positions < torch.tensor(lengths)[:, None]).long()
