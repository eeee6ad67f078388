"use strict";
// The scale is even in the lightness of OKLab (Ottosson 2020, whose matrices these are), so it
// reads without colour too.
function oklch(lightness, chroma, hue) {
  const a = chroma * Math.cos(hue * Math.PI / 180), b = chroma * Math.sin(hue * Math.PI / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3;
  const linear = [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s]
    .map((x) => Math.min(1, Math.max(0, x)));
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  const gamma = (x) => x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055;
  return [`rgb(${linear.map((x) => Math.round(255 * gamma(x)))})`, luminance];
}

function makeColors() {
  colors = []; inks = [];
  for (let percent = 0; percent <= 100; percent++) {
    const sure = percent / 100;
    const lightness = dark.matches ? 0.27 + 0.67 * sure : 0.95 - 0.59 * sure;
    const along = dark.matches ? 1 - sure : sure;
    const chroma = 0.035 + 0.09 * Math.sin(Math.PI * (0.08 + 0.62 * along));
    const [color, luminance] = oklch(lightness, chroma, 95 + 165 * along);
    colors.push(color);
    inks.push(luminance > 0.179 ? "#000000" : "#ffffff");  // contrast of at least 4.5 either way
  }
  const stops = [0, 20, 40, 60, 80, 100].map((p) => colors[p] + " " + p + "%");
  $("ramp").style.background = "linear-gradient(to right, " + stops + ")";
  const values = getComputedStyle(document.documentElement);
  for (const name of ["ink", "muted", "accent", "bar", "mono"]) {
    theme[name] = values.getPropertyValue("--" + name);
  }
}

const isSpecial = (id) => data.special.includes(id);
const percent = (mille) => mille >= 1000 ? "> 99.9 %" : mille < 1 ? "< 0.1 %" :
  (mille / 10).toFixed(1) + " %";
const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
const labelOf = (id) => data.tokens[id];

function element(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

// ---- the map -------------------------------------------------------------------------------

function canvas(node, width, height) {
  const most = 32000 / Math.max(width, height);  // what browsers can do
  const ratio = Math.min(devicePixelRatio || 1, most);
  node.width = Math.round(width * ratio);
  node.height = Math.round(height * ratio);
  node.style.width = width + "px";
  node.style.height = height + "px";
  const pen = node.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px " + theme.mono;
  pen.textBaseline = "middle";
  return pen;
}

function room() {
  const bars = $("bars").offsetParent === null ? 0 : 90;
  return $("grid").clientWidth - 74 - bars;
}

function tokenWidths() {
  const pen = $("map").getContext("2d");
  pen.font = "11px " + theme.mono;
  return Array.from({length: view.width}, (_, p) => {
    const ids = [...new Set(view.steps.map((s) => s.ids[p]))];
    const wide = Math.max(...ids.map((id) => pen.measureText(labelOf(id)).width));
    return Math.ceil(Math.min(92, Math.max(20, wide + 12)));
  });
}

function measure() {
  const count = view.steps.length;
  const row = state.tokens ? 21 : Math.max(8, Math.min(26, Math.floor(560 / count)));
  const even = Math.max(7, Math.min(34, Math.floor(room() / view.width)));
  const x = [0];
  for (const wide of state.tokens ? tokenWidths() : Array(view.width).fill(even)) {
    x.push(x[x.length - 1] + wide);
  }
  layout = {row, x, width: x[view.width], height: HEAD + count * row};
  drawMap();
}

function drawMap() {
  const {x, width, height} = layout;
  const pen = canvas($("map"), width, height + 6);
  pen.fillStyle = theme.muted;
  let last = -40;
  for (let p = 0; p < view.width; p++) {
    const wanted = state.tokens || p === 0 || (p + 1) % 5 === 0;
    const ends = x[p] + pen.measureText(p + 1).width + 1;
    if (wanted && x[p] - last >= 24 && ends <= width) {
      pen.fillText(p + 1, x[p] + 1, HEAD / 2);
      last = x[p];
    }
  }
  view.steps.forEach((step, s) => {
    for (let p = 0; p < view.width; p++) drawCell(pen, step, s, p);
  });
  if (view.steps.length < data.num_steps) {
    pen.lineWidth = 2;
    pen.setLineDash([6, 4]);
    pen.strokeStyle = theme.ink;
    pen.beginPath();
    pen.moveTo(0, height + 3);
    pen.lineTo(width, height + 3);
    pen.stroke();
  }
}

function place(node, left, top, width, height) {
  for (const [name, value] of Object.entries({left, top, width, height})) {
    node.style[name] = value + "px";
  }
}

// Only frames move over the map: drawing it anew at every move of the pointer would be slow.
function draw() {
  const {row, x, width, height} = layout, p = state.position;
  place($("row"), 0, HEAD + state.step * row - 1, width, row + 1);
  $("column").hidden = p < 0;
  if (p >= 0) place($("column"), x[p] - 1, HEAD - 1, x[p + 1] - x[p] + 1, height - HEAD + 1);
  drawLabels();
  drawBars();
}

function drawCell(pen, step, s, p) {
  const {row, x} = layout;
  const sure = Math.round(step.confidence[p] / 10);
  const left = x[p], top = HEAD + s * row, wide = x[p + 1] - left - GAP, high = row - GAP;
  const outside = p > step.end;
  pen.globalAlpha = outside ? 0.22 : 1;
  pen.fillStyle = colors[sure];
  pen.fillRect(left, top, wide, high);
  pen.fillStyle = outside ? theme.ink : inks[sure];
  if (state.tokens) {
    pen.globalAlpha = outside ? 0.55 : 1;
    pen.fillText(fitting(pen, labelOf(step.ids[p]), wide - 8), left + 4, top + high / 2 + 1);
  }
  pen.globalAlpha = 1;
  if (step.from.has(p) && !outside) {
    const size = Math.min(7, Math.max(4, Math.min(wide, high) / 2));
    pen.beginPath();
    pen.moveTo(left + wide - size, top);
    pen.lineTo(left + wide, top);
    pen.lineTo(left + wide, top + size);
    pen.fill();
  }
}

const fittings = new Map();           // measuring a text is slow

function fitting(pen, text, room) {
  const key = room + " " + text;
  if (!fittings.has(key)) {
    let short = text;
    const characters = [...text];
    while (short !== "…" && pen.measureText(short).width > room + 0.5) {
      characters.pop();
      short = characters.join("") + "…";
    }
    fittings.set(key, short);
  }
  return fittings.get(key);
}

function drawLabels() {
  const {row, height} = layout;
  const pen = canvas($("labels"), 74, height + 6);
  pen.textAlign = "right";
  pen.fillStyle = theme.muted;
  pen.fillText("step", 30, HEAD / 2);
  pen.fillText("time", 68, HEAD / 2);
  const every = Math.ceil(13 / row);
  view.steps.forEach((step, s) => {
    const chosen = s === state.step;
    if (!chosen && (s % every || Math.abs(s - state.step) < every)) return;
    pen.fillStyle = chosen ? theme.accent : theme.muted;
    pen.font = (chosen ? "bold " : "") + "11px " + theme.mono;
    pen.fillText(s + 1, 30, HEAD + s * row + row / 2);
    pen.fillText(step.time.toFixed(2), 68, HEAD + s * row + row / 2);
  });
}

function changedIn(step) {
  return [...step.from.keys()].filter((p) => p <= step.end).length;
}

function drawBars() {
  const {row, height} = layout;
  const pen = canvas($("bars"), 86, height + 6);
  const counts = view.steps.map(changedIn);
  const most = Math.max(1, ...counts);
  pen.fillStyle = theme.muted;
  pen.fillText("changed", 4, HEAD / 2);
  const every = Math.ceil(13 / row);
  counts.forEach((count, s) => {
    const long = 48 * count / most, top = HEAD + s * row;
    pen.fillStyle = s === state.step ? theme.accent : theme.bar;
    if (count) pen.fillRect(4, top + 1, long, Math.max(2, row - GAP - 2));
    if (s === 0 || s % every) return;
    pen.fillStyle = theme.muted;
    pen.fillText(count, 8 + long, top + row / 2);
  });
}
