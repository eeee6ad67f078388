"""The denoising of a batch as one page: a map of the confidence at every position and step."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from transformers import PreTrainedTokenizerBase

from tess.sampling.steps import StepTrace
from tess.trace.data import trace_data


def _file(name: str) -> str:
    """A file beside this one, on lines of its own in the page."""
    return "\n" + resources.files("tess.trace").joinpath(name).read_text(encoding="utf-8")


def trace_page(
    traces: Sequence[StepTrace],
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    texts: Sequence[str] | None,
    settings: Mapping[str, Any],
    *,
    lengths: Sequence[int] | None = None,
    nfe: Sequence[int] | None = None,
) -> str:
    """A page of HTML that needs nothing beside it: no network, no other file.

    The arguments and errors are those of `tess.trace.data.trace_data`; settings that are None are
    left out. Write it as UTF-8.
    """
    data = trace_data(traces, tokenizer, sources, texts, settings, lengths=lengths, nfe=nfe)
    script = _file("map.js") + _file("steps.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_file("page.html").lstrip()).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=_file("page.css"),
        data=as_inline_json(packed(data)),
        script=script,
    )


def as_inline_json(data: Any) -> str:
    """JSON that no `</script>` or `<!--` in a string can end."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: no U+2028 either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(data: Mapping[str, Any]) -> dict[str, Any]:
    """`trace_data` made small: tokens by number, and after the first step only the changes.

    Confidence is in thousandths, entropy in hundredths of a nat; `changes` is a flat list of
    positions and tokens.
    """
    numbers: dict[str, int] = {}
    examples = []
    for example in data["examples"]:
        steps = []
        for step in example["steps"]:
            changes = [
                value
                for at in step["changed"]
                for value in (at, numbers.setdefault(step["tokens"][at], len(numbers)))
            ]
            steps.append(
                {
                    "time": step["time"],
                    "end": step["end"],
                    "changes": changes,
                    "joined": step["joined"],
                    "confidence": [round(1000 * value) for value in step["confidence"]],
                    "entropy": [round(100 * value) for value in step["entropy"]],
                }
            )
        first = [numbers.setdefault(token, len(numbers)) for token in example["steps"][0]["tokens"]]
        kept = {name: example[name] for name in ("source", "text", "nfe")}
        examples.append({**kept, "first": first, "steps": steps})
    return {
        "settings": [[k, str(v)] for k, v in data["settings"].items() if v is not None],
        "num_steps": data["num_steps"],
        "tokens": list(numbers),
        "special": [numbers[token] for token in data["special_tokens"] if token in numbers],
        "examples": examples,
    }
