"""The report of a comparison as dataclasses, to JSON and back; keys: `docs/comparison.md`.

A field that is marked as optional is left out of the JSON where it is None.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

_OPTIONAL = {"optional": True}


@dataclass(frozen=True)
class Figure:
    """A measure with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired test: one system minus another, its interval, and p."""

    difference: float
    low: float
    high: float
    p_value: float


Figures = Mapping[str, Figure]
Differences = Mapping[str, Difference]
"""By the name of the measure."""


@dataclass(frozen=True)
class Spread:
    """Over seeds."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True)
class ProtocolFacts:
    """What is measured, and by what the comparison is judged (`main`)."""

    name: str
    what: str
    main: str
    level: float
    resamples: int
    signatures: Mapping[str, str]
    higher_is_better: Mapping[str, bool | None]


@dataclass(frozen=True)
class DataFacts:
    """Where the test rows are from."""

    task: str | None
    dataset: str | None
    split: str | None
    test_file: str | None
    test_limit: int | None
    detokenize: bool
    rows: int


@dataclass(frozen=True)
class TrainedRun:
    """One finished training of a stage."""

    decoder: str
    seed: int
    updates: int
    weights: str


@dataclass(frozen=True)
class StageFacts:
    """A stage; shared, differing: settings of its arms; data: see `rows.training_facts`."""

    name: str
    arms: list[str]
    shared: Mapping[str, Any]
    differing: Mapping[str, list[Any]]
    data: Mapping[str, Any]
    runs: list[TrainedRun]


@dataclass(frozen=True)
class Training:
    """The stages, or the checkpoints that were there, with as many updates as their folders say."""

    allowed_differences: list[str]
    checkpoints_differ_in: Mapping[str, list[Any]]
    checkpoints: Mapping[str, str] | None = field(default=None, metadata=_OPTIONAL)
    updates: Mapping[str, int | None] | None = field(default=None, metadata=_OPTIONAL)
    stages: list[StageFacts] | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class Baselines:
    """Texts that need no model."""

    lead_sentences: int
    truncation_words: int
    truncation_words_are: str
    fixed_text: str | None = field(metadata=_OPTIONAL)
    measures: Mapping[str, Figures]


@dataclass(frozen=True)
class DecoderFacts:
    """How a system writes."""

    num_parameters: int
    scheduler: str | None
    timestep_spacing: str | None
    stop_patience: int | None
    num_candidates: int
    choose_by: str | None
    num_beams: int
    num_draft_tokens: int | None
    length: str | None
    sources_cut: int


@dataclass(frozen=True)
class Cost:
    """By count, a text or a token each."""

    nfe_mean: float
    nfe_max: int
    new_tokens_mean: float
    tokens_per_forward: float
    acceptance_length: float | None
    flops_per_output_token: float | None
    flops_note: str | None


@dataclass(frozen=True)
class Verdict:
    """Whether the main measure is better, with intervals that do not meet."""

    better_than_copy: bool
    better_than_untrained: bool


@dataclass(frozen=True)
class SeedResult:
    """One system with one seed."""

    signature: str
    measures: Figures
    against_greedy_ar: Differences | None
    against_copy: Differences
    exact_equal_to_ar: float | None
    intervals_apart: Verdict
    empty_texts: int
    cost: Cost


@dataclass(frozen=True)
class SystemResult:
    """One system; seeds: by their number as text, the first in the tables."""

    settings: Mapping[str, Any]
    decoder: DecoderFacts
    seeds: Mapping[str, SeedResult]
    over_seeds: Mapping[str, Spread]

    @property
    def first(self) -> SeedResult:
        """The figures of the first seed."""
        return next(iter(self.seeds.values()))


@dataclass(frozen=True)
class Sample:
    """What all systems wrote for one row."""

    row: int
    source: str
    references: list[str]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Results:
    """All that the same seeds give again."""

    protocol: ProtocolFacts
    data: DataFacts
    seeds: list[int]
    batch_size: int
    training: Training
    weights: Mapping[str, Mapping[str, str]]
    baselines: Baselines
    greedy_ar: str | None
    systems: Mapping[str, SystemResult]
    samples: list[Sample]


@dataclass(frozen=True)
class Speed:
    """Of one training."""

    stage: str
    decoder: str
    seed: int
    seconds_per_update: float | None


@dataclass(frozen=True)
class Latency:
    """One text at a time."""

    median_ms: float
    p90_ms: float
    mean_ms: float
    new_tokens_per_second: float
    texts: int
    repeats: int


@dataclass(frozen=True)
class Throughput:
    """In batches; None: the memory was too small."""

    batch_size: int
    new_tokens_per_second: float | None
    texts: int
    texts_per_second: float | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class Timing:
    """One system; setting: what a time depends on beside the system."""

    setting: Mapping[str, Any]
    latency: Latency
    throughput: list[Throughput]
    peak_memory_bytes: int | None
    peak_memory_batch_size: int
    load_average: float | None


@dataclass(frozen=True)
class Timings:
    """What a clock or a memory counter said."""

    dtype: str
    seconds_per_update: list[Speed]
    systems: Mapping[str, Timing]


@dataclass(frozen=True)
class Report:
    """`report.json`; recipe: its text."""

    name: str
    results: Results
    timings: Timings
    environment: Mapping[str, Any]
    recipe: str


def to_json(value: Any) -> Any:
    """What JSON can hold of a dataclass of this file."""
    if is_dataclass(value):
        pairs = ((item, getattr(value, item.name)) for item in fields(value))
        return {
            item.name: to_json(own)
            for item, own in pairs
            if not (own is None and "optional" in item.metadata)
        }
    if isinstance(value, Mapping):
        return {key: to_json(own) for key, own in value.items()}
    return [to_json(own) for own in value] if isinstance(value, list) else value


def from_json(kind: Any, value: Any) -> Any:
    """A dataclass of this file out of what `to_json` gave.

    Raises:
        KeyError, TypeError, AttributeError: something else.
    """
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [one for one in typing.get_args(kind) if one is not types.NoneType]
        return None if value is None else from_json(kinds[0], value) if len(kinds) == 1 else value
    if is_dataclass(kind):
        known = typing.get_type_hints(kind)
        return kind(**{
            item.name: from_json(known[item.name], value.get(item.name))
            if "optional" in item.metadata
            else from_json(known[item.name], value[item.name])
            for item in fields(kind)
        })
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return [from_json(inner[0], own) for own in value]
    if inner:
        return {key: from_json(inner[1], own) for key, own in value.items()}
    return value


def without_samples(report: Report) -> Report:
    """For passing on: the licence of the texts may forbid it."""
    return dataclasses.replace(report, results=dataclasses.replace(report.results, samples=[]))
