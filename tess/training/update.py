"""The rows behind one step of the optimizer, however they lie in micro-batches and processes.

An update with M micro-batches in P processes computes what one batch with all the rows would.
Random numbers are drawn for all rows, in each micro-batch and process alike, and each keeps its
own. Every weighted mean is one over all rows. An evaluation is the loss of one update, without its
step.
"""

# P processes, M micro-batches, K means, N rows here

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, distributed

Batch = Mapping[str, Tensor]


def processes() -> tuple[int, int]:
    """How many processes train together, and which of them this one is; (1, 0) alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


class Update:
    """This process's micro-batches of one update; `turn` says which one is computed.

    Rows are counted micro-batch by micro-batch, and within one process by process: the order in
    which the sampler gives them out.

    Args:
        batches: in every process as many, and of as many rows where `starts` is not given.
        starts: number of each batch's first row among all of the update.
        total: how many rows that are.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        starts: Sequence[int] | None = None,
        total: int | None = None,
    ) -> None:
        self.batches, self.starts, self.total = batches, starts, total
        if starts is None:
            size, index = processes()
            counts = [_rows(batch) for batch in batches]
            before = [0, *accumulate(counts)]
            self.starts = [size * b + index * c for b, c in zip(before, counts, strict=False)]
            self.total = size * before[-1]
        self.turn = 0
        self._generators: list[Tensor] = []
        self._totals_K: Tensor | None = None
        self._kept: list[tuple[Tensor, ...]] = []

    def begin(self, turn: int) -> Batch:
        """The micro-batch number `turn`: it draws the same random numbers as the first one did."""
        self.turn = turn
        if turn == 0 and len(self.batches) > 1:
            self._generators = _generator_states()
        elif turn > 0:
            _set_generator_states(self._generators)
        return self.batches[turn]

    @property
    def is_last(self) -> bool:
        """Whether this micro-batch is the update's last one."""
        return self.turn == len(self.batches) - 1

    def rows(self, turn: int) -> slice:
        """Which of the update's rows a micro-batch has, by its number.

        Random numbers are drawn for all `total` rows, in the last dimension, and this is the part
        that counts. The processes' generators are in step: one seed, and the same draws in all.
        """
        return slice(self.starts[turn], self.starts[turn] + _rows(self.batches[turn]))

    @property
    def own(self) -> slice:
        """The rows of the micro-batch whose turn it is."""
        return self.rows(self.turn)

    def totals(self, weights_of: Callable[[int], Tensor]) -> Tensor:
        """Sums [K] over all rows of what `weights_of` says of a micro-batch, by number; float32.

        Every process has to call it, with the same K.
        """
        if self._totals_K is None:
            every = [weights_of(turn).detach().float() for turn in range(len(self.batches))]
            self._totals_K = torch.stack(every).sum(0)
            if processes()[0] > 1:
                distributed.all_reduce(self._totals_K)
        return self._totals_K

    def mean_shares(self, weights_of: Callable[[int], Tensor]) -> Tensor:
        """What each of K weighted means over this micro-batch's rows is to be multiplied by.

        The sum over the micro-batches of these products, and their mean over the processes, is the
        weighted mean over all rows: the factors are P w / (sum of w over the update), in float32.

        weights_of: number of a micro-batch -> the sum of the weights behind each mean [K].
        """
        totals_K, own_K = self.totals(weights_of), weights_of(self.turn).detach().float()
        # where no row counts, all means are 0
        return torch.where(totals_K > 0, processes()[0] * own_K / totals_K, 0.0)

    def keep(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Keep values [N] of this micro-batch; those of all micro-batches so far, joined."""
        self._kept.append(values)
        return tuple(torch.cat(parts) for parts in zip(*self._kept, strict=True))


def _rows(batch: Batch) -> int:
    return len(batch["target_ids"])


def _generator_states() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _set_generator_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
