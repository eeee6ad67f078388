"""What the denoising showed at every step, and the same as plain data.

Shapes: B examples, L target positions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tess.errors import UserError
from tess.sampling.steps import StepTrace
from tess.text.end_tokens import before_end, end_tokens
from tess.text.token_strings import TokenStrings
from tess.text.tokenization import decode


def trace_data(
    traces: Sequence[StepTrace],
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    texts: Sequence[str] | None,
    settings: Mapping[str, Any],
    *,
    lengths: Sequence[int] | None = None,
    nfe: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The trace as data that `json.dumps` takes.

    Args:
        traces: the steps of one batch, in order.
        sources, texts: of its B examples, as they are to be shown; texts None: those of the last
            step.
        settings: what to show beside them: names and plain values. `num_inference_steps`, where it
            is there, is the number of steps that were planned.
        lengths: each example's canvas; None: all L positions.
        nfe: network evaluations of each example; None: the steps it was evaluated in.

    Returns:
        `settings`; `num_steps`, those planned; `special_tokens`, the strings of those that occur;
        and `examples`, each with `source`, `text`, `nfe` and `steps`, the steps it was evaluated
        in, each with
            time: the time of the prediction.
            tokens: a string per position (`tess.text.token_strings`).
            joined: [position, text] where a character is spread over several tokens.
            confidence: the probability of each token, to 4 digits.
            entropy: nats, to 3 digits.
            changed: the positions whose token is another one than in the step before.
            end: the position of the first `</s>`, what follows it is no text; or their number.

    Raises:
        UserError: no step, other numbers of sources, texts, lengths or nfe than examples, or a
            value that is not a number.
    """
    if not traces:
        raise UserError("expected the trace of at least one step, got none")
    rows = len(traces[0].token_ids)
    for name, given in (("sources", sources), ("texts", texts), ("lengths", lengths), ("nfe", nfe)):
        if given is not None and len(given) != rows:
            raise UserError(f"the trace has {rows} examples, but there are {len(given)} {name}")
    strings = TokenStrings(tokenizer)
    examples = []
    for row in range(rows):
        length = traces[0].token_ids.shape[1] if lengths is None else lengths[row]
        steps = _steps(traces, row, length, strings, end_tokens(tokenizer))
        spent = len(steps) if nfe is None else nfe[row]
        last = decode(tokenizer, traces[-1].token_ids[row, :length].tolist())
        text = last if texts is None else texts[row]
        examples.append({"source": sources[row], "text": text, "nfe": spent, "steps": steps})
    used = {int(id_) for trace in traces for id_ in trace.token_ids.unique()}
    return {
        "settings": dict(settings),
        "num_steps": max(len(traces), settings.get("num_inference_steps") or 0),
        "special_tokens": sorted(strings.string(id_) for id_ in used if strings.is_special(id_)),
        "examples": examples,
    }


def _steps(
    traces: Sequence[StepTrace],
    row: int,
    length: int,
    strings: TokenStrings,
    ends: Sequence[int],
) -> list[dict[str, Any]]:
    steps = []
    before: list[int] | None = None
    for number, trace in enumerate(traces, 1):
        if not bool(trace.active[row]):
            continue
        ids = trace.token_ids[row, :length].tolist()
        log_probs = trace.log_probs[row, :length].tolist()
        entropies = trace.entropies[row, :length].tolist()
        if any(map(math.isnan, log_probs + entropies)):
            raise UserError(f"step {number} of example {row + 1} holds values that are not numbers")
        tokens = [strings.string(id_) for id_ in ids]
        pieces = strings.pieces(ids)
        steps.append(
            {
                "time": round(trace.timestep, 6),
                "tokens": tokens,
                "joined": [
                    [at, piece]
                    for at, (piece, id_) in enumerate(zip(pieces, ids, strict=True))
                    if piece != strings.pieces([id_])[0]
                ],
                "confidence": [round(math.exp(min(value, 0.0)), 4) for value in log_probs],
                "entropy": [round(value, 3) for value in entropies],
                "changed": [at for at in range(length) if before and ids[at] != before[at]],
                "end": before_end(ids, ends),
            }
        )
        before = ids
    return steps
