const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = {example: 0, step: 0, position: -1, tokens: false, timer: 0};
const HEAD = 18, GAP = 1;
let view = null;                      // the example on show, unpacked
let layout = null;                    // where its cells are
let colors = [], inks = [];           // by confidence in percent
let theme = {};                       // the page's colours and fonts

function unpack(packed) {
  const steps = [];
  let ids = packed.first;
  for (const step of packed.steps) {
    ids = ids.slice();
    const from = new Map();
    for (let i = 0; i < step.changes.length; i += 2) {
      from.set(step.changes[i], ids[step.changes[i]]);
      ids[step.changes[i]] = step.changes[i + 1];
    }
    steps.push({...step, ids, from, joined: new Map(step.joined)});
  }
  const width = Math.max(...steps.map((s) => Math.min(s.end + 1, ids.length)));
  return {...packed, steps, width, length: ids.length};
}

// ---- the text, the line above the map, the tooltip ----------------------------------------

function showText() {
  const step = view.steps[state.step];
  const out = $("text");
  out.replaceChildren();
  let repeated = 1;
  for (let p = 0; p < Math.min(step.end + 1, view.length); p++) {
    const id = step.ids[p], special = isSpecial(id);
    const piece = step.joined.has(p) ? step.joined.get(p) : labelOf(id);
    if (piece === "") continue;
    repeated = special && p && id === step.ids[p - 1] ? repeated + 1 : 1;
    if (repeated > 1) {                // a canvas has long runs of padding
      out.lastChild.textContent = piece + "×" + repeated;
      continue;
    }
    const node = element("span", special ? piece : piece.replaceAll("␣", " "));
    node.className = "token" + (special ? " special" : "") + (step.from.has(p) ? " changed" : "") +
      (p === state.position ? " pointed" : "");
    node.style.borderBottomColor = colors[Math.round(step.confidence[p] / 10)];
    node.dataset.position = p;
    out.append(node);
  }
}

// The map must not move under the pointer when another step's text has more lines.
function reserve() {
  const chosen = state.step, out = $("text");
  const long = (s) => s.ids.slice(0, s.end + 1).reduce((n, id) => n + labelOf(id).length, 0);
  const byLength = view.steps.map((s, number) => [long(s), number]).sort((a, b) => b[0] - a[0]);
  out.style.minHeight = "";
  for (const [, number] of byLength.slice(0, 5)) {
    state.step = number;
    showText();
    keepHeight();
  }
  state.step = chosen;
}

function keepHeight() {
  const out = $("text");
  out.style.minHeight = Math.ceil(out.getBoundingClientRect().height) + "px";
}

function showStatus() {
  const step = view.steps[state.step];
  const inside = Math.min(step.end + 1, view.length);
  const facts = [["step", state.step + 1 + " of " + view.steps.length],
    ["time", step.time.toFixed(3)],
    ["changed", state.step ? String(changedIn(step)) : "–"],
    ["mean probability", percent(Math.round(mean(step.confidence.slice(0, inside))))],
    ["mean entropy", (mean(step.entropy.slice(0, inside)) / 100).toFixed(2) + " nats"]];
  $("facts").replaceChildren(...facts.map(([name, value]) => {
    const node = element("span", name + " ");
    node.append(element("b", value));
    return node;
  }));
  $("slider").value = state.step;
  $("slider").setAttribute("aria-valuetext", "step " + (state.step + 1));
}

function showStop() {
  const made = view.steps.length, notes = [];
  if (made < data.num_steps) {
    notes.push("Stopped after step " + made + " of " + data.num_steps + ": the text was done.");
  }
  notes.push(view.nfe + " network evaluations.");
  if (view.width < view.length) {
    notes.push("Not drawn: " + (view.length - view.width) +
      " positions that were behind the text's end in every step.");
  }
  $("stop").textContent = notes.join(" ");
}

function showTip(x, y) {
  const tip = $("tip"), p = state.position, step = view.steps[state.step];
  if (p < 0) { tip.hidden = true; return; }
  const change = state.step === 0 ? "first step" :
    step.from.has(p) ? "from " + labelOf(step.from.get(p)) : "no";
  const rows = [["probability", percent(step.confidence[p])],
    ["entropy", (step.entropy[p] / 100).toFixed(2) + " nats"],
    ["position", p + 1 + " of " + view.length],
    ["step", state.step + 1 + ", time " + step.time.toFixed(3)],
    ["changed", change]];
  if (step.joined.get(p)) rows.push(["begins", step.joined.get(p)]);
  if (p > step.end) rows.push(["", "after the end: no text"]);
  const list = element("dl");
  for (const [name, value] of rows) list.append(element("dt", name), element("dd", value));
  tip.replaceChildren(element("div", labelOf(step.ids[p]), "name"), list);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const wide = document.documentElement.clientWidth;
  const left = x + 16 + box.width > wide ? x - 16 - box.width : x + 16;
  tip.style.left = Math.max(4, Math.min(left, wide - box.width - 4)) + "px";
  tip.style.top = Math.max(4, Math.min(y + 16, innerHeight - box.height - 4)) + "px";
}

function tipAtCell() {
  const scroll = $("scroll"), left = layout.x[state.position], right = layout.x[state.position + 1];
  if (left < scroll.scrollLeft) scroll.scrollLeft = left;
  else if (right > scroll.scrollLeft + scroll.clientWidth) {
    scroll.scrollLeft = right - scroll.clientWidth;
  }
  const box = $("map").getBoundingClientRect();
  showTip(box.left + left,
    box.top + HEAD + (state.step + 1) * layout.row);
}

// ---- what moves ----------------------------------------------------------------------------

function refresh() {
  draw();
  showText();
  keepHeight();
  showStatus();
  if (state.position < 0) $("tip").hidden = true;
}

function goto(step) {
  state.step = Math.max(0, Math.min(view.steps.length - 1, step));
  refresh();
  if (state.position >= 0 && !$("tip").hidden) tipAtCell();
}

function point(position) {
  state.position = Math.max(-1, Math.min(view.width - 1, position));
  refresh();
}

function pause() {
  clearInterval(state.timer);
  state.timer = 0;
  $("play").textContent = "▶ Play";
}

function play() {
  if (state.timer) return pause();
  if (state.step === view.steps.length - 1) goto(0);
  $("play").textContent = "❚❚ Pause";
  const pace = Math.max(60, Math.min(450, 6000 / view.steps.length));
  state.timer = setInterval(() => {
    goto(state.step + 1);
    if (state.step === view.steps.length - 1) pause();
  }, pace);
}

function show(example) {
  pause();
  state.example = (example + data.examples.length) % data.examples.length;
  view = unpack(data.examples[state.example]);
  state.position = -1;
  state.step = view.steps.length - 1;
  $("example").value = state.example;
  $("source").textContent = view.source;
  $("final").textContent = view.text;
  $("slider").max = view.steps.length - 1;
  showStop();
  measure();
  reserve();
  refresh();
}

function cellAt(event) {
  const box = $("map").getBoundingClientRect();
  const across = event.clientX - box.left;
  const step = Math.floor((event.clientY - box.top - HEAD) / layout.row);
  const position = layout.x.findIndex((x, p) => p < view.width && across < layout.x[p + 1]);
  if (step < 0 || step >= view.steps.length || position < 0 || across < 0) return null;
  return {step, position};
}

function onMap(event) {
  const cell = cellAt(event);
  if (!cell) return point(-1);
  if (!state.timer) state.step = cell.step;
  point(cell.position);
  showTip(event.clientX, event.clientY);
}

const KEYS = {
  ArrowLeft: () => goto(state.step - 1), ArrowUp: () => goto(state.step - 1),
  ArrowRight: () => goto(state.step + 1), ArrowDown: () => goto(state.step + 1),
  Home: () => goto(0), End: () => goto(view.steps.length - 1),
  " ": play, n: () => show(state.example + 1), p: () => show(state.example - 1),
  t: () => $("tokens").click(), Escape: () => point(-1),
  "[": () => { point(Math.max(0, state.position - 1)); tipAtCell(); },
  "]": () => { point(state.position + 1); tipAtCell(); },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  const at = event.target.tagName;
  if (at === "SELECT" || (event.key === " " && (at === "BUTTON" || event.target === $("tokens")))) {
    return;
  }
  event.preventDefault();
  KEYS[event.key]();
});
$("map").addEventListener("pointermove", onMap);
$("map").addEventListener("pointerdown", onMap);
for (const id of ["map", "text"]) {   // a lifted finger leaves too, but its place stays shown
  $(id).addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") point(-1);
  });
}
document.addEventListener("pointerdown", (event) => {
  if (!$("map").contains(event.target) && !$("text").contains(event.target)) point(-1);
});
$("text").addEventListener("pointerover", (event) => {
  if (!("position" in event.target.dataset)) return;
  const position = Number(event.target.dataset.position);
  if (position === state.position) return;
  state.position = position;
  draw();
  for (const node of $("text").children) {
    node.classList.toggle("pointed", Number(node.dataset.position) === position);
  }
  showTip(event.clientX, event.clientY);
});
$("slider").addEventListener("input", () => { pause(); goto(Number($("slider").value)); });
$("play").addEventListener("click", play);
$("previous").addEventListener("click", () => { pause(); goto(state.step - 1); });
$("next").addEventListener("click", () => { pause(); goto(state.step + 1); });
$("example").addEventListener("change", () => show(Number($("example").value)));
$("tokens").addEventListener("change", () => {
  state.tokens = $("tokens").checked;
  measure();
  refresh();
});
addEventListener("resize", () => { measure(); reserve(); refresh(); });
dark.addEventListener("change", () => { makeColors(); measure(); refresh(); });

data.examples.forEach((example, number) => {
  const option = element("option", number + 1 + ". " + [...example.source].slice(0, 60).join(""));
  option.value = number;
  $("example").append(option);
});
$("choice").hidden = data.examples.length === 1;
for (const [name, value] of data.settings) {
  const chip = element("li", name + " ");
  chip.append(element("b", value));
  $("settings").append(chip);
}
makeColors();
show(0);
const whole = tokenWidths().reduce((a, b) => a + b, 0);
if (whole <= room() && view.steps.length <= 32) $("tokens").click();
