"""The training side of a comparison: what each arm is trained with, that both are alike, and runs.

An arm is one training by `tess.training.run.train`: a stage, a decoder (tess or ar) and a seed. It
goes on from its last checkpoint, and a finished one is not repeated.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from tess.backbones.config import HybridConfig
from tess.comparison.clock import Clock
from tess.comparison.recipe import ARMS, Recipe, Stage
from tess.data.settings import DataArguments
from tess.errors import UserError
from tess.options import known_keys
from tess.storage.files import write_atomically
from tess.storage.kept import digest, digest_folder
from tess.storage.parts import Parts, kind_of, own_fields
from tess.training.flags import parse_settings
from tess.training.resuming import TRAINER_STATE_FILE, read_state
from tess.training.run import FINAL_FOLDER, train
from tess.training.settings import CHANGEABLE, ModelArguments, Settings

ARM_FILE = "comparison_arm.json"
DEFAULTS: dict[str, Any] = {"disable_tqdm": True, "num_samples_to_print": 0, "report_to": "none"}
"""Of every arm, unless a stage says otherwise: the comparison has a bar of its own."""

SIZES = sorted(
    {f.name for f in dataclasses.fields(ModelArguments)}
    & set(HybridConfig.__dataclass_fields__) - CHANGEABLE
)
_DATA = [f.name for f in dataclasses.fields(DataArguments) if f.name != "conditional_generation"]
_BUDGET = ["max_steps", "num_train_epochs", "per_device_train_batch_size"]
_BUDGET += ["gradient_accumulation_steps", "seed", "data_seed"]
SAME = {"model": ["preset", *SIZES], "data": _DATA, "training": _BUDGET}
"""Settings that both arms of a stage have in common: sizes, data, updates, batches and seed."""

ALLOWABLE = {"arms", "init_from", "tokenizer", "updates"} | {n for g in SAME.values() for n in g}
"""Names that `allow_differences` may have."""

_PLACES = {"output_dir", "logging_dir", "run_name", "init_from", "tokenizer", "train_tokenizer"}
_PLACES |= {"data_root"}
_ROWS = ("task", "dataset", "train_file", "text_column", "max_train_samples")
_ROWS_DISTILLED = {*_ROWS, "source_column", "target_column", "drop_copies", "eval_strategy"}


@dataclass(frozen=True)
class Arm:
    """One training run. `settings` are flat, as `scripts/train.py` takes them.

    A distilled arm learns what its `teacher` wrote, with `distilled_num_beams` beams, for
    `distilled_rows` of the training sources.
    """

    stage: str
    kind: str
    seed: int
    folder: Path
    settings: Mapping[str, Any]
    teacher: "Arm | None" = None
    distilled_rows: int | None = None
    distilled_num_beams: int = 1

    @property
    def final(self) -> Path:
        """The checkpoint that it ends with."""
        return self.folder / FINAL_FOLDER

    @property
    def texts(self) -> Path | None:
        """The file with the teacher's texts (`tess.comparison.distillation`)."""
        beams = f"_beams_{self.distilled_num_beams}" if self.distilled_num_beams > 1 else ""
        name = f"distilled_{self.distilled_rows}{beams}.jsonl"
        return self.teacher and self.teacher.folder / name

    @property
    def label(self) -> str:
        """For lines and errors."""
        return f"stage {self.stage}, {self.kind}, seed {self.seed}"

    @cached_property
    def parsed(self) -> Settings:
        """To look at; UserError for what `scripts/train.py` would refuse."""
        return self.parse()

    def parse(self) -> Settings:
        """To train with: reading them also sets up the process (devices, mixed precision)."""
        flags: list[str] = []
        for key, value in self.settings.items():
            if value is None or value == []:
                continue
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key}"]
            flags += [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        try:
            return parse_settings(flags)
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from error


@dataclass(frozen=True)
class Trained:
    """A finished training. weights: a hash of the final folder; ran: updates of this process.

    seconds_per_update: of the process that trained last.
    """

    stage: str
    decoder: str
    seed: int
    updates: int
    weights: str
    seconds_per_update: float | None
    ran: int = 0


@dataclass(frozen=True)
class Plan:
    """arms: the trainings in their order. updates: of given checkpoints, where that is known."""

    arms: list[Arm]
    updates: dict[str, int | None] | None


def plan(recipe: Recipe) -> Plan:
    """What there is to train, or how far what is there was trained.

    Raises:
        UserError: settings that cannot be used, arms or checkpoints that are not alike, or, with
            near matches, a name in allow_differences that allows nothing.
    """
    made = Plan(
        plan_arms(recipe) if recipe.stages else [],
        _known_updates(recipe) if recipe.checkpoints else None,
    )
    known_keys(dict.fromkeys(recipe.allow_differences), ALLOWABLE, "allow_differences")
    return made


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


def plan_arms(recipe: Recipe) -> list[Arm]:
    """All trainings in the order in which they run; a stage with a seed of its own comes once.

    Raises:
        UserError: settings that cannot be used, or arms of one stage that are not alike.
    """
    arms: dict[Path, Arm] = {}
    for seed in recipe.seeds:
        before: dict[str, Arm] = {}
        for stage in recipe.stages:
            new: dict[str, Arm] = {}
            for kind in stage.arms:
                new[kind] = _arm(recipe, stage, kind, seed, before, new)
            check_alike(new, recipe.allow_differences)
            if stage.distilled_rows is not None:
                if new["tess"].settings.get("train_tokenizer"):
                    raise UserError(
                        f"stage {stage.name!r}: distilled_rows needs a tokenizer that is there "
                        "before the ar arm is trained; give it as tokenizer, or in a stage before"
                    )
                new = {"ar": new["ar"], "tess": _distilled(new["tess"], new["ar"], stage)}
            arms |= {arm.folder: arm for arm in new.values() if arm.folder not in arms}
            before |= new
        if missing := sorted(set(ARMS) - set(before)):
            raise UserError(f"no stage trains the arm {missing[0]!r}")
    return list(arms.values())


def last_arms(arms: Sequence[Arm], recipe: Recipe, seed: int) -> dict[str, Arm]:
    """The last training of each kind, for one seed of the comparison."""
    found = {}
    for stage in recipe.stages:
        for kind in stage.arms:
            own = _seed_of(stage, kind, seed)
            found[kind] = next(
                a for a in arms if (a.stage, a.kind, a.seed) == (stage.name, kind, own)
            )
    return found


def _seed_of(stage: Stage, kind: str, seed: int) -> int:
    return {**stage.shared, **getattr(stage, kind)}.get("seed", seed)


def _arm(
    recipe: Recipe,
    stage: Stage,
    kind: str,
    seed: int,
    before: Mapping[str, Arm],
    beside: Mapping[str, Arm],
) -> Arm:
    own = getattr(stage, kind)
    settings = DEFAULTS | dict(stage.shared) | dict(own)
    settings |= {"objective": kind, "seed": _seed_of(stage, kind, seed)}
    if not 0 <= settings["seed"] < 2**32:
        raise UserError(
            f"stage {stage.name!r}, {kind}: a training's seed must be from 0 to 2^32 - 1, got "
            f"{settings['seed']}"
        )
    if recipe.data_root is not None:
        settings.setdefault("data_root", recipe.data_root)
    if "output_dir" in own:
        folder = Path(str(own["output_dir"]).replace("{seed}", str(seed)))
        if len(recipe.seeds) > 1 and "{seed}" not in str(own["output_dir"]):
            raise UserError(
                f"stage {stage.name!r}, {kind}: with several seeds output_dir needs a "
                f"{{seed}} in it, got {own['output_dir']!r}"
            )
    else:
        base = Path(stage.output_dir or Path(recipe.output_dir) / "train" / stage.name)
        folder = base / f"{kind}.seed{settings['seed']}"
    settings["output_dir"] = str(folder)
    if kind in before:
        first = ("tokenizer", "train_tokenizer", "init_from")
        if given := [key for key in first if settings.get(key)]:
            raise UserError(
                f"stage {stage.name!r}: {given[0]} is of the first stage; a later one starts from "
                "the stage before it and keeps its tokenizer"
            )
        settings["init_from"] = str(before[kind].final)
    elif kind == "ar" and settings.get("train_tokenizer"):
        if "tess" not in beside:
            raise UserError(f"stage {stage.name!r}: the tess arm trains the tokenizer, and there "
                            "is none")
        # the very same folder, which knows its own size
        settings |= {"train_tokenizer": False, "vocab_size": None}
        settings["tokenizer"] = str(beside["tess"].final / "tokenizer")
    return Arm(stage.name, kind, settings["seed"], folder, settings)


def _distilled(arm: Arm, teacher: Arm, stage: Stage) -> Arm:
    """The arm with its teacher's texts as training file, in place of the data that both had."""
    own = dict.fromkeys(_ROWS) | {"source_column": "source", "target_column": "target"}
    own |= {"drop_copies": True}
    found = dataclasses.replace(
        arm,
        teacher=teacher,
        distilled_rows=stage.distilled_rows,
        distilled_num_beams=stage.distilled_num_beams,
    )
    own["train_file"] = [str(found.texts.resolve())]
    if arm.settings.get("task") and not arm.settings.get("validation_file"):
        own |= {"eval_strategy": None}  # the task's validation rows are not read with a file
    return dataclasses.replace(found, settings=dict(arm.settings) | own)


# ---- alike ----


def check_alike(arms: Mapping[str, Arm], allowed: Sequence[str]) -> None:
    """Refuse arms of one stage that differ in what a fair comparison holds fixed.

    Raises:
        UserError: the first such setting that `allowed` does not name.
    """
    parsed = {kind: arm.parsed for kind, arm in arms.items()}
    stage = next(iter(arms.values())).stage
    if len(parsed) == 1:
        (kind, settings), *_ = parsed.items()
        if not settings.causal.freeze_backbone and "arms" not in allowed:
            raise UserError(
                f"stage {stage!r} trains {kind} alone, which gives it more updates than the other "
                "arm; name 'arms' in allow_differences if that is meant (a frozen backbone needs "
                "no leave)"
            )
        return
    for name, (tess, ar) in must_be_same(parsed["tess"], parsed["ar"]).items():
        if name not in allowed:
            raise UserError(
                f"stage {stage!r}: {name} is {tess!r} for tess and {ar!r} for ar; a fair "
                f"comparison has it equal (or name {name!r} in allow_differences)"
            )


def must_be_same(tess: Settings, ar: Settings) -> dict[str, tuple[Any, Any]]:
    """What two arms differ in, name -> (tess, ar): of `SAME`, and whether they start trained."""
    found = {}
    for group, names in SAME.items():
        for name in names:
            if name == "vocab_size" and (tess.model.train_tokenizer or tess.model.init_from):
                continue  # the tokenizer's own, which is the same folder
            if name == "num_train_epochs" and tess.training.max_steps > 0 < ar.training.max_steps:
                continue  # not read
            a, b = getattr(getattr(tess, group), name), getattr(getattr(ar, group), name)
            if a != b:
                found[name] = (a, b)
    starts = tess.model.init_from, ar.model.init_from
    if None in starts and starts != (None, None):  # one arm has been trained before
        found["init_from"] = starts
    return found


def differing(tess: Arm, ar: Arm) -> dict[str, list[Any]]:
    """All flat settings in which two arms differ, for the report: name -> [tess, ar]."""
    names = sorted((set(tess.settings) | set(ar.settings)) - _PLACES - {"objective"})
    pairs = {name: [tess.settings.get(name), ar.settings.get(name)] for name in names}
    pairs.pop("vocab_size", None)
    found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if tess.teacher is not None:
        beams = tess.distilled_num_beams
        what = f"written by the ar arm for up to {tess.distilled_rows} training sources"
        what += f" with {beams} beams, no copies" if beams > 1 else ", no copies"
        found = {name: pair for name, pair in found.items() if name not in _ROWS_DISTILLED}
        found = {"training targets": [what, "those of the data"]} | found
    return found


def check_checkpoints(tess: Parts, ar: Parts, allowed: Sequence[str]) -> dict[str, list[Any]]:
    """Backbone sizes and tokenizer as the checkpoints have them: what differs, and was allowed.

    Raises:
        UserError: the first difference that was not.
    """
    ours, theirs = own_fields(tess.model.config.backbone_config), own_fields(ar.model.config)
    pairs = {name: [ours.get(name), theirs.get(name)] for name in SIZES}
    pairs["tokenizer"] = [_tokenizer_digest(tess.tokenizer), _tokenizer_digest(ar.tokenizer)]
    found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    for name, (a, b) in found.items():
        if name not in allowed:
            raise UserError(
                f"the checkpoints differ: {name} is {a!r} of tess and {b!r} of ar; a fair "
                f"comparison has it equal (or name {name!r} in allow_differences)"
            )
    return found


def _tokenizer_digest(tokenizer: Any) -> str:
    special = {key: getattr(tokenizer, key) for key in ("pad_token", "bos_token", "eos_token")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        rules = {k: v for k, v in json.loads(backend.to_str()).items()
                 if k not in ("truncation", "padding")}
    return digest([special, rules])


# ---- runs ----


def updates_of(folder: Path) -> int | None:
    """Updates of the training whose output folder this is; None where it has no checkpoint."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None or not (Path(last) / TRAINER_STATE_FILE).is_file():
        return None
    return read_state(Path(last))["global_step"]


def run_arm(arm: Arm, advance: Callable[[int], None] = lambda updates: None) -> Trained:
    """Train an arm, unless it is there already.

    advance: called with the number of updates done since the last call, those of an earlier run
        included.

    Raises:
        UserError: the folder has a training with other settings, or `train` refuses.
    """
    record = _read_record(arm)
    start = arm.settings.get("init_from") or arm.settings.get("tokenizer")
    now = {"settings": _recorded(arm), "start": None, "texts": None}
    if start and Path(start).is_dir():
        now["start"] = digest_folder(Path(start))
    if arm.texts is not None:
        now["texts"] = hashlib.sha256(arm.texts.read_bytes()).hexdigest()[:16]
    if not record and updates_of(arm.folder) is not None:
        raise UserError(
            f"{arm.folder} holds a training that no comparison started, whose settings cannot be "
            "checked; choose another output_dir, or remove that folder"
        )
    _check_record(arm, record, now)
    finished = record.get("weights")
    if finished and arm.final.is_dir() and digest_folder(arm.final) == finished:
        return _trained(arm, record)
    settings = arm.parse()
    try:
        arm.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(arm.folder / ARM_FILE, json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {arm.folder}: {error.strerror}") from error
    clock = Clock(advance)
    try:
        train(settings, callbacks=[clock])
    except UserError as error:
        raise UserError(f"{arm.label}: {error}") from error
    updates = updates_of(arm.folder)
    done = {
        "updates": clock.at if updates is None else updates,
        "weights": digest_folder(arm.final),
        "seconds_per_update": clock.seconds_per_update or record.get("seconds_per_update"),
    }
    write_atomically(arm.folder / ARM_FILE, json.dumps(now | done, indent=2) + "\n")
    return _trained(arm, done, clock.ran)


def finished_arm(arm: Arm) -> Trained:
    """The record of a finished arm; UserError where it is not finished, or of other settings."""
    record = _read_record(arm)
    if not record.get("weights") or kind_of(arm.final) != arm.kind:
        raise UserError(
            f"{arm.label} is not trained yet: {arm.final} or its record {ARM_FILE} is missing; "
            "run --only train"
        )
    # what it started from need not be on this machine
    now = {key: record.get(key) for key in ("start", "texts")}
    _check_record(arm, record, {"settings": _recorded(arm)} | now)
    return _trained(arm, record)


def _trained(arm: Arm, record: Mapping[str, Any], ran: int = 0) -> Trained:
    found = (record[key] for key in ("updates", "weights", "seconds_per_update"))
    return Trained(arm.stage, arm.kind, arm.seed, *found, ran)


def _recorded(arm: Arm) -> dict[str, Any]:
    """Settings as the record has them: of a teacher's texts their hash is kept, not the place."""
    if arm.teacher is None:
        return dict(arm.settings)
    rows = {"distilled_rows": arm.distilled_rows}
    return {k: v for k, v in arm.settings.items() if k != "train_file"} | rows


def _read_record(arm: Arm) -> dict[str, Any]:
    path = arm.folder / ARM_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def _check_record(arm: Arm, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, wanted = record.get("settings"), now["settings"]
    if before is None:
        return
    for name in sorted(set(before) | set(wanted)):
        # places may have moved as a whole; what they hold is compared by its hash
        if name not in _PLACES and before.get(name) != wanted.get(name):
            raise UserError(
                f"{arm.folder} was trained with {name} = {before.get(name)!r}, and the recipe now "
                f"has {wanted.get(name)!r}; choose another output_dir, or remove that folder"
            )
    if record.get("start") != now["start"]:
        raise UserError(
            f"{arm.folder} was started from other files than its init_from or tokenizer has now; "
            "choose another output_dir, or remove that folder"
        )
    if record.get("texts") != now["texts"]:
        raise UserError(
            f"{arm.folder} learned other texts than those in {arm.texts}; choose another "
            "output_dir, or remove that folder"
        )
