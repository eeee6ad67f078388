"""A dataset on the hub: its splits, its columns, and how a row becomes a pair of texts."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tess.data.rows import MARK, Example
from tess.errors import UserError
from tess.text.visible import is_blank

logger = logging.getLogger(__name__)

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


def pair_of_columns(source: str, target: str) -> Callable[[Row], Pair]:
    """Two columns as they are; a list of targets is a list of references."""

    def convert(row: Row) -> Pair:
        value = row[target]
        return row[source], list(value) if isinstance(value, list | tuple) else [value]

    return convert


ALL_SPLITS = {"train": "train", "validation": "validation", "test": "test"}


def load_hub(name: str, hub: HubDataset, split: str, limit: int | None) -> list[Example]:
    import datasets  # takes a second, and the packaged rows do without

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
        source, *references = ((text or "").lstrip(MARK) for text in (pair[0], *pair[1]))
        references = tuple(text for text in references if not is_blank(text))
        if references and not is_blank(source):
            yield Example(source, references)
        else:
            blanks.rows += 1
