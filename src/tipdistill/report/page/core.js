
"use strict";
// Text from the data reaches the page through text nodes and attributes that hold no markup, and in no other way.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NAMES = { 1: "uncertain, wrong", 2: "uncertain, agreed", 3: "confident and wrong", 4: "solved" };
const STATISTIC_NAMES = {
  entropy: "student entropy",
  reverse_kl: "reverse KL",
  forward_kl: "forward KL",
  teacher_entropy: "teacher entropy",
  student_logprob: "student log p",
  teacher_logprob: "teacher log p",
};
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "var(--ink)"];
const DASHES = ["", "6 3", "2 2", "7 3 2 3"];

const state = {
  set: 0, rule: 0, level: 0, shade: "quadrant", sort: "rollout", target: "q3", query: "", hexagon: -1,
  quadrants: new Set([1, 2, 3, 4]), current: -1,
};
const watchers = [];
/** Call `watcher` with the names of what changed: "set", "rule" (or retention), "shade", "filter". */
function watch(watcher) { watchers.push(watcher); }
function changed(...what) { for (const watcher of watchers) watcher(new Set(what)); }
function current() { return DATA.sets[state.set]; }

const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function drawn(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function option(value, text) { const node = element("option", { value }); node.textContent = text; return node; }

// Numbers.

function percent(share, digits) {
  const value = 100 * share;
  if (!Number.isFinite(value)) return "–";
  if (digits === undefined) {
    if (value > 0 && value < 0.05) return "<0.1 %";
    if (value >= 99.5 && value < 100) return ">99 %";
    digits = value > 0 && value < 9.95 ? 1 : 0;
  }
  return `${value.toFixed(digits)} %`;
}
function probability(share) { return share < 1e-4 ? "<0.01 %" : percent(share, share < 0.0995 ? 2 : 1); }
function count(value) { return value.toLocaleString("en-US"); }
function nats(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 100 ? value.toFixed(0) : size >= 0.01 ? value.toFixed(size >= 10 ? 1 : 2) : value.toExponential(1);
}
function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)} k`;
  return size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(3));
}
/** A rule and the retention it is shown at; one that keeps every token has none. */
function ruleAt(rule, retention) { return rule.whole ? ruleName(rule.name) : `${ruleName(rule.name)} at ${percent(retention)}`; }
function ruleName(name) {
  const known = {
    soft_or: "Soft-OR", soft_or_log: "Soft-OR (log)", q3: "Q3", entropy: "entropy", entropy_sampling: "entropy, sampled",
    divergence: "divergence", random: "random", gradient_norm: "gradient norm", gradient_norm_sampling: "gradient norm, sampled",
    "complement:soft_or": "bottom by Soft-OR",
    hellinger: "Hellinger", signal_to_curvature: "signal to curvature",
  };
  return known[name] ?? name;
}

// Text of tokens.

const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/u;
function codeOf(character) { return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`; }

/** Append text to a node; line breaks, tabs and characters that show nothing get a mark that copying leaves out. */
function fill(node, text) {
  let plain = "";
  const flush = () => { if (plain) node.append(plain); plain = ""; };
  for (const character of text) {
    if (!INVISIBLE.test(character)) { plain += character; continue; }
    flush();
    if (character === "\n") node.append(element("i", { class: "nl" }), "\n");
    else if (character === "\t") node.append(element("i", { class: "tab" }), "\t");
    else node.append(element("i", { class: "code", "data-code": codeOf(character) }));
  }
  flush();
}
/** The same as one string, for lists of tokens: spaces at the edges show. */
function visible(text) {
  if (text === "") return "∅";
  let shown = "";
  for (const character of text) {
    shown += character === "\n" ? "↵" : character === "\t" ? "⇥" : INVISIBLE.test(character) ? `⟨${codeOf(character)}⟩` : character;
  }
  return shown.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

// Arrays.

let bytes = null;
const unpacked = new Map();
async function unpackAll() {
  const compressed = Uint8Array.from(atob(DATA.blob), (character) => character.charCodeAt(0));
  DATA.blob = "";
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"));
  bytes = new Uint8Array(await new Response(stream).arrayBuffer());
}
/** The array that a place in the data stands for; its bytes lie plane by plane. */
function array(place) {
  let values = unpacked.get(place);
  if (values) return values;
  const type = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array }[place.type];
  const size = type.BYTES_PER_ELEMENT;
  const joined = new Uint8Array(place.length * size);
  for (let plane = 0; plane < size; plane++) {
    const from = place.at + plane * place.length;
    for (let item = 0; item < place.length; item++) joined[item * size + plane] = bytes[from + item];
  }
  values = new type(joined.buffer);
  unpacked.set(place, values);
  return values;
}

// A box beside the pointer.

const tip = element("div", { class: "tip", role: "status" });
tip.hidden = true;
document.body.append(tip);
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = event.target.getBoundingClientRect();
  const [x, y] = event.type.startsWith("focus") ? [box.right, box.bottom] : [event.clientX, event.clientY];
  tip.style.left = `${window.scrollX + Math.max(0, Math.min(x + 14, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${window.scrollY + y + 14}px`;
}
function hideTip() { tip.hidden = true; }
