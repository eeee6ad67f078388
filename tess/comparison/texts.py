"""What the systems wrote for all test rows, kept on disk.

Texts are in `systems/NAME.seedN.jsonl`, beside what they depend on in a `.json`. They are not
written again while that stays the same: settings, weights, seed, rows, batch size, type and device.
"""

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tess.comparison.progress import row_work
from tess.comparison.recipe import System
from tess.comparison.report import DecoderFacts, from_json
from tess.comparison.state import Comparison, Models
from tess.comparison.systems import load_system, write_texts
from tess.decoders.base import Decoder, Generation
from tess.errors import UserError
from tess.storage.files import write_atomically
from tess.storage.kept import digest, keep, kept
from tess.version import VERSION

_KEPT = [item.name for item in fields(Generation) if item.name not in ("token_ids", "first")]


@dataclass(frozen=True)
class Written:
    """The texts of one system with one seed, without their token ids, and what they cost."""

    decoder: DecoderFacts
    flops_per_output_token: float | None
    flops_note: str | None
    texts: Sequence[Generation]


def write_all(run: Comparison) -> dict[int, dict[str, Written]]:
    """The texts of all systems: seed -> system -> texts.

    Raises:
        UserError: a system that cannot be loaded, or texts that are not there where only a report
            is asked for.
    """
    return {
        seed: {system.name: _write(run, system, models) for system in run.systems}
        for seed, models in run.models.items()
    }


def _write(run: Comparison, system: System, models: Models) -> Written:
    recipe, label = run.recipe, f"{system.name}, seed {models.seed}"
    path = run.folder / "systems" / f"{system.name}.seed{models.seed}.json"
    size = {"batch_size": recipe.batch_size, "dtype": recipe.dtype}
    key = texts_key(system, models, run.sources, **size)
    work, reports = row_work(system), run.only == "report"
    if (found := _kept(path, key, ("device",) if reports else ())) is not None:
        run.progress.skip(work * len(run.sources))
        if not reports:
            run.say(f"{label}: texts are there already")
        return found
    if reports:
        raise UserError(f"the texts of {label} are not written yet; run --only decode")
    run.progress.begin(f"write {label}")
    decoder = load_system(system, models, recipe.dtype)
    texts = write_texts(
        system, decoder, run.sources, seed=models.seed, batch_size=recipe.batch_size,
        on_batch=lambda texts: run.progress.advance(len(texts) * work),
    )
    written = _describe(decoder, run.sources, texts)
    changed = " anew, as settings or weights have changed" if path.exists() else ""
    _keep(path, key, written)
    cut = written.decoder.sources_cut
    cut = f", {cut} sources cut to the model's longest" if cut else ""
    run.say(f"{label}: {len(texts)} texts written{changed}{cut}")
    return written


def texts_key(
    system: System, models: Models, sources: Sequence[str], *, batch_size: int, dtype: str
) -> dict[str, Any]:
    """All that the texts of a system depend on."""
    return {
        "system": system.settings(),
        "weights": dict(models.weights),
        "seed": models.seed,
        "rows": len(sources),
        "sources": digest(list(sources)),
        "batch_size": batch_size,
        "dtype": dtype,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {
            "tess": VERSION,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
    }


def _describe(decoder: Decoder, sources: Sequence[str], texts: Sequence[Generation]) -> Written:
    """What the report says of a decoder, and its floating-point operations per output token."""
    read = decoder.encode(sources, warn=False)
    flops = why = None
    try:
        flops = decoder.cost([len(row) for row in read.rows], texts).per_output_token
    except UserError as error:  # a kind of decoding whose cost is not known
        why = str(error)
    found = decoder.describe()
    facts = DecoderFacts(
        num_parameters=decoder.num_parameters,
        scheduler=found.scheduler,
        timestep_spacing=found.timestep_spacing,
        stop_patience=found.stopping and found.stopping["patience"],
        num_candidates=found.num_candidates,
        choose_by=found.choose_by,
        num_beams=found.num_beams,
        num_draft_tokens=found.num_draft_tokens,
        length=found.length,
        sources_cut=read.num_cut,
    )
    return Written(facts, flops, why, texts)


def _kept(path: Path, key: Mapping[str, Any], ignoring: Collection[str]) -> Written | None:
    """The description in `path` (.json) and the texts beside it (.jsonl); None: write them anew."""
    described = kept(path, key, ignoring)
    texts_path = path.with_suffix(".jsonl")
    if described is None or not texts_path.is_file():
        return None
    try:
        lines = texts_path.read_text(encoding="utf-8").split("\n")
        texts = [_text(json.loads(line)) for line in lines if line]
    except ValueError:
        return None
    flops = described.pop("flops_per_output_token"), described.pop("flops_note")
    found = Written(from_json(DecoderFacts, described), *flops, texts)
    return found if len(texts) == key["rows"] else None


def _text(row: dict[str, Any]) -> Generation:
    if row["num_drafted"] and not row["num_verifications"]:
        # version 0.1 did not count the checks of ar+mtp: each evaluation but the source's is one
        row["num_verifications"] = row["nfe"] - 1
    return Generation(token_ids=[], **row)


def _keep(path: Path, key: Mapping[str, Any], written: Written) -> None:
    """Write texts, then what they depend on."""
    rows = [{name: getattr(text, name) for name in _KEPT} for text in written.texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # so that it never describes rows of another run
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path.with_suffix(".jsonl"), lines)
    flops = {name: getattr(written, name) for name in ("flops_per_output_token", "flops_note")}
    keep(path, key, asdict(written.decoder) | flops)
