"""The recipe of a comparison: a YAML or JSON file as dataclasses, every key of it checked.

The keys are listed in `docs/comparison.md`.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tess.data.tasks.catalog import DEFAULT_DATASET, get_task
from tess.decoders.beam_search import wants_beams
from tess.decoders.options import DECODERS
from tess.errors import UserError
from tess.metrics.catalog import get_protocol
from tess.options import decode, known_keys, read_bytes, read_config, values_of
from tess.sampling.options import SamplerOptions
from tess.training.flags import known_names

ARMS = ("tess", "ar")
COPY, LEAD, TRUNCATION, FIXED, UNTRAINED = "copy", "lead", "truncation", "fixed", "untrained"
RESERVED = (COPY, LEAD, TRUNCATION, FIXED, UNTRAINED)
UNTRAINED_STEPS = 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

_OPTIONS = {f.name: f.type for f in SamplerOptions.flags()}
_DECODING = ("num_inference_steps", "gen_length", "num_beams", "length_penalty", "num_draft_tokens")


@dataclass(frozen=True, eq=False)
class System:
    """One way to write: a decoder and its settings. `options` are those of `SamplerOptions`."""

    name: str
    decoder: str
    num_inference_steps: int | None = None
    gen_length: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    num_draft_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    untrained: bool = False

    def settings(self) -> dict[str, Any]:
        """What was set, as plain data."""
        given = {name: getattr(self, name) for name in _DECODING}
        plain = {"decoder": self.decoder} | given | dict(self.options)
        plain |= {"untrained": True} if self.untrained else {}
        return {name: value for name, value in plain.items() if value is not None}

    @property
    def is_greedy_ar(self) -> bool:
        """Whether its texts are those that the others are held against."""
        return self.decoder == "ar" and (self.num_beams or 1) == 1 and self.gen_length is None


@dataclass(frozen=True)
class Stage:
    """One training stage: flat settings of `scripts/train.py`, shared and of each arm.

    output_dir: where its arms go, so that several recipes can share a stage; None: into the
    comparison's own folder.
    distilled_rows: training sources for which the ar arm writes what the tess arm learns; None:
    both learn the targets of the data.
    distilled_num_beams: with how many beams it writes them; 1 is greedy.
    """

    name: str
    shared: Mapping[str, Any]
    tess: Mapping[str, Any]
    ar: Mapping[str, Any]
    arms: tuple[str, ...] = ARMS
    output_dir: str | None = None
    distilled_rows: int | None = None
    distilled_num_beams: int = 1


@dataclass(frozen=True)
class Recipe:
    """A comparison; see `docs/comparison.md` for the meaning of each field."""

    name: str
    text: str
    output_dir: str
    protocol: str
    task: str | None = None
    dataset: str | None = None
    split: str | None = None
    test_file: str | None = None
    data_root: str | None = None
    source_column: str = "source"
    target_column: str = "target"
    detokenize: bool = False
    test_limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    stages: tuple[Stage, ...] = ()
    checkpoints: Mapping[str, str] | None = None
    systems: tuple[System, ...] = ()
    default_systems: bool = False
    batch_size: int = 16
    dtype: str = "float32"
    timing_rows: int = 20
    timing_repeats: int = 2
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    memory: bool = True
    samples: int = 10
    truncation_words: int | None = None
    lead_sentences: int | None = None
    fixed_text: str | None = None
    allow_differences: tuple[str, ...] = ()

    def data_label(self) -> dict[str, Any]:
        """Where the test rows are from, for the report."""
        names = ("task", "dataset", "split", "test_file", "test_limit", "detokenize")
        return {name: getattr(self, name) for name in names}


DEFAULT_SYSTEMS = (
    *(System(f"tess-{n}", "tess", num_inference_steps=n) for n in (1, 4, 8, 16)),
    System(
        "tess-ddim-stopping",
        "tess",
        num_inference_steps=16,
        options={"scheduler": "ddim", "stop_patience": 2},
    ),
    System("ar", "ar"),
    System("ar-beam-4", "ar", num_beams=4),
    System("ar+mtp", "ar+mtp"),
)
"""What is compared where a recipe names no systems; `ar+mtp` only with a multi-token predictor."""


def read_recipe(
    path: str | Path, output_dir: str | None = None, data_root: str | None = None
) -> Recipe:
    """Read a recipe; the two arguments win over its own keys.

    Raises:
        UserError: an unreadable file, an unknown key (with near matches), a value of the wrong
            type, or settings that do not go together.
    """
    path = Path(path)
    given = values_of(_kinds(Recipe, _WRITTEN), read_config(path), f"{path}")
    values = {"name": path.stem} | given
    values |= {"output_dir": output_dir} if output_dir else {}
    values |= {"data_root": data_root} if data_root else {}
    for key in ("output_dir", "protocol"):
        if key not in values:
            raise UserError(f"{path}: expected the key {key!r}, and there is none")
    stages, systems = values.pop("stages", []), values.pop("systems", [])
    if "checkpoints" in values:
        values["checkpoints"] = _checkpoints(values["checkpoints"])
    recipe = Recipe(
        text=decode(read_bytes(path), path),
        stages=tuple(_stage(item, at) for at, item in enumerate(stages, start=1)),
        systems=tuple(_system(item, at) for at, item in enumerate(systems, start=1))
        or DEFAULT_SYSTEMS,
        default_systems=not systems,
        **values,
    )
    _check(recipe)
    return recipe


_WRITTEN = {
    "stages": list[Mapping],
    "systems": list[Mapping],
    "checkpoints": Any,
    "text": None,
    "default_systems": None,
}
"""How fields of `Recipe` are written in a file, where it is another way; None: they are not."""


def _kinds(kind: type, written: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keys that a file may have for a dataclass, and their types."""
    found = {f.name: f.type for f in dataclasses.fields(kind)} | dict(written or {})
    return {name: kind for name, kind in found.items() if kind is not None}


def _checkpoints(value: Any) -> Mapping[str, str]:
    if isinstance(value, str):
        return {arm: str(Path(value) / arm) for arm in ARMS}
    found = values_of(dict.fromkeys(ARMS, str), value, "checkpoints")
    if missing := [arm for arm in ARMS if arm not in found]:
        raise UserError(f"checkpoints: expected a folder for {missing[0]!r}, found none")
    return found


def _stage(item: Mapping[str, Any], at: int) -> Stage:
    values = {"shared": {}, "tess": {}, "ar": {}} | values_of(_kinds(Stage), item, f"stage {at}")
    stage = Stage(name=_name(values.pop("name", None), f"stage {at}"), **values)
    where = f"stage {stage.name!r}"
    flags = set(known_names()) - {"objective"}
    for key in ("shared", *ARMS):
        known_keys(getattr(stage, key), flags, f"{where}, {key}")
    if "output_dir" in stage.shared:
        raise UserError(f"{where}: output_dir belongs beside shared, not into it")
    if not stage.arms or not set(stage.arms) <= set(ARMS):
        raise UserError(f"{where}: arms may name {' and '.join(ARMS)}, got {list(stage.arms)}")
    _at_least_one(stage, ("distilled_rows",), where)
    if stage.distilled_rows and set(stage.arms) != set(ARMS):
        raise UserError(
            f"{where}: distilled_rows needs both arms, as ar writes what tess learns; "
            f"got {list(stage.arms)}"
        )
    beams = stage.distilled_num_beams
    if beams < 1 or (beams > 1 and stage.distilled_rows is None):
        raise UserError(
            f"{where}: distilled_num_beams must be at least 1, and above 1 beside "
            f"distilled_rows only, got {beams}"
        )
    return stage


def _system(item: Mapping[str, Any], at: int) -> System:
    kinds = _kinds(System, {"options": None, "untrained": None})
    values = values_of(kinds | _OPTIONS, item, f"system {at}")
    name, decoder = _name(values.pop("name", None), f"system {at}"), values.pop("decoder", None)
    where = f"system {name!r}"
    if name in RESERVED:
        raise UserError(f"{where}: this name is taken by a baseline; choose another")
    if decoder not in DECODERS:
        raise UserError(f"{where}: decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    options = {key: values.pop(key) for key in _OPTIONS if key in values}
    system = System(name, decoder, **values, options=options)
    _check_system(system, where)
    return system


def _check_system(system: System, where: str) -> None:
    try:
        options = SamplerOptions(**system.options)
        wants_beams(system.decoder, system.num_beams, system.length_penalty)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if "tess" not in system.decoder:
        steps = ["num_inference_steps"] if system.num_inference_steps is not None else []
        if strange := [*steps, *system.options]:
            raise UserError(f"{where}: {strange[0]} belongs to tess, and this is {system.decoder}")
    if system.num_draft_tokens is not None and system.decoder != "ar+mtp":
        raise UserError(f"{where}: num_draft_tokens belongs to ar+mtp, and this is "
                        f"{system.decoder}")
    _at_least_one(system, ("num_inference_steps", "gen_length", "num_draft_tokens"), where)
    _at_least_one(options, ("num_candidates",), where)


def _check(recipe: Recipe) -> None:
    get_protocol(recipe.protocol)
    if bool(recipe.task) == bool(recipe.test_file):
        raise UserError("give the test rows by either task or test_file")
    if recipe.task:
        get_task(recipe.task).splits(recipe.dataset or DEFAULT_DATASET)
    elif recipe.dataset or recipe.split:
        raise UserError("dataset and split go with task, not with test_file")
    if bool(recipe.stages) == bool(recipe.checkpoints):
        raise UserError("give either stages to train or checkpoints that are there")
    for what, names in (
        ("system", [system.name for system in recipe.systems]),
        ("stage", [stage.name for stage in recipe.stages]),
    ):
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two {what}s are called {twice[0]!r}; give each a name of its own")
    if not recipe.seeds:
        raise UserError("seeds: expected at least one number, found none")
    if not recipe.batch_sizes or min(recipe.batch_sizes) < 1:
        raise UserError(f"batch_sizes must be 1 or more each, got {list(recipe.batch_sizes)}")
    _at_least_one(recipe, ("test_limit", "batch_size", "timing_rows", "timing_repeats",
                           "truncation_words", "lead_sentences"), recipe.name)  # fmt: skip
    if recipe.fixed_text is not None and not recipe.fixed_text.strip():
        raise UserError("fixed_text must have a word at least, got an empty text")
    if recipe.samples < 0:
        raise UserError(f"samples must not be negative, got {recipe.samples}")
    if recipe.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype must be float32 or bfloat16, got {recipe.dtype!r}")


def _at_least_one(owner: Any, names: tuple[str, ...], where: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 1:
            raise UserError(f"{where}: {name} must be at least 1, got {value}")


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise UserError(
            f"{where}: expected a name of letters, digits and . _ + -, as it names files; "
            f"got {value!r}"
        )
    return value
