"""From a folder to a decoder."""

from dataclasses import replace
from pathlib import Path

import torch

from tess.backbones.causal_lm import DRAFT_TOKENS
from tess.decoders.autoregressive import ArDecoder, ArMtpDecoder
from tess.decoders.base import DECODERS, Decoder
from tess.decoders.beam_search import BeamDecoder, wants_beams
from tess.decoders.diffusion import TessDecoder
from tess.decoders.verified import DraftVerifyDecoder
from tess.errors import UserError
from tess.sampling.options import SamplerOptions
from tess.storage.hub import local_folder
from tess.storage.parts import Parts, kind_of, load_parts


def make_decoder(parts: Parts, options: SamplerOptions | None = None) -> TessDecoder | ArDecoder:
    """The decoder of a loaded (or just trained) checkpoint: `tess`, or else `ar`."""
    if parts.scheduler is not None:
        return TessDecoder(parts, options)
    refuse_options(options, ArDecoder.name)
    return ArDecoder(parts)


def refuse_options(options: SamplerOptions | None, name: str) -> None:
    if options is not None and (given := options.changed()):
        raise UserError(f"{', '.join(given)} belongs to the tess decoder, and this one is {name}")


def load_decoder(
    checkpoint: str | Path,
    decoder: str | None = None,
    dtype: torch.dtype = torch.float32,
    num_draft_tokens: int | None = None,
    options: SamplerOptions | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
) -> Decoder:
    """Load the decoder called `decoder` from a checkpoint.

    Args:
        checkpoint: a folder or hub id (`tess.storage.hub.local_folder`): a pipeline (tess), a
            causal model (ar), one that holds such ones as `tess/` and `ar/`, or a training's output
            with `final/`.
        decoder: "tess", "ar", "ar+mtp" or "tess+ar"; None takes tess where there is one, else ar.
        dtype: of the weights in memory; with float32 a text does not depend on its batch.
        num_draft_tokens: of ar+mtp, drafted at a time (3 unless given); changes speed alone.
        options: of tess: scheduler, stopping, guidance, candidates and the like. To choose by "ar"
            without a scorer takes the folder's own causal model.
        num_beams, length_penalty: of ar, see `BeamDecoder`; 1 beam unless given, and 1.0.

    Raises:
        UserError: no such folder, no such decoder in it, or a checkpoint that cannot be used.
    """
    if decoder is not None and decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}; known are {', '.join(DECODERS)}")
    if num_draft_tokens is not None and decoder != ArMtpDecoder.name:
        raise UserError("num_draft_tokens belongs to the ar+mtp decoder")
    folder = local_folder(checkpoint)
    found = _find(folder)
    if not found:
        raise UserError(
            f"{folder} is not a checkpoint: expected model_index.json (tess), a hybrid causal "
            "model's config.json (ar), or folders tess/ or ar/"
        )
    name = decoder or next(name for name in DECODERS if name in found)
    kind, *verifier = name.removesuffix("+mtp").split("+")
    if not {kind, *verifier} <= set(found):
        raise UserError(f"{folder} has no decoder {name!r}; it has {', '.join(found)}")
    beams = wants_beams(name, num_beams, length_penalty)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options is not None and options.needs_scorer:
        if "ar" not in found:
            raise UserError(f"choose_by 'ar' needs a causal model beside the denoiser in {folder}")
        options = replace(options, scorer=load_parts(found["ar"], dtype, device).model.eval())
    parts = load_parts(found[kind], dtype, device)
    if name == ArMtpDecoder.name:
        refuse_options(options, name)
        return ArMtpDecoder(parts, DRAFT_TOKENS if num_draft_tokens is None else num_draft_tokens)
    if verifier:
        return DraftVerifyDecoder(parts, load_parts(found["ar"], dtype, device), options=options)
    if beams:
        refuse_options(options, name)
        return BeamDecoder(parts, num_beams, length_penalty)
    return make_decoder(parts, options)


def _find(folder: Path) -> dict[str, Path]:
    """The checkpoints at or below `folder`, by decoder."""
    if kind := kind_of(folder):
        return {kind: folder}
    if kind := kind_of(folder / "final"):
        return {kind: folder / "final"}
    return {name: folder / name for name in ("tess", "ar") if kind_of(folder / name) == name}
