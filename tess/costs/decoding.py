"""Floating-point operations of texts that were written, by the numbers of the run itself.

What is counted, 2 operations for each multiply-add, with the formulas of `tess.costs.roofline`:
every weight of the backbone for each token that meets it (of the routed experts those that it is
sent to), attention over the positions that are there, the scan by chunks, the final norm and the
logits over the whole vocabulary; for tess also the noised embedding and what self-conditioning
takes.

- tess: the source once, then each evaluation over the text's own canvas; `nfe` has those of all
  candidates. In the joint layout the source is read in every evaluation.
- ar: the source once, which gives the first token, then a step for every further evaluation, each
  over one key more. With beams all of it `num_beams` times, as it is run.
- ar+mtp: the source once, then in every round the predictor over the tokens of the last round and
  over its drafts one by one, and the backbone over the last token and all drafts. The predictor
  reads the source too. Rounds of a text are counted as if each had added the same.
- tess+ar: tess as above, and the backbone over the source and in blocks over the drafts.

What is not: padding, which a batch adds; rows that wait for the last of their batch; element-wise
work such as the softmax, the activations and the drawing of noise; embedding look-ups; the time
embedding; the length head; the choice among candidates; and work that does not grow with the texts.
Of guidance both evaluations are counted, the one without a source as if it had it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tess.backbones.config import HybridConfig
from tess.config import CONCATENATING, TessConfig
from tess.costs.roofline import (
    Block,
    ar_step,
    draft_pass,
    expected_embedding_cost,
    head_cost,
    noised_embedding_cost,
    stack_cost,
    verify_pass,
)
from tess.decoders.base import Decoder, Generation
from tess.decoders.diffusion import TessDecoder
from tess.decoders.options import DECODERS
from tess.decoders.verified import DraftVerifyDecoder
from tess.errors import UserError
from tess.schedulers.simplex import NUM_TOP
from tess.text.tokenization import encode_sources


@dataclass(frozen=True)
class DecodingCost:
    """Floating-point operations of a run.

    total: of all texts. per_output_token: over all new tokens, padding left out; None: there is no
    token.
    """

    total: float
    per_output_token: float | None


def decoding_flops(
    config: TessConfig | HybridConfig,
    decoder_name: str,
    *,
    source_lengths: Sequence[int],
    nfe: Sequence[int],
    new_tokens: Sequence[int],
    canvas_lengths: Sequence[int] | None = None,
    num_beams: int = 1,
    num_draft_tokens: int | None = None,
    num_top: int | None = NUM_TOP,
    verifier: HybridConfig | None = None,
    num_drafted: Sequence[int] | None = None,
    num_verifications: Sequence[int] | None = None,
) -> DecodingCost:
    """What a run took: see the top of the file. Lists have a number for each text.

    Args:
        config: of the model; of tess+ar that of the denoiser.
        decoder_name: one of `tess.decoders.base.DECODERS`.
        source_lengths: tokens, special ones included, as the model read them.
        nfe, new_tokens, canvas_lengths, num_drafted, num_verifications: as in
            `tess.decoders.base.Generation`; the last two for tess+ar alone, canvases for it and
            tess.
        num_beams: of ar.
        num_draft_tokens: of ar+mtp.
        num_top: order statistics of a noised token; None: the noise is dense.
        verifier: of tess+ar, the causal model.

    Raises:
        UserError: an unknown decoder, a number that it needs and that is missing, a model of
            another kind, or lists of other lengths.
    """
    if decoder_name not in DECODERS:
        raise UserError(f"unknown decoder {decoder_name!r}; known are {', '.join(DECODERS)}")
    lists = {"source_lengths": source_lengths, "nfe": nfe, "new_tokens": new_tokens}
    if "tess" in decoder_name:
        lists["canvas_lengths"] = canvas_lengths
        denoiser, causal = config, verifier
    else:
        denoiser, causal = None, config
    if decoder_name == "tess+ar":
        lists |= {"num_drafted": num_drafted, "num_verifications": num_verifications}
    _check(decoder_name, denoiser, causal, lists)
    if decoder_name == "ar+mtp" and (num_draft_tokens is None or num_draft_tokens < 1):
        raise UserError(f"ar+mtp needs num_draft_tokens of 1 or more, got {num_draft_tokens}")
    if num_beams < 1 or (num_beams > 1 and decoder_name != "ar"):
        raise UserError(f"num_beams must be 1, or more for ar, got {num_beams} for {decoder_name}")

    def one(source: int, evaluations: int, tokens: int, *more: int) -> float:
        if decoder_name == "tess":
            return _tess_text(denoiser, source, more[0], evaluations, num_top)
        if decoder_name == "ar":
            return num_beams * _ar_text(causal, source, evaluations)
        if decoder_name == "ar+mtp":
            return _mtp_text(causal, source, evaluations, tokens, num_draft_tokens)
        canvas, drafted, checks = more
        drafts = evaluations - checks - 1
        return _tess_text(denoiser, source, canvas, drafts, num_top) + _verified_text(
            causal, source, tokens, drafted, checks
        )

    return _sum(one, lists, sum(new_tokens))


def flops_of_run(
    decoder: Decoder, source_lengths: Sequence[int], generations: Sequence[Generation]
) -> DecodingCost:
    """`decoding_flops` of the texts that a decoder gave for sources of these lengths.

    Raises:
        UserError: texts that were written in blocks, whose contexts nobody has noted.
    """
    config, verifier, writer = decoder.model.config, None, decoder
    if isinstance(decoder, DraftVerifyDecoder):
        writer, verifier = decoder.writer, config
        config = writer.model.config
    num_top = NUM_TOP
    if isinstance(writer, TessDecoder):
        if "block_length" in writer.options.changed():
            raise UserError("the cost of texts written in blocks is not known; leave block_length")
        settings = writer.pipeline.scheduler.config
        num_top = None
        if settings.noise != "dense":
            num_top = min(settings.num_top, config.vocab_size - 1)
    lists = {
        name: [getattr(text, field) for text in generations]
        for name, field in (
            ("nfe", "nfe"),
            ("new_tokens", "num_new_tokens"),
            ("canvas_lengths", "canvas_length"),
            ("num_drafted", "num_drafted"),
            ("num_verifications", "num_verifications"),
        )
    }
    return decoding_flops(
        config,
        decoder.name,
        source_lengths=source_lengths,
        num_beams=decoder.num_beams,
        num_draft_tokens=decoder.num_draft_tokens,
        num_top=num_top,
        verifier=verifier,
        **lists,
    )


def source_lengths(decoder: Decoder, texts: Sequence[str]) -> list[int]:
    """Tokens of the sources as `Decoder.generate` reads them, too long ones cut."""
    # not cut here: the decoder has warned of that
    longest = decoder._max_source_length()
    lengths = [len(row) for row in encode_sources(decoder.tokenizer, list(texts))]
    return lengths if longest is None else [min(length, longest) for length in lengths]


def _check(
    name: str,
    denoiser: TessConfig | HybridConfig | None,
    causal: TessConfig | HybridConfig | None,
    lists: dict[str, Sequence[int] | None],
) -> None:
    for part, kind in ((denoiser, TessConfig), (causal, HybridConfig)):
        needed = "tess" in name if kind is TessConfig else "ar" in name
        if needed and not isinstance(part, kind):
            raise UserError(f"{name} needs a {kind.__name__}, got {type(part).__name__}")
    if name == "ar+mtp" and not causal.num_nextn_predict_layers:
        raise UserError("ar+mtp needs a model with a multi-token predictor, got one without")
    rows = len(lists["source_lengths"])
    for key, numbers in lists.items():
        if numbers is None or None in numbers:
            raise UserError(f"{name} needs {key}, a number for each text")
        if len(numbers) != rows:
            raise UserError(f"{key} must have {rows} numbers, one for each text: {len(numbers)}")
    # an unused denoiser or canvas (no draft was asked for) may be 0
    for key in ("source_lengths", "nfe"):
        if rows and min(lists[key]) < 1:
            raise UserError(f"{key} must be at least 1, got {min(lists[key])}")


def _sum(
    one: Callable[..., float], lists: dict[str, Sequence[int]], new_tokens: int
) -> DecodingCost:
    total = float(sum(one(*numbers) for numbers in zip(*lists.values(), strict=True)))
    return DecodingCost(total, total / new_tokens if new_tokens else None)


# one text each; means over a text's steps are exact where the cost is linear in the context


def _tess_text(
    config: TessConfig, source: int, canvas: int, evaluations: int, num_top: int | None
) -> float:
    if not evaluations:
        return 0.0
    backbone, pattern = config.backbone_config, config.backbone_config.hybrid_override_pattern
    shift = int(config.label_shift)  # the source's last token is read in front of the target
    cached, positions, reading = source - shift, canvas + shift, 0.0
    if config.source_encoding == "joint":
        cached, positions = 0, source + canvas
    else:
        both = config.source_encoding == "bidirectional"
        reading = stack_cost(backbone, pattern, Block(1, cached, 0, bidirectional=both)).flops
    block = Block(1, positions, cached, bidirectional=True)
    step = stack_cost(backbone, pattern, block).flops + head_cost(backbone, canvas).flops
    return reading + evaluations * (step + _input_flops(config, source, canvas, num_top))


def _input_flops(config: TessConfig, source: int, canvas: int, num_top: int | None) -> float:
    """The canvas's embedding out of the noised simplex and the last prediction."""
    kind, backbone, width = config.self_conditioning, config.backbone_config, config.hidden_size
    product = expected_embedding_cost(backbone, canvas).flops  # over the vocabulary, as the logits
    if config.needs_whole_simplex:
        return 2 * product  # the prediction's logits once more, and the mixture's embedding
    noised = product
    if num_top is not None:
        noised = noised_embedding_cost(backbone, canvas, num_top).flops
    soft = product if kind is not None and "projection" not in kind else 0.0
    joins, joined = 0, canvas
    if config.deepmind_conditional:
        joins, joined = 4, canvas + (source if config.source_encoding == "joint" else 0)
    elif kind in CONCATENATING:
        joins = 2
    if joins and config.self_conditioning_mlp:
        joins += 1
    return noised + soft + 2 * joined * joins * width**2


def _reading(config: HybridConfig, source: int) -> float:
    """The source into the cache, and the logits after its last token."""
    block = Block(1, source, 0)
    stack = stack_cost(config, config.hybrid_override_pattern, block)
    return (stack + head_cost(config, 1)).flops


def _ar_text(config: HybridConfig, source: int, evaluations: int) -> float:
    steps = evaluations - 1  # the last token is not read
    return _reading(config, source) + steps * ar_step(config, 1, source + (steps - 1) / 2).flops


def _mtp_text(config: HybridConfig, source: int, evaluations: int, tokens: int, k: int) -> float:
    rounds = evaluations - 1
    if not rounds:
        return _reading(config, source)
    gain = (tokens - 1) / rounds
    middle = source + gain * (rounds - 1) / 2
    drafting = draft_pass(config, 1, source, 0).flops
    drafting += (rounds - 1) * draft_pass(config, 1, gain, middle - gain / 2).flops
    drafting += rounds * (k - 1) * draft_pass(config, 1, 1, middle + (k - 2) / 2).flops
    checking = rounds * verify_pass(config, 1, middle, k).flops
    return _reading(config, source) + drafting + checking


def _verified_text(
    config: HybridConfig, source: int, tokens: int, drafted: int, checks: int
) -> float:
    if not checks:
        return _reading(config, source)
    gain = (tokens - 1) / checks
    check = verify_pass(config, 1, source + gain * (checks - 1) / 2, drafted / checks)
    return _reading(config, source) + checks * check.flops
