"""Run a decoder over text pairs, score it beside the copy-the-source baseline, write the report.

The keys of `report.json` are stable and documented in `docs/evaluation.md`.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from tess.costs.machine import evaluation_versions, machine
from tess.data.rows import Example
from tess.errors import UserError
from tess.evaluation.page import markdown
from tess.evaluation.protocol import protocol_section
from tess.metrics.bertscore import BertScore
from tess.metrics.catalog import get_protocol
from tess.metrics.scores import score
from tess.storage.files import write_atomically
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
    max_target_length: int | None  # the longest canvas that the model was trained on, in tokens
    tokenizer: PreTrainedTokenizerBase

    def describe(self) -> Any: ...  # `tess.decoders.base.Description`

    def generate(
        self,
        sources: list[str],
        *,
        num_inference_steps: int | None,
        gen_length: int | Sequence[int] | None,
        seed: int,
        batch_size: int,
        progress: bool,
        strict: bool,
    ) -> Sequence[Generation]: ...


@dataclass(frozen=True)
class Evaluation:
    """The contents of `report.json` and of the lines of `predictions.jsonl`."""

    report: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate(
    decoder: Decoder,
    examples: Sequence[Example],
    *,
    checkpoint: str,
    data: Mapping[str, str | None],
    num_inference_steps: int | None = None,
    gen_length: int | None = None,
    gold_length: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = False,
    strict: bool = False,
    protocol: str | None = None,
    bertscore: BertScore | None = None,
) -> Evaluation:
    """Generate one text per example (the first `limit` of them) and score them all.

    Args:
        checkpoint, data: where model and rows came from; they go into the report as they are.
        num_inference_steps: None takes the decoder's default; the report has the number itself,
            and null for a decoder without such steps.
        gen_length: most new tokens of every text; None: as the decoder has it.
        gold_length: a diagnostic, marked in the report: each canvas is as long as the row's first
            reference, which no system can know.
        strict: a source that is too long is an error, not a warning and a cut.
        protocol: a name of `tess.metrics.protocols`: the report gets a section of its figures with
            intervals, beside those of the baselines.
        bertscore: a loaded model, whose figure joins that section.

    Raises:
        UserError: no example, a limit or batch size under 1, two lengths, an unknown protocol,
        BERTScore without a protocol, or what the decoder refuses.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if gold_length and gen_length is not None:
        raise UserError(f"gold_length and gen_length exclude each other, got both ({gen_length})")
    if protocol is not None:
        get_protocol(protocol)  # an unknown one is refused before the long run
    elif bertscore is not None:
        raise UserError("bertscore is part of a protocol's section; name a protocol as well")
    examples = list(examples[:limit])
    if not examples:
        raise UserError("expected at least one example to evaluate, got none")
    sources = [example.source for example in examples]
    references = [list(example.references) for example in examples]

    if num_inference_steps is None:
        num_inference_steps = decoder.default_num_inference_steps
    start = time.perf_counter()
    generations = decoder.generate(
        sources,
        num_inference_steps=num_inference_steps,
        gen_length=_gold_lengths(decoder, references) if gold_length else gen_length,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        strict=strict,
    )
    seconds = time.perf_counter() - start
    assert len(generations) == len(examples), "a decoder gives one text per source"

    described = decoder.describe()
    texts = [generation.text for generation in generations]
    several = described.num_candidates > 1
    firsts = _first_candidates(generations) if several else generations
    nfe = [int(generation.nfe) for generation in generations]
    nfe_first = [int(generation.nfe) for generation in firsts]
    length = described.length if gen_length is None else "fixed"
    metrics = {"system": score(texts, references, sources)}
    if several:
        metrics["first_candidate"] = score([one.text for one in firsts], references, sources)
    metrics["copy_source"] = score(sources, references, sources)
    section = None
    if protocol is not None:
        systems = {"system": texts}
        if several:
            systems["first_candidate"] = [one.text for one in firsts]
        section = protocol_section(
            protocol,
            systems,
            references,
            sources,
            task=data.get("task"),
            samples=f"{described.num_candidates}-{described.choose_by}" if several else "1",
            bertscore=bertscore,
        )
    new_tokens = sum(int(generation.num_new_tokens) for generation in generations)
    report = {
        "checkpoint": checkpoint,
        "decoder": decoder.name,
        "num_parameters": decoder.num_parameters,
        "data": dict(data),
        "rows": len(examples),
        "seed": seed,
        "batch_size": batch_size,
        "num_inference_steps": num_inference_steps,
        "scheduler": described.scheduler,
        "timestep_spacing": described.timestep_spacing,
        "stopping": described.stopping,
        "length": "gold" if gold_length else length,
        "gen_length": gen_length,
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
            [one.num_verifications for one in generations], new_tokens
        ),
        "metrics": metrics,
        "protocol": section,
        "versions": evaluation_versions(),
        "machine": machine(),
    }
    predictions = [
        {
            "source": example.source,
            "references": list(example.references),
            "prediction": generation.text,
            "nfe": int(generation.nfe),
            "num_new_tokens": int(generation.num_new_tokens),
        }
        for example, generation in zip(examples, generations, strict=True)
    ]
    if several:
        for row, first in zip(predictions, firsts, strict=True):
            row["first_prediction"] = first.text
    return Evaluation(report, predictions)


def _gold_lengths(decoder: Decoder, references: Sequence[Sequence[str]]) -> list[int]:
    """Tokens of the first references, `</s>` included, as training cuts them."""
    ids = encode_texts(decoder.tokenizer, [row[0] for row in references])
    longest = decoder.max_target_length
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
    all (an older file stays as it was when writing fails), and return their paths."""
    lines = [json.dumps(row, ensure_ascii=False) for row in evaluation.predictions]
    contents = (
        json.dumps(evaluation.report, ensure_ascii=False, indent=2, allow_nan=False),
        markdown(evaluation.report).rstrip("\n"),
        "\n".join(lines),
    )
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, contents, strict=True):
        write_atomically(path, text + "\n")
    return paths
