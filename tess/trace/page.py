"""The denoising of a batch as one page: a map of the confidence at every position and step."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tess.sampling.steps import StepTrace
from tess.trace.data import trace_data
from tess.trace.map_script import MAP
from tess.trace.steps_script import STEPS

SCRIPT = MAP + STEPS

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1b1e22;
  --muted: #575f69; --line: #d9dce0; --accent: #b83a08; --mark: #fde4d3; --bar: #aab2bc;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --card: #1b1e23; --ink: #e9ebee;
  --muted: #a4adb8; --line: #343a42; --accent: #ffb066; --mark: #4a3019; --bar: #596370; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1560px; margin: 0 auto; padding: 24px 20px 40px; }
header { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: baseline;
  margin-bottom: 16px; }
h1 { font-size: 22px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 12px; font-weight: 600; color: var(--muted); margin: 0 0 4px; }
ul { display: flex; flex-wrap: wrap; gap: 6px; margin: 0; padding: 0; list-style: none; }
li { font-size: 12.5px; color: var(--muted); border: 1px solid var(--line); border-radius: 5px;
  padding: 1px 8px; overflow-wrap: anywhere; }
b { color: var(--ink); font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; margin-bottom: 12px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px 28px; }
.pair p, #text { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
#choice { display: block; margin-bottom: 12px; }
#choice select { width: 100%; }
select, button { font: inherit; color: var(--ink); background: var(--card); cursor: pointer;
  border: 1px solid var(--line); border-radius: 7px; padding: 5px 12px; }
button:hover, select:hover { border-color: var(--muted); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#play { min-width: 96px; }
#text { font-size: 18px; line-height: 2; margin-bottom: 12px; }
.token { border-bottom: 4px solid; padding: 1px 0; }
.changed { font-weight: 650; background: var(--mark); }
.special { font: 13px var(--mono); color: var(--muted); margin-left: 3px; }
.pointed { outline: 2px solid var(--accent); }
.bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
#slider { flex: 1 1 180px; accent-color: var(--accent); min-width: 120px; }
#facts { display: flex; flex-wrap: wrap; gap: 2px 20px; margin-top: 10px; font-size: 13.5px;
  color: var(--muted); font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; align-items: center; font-size: 12.5px;
  color: var(--muted); margin-bottom: 10px; }
.legend span, .legend label { display: inline-flex; gap: 6px; align-items: center; }
.legend label { margin-left: auto; cursor: pointer; color: var(--ink); }
#ramp { width: 150px; height: 12px; border-radius: 3px; border: 1px solid var(--line); }
.swatch { width: 14px; height: 14px; border-radius: 2px; background: var(--bar); }
.swatch.corner { background: linear-gradient(225deg, var(--ink) 35%, var(--bar) 36%); }
.swatch.after { opacity: 0.25; }
#grid { display: flex; }
#labels, #bars { flex: none; }
#scroll { overflow-x: auto; overflow-y: hidden; flex: 0 1 auto; min-width: 0; position: relative; }
.frame { position: absolute; pointer-events: none; border: 2px solid var(--accent); }
#column { border-width: 1px; }
canvas { display: block; }
#map { cursor: crosshair; touch-action: pan-x pan-y; }
#stop { margin: 8px 0 0 74px; font-size: 13px; color: var(--muted); }
#tip { position: fixed; z-index: 1; max-width: min(320px, 92vw); background: var(--card);
  border: 1px solid var(--muted); border-radius: 8px; padding: 8px 12px; pointer-events: none;
  box-shadow: 0 6px 20px rgb(0 0 0 / 0.25); font-size: 13px; }
#tip .name { font: 600 16px var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; }
#tip dl { display: grid; grid-template-columns: auto 1fr; gap: 0 12px; margin: 4px 0 0; }
#tip dt { color: var(--muted); }
#tip dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
[hidden] { display: none !important; }
footer { font-size: 12.5px; color: var(--muted); }
kbd { font: 12px var(--mono); border: 1px solid var(--line); border-radius: 4px; padding: 0 5px;
  color: var(--ink); }
@media (max-width: 640px) { main { padding: 14px 10px 24px; } .pair { grid-template-columns: 1fr; }
  .card { padding: 12px; } #bars { display: none; } #stop { margin-left: 0; }
  #text { font-size: 16px; } .legend label { margin-left: 0; } }
"""

BODY = """
<main>
<header><h1>Denoising, step by step</h1><ul id="settings" aria-label="Settings"></ul></header>
<noscript><p class="card">This page draws its map with a script, and scripts are switched off.</p>
</noscript>
<label id="choice"><select id="example" aria-label="Example"></select></label>
<section class="card pair">
<div><h2>Source</h2><p id="source" dir="auto"></p></div>
<div><h2>Final text</h2><p id="final" dir="auto"></p></div>
</section>
<section class="card">
<h2>The text at the chosen step</h2>
<p id="text" dir="auto"></p>
<div class="bar">
<button id="play" type="button">▶ Play</button>
<button id="previous" type="button" aria-label="Previous step">‹</button>
<button id="next" type="button" aria-label="Next step">›</button>
<input id="slider" type="range" min="0" value="0" step="1" aria-label="Step">
</div>
<div id="facts"></div>
</section>
<section class="card">
<div class="legend">
<span>probability of the token&nbsp; 0 <i id="ramp"></i> 1</span>
<span><i class="swatch corner"></i> changed in this step</span>
<span><i class="swatch after"></i> after the text’s end</span>
<label><input id="tokens" type="checkbox"> tokens in the cells</label>
</div>
<div id="grid">
<canvas id="labels" aria-hidden="true"></canvas>
<div id="scroll"><canvas id="map" role="img" aria-label="Confidence: a row for each step, a column
for each position. The keys [ and ] walk along the positions."></canvas>
<div id="row" class="frame"></div><div id="column" class="frame" hidden></div></div>
<canvas id="bars" aria-hidden="true"></canvas>
</div>
<p id="stop"></p>
</section>
<footer><kbd>←</kbd> <kbd>→</kbd> step &ensp; <kbd>Space</kbd> play &ensp; <kbd>[</kbd> <kbd>]</kbd>
position &ensp; <kbd>n</kbd> <kbd>p</kbd> example &ensp; <kbd>t</kbd> tokens in the cells</footer>
<div id="tip" role="status" hidden></div>
</main>
"""


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
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Denoising, step by step</title>\n<style>{STYLE}</style>\n</head>\n<body>{BODY}"
        f'<script type="application/json" id="data">{as_inline_json(packed(data))}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
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
