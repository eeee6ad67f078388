"""Run a decoder over text pairs, score it beside the copy-the-source baseline, write the report.

The keys of `report.json` are stable and documented in `docs/evaluation.md`.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from tess.costs.machine import MACHINE, VERSIONS, environment
from tess.data.rows import Example
from tess.errors import UserError
from tess.evaluation.page import markdown
from tess.evaluation.partial import PARTIAL, PartialTexts
from tess.evaluation.protocol import protocol_section
from tess.evaluation.report import Report, Section
from tess.metrics.bertscore import BertScore
from tess.metrics.catalog import get_protocol
from tess.metrics.scores import score
from tess.progress import Progress
from tess.storage.files import write_atomically
from tess.storage.kept import digest
from tess.text.tokenization import encode_texts, target_layout

FILES = ("report.json", "report.md", "predictions.jsonl")


class Generation(Protocol):
    """What a decoder gives for one source."""

    text: str
    num_new_tokens: int  # new tokens that are not padding
    nfe: int  # network evaluations spent on this text, all candidates together
    num_verifications: int  # checks of a draft
    first: "Generation | None"  # the first candidate, where there were several


class Decoder(Protocol):
    """The part of a decoder (`tess.decoders.base`) that evaluation uses."""

    name: str
    num_parameters: int
    default_num_inference_steps: int | None  # None: it has no such thing
    max_target_length: int | None  # of a canvas, in tokens; None: it writes on none
    tokenizer: PreTrainedTokenizerBase

    def describe(self) -> Any: ...  # `tess.decoders.base.Description`

    def generate(self, sources: list[str], **options: Any) -> Sequence[Generation]: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows are written and scored.

    Args:
        num_inference_steps: None takes the decoder's default; the report has the number itself,
            and null for a decoder without such steps.
        gen_length: most new tokens of every text; None: as the decoder has it.
        gold_length: a diagnostic, marked in the report: each canvas is as long as the row's first
            reference, which no system can know.
        limit: only so many rows, the first.
        strict: a source that is too long is an error, not a warning and a cut.
        protocol: a name of `tess.metrics.protocols`: the report gets a section of its figures with
            intervals, beside those of the baselines.

    Raises:
        UserError: a number under 1, two lengths, or an unknown protocol.
    """

    num_inference_steps: int | None = None
    gen_length: int | None = None
    gold_length: bool = False
    seed: int = 0
    batch_size: int = 8
    limit: int | None = None
    strict: bool = False
    protocol: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "gen_length", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.gold_length and self.gen_length is not None:
            raise UserError(
                f"gold_length and gen_length exclude each other, got both ({self.gen_length})"
            )
        if self.protocol is not None:
            get_protocol(self.protocol)


@dataclass(frozen=True)
class Rows:
    """Sources, and the references of each."""

    sources: list[str]
    references: list[list[str]]


@dataclass(frozen=True)
class Written:
    """A text for each source. num_kept: of them, those that an earlier process wrote.

    seconds: that generation took, in all processes together.
    """

    texts: Sequence[Generation]
    firsts: Sequence[Generation]
    seconds: float
    num_kept: int


@dataclass(frozen=True)
class Evaluation:
    """The contents of `report.json` and of the lines of `predictions.jsonl`."""

    report: Report
    predictions: list[dict[str, Any]]
    num_kept: int = 0


def evaluate(
    decoder: Decoder,
    examples: Sequence[Example],
    settings: Settings,
    *,
    checkpoint: str,
    data: Mapping[str, str | None],
    progress: bool = False,
    bertscore: BertScore | None = None,
    partial: Path | None = None,
    weights: Any = None,
) -> Evaluation:
    """Generate one text per example and score them all.

    Args:
        checkpoint, data: where model and rows came from; they go into the report as they are.
        progress: show how many texts are written, on stderr.
        bertscore: a loaded model, whose figure joins the protocol's section.
        partial: a file for the texts as they come; one that an equal evaluation left is gone on
            with.
        weights: what the checkpoint holds, as a hash: texts of another one are not reused.

    Raises:
        UserError: no example, BERTScore without a protocol, a gold length for a decoder without a
            canvas, or what the decoder refuses.
    """
    if bertscore is not None and settings.protocol is None:
        raise UserError("bertscore is part of a protocol's section; name a protocol as well")
    examples = examples[: settings.limit]
    if not examples:
        raise UserError("expected at least one example to evaluate, got none")
    rows = Rows(
        [example.source for example in examples],
        [list(example.references) for example in examples],
    )
    written = _write(decoder, rows, settings, progress, partial, weights)
    scored = _score(decoder, rows, written, settings, data.get("task"), bertscore)
    report = _report(decoder, written, settings, checkpoint, data, scored)
    return Evaluation(report, _predictions(rows, written), written.num_kept)


def _write(
    decoder: Decoder,
    rows: Rows,
    settings: Settings,
    progress: bool,
    partial: Path | None,
    weights: Any,
) -> Written:
    options = {
        "num_inference_steps": _steps(decoder, settings),
        "gen_length": settings.gen_length,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "strict": settings.strict,
    }
    if settings.gold_length:
        options["gen_length"] = _gold_lengths(decoder, rows.references)
    kept = None
    if partial is not None:
        depends_on = {
            "weights": weights, "decoder": decoder.name, **asdict(decoder.describe()), **options,
            "sources": digest(rows.sources), "machine": environment([*VERSIONS, *MACHINE]),
        }
        kept = PartialTexts(partial, depends_on)
    finished = dict(kept.finished) if kept else {}
    start = last = time.perf_counter()
    bar = Progress(len(rows.sources), "writing", "texts", done=len(finished), show=progress)

    def on_batch(batch: Mapping[int, Generation]) -> None:
        nonlocal last
        before, last = last, time.perf_counter()
        if kept:
            kept.add(batch, last - before)
        bar.advance(len(batch))

    with bar:
        texts = decoder.generate(rows.sources, **options, on_batch=on_batch, finished=finished)
    seconds = time.perf_counter() - start + (kept.seconds if kept else 0.0)
    assert len(texts) == len(rows.sources), "a decoder gives one text per source"
    firsts = _first_candidates(texts) if decoder.describe().num_candidates > 1 else texts
    return Written(texts, firsts, seconds, len(finished))


def _steps(decoder: Decoder, settings: Settings) -> int | None:
    given = settings.num_inference_steps
    return decoder.default_num_inference_steps if given is None else given


def _score(
    decoder: Decoder,
    rows: Rows,
    written: Written,
    settings: Settings,
    task: str | None,
    bertscore: BertScore | None,
) -> tuple[dict[str, Any], Section | None]:
    """The sections `metrics` and `protocol`."""
    described = decoder.describe()
    systems, samples = {"system": [one.text for one in written.texts]}, "1"
    if described.num_candidates > 1:
        systems["first_candidate"] = [one.text for one in written.firsts]
        samples = f"{described.num_candidates}-{described.choose_by}"
    metrics = {
        name: score(texts, rows.references, rows.sources)
        for name, texts in (systems | {"copy_source": rows.sources}).items()
    }
    if settings.protocol is None:
        return metrics, None
    return metrics, protocol_section(
        settings.protocol,
        systems,
        rows.references,
        rows.sources,
        task=task,
        samples=samples,
        bertscore=bertscore,
    )


def _report(
    decoder: Decoder,
    written: Written,
    settings: Settings,
    checkpoint: str,
    data: Mapping[str, str | None],
    scored: tuple[dict[str, Any], Section | None],
) -> Report:
    described, seconds = decoder.describe(), written.seconds
    nfe = [int(text.nfe) for text in written.texts]
    nfe_first = [int(text.nfe) for text in written.firsts]
    new_tokens = sum(int(text.num_new_tokens) for text in written.texts)
    length = described.length if settings.gen_length is None else "fixed"
    report = {
        "checkpoint": checkpoint,
        "decoder": decoder.name,
        "num_parameters": decoder.num_parameters,
        "data": dict(data),
        "rows": len(nfe),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "num_inference_steps": _steps(decoder, settings),
        "scheduler": described.scheduler,
        "timestep_spacing": described.timestep_spacing,
        "stopping": described.stopping,
        "length": "gold" if settings.gold_length else length,
        "gen_length": settings.gen_length,
        "sampler": described.sampler,
        "num_candidates": described.num_candidates,
        "choose_by": described.choose_by,
        "nfe_mean": sum(nfe) / len(nfe),
        "nfe_max": max(nfe),
        "nfe_first_mean": sum(nfe_first) / len(nfe),
        "new_tokens": new_tokens,
        "generation_seconds": seconds,
        "new_tokens_per_second": new_tokens / seconds if seconds > 0 else 0.0,
        "milliseconds_per_token": 1e3 * seconds / new_tokens if new_tokens else None,
        "tokens_per_forward": new_tokens / sum(nfe),
        "num_draft_tokens": described.num_draft_tokens,
        "num_beams": described.num_beams,
        "length_penalty": described.length_penalty,
        "acceptance_length": acceptance_length(
            [text.num_verifications for text in written.texts], new_tokens
        ),
        "metrics": scored[0],
        "protocol": scored[1],
        "versions": environment(VERSIONS),
        "machine": environment(MACHINE),
    }
    if described.generation_config is not None:
        report["generation_config"] = described.generation_config
    return report


def _predictions(rows: Rows, written: Written) -> list[dict[str, Any]]:
    predictions = [
        {
            "source": source,
            "references": references,
            "prediction": text.text,
            "nfe": int(text.nfe),
            "num_new_tokens": int(text.num_new_tokens),
        }
        for source, references, text in zip(
            rows.sources, rows.references, written.texts, strict=True
        )
    ]
    if written.firsts is not written.texts:
        for row, first in zip(predictions, written.firsts, strict=True):
            row["first_prediction"] = first.text
    return predictions


def _gold_lengths(decoder: Decoder, references: Sequence[Sequence[str]]) -> list[int]:
    """Tokens of the first references, `</s>` included, as training cuts them."""
    longest = decoder.max_target_length
    if longest is None:
        raise UserError(f"gold_length is of the canvas of tess, and {decoder.name} has none")
    ids = encode_texts(decoder.tokenizer, [row[0] for row in references])
    return [len(target_layout(decoder.tokenizer, row, longest)) for row in ids]


def _first_candidates(generations: Sequence[Generation]) -> Sequence[Generation]:
    """What one candidate alone would have been, for every source."""
    firsts = [generation.first for generation in generations]
    assert all(first is not None for first in firsts), "several candidates have a first"
    return firsts


def acceptance_length(num_verifications: Sequence[int], new_tokens: int) -> float | None:
    """Tokens that one check of a draft adds, on average: the drafts that stay, and its own one.

    num_verifications: of each text. None for a decoder that does not draft, and where no text
    needed a check.
    """
    checks = sum(num_verifications)
    # reading the source gave each text its first token
    return (new_tokens - len(num_verifications)) / checks if checks else None


def write_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `report.json`, `report.md` and `predictions.jsonl` into `folder`, each whole or not at
    all (an older file stays as it was when writing fails), and return their paths.

    Partial texts that are there go, as the evaluation is complete.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in evaluation.predictions]
    contents = (
        json.dumps(evaluation.report, ensure_ascii=False, indent=2, allow_nan=False),
        markdown(evaluation.report).rstrip("\n"),
        "\n".join(lines),
    )
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, contents, strict=True):
        write_atomically(path, text + "\n")
    (folder / PARTIAL).unlink(missing_ok=True)
    return paths
