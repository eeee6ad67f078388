"""From a folder to a decoder."""

from dataclasses import replace
from pathlib import Path

import torch

from tess.backbones.causal_lm import DRAFT_TOKENS
from tess.backbones.damage import fault_in
from tess.decoders.autoregressive import ArDecoder, ArMtpDecoder
from tess.decoders.base import Decoder
from tess.decoders.beam_search import BeamDecoder, wants_beams
from tess.decoders.diffusion import TessDecoder
from tess.decoders.options import DECODERS
from tess.decoders.verified import DraftVerifyDecoder
from tess.errors import UserError
from tess.sampling.options import SamplerOptions
from tess.storage.hub import local_folder
from tess.storage.parts import Parts, kind_of, load_parts


def make_decoder(
    parts: Parts, options: SamplerOptions | None = None, *, chat: bool = False
) -> TessDecoder | ArDecoder:
    """The decoder of a loaded (or just trained) checkpoint: `tess`, or else `ar`."""
    if parts.scheduler is not None:
        return TessDecoder(parts, options)
    refuse_options(options, ArDecoder.name)
    return ArDecoder(parts, chat=chat)


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
    chat: bool = False,
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
        chat: of ar, ar+mtp and tess+ar: a source is the user's turn in the tokenizer's chat
            template.

    Raises:
        UserError: no such folder, no such decoder in it, or a checkpoint that cannot be used.
    """
    if decoder is not None and decoder not in DECODERS:
        raise UserError(f"unknown decoder {decoder!r}; known are {', '.join(DECODERS)}")
    if num_draft_tokens is not None and decoder != ArMtpDecoder.name:
        raise UserError("num_draft_tokens belongs to the ar+mtp decoder")
    folder = local_folder(checkpoint)
    found = find_checkpoints(folder)
    if not found:
        if fault := fault_in(folder):
            raise UserError(fault)
        raise UserError(
            f"{folder} is not a checkpoint: expected model_index.json (tess), a hybrid causal "
            "model's config.json (ar), or folders tess/ or ar/"
        )
    name = decoder or next(iter(found))
    kind, *verifier = name.removesuffix("+mtp").split("+")
    if not {kind, *verifier} <= set(found):
        raise UserError(f"{folder} has no decoder {name!r}; it has {', '.join(found)}")
    if chat and name == TessDecoder.name:
        raise UserError("chat belongs to the ar decoders, and this one is tess")
    beams = wants_beams(name, num_beams, length_penalty)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options is not None and options.needs_scorer:
        if "ar" not in found:
            raise UserError(f"choose_by 'ar' needs a causal model beside the denoiser in {folder}")
        options = replace(options, scorer=load_parts(found["ar"], dtype, device).model.eval())
    parts = load_parts(found[kind], dtype, device)
    if name == ArMtpDecoder.name:
        refuse_options(options, name)
        count = DRAFT_TOKENS if num_draft_tokens is None else num_draft_tokens
        return ArMtpDecoder(parts, count, chat=chat)
    if verifier:
        causal = load_parts(found["ar"], dtype, device)
        return DraftVerifyDecoder(parts, causal, options=options, chat=chat)
    if beams:
        refuse_options(options, name)
        return BeamDecoder(parts, num_beams, length_penalty, chat=chat)
    return make_decoder(parts, options, chat=chat)


def find_checkpoints(folder: Path) -> dict[str, Path]:
    """The checkpoints at or below `folder`, by decoder."""
    if kind := kind_of(folder):
        return {kind: folder}
    if kind := kind_of(folder / "final"):
        return {kind: folder / "final"}
    return {name: folder / name for name in ("tess", "ar") if kind_of(folder / name) == name}
