"""Rows of token ids made equally long."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """`source_ids` and `source_mask` [B, S] int64 of rows of token ids; padding stands first."""
    source_mask = right_mask([len(row) for row in rows]).flip(1)
    source_ids = torch.full_like(source_mask, pad_token_id)
    tokens = [token for row in rows for token in row]
    source_ids[source_mask.bool()] = torch.tensor(tokens, dtype=torch.long)
    return {"source_ids": source_ids.to(device), "source_mask": source_mask.to(device)}


def right_mask(lengths: Sequence[int]) -> Tensor:
    """[B, max] int64, 1 at the first lengths[b] positions of row b."""
    positions = torch.arange(max(lengths))
    return (positions < torch.tensor(lengths)[:, None]).long()
