"""Updates of a training as they are done, and how long one takes."""

import time
from collections.abc import Callable

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Counts updates and times them."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance, self.at, self.ran = advance, 0, 0
        self.first = self.last = 0.0

    @property
    def seconds_per_update(self) -> float | None:
        # the first update of a run also warms up
        return (self.last - self.first) / (self.ran - 1) if self.ran > 1 else None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._move(state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.last = time.perf_counter()
        self.ran += 1
        if self.ran == 1:
            self.first = self.last
        self._move(state.global_step)

    def _move(self, step: int) -> None:
        self.advance(step - self.at)
        self.at = step
