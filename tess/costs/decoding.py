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


@dataclass(frozen=True)
class DecodingCost:
    """Floating-point operations of a run.

    total: of all texts. per_output_token: over all new tokens, padding left out; None: there is no
    token.
    """

    total: float
    per_output_token: float | None


# one text each; means over a text's steps are exact where the cost is linear in the context


def tess_flops(
    config: TessConfig, source: int, canvas: int, evaluations: int, num_top: int | None
) -> float:
    """Denoising: so many evaluations over a canvas.

    source, canvas: tokens; the source's special ones included, as the model reads them.
    num_top: order statistics of a noised token; None: the noise is dense.
    """
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


def ar_flops(config: HybridConfig, source: int, evaluations: int) -> float:
    """Token by token, that of the source among the evaluations."""
    steps = evaluations - 1  # the last token is not read
    return _reading(config, source) + steps * ar_step(config, 1, source + (steps - 1) / 2).flops


def mtp_flops(config: HybridConfig, source: int, evaluations: int, tokens: int, k: int) -> float:
    """As `ar_flops`, with k tokens drafted by the predictor in every round."""
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


def verified_flops(
    config: HybridConfig, source: int, tokens: int, drafted: int, checks: int
) -> float:
    """The causal model's part of a text; the drafts, checked so often, came from elsewhere."""
    if not checks:
        return _reading(config, source)
    gain = (tokens - 1) / checks
    check = verify_pass(config, 1, source + gain * (checks - 1) / 2, drafted / checks)
    return _reading(config, source) + checks * check.flops
