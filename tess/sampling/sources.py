"""The source side of a pipeline call: ids, masks, random keys, and the encoding they share."""

# B examples, S source positions
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tess.backbones.cache import HybridCache
from tess.errors import UserError
from tess.options import check_seed
from tess.text.tokenization import padding_ids


@dataclass(frozen=True, eq=False)
class Context:
    """A batch of sources as the denoiser's forward takes it.

    source_ids, source_mask: [B, S], left-padded.
    cache: their encoding; None: they are read in every step.
    """

    source_ids: Tensor
    source_mask: Tensor
    cache: HybridCache | None = None

    def arguments(self) -> dict[str, Any]:
        """For `TessDenoiser.forward`."""
        return {
            "source_ids": self.source_ids,
            "source_mask": self.source_mask,
            "cache": self.cache,
        }

    def select(self, rows: Tensor) -> "Context":
        """The sources `rows` (int64), in that order; rows may repeat."""
        return Context(
            self.source_ids[rows],
            self.source_mask[rows],
            None if self.cache is None else self.cache.select(rows),
        )

    def without_cache(self) -> "Context":
        """The same sources, to be read in every step."""
        return replace(self, cache=None)


def id_rows(
    input_ids: Tensor | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> list[list[int]]:
    """Sources given as ids, without padding at either end.

    Raises:
        UserError: not [B, S], an empty row, or an id outside the vocabulary.
    """
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2:
            raise UserError(f"input_ids must be [batch, length], got {list(input_ids.shape)}")
        padding = padding_ids(tokenizer)
        rows = [_strip(row, padding) for row in input_ids.tolist()]
    else:
        rows = [list(row) for row in input_ids]
    for index, row in enumerate(rows):
        if not row:
            raise UserError(f"row {index} of input_ids is empty")
        if min(row) < 0 or max(row) >= vocab_size:
            strange = max(row) if max(row) >= vocab_size else min(row)
            raise UserError(f"token id {strange} is outside the vocabulary of {vocab_size}")
    return rows


def example_keys(sources: Sequence[Sequence[int]], seed: int) -> Tensor:
    """Random keys [B] int64: a hash of the seed, the source and its number among equal sources."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for row in map(tuple, sources):
        keys.append(_hash(f"{seed}:{seen[row]}:{','.join(map(str, row))}"))
        seen[row] += 1
    return torch.tensor(keys, dtype=torch.long)


def seeded_keys(sources: Sequence[Sequence[int]], seed: int) -> Tensor:
    """`example_keys` of a seed that a user gave, as `draw_seed` has it of its generator.

    Raises:
        UserError: a seed that is no integer of 64 bits.
    """
    return example_keys(sources, draw_seed(torch.Generator().manual_seed(check_seed(seed))))


def derived_keys(keys: Tensor, count: int, purpose: str) -> Tensor:
    """[B * count] keys, `count` in a row for each: the key itself, then some derived from it."""
    rows = [
        key if index == 0 else _hash(f"{purpose}:{key}:{index}")
        for key in keys.tolist()
        for index in range(count)
    ]
    return torch.tensor(rows, dtype=torch.long)


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for `example_keys`; None takes torch's global generator."""
    device = None if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _strip(row: list[int], padding: set[int]) -> list[int]:
    kept = [index for index, token in enumerate(row) if token not in padding]
    return row[kept[0] : kept[-1] + 1] if kept else []
