"""A comparison as it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tess.comparison.arms import Arm
from tess.comparison.recipe import Recipe, System
from tess.data.rows import Example
from tess.progress import Progress


@dataclass(frozen=True)
class Models:
    """The two checkpoints of one seed. folder has both, as `tess/` and `ar/`."""

    seed: int
    folder: Path
    weights: Mapping[str, str]


@dataclass
class Comparison:
    """What is compared, and how far it is.

    folder: where everything goes.
    only: the part that is asked for, one of `tess.comparison.settings.PARTS`; None: all.
    updates: of given checkpoints, where their folders say so.
    print: called with a line for every finished part.
    models: by seed. differing: what differs between the checkpoints, and was allowed.
    """

    recipe: Recipe
    folder: Path
    only: str | None
    examples: Sequence[Example]
    arms: Sequence[Arm]
    updates: Mapping[str, int | None] | None
    systems: list[System]
    progress: Progress
    print: Callable[[str], Any]
    models: dict[int, Models] = field(default_factory=dict)
    differing: Mapping[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def sources(self) -> list[str]:
        """The sources of the test rows."""
        return [example.source for example in self.examples]

    @property
    def first_models(self) -> Models:
        """Those of the first seed, which are timed."""
        return self.models[self.recipe.seeds[0]]

    def say(self, line: str) -> None:
        """A line of its own beside the progress."""
        with self.progress.aside():
            self.print(line)
