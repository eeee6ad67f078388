"""One system of a comparison: load it, let it write all test rows, keep what it wrote.

Texts are kept in `systems/NAME.seedN.jsonl` beside what they depend on, and are not written again
while that stays the same: settings, weights, seed, rows, batch size, type and device.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tess.comparison.arms import digest_folder
from tess.comparison.recipe import ARMS, UNTRAINED, UNTRAINED_STEPS, System
from tess.decoders.base import Decoder, Generation, OnBatch
from tess.decoders.diffusion import TessDecoder
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.sampling.options import SamplerOptions
from tess.storage.files import write_atomically
from tess.storage.kept import keep, kept
from tess.storage.parts import kind_of, load_parts
from tess.version import VERSION

UNTRAINED_SYSTEM = System(UNTRAINED, "tess", num_inference_steps=UNTRAINED_STEPS, untrained=True)
"""The tess model of the comparison's sizes with random weights by the seed."""

_KEPT = [f.name for f in dataclasses.fields(Generation) if f.name not in ("token_ids", "first")]


@dataclass(frozen=True)
class Models:
    """The two checkpoints of one seed. folder has both, as `tess/` and `ar/`."""

    seed: int
    folder: Path
    weights: Mapping[str, str]


def gather_models(places: Mapping[str, Path], folder: Path, seed: int) -> Models:
    """Links to the checkpoints, side by side as `load_decoder` takes them.

    Raises:
        UserError: no checkpoint, or one of the wrong kind.
    """
    weights = {}
    folder.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        place = Path(places[arm])
        if not place.is_dir():
            raise UserError(f"there is no folder {str(place)!r} for the {arm} checkpoint")
        place = place if kind_of(place) else place / "final"
        kind = kind_of(place)
        if kind != arm:
            found = "no checkpoint" if kind is None else f"a checkpoint of {kind}"
            raise UserError(f"expected a checkpoint of {arm} in {places[arm]}, found {found}")
        link = folder / arm
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(place.resolve(), folder.resolve()))
        weights[arm] = digest_folder(place)
    return Models(seed, folder, weights)


def load_system(system: System, models: Models, dtype: str) -> Decoder:
    """The decoder of a system, ready to write.

    Raises:
        UserError: what `load_decoder` refuses.
    """
    if system.untrained:
        return _untrained(system, models)
    options = SamplerOptions(**system.options) if "tess" in system.decoder else None
    try:
        return load_decoder(
            models.folder,
            system.decoder,
            getattr(torch, dtype),
            num_draft_tokens=system.num_draft_tokens,
            options=options,
            num_beams=system.num_beams,
            length_penalty=system.length_penalty,
        )
    except UserError as error:
        raise UserError(f"system {system.name!r}: {error}") from error


def _untrained(system: System, models: Models) -> TessDecoder:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = load_parts(models.folder / "tess")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(models.seed)
        model = type(parts.model)(parts.model.config)
    return TessDecoder(dataclasses.replace(parts, model=model.to(device)))


def steps_of(system: System, decoder: Decoder) -> int | None:
    """Inference steps of a system: its own or its decoder's, no more than there are."""
    if system.untrained:
        return min(system.num_inference_steps, decoder.default_num_inference_steps)
    return system.num_inference_steps or decoder.default_num_inference_steps


def write_texts(
    system: System,
    decoder: Decoder,
    sources: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> list[Generation]:
    """One text per source; those that are cut are counted in the report, not warned of here."""
    return decoder.generate_ids(
        decoder.encode(sources, warn=False).rows,
        num_inference_steps=steps_of(system, decoder),
        gen_length=system.gen_length,
        seed=seed,
        batch_size=batch_size,
        on_batch=on_batch,
    )


def texts_key(
    system: System,
    models: Models,
    sources: Sequence[str],
    *,
    batch_size: int,
    dtype: str,
) -> dict[str, Any]:
    """All that the texts of a system depend on."""
    rows = hashlib.sha256(json.dumps(list(sources)).encode()).hexdigest()[:16]
    return {
        "system": system.settings(),
        "weights": dict(models.weights),
        "seed": models.seed,
        "rows": len(sources),
        "sources": rows,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {
            "tess": VERSION,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
    }


def describe(
    decoder: Decoder, sources: Sequence[str], texts: Sequence[Generation]
) -> dict[str, Any]:
    """What the report says of a decoder, and its floating-point operations per output token."""
    read = decoder.encode(sources, warn=False)
    try:
        flops = decoder.cost([len(row) for row in read.rows], texts).per_output_token
        why = None
    except UserError as error:  # a kind of decoding whose cost is not known
        flops, why = None, str(error)
    found = decoder.describe()
    return {
        "num_parameters": decoder.num_parameters,
        "scheduler": found.scheduler,
        "timestep_spacing": found.timestep_spacing,
        "stop_patience": found.stopping and found.stopping["patience"],
        "num_candidates": found.num_candidates,
        "choose_by": found.choose_by,
        "num_beams": found.num_beams,
        "num_draft_tokens": found.num_draft_tokens,
        "length": found.length,
        "sources_cut": read.num_cut,
        "flops_per_output_token": flops,
        "flops_note": why,
    }


# ---- kept results ----


def kept_texts(
    path: Path, key: Mapping[str, Any], ignoring: Collection[str] = ()
) -> tuple[dict[str, Any], list[dict]] | None:
    """The description and rows in `path` (.json) and beside it (.jsonl); None: write them anew."""
    described = kept(path, key, ignoring)
    rows_path = path.with_suffix(".jsonl")
    if described is None or not rows_path.is_file():
        return None
    try:
        lines = rows_path.read_text(encoding="utf-8").split("\n")
        rows = [_checked(json.loads(line)) for line in lines if line]
    except ValueError:
        return None
    return (described, rows) if len(rows) == key["rows"] else None


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """Rows of versions that did not count the checks of ar+mtp: one for each evaluation more."""
    if row["num_drafted"] and not row["num_verifications"]:
        row["num_verifications"] = row["nfe"] - 1
    return row


def keep_texts(
    path: Path, key: Mapping[str, Any], described: Mapping[str, Any], texts: Sequence[Generation]
) -> list[dict[str, Any]]:
    """Write rows, then what they depend on; return the rows as they are kept."""
    rows = [{name: getattr(text, name) for name in _KEPT} for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # so that it never describes rows of another run
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path.with_suffix(".jsonl"), lines)
    keep(path, key, dict(described))
    return rows
