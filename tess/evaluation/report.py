"""The keys of an evaluation's `report.json`; their meaning is in `docs/evaluation.md`."""

from collections.abc import Mapping
from typing import Any, TypedDict


class Section(TypedDict):
    """The section `protocol`: figures by column and measure, and the test against the copy."""

    name: str
    what: str
    main: str
    signature: str
    signatures: dict[str, str]
    level: float
    resamples: int
    resampling_seed: int
    lead_sentences: int
    truncation_words: int
    figures: dict[str, dict[str, dict[str, float]]]
    against_copy: dict[str, dict[str, float]]


class Report(TypedDict):
    """All keys, in their order."""

    checkpoint: str
    decoder: str
    num_parameters: int
    data: dict[str, str | None]
    rows: int
    seed: int
    batch_size: int
    num_inference_steps: int | None
    scheduler: str | None
    timestep_spacing: str | None
    stopping: Mapping[str, float | None] | None
    length: str | None
    gen_length: int | None
    sampler: Mapping[str, Any] | None
    num_candidates: int
    choose_by: str | None
    nfe_mean: float
    nfe_max: int
    nfe_first_mean: float
    new_tokens: int
    generation_seconds: float
    new_tokens_per_second: float
    milliseconds_per_token: float | None
    tokens_per_forward: float
    num_draft_tokens: int | None
    num_beams: int
    length_penalty: float | None
    acceptance_length: float | None
    metrics: dict[str, dict[str, Any]]
    protocol: Section | None
    versions: dict[str, str]
    machine: dict[str, Any]
