"""Training rows: texts to token ids, and an order that is the same when a run is restarted.

`Trainer` fetches batches ahead of the step that uses them, so the global random state at a
checkpoint is not the one that the next batch was made with. Therefore nothing here reads it: order
and draws are functions of (seed, epoch, row).
"""

import copy
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from tess.data.collators import Row
from tess.errors import UserError
from tess.text.tokenization import encode_texts, source_layout

MEGABATCH = 50
"""Batches that are sorted by length together: little padding, other neighbours in every epoch."""


class TokenRows(Dataset):
    """Rows as ids without special tokens; by index, (epoch, index) or (epoch, index, first).

    `first` is the index of the first row in the row's step: what is drawn once per batch follows
    from it, so that the processes of a run agree.

    Args:
        sources: one string for each row; None for raw text.
        targets: the texts.
        seed: of the draws that a collator makes for a row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[str | None],
        targets: Sequence[str],
        seed: int,
    ) -> None:
        self.seed = seed
        self.num_special = len(source_layout(tokenizer, []))
        self.targets = encode_texts(tokenizer, targets)
        encoded = iter(
            encode_texts(tokenizer, [source for source in sources if source is not None])
        )
        self.sources = [None if source is None else next(encoded) for source in sources]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: int | tuple[int, ...]) -> Row:
        epoch, index, *first = key if isinstance(key, tuple) else (0, key)
        row = {
            "source": self.sources[index],
            "target": self.targets[index],
            "seed": stable_seed(self.seed, epoch, index),
        }
        if first:
            row["batch_seed"] = stable_seed(self.seed, epoch, *first)
        return row

    def select(self, indices: Sequence[int]) -> "TokenRows":
        """Only the given rows, in that order."""
        chosen = copy.copy(self)
        chosen.sources = [self.sources[index] for index in indices]
        chosen.targets = [self.targets[index] for index in indices]
        return chosen

    def lengths(self) -> list[int]:
        """Tokens of each row, source and target together."""
        return [
            len(target) + (0 if source is None else len(source))
            for source, target in zip(self.sources, self.targets, strict=True)
        ]

    def length_rule(
        self, max_source_length: int, max_target_length: int, quantile: float
    ) -> tuple[float, int]:
        """`length_rule` of the rows, which all have a source, with special tokens and cut."""
        sources = [min(len(ids) + self.num_special, max_source_length) for ids in self.sources]
        targets = [min(len(ids) + 1, max_target_length) for ids in self.targets]
        return length_rule(sources, targets, quantile)

    def has_raw_text(self) -> bool:
        """Whether some row has no source."""
        return any(source is None for source in self.sources)


def stable_seed(*parts: int | str) -> int:
    """63 bits from `parts`, the same in every process and version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BucketSampler(Sampler[tuple[int, int, int]]):
    """Yields (epoch, index, first) in an order that is a function of (seed, epoch) alone.

    Accelerate gives each process every P-th micro-batch. Here a batch is all rows of an update, in
    all processes: they are of one length, and those that one process in one batch would get.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an update, the unit that should be of one length.
        seed: of the order.
        bucket: sort each 50 batches by length and shuffle the batches; False is a plain shuffle.
        multiple_of: complete the epoch to a multiple of so many rows with those of its beginning,
            as processes that have to work in step need it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        bucket: bool = True,
        multiple_of: int = 1,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.bucket = bucket
        self.missing = -len(lengths) % multiple_of
        self.epoch = 0
        self._batch_sizes: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def keep_order(self, epoch: int, batch_size: int) -> None:
        """An epoch that began with other batches stays in their order: rows come once in it."""
        self._batch_sizes[epoch] = batch_size

    def batch_size_of(self, epoch: int) -> int:
        """The batch size that rules the order of an epoch."""
        return self._batch_sizes.get(epoch, self.batch_size)

    def __len__(self) -> int:
        return len(self.lengths) + self.missing

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        rng = random.Random(stable_seed("order", self.seed, self.epoch))
        batch_size = self.batch_size_of(self.epoch)
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        if self.bucket:
            order = self._bucketed(order, batch_size, rng)
        order += list(islice(cycle(order), self.missing))
        firsts = order[::batch_size]
        return iter([(self.epoch, index, firsts[i // batch_size]) for i, index in enumerate(order)])

    def _bucketed(self, order: list[int], batch_size: int, rng: random.Random) -> list[int]:
        size = MEGABATCH * batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            mega = sorted(order[start : start + size], key=lambda index: self.lengths[index])
            batches += [mega[i : i + batch_size] for i in range(0, len(mega), batch_size)]
        # Only a batch at the end may be short: elsewhere it would shift the borders of all that
        # follow.
        short = [batch for batch in batches if len(batch) < batch_size]
        whole = [batch for batch in batches if len(batch) == batch_size]
        rng.shuffle(whole)
        return [index for batch in whole + short for index in batch]


def length_rule(
    source_lengths: Sequence[int], target_lengths: Sequence[int], quantile: float
) -> tuple[float, int]:
    """(ratio, margin) such that ceil(ratio * source) + margin covers a `quantile` of the targets.

    Lengths are in tokens with the special ones. The ratio is the median of target/source, the
    margin the given
    quantile of what that leaves over: short sources need more room in proportion than long ones.

    Raises:
        UserError: when the quantile is outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise UserError(f"length_quantile must be above 0 and at most 1, got {quantile}")
    pairs = list(zip(source_lengths, target_lengths, strict=True))
    ratio = _quantile([target / source for source, target in pairs], 0.5)
    margin = _quantile([target - math.ceil(ratio * source) for source, target in pairs], quantile)
    return round(ratio, 4), max(0, math.ceil(margin))


def _quantile(values: Sequence[float], quantile: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)]
