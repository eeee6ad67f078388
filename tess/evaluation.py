"""Run a decoder over text pairs, score it beside the copy-the-source baseline, write the report.

The keys of `report.json` are stable and documented in `docs/evaluation.md`.
"""

import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import tess
from tess.errors import UserError
from tess.loading import Example
from tess.metrics import score

PACKAGES = ("torch", "transformers", "diffusers", "sacrebleu", "rouge-score")
FILES = ("report.json", "report.md", "predictions.jsonl")


class Generation(Protocol):
    """What a decoder gives for one source."""

    text: str
    num_new_tokens: int  # new tokens that are not padding
    nfe: int  # network evaluations spent on this text


class Decoder(Protocol):
    """The part of a decoder (`tess.decoders`) that evaluation uses."""

    name: str
    num_parameters: int
    default_num_inference_steps: int | None  # None: it has no such thing
    num_draft_tokens: int | None  # None: it does not draft

    def generate(
        self,
        sources: list[str],
        *,
        num_inference_steps: int | None,
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
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = False,
    strict: bool = False,
) -> Evaluation:
    """Generate one text per example (the first `limit` of them) and score them all.

    Args:
        checkpoint, data: where model and rows came from; they go into the report as they are.
        num_inference_steps: None takes the decoder's default; the report has the number itself,
            and null for a decoder without such steps.
        strict: a source that is too long is an error, not a warning and a cut.

    Raises:
        UserError: no example, a limit or batch size under 1, or what the decoder refuses.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
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
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        strict=strict,
    )
    seconds = time.perf_counter() - start
    assert len(generations) == len(examples), "a decoder gives one text per source"

    texts = [generation.text for generation in generations]
    nfe = [int(generation.nfe) for generation in generations]
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
        "nfe_mean": sum(nfe) / len(nfe),
        "nfe_max": max(nfe),
        "new_tokens": new_tokens,
        "generation_seconds": seconds,
        "new_tokens_per_second": new_tokens / seconds if seconds > 0 else 0.0,
        "milliseconds_per_token": 1e3 * seconds / new_tokens if new_tokens else None,
        "tokens_per_forward": new_tokens / sum(nfe),
        "num_draft_tokens": decoder.num_draft_tokens,
        "acceptance_length": _acceptance_length(decoder, generations, new_tokens),
        "metrics": {
            "system": score(texts, references, sources),
            "copy_source": score(sources, references, sources),
        },
        "versions": _versions(),
        "machine": _machine(),
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
    return Evaluation(report, predictions)


def _acceptance_length(
    decoder: Decoder, generations: Sequence[Generation], new_tokens: int
) -> float | None:
    """Tokens that one check of a draft adds, on average: the drafts that stay, and its own one.

    None for a decoder that does not draft, and where no text needed a check.
    """
    checks = sum(int(generation.nfe) - 1 for generation in generations)
    if decoder.num_draft_tokens is None or checks == 0:
        return None
    return (new_tokens - len(generations)) / checks  # reading the source gave each its first


def prepare_output_dir(path: str | Path) -> Path:
    """Make the folder before the long run, so that an impossible one fails at once."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to output folder {str(folder)!r}: {error}") from error
    return folder


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


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text through a temporary file in the same folder and `os.replace`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already unless something failed


def markdown(report: Mapping[str, Any]) -> str:
    """`report.json` as a page to read: the metrics in a table, then speed, then the setting."""
    system, copy = report["metrics"]["system"], report["metrics"]["copy_source"]
    lines = [
        f"# {report['decoder']} on {_data_name(report['data'])}",
        "",
        "| metric | system | copy of the source |",
        "|---|---:|---:|",
        *(f"| {key} | {_cell(system[key])} | {_cell(copy[key])} |" for key in _numbers(system)),
        "",
        f"BLEU: `{system['bleu_signature']}`; chrF: `{system['chrf_signature']}`. ROUGE, BLEU, "
        "chrF, SARI, self_bleu and ibleu run to 100; the others are ratios and counts.",
        "",
        "| cost | |",
        "|---|---:|",
        f"| network evaluations per text, mean | {report['nfe_mean']:.2f} |",
        f"| network evaluations per text, maximum | {report['nfe_max']} |",
        f"| new tokens (without padding) | {report['new_tokens']} |",
        f"| generation, seconds | {report['generation_seconds']:.2f} |",
        f"| new tokens per second | {report['new_tokens_per_second']:.1f} |",
        f"| new tokens per network evaluation | {report['tokens_per_forward']:.2f} |",
        *_draft_lines(report),
        "",
        "| setting | |",
        "|---|---|",
    ]
    steps = report["num_inference_steps"]
    settings = {
        "checkpoint": report["checkpoint"],
        "parameters": f"{report['num_parameters']:,}",
        "num_inference_steps": "none" if steps is None else steps,
        "seed": report["seed"],
        "batch_size": report["batch_size"],
        **report["versions"],
        **{f"machine: {key}": value for key, value in report["machine"].items()},
    }
    lines += [f"| {key} | {_escape(value)} |" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _draft_lines(report: Mapping[str, Any]) -> list[str]:
    if report["acceptance_length"] is None:
        return []
    return [
        f"| drafted tokens per evaluation | {report['num_draft_tokens']} |",
        f"| tokens kept per evaluation of a draft | {report['acceptance_length']:.2f} |",
    ]


def summary(report: Mapping[str, Any]) -> str:
    """The figures that matter first, as a small text table for the terminal."""
    system, copy = report["metrics"]["system"], report["metrics"]["copy_source"]
    keys = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "sari", "self_bleu")
    keys += ("distinct2", "repeated_words", "length_ratio", "exact_copies", "empty_predictions")
    rows = [f"{key:<18}{_cell(system[key]):>10}{_cell(copy[key]):>10}" for key in keys]
    return "\n".join(
        [
            f"{report['decoder']} on {_data_name(report['data'])}, {report['rows']} rows",
            f"{'':<18}{'system':>10}{'copy':>10}",
            *rows,
            f"NFE mean {report['nfe_mean']:.2f}, max {report['nfe_max']}; "
            f"{report['new_tokens_per_second']:.1f} new tokens/s, "
            f"{report['tokens_per_forward']:.2f} tokens per evaluation",
        ]
    )


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    return [key for key, value in metrics.items() if not isinstance(value, str)]


def _cell(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _escape(value: object) -> str:
    return str(value).replace("|", "\\|")


def _data_name(data: Mapping[str, str | None]) -> str:
    if data.get("file"):
        return Path(data["file"]).name
    return f"{data['task']} ({data['dataset']}, {data['split']})"


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "tess-diffusion": tess.__version__,
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
