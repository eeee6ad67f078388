"""The bar over a whole comparison, and how much work each part is by a rough count."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from datasets.utils import tqdm

from tess.comparison.arms import Arm
from tess.comparison.recipe import Recipe, System

UPDATE, SINGLE, AR_ROW, MEMORY = 4.0, 4.0, 16.0, 3000.0
"""A row of an update; a text alone; all tokens of one; a process that measures memory."""


class Progress:
    """A bar over the whole plan on stderr; its unit is about one row through the network."""

    def __init__(self, total: float, show: bool, say: Callable[[str], Any]) -> None:
        self.say_line = say
        self.bar = tqdm(
            total=total, disable=not show, file=sys.stderr, smoothing=0.1,
            mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} left: {desc}",
        )

    def begin(self, what: str) -> None:
        """Name the part that runs."""
        self.bar.set_description_str(what)

    def advance(self, work: float) -> None:
        """So much is done."""
        self.bar.update(work)

    def skip(self, work: float) -> None:
        """So much need not be done."""
        self.bar.total = max(self.bar.total - work, self.bar.n)
        self.bar.refresh()

    def say(self, line: str) -> None:
        """A line of its own above the bar."""
        self.bar.clear()
        self.say_line(line)
        self.bar.refresh()


def row_work(system: System) -> float:
    """One text in a batch."""
    beams = system.num_beams or 1
    steps = (system.num_inference_steps or 16) * system.options.get("num_candidates", 1)
    return float(steps) if system.decoder == "tess" else AR_ROW * beams


def timing_work(recipe: Recipe, system: System, rows: int) -> float:
    """Latency, throughput and memory of one system."""
    count = min(recipe.timing_rows, rows)
    texts = sum(size * -(-count // size) for size in recipe.batch_sizes if size > 1)
    work = recipe.timing_repeats * (SINGLE * count + texts) * row_work(system)
    return work + (MEMORY if recipe.memory else 0.0)


def update_work(arm: Arm) -> float:
    """One update of a training."""
    args = arm.parsed.training
    return UPDATE * args.per_device_train_batch_size * args.gradient_accumulation_steps


def arm_work(arm: Arm) -> float:
    """A whole training; one by epochs is taken for 1,000 updates until it is done."""
    steps = arm.parsed.training.max_steps
    return update_work(arm) * (steps if steps > 0 else 1000)


def text_work(arm: Arm) -> float:
    """What a distilled arm's teacher writes."""
    return AR_ROW * (arm.distilled_rows or 0) * arm.distilled_num_beams


def total_work(
    recipe: Recipe, systems: Sequence[System], arms: Sequence[Arm], rows: int, only: str | None
) -> float:
    """The whole plan."""
    total = 0.0
    if only in (None, "train"):
        total += sum(arm_work(arm) + text_work(arm) for arm in arms)
    if only != "train":
        total += rows * len(recipe.seeds) * sum(row_work(system) for system in systems)
        total += sum(timing_work(recipe, system, rows) for system in recipe.systems)
    return max(total, 1.0)
