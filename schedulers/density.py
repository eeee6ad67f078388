"""Densities of training times on (0, 1], given by a table of their distribution function."""

# M bins, C cells, B examples

import torch
from torch import Tensor

EARLIEST_TIME = 1e-6
"""Times are at least this: at t = 0 there is nothing to predict."""


class TableDensity:
    """A density whose distribution function is linear within equal cells of (0, 1].

    cumulative: [C + 1] float64 at 0, 1/C, ..., 1; strictly rising from 0 to 1.
    """

    def __init__(self, cumulative: Tensor) -> None:
        self.cumulative = cumulative

    @property
    def cells(self) -> int:
        """C."""
        return len(self.cumulative) - 1

    def sample(self, uniforms: Tensor) -> Tensor:
        """Times at which the distribution function has the values `uniforms` in [0, 1].

        Same shape, dtype and device. They rise with the uniforms and are at least 1e-6, as the
        times of `tess.training.losses.sample_timesteps` are.
        """
        table = self.cumulative.to(uniforms.device)
        level = uniforms.double()
        cell = (torch.searchsorted(table, level, right=True) - 1).clamp(0, self.cells - 1)
        inside = (level - table[cell]) / (table[cell + 1] - table[cell])
        return ((cell + inside) / self.cells).clamp(EARLIEST_TIME, 1.0).to(uniforms.dtype)

    def pdf(self, times: Tensor) -> Tensor:
        """The density at times in [0, 1]; same shape, dtype and device. Its integral is 1."""
        heights = (self.cumulative.diff() * self.cells).to(times.device)
        cell = (times.double() * self.cells).ceil().long() - 1
        return heights[cell.clamp(0, self.cells - 1)].to(times.dtype)


class LearnedDensity(TableDensity):
    """Equal mass for equal steps of the training loss, as it is seen to depend on the time.

    CDCD's time warping (Dieleman et al., arXiv 2211.15089, section 4): the distribution function is
    the loss as a function of time, shifted and scaled. There it is a fitted monotone function; here
    it is a moving average in M bins of time, made monotone by least squares (pool adjacent
    violators), and a share of the mass stays uniform in t so that no time is forgotten.

    losses: [M] float64, what the loss is expected to be in M equal bins of (0, 1] before any was
        seen; has to rise from the first to the last.
    uniform_share: of the mass, in (0, 1].
    decay: of a bin's average for each example seen in it.

    Raises ValueError for settings out of range and for losses that do not rise.
    """

    def __init__(self, losses: Tensor, uniform_share: float = 0.1, decay: float = 0.99) -> None:
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share must be in (0, 1], got {uniform_share}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not (losses.dim() == 1 and len(losses) > 1 and losses[0] < losses[-1]):
            raise ValueError("losses must be [M] with M > 1, and rise from the first to the last")
        self.uniform_share, self.decay = uniform_share, decay
        self.losses = losses.double().clone()
        super().__init__(self._table())

    def update(self, times: Tensor, losses: Tensor) -> None:
        """Take in examples: their times [B] in [0, 1] and losses [B]; those not finite are left."""
        bins = len(self.losses)
        for time, loss in zip(times.tolist(), losses.detach().double().cpu().tolist(), strict=True):
            if abs(loss) < float("inf"):
                place = min(int(time * bins), bins - 1)
                self.losses[place] += (1 - self.decay) * (loss - self.losses[place])
        self.cumulative = self._table()

    def load(self, losses: Tensor) -> None:
        """Go on from another density's `losses`."""
        if losses.shape != self.losses.shape:
            raise ValueError(f"expected losses [{len(self.losses)}], got {list(losses.shape)}")
        self.losses = losses.double().clone()
        self.cumulative = self._table()

    def _table(self) -> Tensor:
        rising_M = pool_adjacent_violators(self.losses)
        # a bin's average stands for its middle; beyond the outer middles the loss goes on flat
        edges_E = torch.cat([rising_M[:1], (rising_M[1:] + rising_M[:-1]) / 2, rising_M[-1:]])
        times_E = torch.linspace(0, 1, len(edges_E), dtype=torch.float64)
        risen = edges_E[-1] - edges_E[0]
        if not risen > 0:  # nothing rises, so nothing is to be preferred
            return times_E
        return torch.lerp((edges_E - edges_E[0]) / risen, times_E, self.uniform_share)


def pool_adjacent_violators(values: Tensor) -> Tensor:
    """The non-decreasing sequence [M] nearest to `values` [M] in least squares, float64.

    Neighbours that fall are replaced by their mean until none fall (Barlow et al., "Statistical
    inference under order restrictions", 1972).
    """
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        means.append(value)
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, count = means.pop(), counts.pop()
            total = counts[-1] + count
            means[-1] = (means[-1] * counts[-1] + mean * count) / total
            counts[-1] = total
    return torch.tensor(means, dtype=torch.float64).repeat_interleave(torch.tensor(counts))
