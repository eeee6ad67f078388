"""TESS, AR and AR + MTP on one backbone: train, write, score, time, and report in one command.

Everything that is finished is kept in the output folder, so that an interrupted run goes on. The
report has what is the same in every run with the same seeds under `results`, and what a clock or a
memory counter said under `timings`; its keys are in `docs/comparison.md`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tess.comparison.arms import plan
from tess.comparison.page import markdown
from tess.comparison.plots import plot_comparison
from tess.comparison.progress import total_work
from tess.comparison.recipe import Recipe
from tess.comparison.report import Report, Speed, Timings, to_json
from tess.comparison.results import make_results
from tess.comparison.rows import load_test_rows
from tess.comparison.settings import PARTS
from tess.comparison.state import Comparison
from tess.comparison.systems import UNTRAINED_SYSTEM, find_models
from tess.comparison.texts import write_all
from tess.comparison.timing import time_all
from tess.comparison.training import train_all
from tess.costs.machine import COMPARISON, environment
from tess.errors import UserError
from tess.evaluation.plots import check_plots
from tess.progress import Progress
from tess.storage.files import prepare_output_dir, write_atomically


def compare(
    recipe: Recipe,
    *,
    only: str | None = None,
    plots: bool = True,
    progress: bool = False,
    say: Callable[[str], Any] = lambda line: None,
) -> Path | None:
    """Carry out a recipe, going on from what its output folder already has.

    Args:
        only: one of `PARTS`: train alone; decode (and time) trained models; report what is there.
        plots: draw the two figures, which needs matplotlib.
        progress: show how far the whole plan is, on stderr.
        say: called with a line for every finished part.

    Returns:
        The path of `report.json`, or None where no report was asked for.

    Raises:
        UserError: anything in the recipe, the data or the checkpoints that cannot be used.
    """
    _check(recipe, only, plots)
    planned = plan(recipe)
    examples, systems = load_test_rows(recipe), [*recipe.systems, UNTRAINED_SYSTEM]
    run = Comparison(
        recipe,
        prepare_output_dir(recipe.output_dir),
        only,
        examples,
        planned.arms,
        planned.updates,
        systems,
        Progress(
            total_work(recipe, systems, planned.arms, len(examples), only),
            "compare", "rows of work", show=progress,
        ),
        say,
    )
    with run.progress:
        trained = train_all(run)
        if only == "train":
            return None
        find_models(run)
        written, timings = write_all(run), time_all(run)
        if only == "decode":
            return None
        run.progress.begin("report")
        speeds = [
            Speed(one.stage, one.decoder, one.seed, one.seconds_per_update) for one in trained
        ]
        report = Report(
            name=recipe.name,
            results=make_results(run, trained, written),
            timings=Timings(recipe.dtype, speeds, timings),
            environment=environment(COMPARISON),
            recipe=recipe.text,
        )
        return _write(report, run.folder, plots)


def _check(recipe: Recipe, only: str | None, plots: bool) -> None:
    if only is not None and only not in PARTS:
        raise UserError(f"only may be one of {', '.join(PARTS)}, got {only!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a comparison runs in one process; train with `accelerate launch scripts/train.py` and "
            "name what it made under checkpoints"
        )
    if recipe.checkpoints and only == "train":
        raise UserError("this recipe names checkpoints, so there is nothing to train")
    if plots and only in (None, "report"):
        try:
            check_plots()
        except UserError as error:
            raise UserError(
                "figures need matplotlib: pip install 'tess-diffusion[plots]' (or give --no_plots)"
            ) from error


def _write(report: Report, folder: Path, plots: bool) -> Path:
    drawn = plot_comparison(report, folder) if plots else []
    path = folder / "report.json"
    text = json.dumps(to_json(report), ensure_ascii=False, indent=2, allow_nan=False)
    write_atomically(path, text + "\n")
    page = markdown(report, [one.name for one in drawn if one.suffix == ".svg"])
    write_atomically(folder / "report.md", page)
    return path
