"""What the user may ask of the tokens: given, forbidden and preferred ones, and how sure to be."""

# B examples, L positions, R rows of the flattened [B, L], V vocabulary, M soft tokens

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, SuppressTokensLogitsProcessor

from tess.errors import UserError
from tess.kernels.head import Processors
from tess.options import check_count
from tess.sampling.request import LONGEST_TEXT
from tess.schedulers.simplex import SoftTokens

TokenProcessor = LogitsProcessor | Callable[[Tensor, Tensor], Tensor]

FREE = -1
"""In `fixed_tokens`: the position is written by the model."""

_BLANK = re.compile(r"\{(\d{1,9})\}")


def chain(*processors: Processors | None) -> Processors | None:
    """Functions of (first row, logits [R, V]), one after the other; None where there is none."""
    given = [processor for processor in processors if processor is not None]
    if not given:
        return None

    def run(start: int, logits_RV: Tensor) -> Tensor:
        for processor in given:
            logits_RV = processor(start, logits_RV)
        return logits_RV

    return run


def token_processors(
    processors: Sequence[TokenProcessor], left_ids_BL: Tensor
) -> Processors | None:
    """transformers' logits processors over all positions at once.

    A processor is a function of (input_ids [N, l], scores [N, V]). For position l it sees the
    tokens left of it as they stand: those of the step before, since all positions are chosen
    together (and padding in the first step). A processor that looks at no tokens is therefore
    exact, and one that does, such as `NoRepeatNGramLogitsProcessor` or a ban on words of several
    tokens, takes effect a step later: not at all where there is one step.

    left_ids_BL: the tokens as they stand, without the source.
    """
    if not processors:
        return None
    length = left_ids_BL.shape[1]

    def run(start: int, logits_RV: Tensor) -> Tensor:
        rows_R = torch.arange(start, start + len(logits_RV), device=logits_RV.device)
        for processor in processors:
            if isinstance(processor, SuppressTokensLogitsProcessor):  # reads no tokens
                logits_RV = processor(rows_R[:, None], logits_RV)
                continue
            out_RV = torch.empty_like(logits_RV)
            for place in (rows_R % length).unique().tolist():
                here_N = (rows_R % length == place).nonzero()[:, 0]
                seen_Nl = left_ids_BL[rows_R[here_N] // length, :place]
                out_RV[here_N] = processor(seen_Nl, logits_RV[here_N])
            logits_RV = out_RV
        return logits_RV

    return run


def pin(
    model_output: Tensor | SoftTokens, token_ids_BL: Tensor, pinned_BL: Tensor
) -> Tensor | SoftTokens:
    """What a scheduler reads, certain of `token_ids_BL` where `pinned_BL` is true.

    model_output: tokens [B, L], logits [B, L, V] or `SoftTokens`.
    """
    if isinstance(model_output, SoftTokens):
        ids_BLM, probs_BLM = model_output
        pinned_BL1, new_BL1 = pinned_BL[..., None], token_ids_BL[..., None]
        # the token changes places with the first, so that ids stay distinct
        swapped_BLM = torch.where(ids_BLM == new_BL1, ids_BLM[..., :1], ids_BLM)
        swapped_BLM = torch.cat([new_BL1, swapped_BLM[..., 1:]], dim=-1)
        certain_BLM = torch.zeros_like(probs_BLM)
        certain_BLM[..., 0] = 1
        return SoftTokens(
            torch.where(pinned_BL1, swapped_BLM, ids_BLM),
            torch.where(pinned_BL1, certain_BLM, probs_BLM),
        )
    if not model_output.is_floating_point():
        return torch.where(pinned_BL, token_ids_BL, model_output)
    certain_BLV = torch.full_like(model_output, -torch.inf)
    certain_BLV.scatter_(-1, token_ids_BL[..., None], 0.0)
    return torch.where(pinned_BL[..., None], certain_BLV, model_output)


def fixed_canvas(
    fixed_tokens: Tensor, lengths: list[int] | None, batch: int, vocab_size: int
) -> tuple[Tensor, list[int]]:
    """Fixed tokens [B, L] on the canvas, and its lengths: their own width when none are given.

    Raises:
        UserError: another shape or type, ids outside the vocabulary, or more than the canvas holds.
    """
    if not isinstance(fixed_tokens, Tensor):
        raise UserError(
            f"fixed_tokens must be an int64 tensor [{batch}, length], got "
            f"{type(fixed_tokens).__name__}"
        )
    if fixed_tokens.dim() != 2 or len(fixed_tokens) != batch or fixed_tokens.dtype != torch.int64:
        raise UserError(
            f"fixed_tokens must be int64 [{batch}, length], -1 where the model writes, got "
            f"{fixed_tokens.dtype} {list(fixed_tokens.shape)}"
        )
    given = fixed_tokens[fixed_tokens != FREE]
    if given.numel() and not (0 <= int(given.min()) and int(given.max()) < vocab_size):
        raise UserError(
            f"fixed_tokens must be -1 or ids in 0..{vocab_size - 1}, got "
            f"{int(given.min())}..{int(given.max())}"
        )
    width = fixed_tokens.shape[1]
    lengths = [width] * batch if lengths is None else lengths
    longest = max(lengths)
    places = torch.arange(width, device=fixed_tokens.device)
    limits = torch.tensor(lengths, device=fixed_tokens.device)[:, None]
    if ((fixed_tokens != FREE) & (places >= limits)).any():
        raise UserError(
            f"fixed_tokens has tokens beyond the canvas of at most {longest} positions; ask for a "
            "longer gen_length"
        )
    canvas = fixed_tokens.new_full((batch, longest), FREE)
    shared = min(width, longest)
    canvas[:, :shared] = fixed_tokens[:, :shared]
    return canvas, lengths


def template_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> Tensor:
    """Fixed tokens [1, L] of a text with blanks: "{5}" is five tokens that the model writes.

    `</s>` follows the text, unless a blank ends it.

    Raises:
        UserError: no blank, or one that is not a number of tokens in braces.
    """
    pieces = _BLANK.split(template)
    if len(pieces) == 1 or any(set("{}") & set(text) for text in pieces[::2]):
        raise UserError(
            f"expected a template with blanks such as {{5}}, five tokens long, got {template!r}"
        )
    ids: list[int] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            check_count("a blank of the template", int(piece), LONGEST_TEXT)
            ids += [FREE] * int(piece)
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    if ids[-1] != FREE:
        ids.append(tokenizer.eos_token_id)
    return torch.tensor([ids])
