"""How far a long work has come: a bar on a terminal, a line now and then everywhere else."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Progress of one work on stderr, as a context.

    On a terminal it is tqdm's bar. Elsewhere it is a line with done, total, rate and remaining
    time, at most every 30 seconds, so that a log shows that the work goes on.

    Args:
        total: units of the whole work, perhaps by a rough count (`skip`).
        what: the work, which begins the line, e.g. "training".
        unit: what is counted, in the plural, e.g. "updates".
        done: units that an earlier process did; they do not count for the rate.
        show: False: nothing is shown.
        clock: seconds, from any beginning.
    """

    def __init__(
        self,
        total: float,
        what: str,
        unit: str,
        *,
        done: float = 0,
        show: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self._done_before = done
        self._clock, self._show = clock, show
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._last_line = self._clock()
        if self._show and sys.stderr.isatty():
            from tqdm.auto import tqdm  # here: no command loads it to print its help

            self._bar = tqdm(
                total=self.total, desc=self.what, unit=f" {self.unit}", initial=self.done
            )
        return self

    def begin(self, what: str) -> None:
        """Name the part that runs."""
        self.what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def skip(self, n: float) -> None:
        """`n` units of the total need not be done."""
        self.total = max(self.total - n, self.done)
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def aside(self) -> AbstractContextManager[Any]:
        """Inside, other lines may be printed."""
        return nullcontext() if self._bar is None else self._bar.external_write_mode()

    def advance(self, n: float = 1) -> None:
        """`n` more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._show and self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """E.g. `training: 120 of 600 updates, 2 updates/s, 4 min left`."""
        text = f"{self.what}: {self.done:,.0f} of {self.total:,.0f} {self.unit}"
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
