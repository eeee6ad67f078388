"""The texts of a run: read from tasks and files, cleaned, kept apart from the evaluation rows."""

import logging
from pathlib import Path

from tess.data.rows import load_rows, load_texts
from tess.data.settings import NEED_SOURCE, DataArguments
from tess.data.tasks.catalog import get_task, load_task
from tess.data.token_rows import TokenRows
from tess.errors import UserError
from tess.text.detokenize import detokenize

logger = logging.getLogger(__name__)

Texts = list[tuple[str | None, str]]  # (source or None, target)


def load_data(data: DataArguments, want_eval: bool) -> tuple[Texts, Texts]:
    """Training and evaluation texts; the latter may be empty unless they are wanted."""
    if data.task:
        train_texts = _task_texts(data, "train")
        has_eval = "validation" in get_task(data.task).splits(data.dataset or "samples")
        eval_texts = (
            _task_texts(data, "validation") if has_eval and not data.validation_file else []
        )
    else:
        train_texts, eval_texts = _file_texts(data, data.train_file), []
    if data.validation_file:
        eval_texts = _file_texts(data, data.validation_file)
    if want_eval and not eval_texts:
        raise UserError(
            "evaluation during training needs --validation_file (or a task with a validation split)"
        )
    if needing := [name for name in data.corruptions if name in NEED_SOURCE]:
        for name, texts in (("training", train_texts), ("evaluation", eval_texts)):
            if any(source is None for source, _ in texts):
                raise UserError(
                    f"{needing[0]} needs {name} rows with a source and a target, got raw text"
                )
    eval_texts = eval_texts[: data.max_eval_samples]
    if data.drop_copies:
        train_texts = _without_copies(train_texts)
    return _without_eval_sources(train_texts, eval_texts)[: data.max_train_samples], eval_texts


def _task_texts(data: DataArguments, split: str) -> Texts:
    return [(row.source, row.target) for row in load_task(data.task, split, data.dataset)]


def _file_texts(data: DataArguments, files: list[str]) -> Texts:
    texts: Texts = []
    for name in files:
        path = Path(data.data_root or "", name)
        if data.text_column or name.removesuffix(".gz").endswith(".txt"):
            texts += [(None, text) for text in load_texts(path, data.text_column or "text")]
        else:
            rows = load_rows(path, data.source_column, data.target_column)
            texts += [(row.source, row.target) for row in rows]
    if data.detokenize:
        texts = [(source and detokenize(source), detokenize(target)) for source, target in texts]
    return texts


def bare(text: str) -> str:
    """Letters and digits in lower case: texts with equal ones count as the same text."""
    return "".join(filter(str.isalnum, text.lower()))


def _without_copies(texts: Texts) -> Texts:
    """Pairs whose target is not the source, up to case and punctuation."""
    kept = [
        (source, target)
        for source, target in texts
        if source is None or bare(source) != bare(target)
    ]
    if texts and not kept:
        raise UserError("every training row is a copy of its source; nothing is left to train on")
    if dropped := len(texts) - len(kept):
        logger.warning("left out %d training rows whose target is their source", dropped)
    return kept


def _without_eval_sources(train_texts: Texts, eval_texts: Texts) -> Texts:
    """Training texts that share no text with the evaluation rows, up to case and punctuation."""
    held_out = {bare(text) for row in eval_texts for text in row if text is not None}
    kept = [
        row
        for row in train_texts
        if not any(text is not None and bare(text) in held_out for text in row)
    ]
    if dropped := len(train_texts) - len(kept):
        logger.warning(
            "left out %d training rows that share a text with the evaluation rows", dropped
        )
    if train_texts and not kept:
        raise UserError(
            "every training row shares a text with the evaluation rows; nothing is left to train on"
        )
    return kept


def without_long(rows: TokenRows, data: DataArguments) -> TokenRows:
    kept = rows.select(
        [
            index
            for index, (source, target) in enumerate(zip(rows.sources, rows.targets, strict=True))
            if not _is_cut(len(source or ()), len(target), data)
        ]
    )
    if len(kept) < len(rows):
        logger.warning(
            "left out %d of %d training rows: too long", len(rows) - len(kept), len(rows)
        )
    if not len(kept):
        raise UserError(
            "every training row is longer than the maximum lengths; nothing is left to train on"
        )
    return kept


def warn_of_cuts(rows: TokenRows, data: DataArguments) -> None:
    cut = sum(
        _is_cut(len(source or ()), len(target), data)
        for source, target in zip(rows.sources, rows.targets, strict=True)
    )
    if cut:
        logger.warning(
            "%d of %d training rows are longer than the maximum lengths and are cut", cut, len(rows)
        )


def _is_cut(source: int, target: int, data: DataArguments) -> bool:
    """Whether a row of so many tokens is beyond the maximum lengths."""
    if set(data.corruptions) == {"block"}:
        # No target is too long, but all before its last block goes into the source.
        source += target // data.max_target_length * data.max_target_length
        target = 0
    return target + 1 > data.max_target_length or source + 2 > data.max_source_length
