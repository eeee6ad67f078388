"""The decoder of one system of a comparison, out of the checkpoints of one seed."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tess.comparison.arms import check_checkpoints, last_arms
from tess.comparison.recipe import ARMS, UNTRAINED, UNTRAINED_STEPS, System
from tess.comparison.state import Comparison, Models
from tess.decoders.autoregressive import ArMtpDecoder
from tess.decoders.base import Decoder, Generation, OnBatch
from tess.decoders.load import load_decoder
from tess.errors import UserError
from tess.sampling.options import SamplerOptions
from tess.storage.kept import digest_folder
from tess.storage.parts import kind_of, load_parts

UNTRAINED_SYSTEM = System(UNTRAINED, "tess", num_inference_steps=UNTRAINED_STEPS, untrained=True)
"""The tess model of the comparison's sizes with random weights by the seed."""


def find_models(run: Comparison) -> None:
    """Give a comparison its checkpoints, and drop the default systems that they cannot serve.

    Raises:
        UserError: no checkpoint, one of the wrong kind, two that differ where that is not allowed,
            or a system with more steps than the checkpoint has.
    """
    for seed in run.recipe.seeds:
        run.models[seed] = gather_models(
            _places(run, seed), run.folder / f"models.seed{seed}", seed
        )
    found = []
    for models in run.models.values():
        parts = {arm: load_parts(models.folder / arm) for arm in ARMS}
        found.append(check_checkpoints(parts["tess"], parts["ar"], run.recipe.allow_differences))
    run.differing = found[0]
    _check_steps(run.systems, parts["tess"].scheduler.config.num_train_timesteps)
    config = json.loads((run.first_models.folder / "ar" / "config.json").read_text())
    if run.recipe.default_systems and not config.get("num_nextn_predict_layers"):
        name = ArMtpDecoder.name
        run.systems = [system for system in run.systems if system.decoder != name]
        run.say(f"the AR checkpoint has no multi-token predictor; {name} is left out")


def _check_steps(systems: Sequence[System], most: int) -> None:
    for system in systems:
        steps = system.num_inference_steps
        if steps is not None and steps > most and not system.untrained:
            raise UserError(
                f"system {system.name!r}: num_inference_steps must be from 1 to {most}, the number "
                f"of training steps, got {steps}"
            )


def _places(run: Comparison, seed: int) -> dict[str, Path]:
    if run.recipe.checkpoints:
        named = run.recipe.checkpoints.items()
        return {arm: Path(place.replace("{seed}", str(seed))) for arm, place in named}
    return {kind: arm.final for kind, arm in last_arms(run.arms, run.recipe, seed).items()}


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
        return _untrained(models)
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


def _untrained(models: Models) -> Decoder:
    decoder = load_decoder(models.folder, "tess")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(models.seed)
        fresh = type(decoder.model)(decoder.model.config)
    decoder.model.load_state_dict(fresh.state_dict())
    return decoder


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
    steps = steps_of(system, decoder)
    return decoder.generate_ids(
        decoder.encode(sources, warn=False).rows,
        num_inference_steps=steps,
        gen_length=system.gen_length,
        seed=seed,
        batch_size=batch_size,
        on_batch=on_batch,
    )
