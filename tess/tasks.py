"""The tasks, and where their text pairs come from: rows packaged here, or datasets on the hub.

Every task has the dataset `samples` (the default): a few dozen openly licensed rows per split that
ship in the package, so that tests and first runs need no network (`samples/README.md` has licences
and the rule of choice). The others are loaded by name through `datasets.load_dataset`. The hub
library runs no loading scripts any more: where a dataset's main branch has one, the automatic
Parquet copy of it (branch `refs/convert/parquet`) is read instead.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from typing import Any

import datasets

from tess.errors import UserError
from tess.loading import Example, load_rows
from tess.sentences import sentence_around

logger = logging.getLogger(__name__)

DEFAULT_DATASET = "samples"
PARQUET_BRANCH = "refs/convert/parquet"
Row = Mapping[str, Any]
Pair = tuple[str, list[str]]  # a source and its references


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the hub: where it is, its splits under our names, and how a row becomes a pair.

    `columns` are the ones that `convert` reads; `convert` gives None for a row that is no example
    of the task (a pair that is not a paraphrase).
    """

    path: str
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    convert: Callable[[Row], Pair | None]
    config: str | None = None
    revision: str | None = None


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


def _columns(source: str, target: str) -> Callable[[Row], Pair]:
    """Two columns as they are; a list of targets is a list of references."""

    def convert(row: Row) -> Pair:
        value = row[target]
        return row[source], list(value) if isinstance(value, list | tuple) else [value]

    return convert


def _duplicate_questions(row: Row) -> Pair | None:
    """QQP labels pairs of questions: 1 is a paraphrase, 0 is not."""
    return (row["question1"], [row["question2"]]) if row["label"] == 1 else None


def _target_or_references(row: Row) -> Pair:
    """GEM's layout: `references` is empty where there is one `target`."""
    return row["source"], list(row["references"]) or [row["target"]]


def _answer_sentence(row: Row) -> Pair:
    """Du et al. (2017): the question is asked of the sentence in which the answer begins."""
    return sentence_around(row["context"], row["answers"]["answer_start"][0]), [row["question"]]


ALL_SPLITS = {"train": "train", "validation": "validation", "test": "test"}

_SUMMARIZATION = {
    "cnn_dailymail": HubDataset(
        "abisee/cnn_dailymail",
        ALL_SPLITS,
        ("article", "highlights"),
        _columns("article", "highlights"),
        config="3.0.0",
    ),
    "xsum": HubDataset(
        "EdinburghNLP/xsum",
        ALL_SPLITS,
        ("document", "summary"),
        _columns("document", "summary"),
        revision=PARQUET_BRANCH,
    ),
    "samsum": HubDataset(
        "knkarthick/samsum",
        ALL_SPLITS,
        ("dialogue", "summary"),
        _columns("dialogue", "summary"),
    ),
}
_SIMPLIFICATION = {
    # Wiki-Auto to train on; ASSET and TurkCorpus to test on, as GEM bundles them
    "wiki_auto": HubDataset(
        "GEM/wiki_auto_asset_turk",
        {
            "train": "train",
            "validation": "validation",
            "test": "test_asset",
            "test_turk": "test_turk",
        },
        ("source", "target", "references"),
        _target_or_references,
        revision=PARQUET_BRANCH,
    ),
    "asset": HubDataset(
        "facebook/asset",
        {"validation": "validation", "test": "test"},
        ("original", "simplifications"),
        _columns("original", "simplifications"),
        config="simplification",
    ),
}
_PARAPHRASE = {
    # the labels of GLUE's test split are secret, so it has no known paraphrases
    "qqp": HubDataset(
        "nyu-mll/glue",
        {"train": "train", "validation": "validation"},
        ("question1", "question2", "label"),
        _duplicate_questions,
        config="qqp",
    ),
}
_QUESTION_GENERATION = {
    "squad": HubDataset(
        "rajpurkar/squad",
        {"train": "train", "validation": "validation"},
        ("context", "question", "answers"),
        _answer_sentence,
    ),
}

_SAMPLES = ("train", "validation", "test")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("summarization", "a text to its summary", _SAMPLES, _SUMMARIZATION),
        Task("simplification", "a sentence to a simpler one", _SAMPLES, _SIMPLIFICATION),
        Task("paraphrase", "a sentence to one that means the same", ("test",), _PARAPHRASE),
        Task(
            "question_generation",
            "a sentence to a question that it answers",
            _SAMPLES,
            _QUESTION_GENERATION,
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
    return _load_hub(dataset, task.hub[dataset], split, limit)


def _load_hub(name: str, hub: HubDataset, split: str, limit: int | None) -> list[Example]:
    try:
        table = datasets.load_dataset(
            hub.path, hub.config, split=hub.splits[split], revision=hub.revision
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"could not load dataset {name!r} ({hub.path} on the Hugging Face hub): {reason}; "
            "without a network, use the packaged rows or a file of your own"
        ) from error
    if missing := [column for column in hub.columns if column not in table.column_names]:
        raise UserError(
            f"{hub.path} has no column {missing[0]!r}; the columns there are {table.column_names}"
        )
    blanks = _Count()
    examples = list(islice(_examples(table, hub.convert, blanks), limit))
    if blanks.rows:
        logger.warning("%s: left out %d rows with a blank source or target", name, blanks.rows)
    if not examples:
        raise UserError(f"{hub.path}, split {split!r}, holds no example of the task")
    return examples


@dataclass
class _Count:
    rows: int = 0


def _examples(
    table: Iterable[Row], convert: Callable[[Row], Pair | None], blanks: _Count
) -> Iterator[Example]:
    """Public datasets hold a few blank cells that no user can mend: they are counted, left out."""
    for row in table:
        pair = convert(row)
        if pair is None:
            continue
        source, references = pair[0], tuple(text for text in pair[1] if text and text.strip())
        if source and source.strip() and references:
            yield Example(source, references)
        else:
            blanks.rows += 1
