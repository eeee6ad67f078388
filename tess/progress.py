"""How far a long work has come: a bar on a terminal, a line now and then everywhere else."""

import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Progress of one work on stderr, as a context; only `advance` is called inside.

    On a terminal it is tqdm's bar. Elsewhere it is a line with done, total, rate and remaining
    time, at most every 30 seconds, so that a log shows that the work goes on.

    Args:
        total: units of the whole work.
        what: the work, which begins the line, e.g. "training".
        unit: what is counted, in the plural, e.g. "updates".
        done: units that an earlier process did; they do not count for the rate.
        clock: seconds, from any beginning.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str,
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self._done_before = done
        self._clock = clock
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._last_line = self._clock()
        if sys.stderr.isatty():
            from tqdm.auto import tqdm  # here: no command loads it to print its help

            self._bar = tqdm(
                total=self.total, desc=self.what, unit=f" {self.unit}", initial=self.done
            )
        return self

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """E.g. `training: 120 of 600 updates, 2 updates/s, 4 min left`."""
        text = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}"
        passed, of_this_process = self._clock() - self._start, self.done - self._done_before
        if passed <= 0 or of_this_process <= 0:
            return text
        rate = of_this_process / passed
        left = max(0, self.total - self.done) / rate
        return f"{text}, {rate:.3g} {self.unit}/s, {duration(left)} left"

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds in the two units that say how long it is: `40 s`, `4 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
