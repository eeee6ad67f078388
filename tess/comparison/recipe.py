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
from tess.decoders.base import DECODERS
from tess.decoders.beam_search import wants_beams
from tess.errors import UserError
from tess.metrics.catalog import get_protocol
from tess.options import known_keys, read_config, typed
from tess.sampling.options import SamplerOptions
from tess.training.settings import make_parser

ARMS = ("tess", "ar")
COPY, LEAD, TRUNCATION, FIXED, UNTRAINED = "copy", "lead", "truncation", "fixed", "untrained"
RESERVED = (COPY, LEAD, TRUNCATION, FIXED, UNTRAINED)
UNTRAINED_STEPS = 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

_OPTIONS = {f.name: f.type for f in SamplerOptions.flags()}
_DECODING = {
    "num_inference_steps": int,
    "gen_length": int,
    "num_beams": int,
    "length_penalty": float,
    "num_draft_tokens": int,
}


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
    given = read_config(path)
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    keys = set(fields) - {"text", "default_systems"}
    known_keys(given, keys, f"{path}")
    values = {key: value for key, value in given.items() if value is not None}
    values |= {"output_dir": output_dir} if output_dir else {}
    values |= {"data_root": data_root} if data_root else {}
    values.setdefault("name", path.stem)
    for key in ("output_dir", "protocol"):
        if key not in values:
            raise UserError(f"{path}: expected the key {key!r}, and there is none")
    for key, value in values.items():
        values[key] = _value(key, value, str(fields[key].type))
    recipe = Recipe(text=path.read_text(), **values)
    if not recipe.systems:
        recipe = dataclasses.replace(recipe, systems=DEFAULT_SYSTEMS, default_systems=True)
    _check(recipe)
    return recipe


def _value(key: str, value: Any, kind: str) -> Any:
    if key == "stages":
        return tuple(_stage(item, at) for at, item in enumerate(_list(value, key)))
    if key == "systems":
        return tuple(_system(item, at) for at, item in enumerate(_list(value, key)))
    if key == "checkpoints":
        if isinstance(value, str):
            value = {arm: str(Path(value) / arm) for arm in ARMS}
        known_keys(_mapping(value, key), ARMS, key)
        if missing := [arm for arm in ARMS if not isinstance(value.get(arm), str)]:
            raise UserError(f"checkpoints: expected a folder for {missing[0]!r}, found none")
        return value
    if kind.startswith("tuple"):
        inner = int if "int" in kind else str
        items = tuple(typed(item, inner, key) for item in _list(value, key))
        if len(set(items)) < len(items):
            raise UserError(f"{key} has a value twice: {list(items)}")
        return items
    plain = bool if "bool" in kind else int if "int" in kind else str
    return typed(value, plain, key)


def _stage(item: Any, at: int) -> Stage:
    where = f"stage {at + 1}"
    _mapping(item, where)
    known_keys(item, {f.name for f in dataclasses.fields(Stage)}, where)
    name = _name(item.get("name"), where)
    groups = {key: _mapping(item.get(key) or {}, f"{where}, {key}") for key in ("shared", *ARMS)}
    flags = {action.dest for action in make_parser("")._actions} - {"help", "objective"}
    for key, group in groups.items():
        known_keys(group, flags, f"stage {name!r}, {key}")
    if "output_dir" in groups["shared"]:
        raise UserError(f"stage {name!r}: output_dir belongs beside shared, not into it")
    arms = tuple(_list(item.get("arms", list(ARMS)), f"{where}, arms"))
    if not arms or not set(arms) <= set(ARMS):
        raise UserError(f"stage {name!r}: arms may name {' and '.join(ARMS)}, got {list(arms)}")
    rows = item.get("distilled_rows")
    if rows is not None:
        rows = typed(rows, int, f"stage {name!r}, distilled_rows")
        if rows < 1:
            raise UserError(f"stage {name!r}: distilled_rows must be at least 1, got {rows}")
        if set(arms) != set(ARMS):
            raise UserError(
                f"stage {name!r}: distilled_rows needs both arms, as ar writes what tess learns; "
                f"got {list(arms)}"
            )
    beams = typed(item.get("distilled_num_beams", 1), int, f"stage {name!r}, distilled_num_beams")
    if beams < 1 or (beams > 1 and rows is None):
        raise UserError(
            f"stage {name!r}: distilled_num_beams must be at least 1, and above 1 beside "
            f"distilled_rows only, got {beams}"
        )
    place = item.get("output_dir")
    return Stage(name, **groups, arms=arms, output_dir=place, distilled_rows=rows,
                 distilled_num_beams=beams)


def _system(item: Any, at: int) -> System:
    where = f"system {at + 1}"
    _mapping(item, where)
    name = _name(item.get("name"), where)
    where = f"system {name!r}"
    known_keys(item, {"name", "decoder", *_DECODING, *_OPTIONS}, where)
    if name in RESERVED:
        raise UserError(f"{where}: this name is taken by a baseline; choose another")
    decoder = item.get("decoder")
    if decoder not in DECODERS:
        raise UserError(f"{where}: decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    given = {key: value for key, value in item.items() if value is not None}
    decoding = {k: typed(given[k], kind, f"{where}, {k}") for k, kind in _DECODING.items()
                if k in given}
    options = {key: _option(given[key], key, where) for key in _OPTIONS if key in given}
    system = System(name, decoder, **decoding, options=options)
    _check_system(system, where)
    return system


def _option(value: Any, key: str, where: str) -> Any:
    kind = str(_OPTIONS[key])
    if kind.startswith("list"):
        return [typed(item, str, f"{where}, {key}") for item in _list(value, key)]
    plain = int if "int" in kind else float if "float" in kind else str
    return typed(value, plain, f"{where}, {key}")


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
    for key in ("num_inference_steps", "gen_length", "num_draft_tokens"):
        value = getattr(system, key)
        if value is not None and value < 1:
            raise UserError(f"{where}: {key} must be at least 1, got {value}")
    if options.num_candidates < 1:
        raise UserError(f"{where}: num_candidates must be at least 1, got {options.num_candidates}")


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
    for key in ("test_limit", "batch_size", "timing_rows", "timing_repeats", "truncation_words",
                "lead_sentences"):
        value = getattr(recipe, key)
        if value is not None and value < 1:
            raise UserError(f"{key} must be at least 1, got {value}")
    if recipe.fixed_text is not None and not recipe.fixed_text.strip():
        raise UserError("fixed_text must have a word at least, got an empty text")
    if recipe.samples < 0:
        raise UserError(f"samples must not be negative, got {recipe.samples}")
    if recipe.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype must be float32 or bfloat16, got {recipe.dtype!r}")


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{what} must be a list, got {value!r}")
    return value


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a mapping of settings, got {value!r}")
    return value


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise UserError(
            f"{where}: expected a name of letters, digits and . _ + -, as it names files; "
            f"got {value!r}"
        )
    return value
