"""The texts of a comparison: its test rows, and what its training rows say of them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tess.comparison.arms import Arm
from tess.comparison.recipe import Recipe
from tess.data.rows import Example, load_rows
from tess.data.tasks.catalog import load_task
from tess.data.texts import bare, load_data
from tess.errors import UserError
from tess.metrics.protocols import mean_words
from tess.storage.kept import digest, keep, kept
from tess.text.detokenize import detokenize


def load_test_rows(recipe: Recipe) -> list[Example]:
    """The rows that all systems are scored on, the first `test_limit` of them.

    Raises:
        UserError: no such task or file, a broken row, or no rows.
    """
    if recipe.task:
        rows = load_task(recipe.task, recipe.split or "test", recipe.dataset, recipe.test_limit)
    else:
        path = Path(recipe.data_root or "", recipe.test_file)
        rows = load_rows(path, recipe.source_column, recipe.target_column)[: recipe.test_limit]
    if not rows:
        raise UserError("expected at least one test row, found none")
    if recipe.detokenize:
        rows = [
            Example(detokenize(row.source), tuple(map(detokenize, row.references))) for row in rows
        ]
    return rows


def training_facts(
    arms: Sequence[Arm], examples: Sequence[Example], path: Path
) -> dict[str, dict[str, Any]]:
    """For each stage: training rows, mean words of a target, test rows that share a text with them.

    Read from the files once and kept in `path`; a stage's data settings are its ar arm's, where it
    has one: those of a distilled tess arm are texts of the ar arm.
    """
    stages = {arm.stage: arm for arm in arms if arm.kind == "tess"}
    stages |= {arm.stage: arm for arm in arms if arm.kind == "ar"}
    stages = {arm.stage: stages[arm.stage] for arm in arms}  # in the order of the recipe
    test = [(row.source, *row.references) for row in examples]
    key = {
        "test": digest(test),
        "data": {name: _data_settings(arm) for name, arm in stages.items()},
    }
    if (found := kept(path, key)) is not None:
        return found
    seen: dict[str, dict[str, Any]] = {}
    facts = {}
    for name, arm in stages.items():
        data = json.dumps(key["data"][name], sort_keys=True)
        if data not in seen:
            seen[data] = _facts(arm, test)
        facts[name] = seen[data]
    keep(path, key, facts)
    return facts


def _data_settings(arm: Arm) -> dict[str, Any]:
    settings = arm.parsed
    found = dataclasses.asdict(settings.data)
    names = [*settings.data.train_file, *settings.data.validation_file]
    files = [Path(settings.data.data_root or "", name) for name in names]
    found["sizes"] = [path.stat().st_size if path.is_file() else None for path in files]
    return found


def _facts(arm: Arm, test: Sequence[Sequence[str]]) -> dict[str, Any]:
    texts, _ = load_data(arm.parsed.data, want_eval=False)
    trained = {bare(text) for row in texts for text in row if text is not None}
    return {
        "training_rows": len(texts),
        "target_words": mean_words([[target] for _, target in texts]),
        "test_rows_seen": sum(any(bare(text) in trained for text in row) for row in test),
    }
