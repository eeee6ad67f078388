"""The tasks, and where their text pairs come from: rows packaged here, or datasets on the hub.

Every task has the dataset `samples` (the default): a few dozen openly licensed rows per split that
ship in the package, so that tests and first runs need no network (`samples/README.md` has licences
and the rule of choice). The others are loaded by name through `datasets.load_dataset`. The hub
library runs no loading scripts any more: where a dataset's main branch has one, the automatic
Parquet copy of it (branch `refs/convert/parquet`) is read instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from tess.data.rows import Example, load_rows
from tess.data.tasks.hub import HubDataset, load_hub
from tess.data.tasks.paraphrase import PARAPHRASE
from tess.data.tasks.question_generation import QUESTION_GENERATION
from tess.data.tasks.simplification import SIMPLIFICATION
from tess.data.tasks.summarization import SUMMARIZATION
from tess.errors import UserError

DEFAULT_DATASET = "samples"


@dataclass(frozen=True)
class Task:
    """A named text-to-text task: the splits of its packaged rows, and its hub datasets."""

    name: str
    description: str
    sample_splits: tuple[str, ...]
    hub: Mapping[str, HubDataset]

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names that `load_task(..., dataset=...)` knows, the default first."""
        return (DEFAULT_DATASET, *self.hub)

    def splits(self, dataset: str = DEFAULT_DATASET) -> tuple[str, ...]:
        """The splits of one of this task's datasets; UserError for an unknown one."""
        if dataset == DEFAULT_DATASET:
            return self.sample_splits
        if dataset not in self.hub:
            raise UserError(
                f"task {self.name!r} has no dataset {dataset!r}; known are {list(self.datasets)}"
            )
        return tuple(self.hub[dataset].splits)


_SAMPLES = ("train", "validation", "test")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("summarization", "a text to its summary", _SAMPLES, SUMMARIZATION),
        Task("simplification", "a sentence to a simpler one", _SAMPLES, SIMPLIFICATION),
        Task("paraphrase", "a sentence to one that means the same", ("test",), PARAPHRASE),
        Task(
            "question_generation",
            "a sentence to a question that it answers",
            _SAMPLES,
            QUESTION_GENERATION,
        ),
    )
}


def get_task(name: str) -> Task:
    """The task called `name`; UserError with the known names otherwise."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; known are {list(TASKS)}")
    return TASKS[name]


def load_task(
    name: str, split: str = "test", dataset: str | None = None, limit: int | None = None
) -> list[Example]:
    """The examples of one split of a task, in the dataset's order; `limit` keeps the first ones.

    Args:
        dataset: one of `get_task(name).datasets`; None is the packaged rows.
        limit: at most so many examples (after rows that are no example are left out).

    Raises:
        UserError: unknown task, dataset or split (the message lists the known ones), a limit under
            1, a dataset that cannot be reached or has not the columns that are expected.
    """
    task = get_task(name)
    dataset = dataset or DEFAULT_DATASET
    if split not in (known := task.splits(dataset)):
        raise UserError(
            f"{dataset!r} of task {name!r} has no split {split!r}; known are {list(known)}"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    if dataset == DEFAULT_DATASET:
        rows = resources.files("tess") / "samples" / f"{name}.{split}.jsonl"
        with resources.as_file(rows) as path:
            return load_rows(path)[:limit]
    return load_hub(dataset, task.hub[dataset], split, limit)
