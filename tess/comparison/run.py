"""TESS, AR and AR + MTP on one backbone: train, write, score, time, and report in one command.

Everything that is finished is kept in the output folder, so that an interrupted run goes on. The
report has what is the same in every run with the same seeds under `results`, and what a clock or a
memory counter said under `timings`; its keys are in `docs/comparison.md`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tess.comparison.arms import (
    Arm,
    check_allowed,
    check_checkpoints,
    finished_arm,
    last_arms,
    plan_arms,
    run_arm,
    updates_of,
)
from tess.comparison.distillation import distill
from tess.comparison.page import markdown
from tess.comparison.plots import plot_comparison
from tess.comparison.progress import (
    AR_ROW,
    Progress,
    arm_work,
    row_work,
    text_work,
    timing_work,
    total_work,
    update_work,
)
from tess.comparison.recipe import ARMS, Recipe, System
from tess.comparison.results import make_results
from tess.comparison.rows import load_test_rows, training_facts
from tess.comparison.settings import PARTS
from tess.comparison.systems import (
    UNTRAINED_SYSTEM,
    Models,
    describe,
    gather_models,
    keep_texts,
    kept_texts,
    load_system,
    texts_key,
    write_texts,
)
from tess.comparison.timing import evenly_spaced, time_systems
from tess.costs.machine import comparison_environment, timing_setting
from tess.data.rows import Example
from tess.errors import UserError
from tess.evaluation.plots import check_plots
from tess.storage.files import prepare_output_dir, write_atomically
from tess.storage.kept import keep, kept
from tess.storage.parts import load_parts


@dataclass
class Comparison:
    """A comparison as it runs. recipe: what to do; folder: where everything goes."""

    recipe: Recipe
    folder: Path
    examples: Sequence[Example]
    arms: Sequence[Arm]
    progress: Progress | None = None

    @cached_property
    def sources(self) -> list[str]:
        """The sources of the test rows."""
        return [example.source for example in self.examples]

    @cached_property
    def systems(self) -> list[System]:
        """Those of the recipe, then the untrained model."""
        return [*self.recipe.systems, UNTRAINED_SYSTEM]


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
        progress: a bar over the whole plan, on stderr.
        say: called with a line for every finished part.

    Returns:
        The path of `report.json`, or None where no report was asked for.

    Raises:
        UserError: anything in the recipe, the data or the checkpoints that cannot be used.
    """
    if only is not None and only not in PARTS:
        raise UserError(f"only may be one of {', '.join(PARTS)}, got {only!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a comparison runs in one process; train with `accelerate launch scripts/train.py` and "
            "name what it made under checkpoints"
        )
    if plots and only in (None, "report"):
        _need_plots()
    check_allowed(recipe)
    arms = plan_arms(recipe) if recipe.stages else []
    examples = load_test_rows(recipe)
    run = Comparison(recipe, prepare_output_dir(recipe.output_dir), examples, arms)
    if recipe.checkpoints and only == "train":
        raise UserError("this recipe names checkpoints, so there is nothing to train")
    if recipe.checkpoints:
        _known_updates(recipe)  # refuses unequal ones before the long run
    run.progress = Progress(
        total_work(recipe, run.systems, arms, len(examples), only), progress, say
    )
    try:
        trained = _train(run, only)
        if only == "train":
            return None
        models = {seed: _models(run, seed) for seed in recipe.seeds}
        _drop_missing_predictor(run, models[recipe.seeds[0]])
        different, *_ = [_check_models(run, found) for found in models.values()]
        written = _write_all(run, models, only)
        timings = _time_all(run, models[recipe.seeds[0]], only)
        if only == "decode":
            return None
        run.progress.begin("report")
        return _report(run, trained, models, different, written, timings, plots)
    finally:
        run.progress.bar.close()


def _need_plots() -> None:
    try:
        check_plots()
    except UserError as error:
        raise UserError(
            "figures need matplotlib: pip install 'tess-diffusion[plots]' (or give --no_plots)"
        ) from error


# ---- the parts ----


def _train(run: Comparison, only: str | None) -> list[dict[str, Any]]:
    """Records of all arms, with stage, kind and seed."""
    records = []
    for arm in run.arms:
        run.progress.begin(f"train {arm.label}")
        if only in ("decode", "report"):
            found = finished_arm(arm) | {"ran": 0}
        else:
            found = _train_arm(run, arm)
        records.append({"stage": arm.stage, "decoder": arm.kind, "seed": arm.seed} | found)
    return records


def _distill(run: Comparison, arm: Arm) -> None:
    work, done = text_work(arm), 0.0

    def advance(rows: int) -> None:
        nonlocal done
        done += AR_ROW * rows
        run.progress.advance(AR_ROW * rows)

    run.progress.begin(f"texts for {arm.label}")
    written = distill(arm, advance)
    run.progress.skip(work - done)
    what = f"{written} texts written" if written else "texts are there already"
    run.progress.say(f"{arm.label}: {what} to learn from")
    run.progress.begin(f"train {arm.label}")


def _train_arm(run: Comparison, arm: Arm) -> dict[str, Any]:
    if arm.teacher is not None:
        _distill(run, arm)
    work, each = arm_work(arm), update_work(arm)
    done = 0.0

    def advance(updates: int) -> None:
        nonlocal done
        step = min(updates * each, work - done)
        done += step
        run.progress.advance(step)

    found = run_arm(arm, advance)
    run.progress.skip(work - done)
    what = f"trained, {found['ran']} updates" if found["ran"] else "is trained already"
    run.progress.say(f"{arm.label}: {what} ({found['updates']} in all)")
    return found


def _models(run: Comparison, seed: int) -> Models:
    if run.recipe.checkpoints:
        places = {
            arm: Path(place.replace("{seed}", str(seed)))
            for arm, place in run.recipe.checkpoints.items()
        }
    else:
        places = {kind: arm.final for kind, arm in last_arms(run.arms, run.recipe, seed).items()}
    return gather_models(places, run.folder / f"models.seed{seed}", seed)


def _check_models(run: Comparison, models: Models) -> dict[str, list[Any]]:
    parts = {arm: load_parts(models.folder / arm) for arm in ARMS}
    return check_checkpoints(parts["tess"], parts["ar"], run.recipe.allow_differences)


def _drop_missing_predictor(run: Comparison, models: Models) -> None:
    """Of the default systems `ar+mtp` is for models with a multi-token predictor."""
    config = json.loads((models.folder / "ar" / "config.json").read_text())
    if run.recipe.default_systems and not config.get("num_nextn_predict_layers"):
        run.systems = [system for system in run.systems if system.decoder != "ar+mtp"]
        run.progress.say("the AR checkpoint has no multi-token predictor; ar+mtp is left out")


def _known_updates(recipe: Recipe) -> dict[str, int | None]:
    """Updates of the last training of each given checkpoint, where its folder still says so.

    Raises:
        UserError: both are known and differ, and the recipe does not allow that.
    """
    found = {}
    for arm, name in recipe.checkpoints.items():
        place = Path(name.replace("{seed}", str(recipe.seeds[0])))
        found[arm] = updates_of(place.parent if place.name == "final" else place)
    if None not in found.values() and len(set(found.values())) > 1:
        if "updates" not in recipe.allow_differences:
            raise UserError(
                f"the checkpoints differ: the last training of tess has {found['tess']} updates "
                f"and that of ar {found['ar']}; a fair comparison has as many (or name 'updates' "
                "in allow_differences)"
            )
    return found


Written = dict[int, dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]]
"""seed -> system -> what describes the decoder, and a row for each text."""


def _write_all(run: Comparison, models: Mapping[int, Models], only: str | None) -> Written:
    return {
        seed: {system.name: _write(run, system, found, only) for system in run.systems}
        for seed, found in models.items()
    }


def _write(run: Comparison, system: System, models: Models, only: str | None):
    recipe, label = run.recipe, f"{system.name}, seed {models.seed}"
    path = run.folder / "systems" / f"{system.name}.seed{models.seed}.json"
    size = {"batch_size": recipe.batch_size, "dtype": recipe.dtype}
    key = texts_key(system, models, run.sources, **size)
    work = row_work(system)
    ignoring = ("device",) if only == "report" else ()
    if (found := kept_texts(path, key, ignoring)) is not None:
        run.progress.skip(work * len(run.sources))
        if only != "report":
            run.progress.say(f"{label}: texts are there already")
        return found
    if only == "report":
        raise UserError(f"the texts of {label} are not written yet; run --only decode")
    run.progress.begin(f"write {label}")
    decoder = load_system(system, models, recipe.dtype)
    texts = write_texts(
        system, decoder, run.sources, seed=models.seed, batch_size=recipe.batch_size,
        on_batch=lambda texts: run.progress.advance(len(texts) * work),
    )
    described = describe(decoder, run.sources, texts)
    changed = " anew, as settings or weights have changed" if path.exists() else ""
    rows = keep_texts(path, key, described, texts)
    cut = described["sources_cut"]
    cut = f", {cut} sources cut to the model's longest" if cut else ""
    run.progress.say(f"{label}: {len(rows)} texts written{changed}{cut}")
    return described, rows


def _time_all(run: Comparison, models: Models, only: str | None) -> dict[str, Any]:
    """Latency, throughput and memory of every system but the untrained one."""
    recipe, setting = run.recipe, timing_setting()
    chosen = [run.sources[i] for i in evenly_spaced(len(run.sources), recipe.timing_rows)]
    size = {"batch_size": recipe.batch_size, "dtype": recipe.dtype}
    found: dict[str, Any] = {}
    missing = {}
    for system in run.systems:
        if system.untrained:
            continue
        key = texts_key(system, models, chosen, **size)
        key |= {"setting": setting, "batch_sizes": list(recipe.batch_sizes)}
        key |= {"memory": recipe.memory, "repeats": recipe.timing_repeats}
        path = run.folder / "timings" / f"{system.name}.json"
        found[system.name] = kept(path, key, ("device", "setting") if only == "report" else ())
        if found[system.name] is None:
            missing[system] = path, key
            continue
        run.progress.skip(timing_work(recipe, system, len(run.sources)))
        if only != "report":
            run.progress.say(f"{system.name}: timings are there already")
    if missing and only == "report":
        name = next(iter(missing)).name
        raise UserError(f"{name} is not timed yet; run --only decode")
    if missing:
        timed = time_systems(recipe, list(missing), models, chosen, run.progress)
        for system, (path, key) in missing.items():
            found[system.name] = {"setting": setting} | timed[system.name]
            keep(path, key, found[system.name])
    return found


# ---- the report ----


def _report(
    run: Comparison,
    trained: list[dict[str, Any]],
    models: Mapping[int, Models],
    different: Mapping[str, list[Any]],
    written: Written,
    timings: Mapping[str, Any],
    plots: bool,
) -> Path:
    facts = training_facts(run.arms, run.examples, run.folder / "training_data.json")
    results = make_results(
        run.recipe, run.examples, run.systems, run.arms, trained, facts, models, different, written
    )
    if run.recipe.checkpoints:
        results["training"]["updates"] = _known_updates(run.recipe)
    report = {
        "name": run.recipe.name,
        "results": results,
        "timings": {
            "dtype": run.recipe.dtype,
            "seconds_per_update": [
                {key: record[key] for key in ("stage", "decoder", "seed", "seconds_per_update")}
                for record in trained
            ],
            "systems": dict(timings),
        },
        "environment": comparison_environment(),
        "recipe": run.recipe.text,
    }
    drawn = plot_comparison(report, run.folder) if plots else []
    path = run.folder / "report.json"
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
    write_atomically(path, text + "\n")
    page = markdown(report, [one.name for one in drawn if one.suffix == ".svg"])
    write_atomically(run.folder / "report.md", page)
    return path
