
"use strict";
// The TIP map, and beside it each quadrant's shares and what the rule keeps of it.

const MAP = { width: 720, height: 500, left: 62, right: 8, top: 8, bottom: 44 };
const NARROW_MAP = { ...MAP, width: 430, height: 430, left: 50 };

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
const BLUES = [[[214, 230, 244], [107, 174, 214], [33, 113, 181], [8, 48, 107]], [[38, 58, 78], [46, 96, 140], [86, 156, 214], [205, 230, 252]]];
const ORANGES = [[[253, 190, 133], [240, 130, 50], [205, 85, 0], [120, 40, 0]], [[110, 60, 20], [190, 95, 30], [240, 140, 70], [255, 220, 185]]];
/** A colour for a density in 0..1, the denser the further from the paper. */
function densityColour(share, colours = BLUES) {
  const stops = colours[isDark() ? 1 : 0];
  const at = Math.min(2.999, 3 * share), from = Math.floor(at), part = at - from;
  return `rgb(${stops[from].map((value, i) => Math.round(value + part * (stops[from + 1][i] - value))).join(" ")})`;
}

function keptOfHexagons(set) {
  const levels = set.retentions.length, counts = array(set.map.kept[state.rule]);
  const kept = new Float64Array(array(set.map.tokens).length);
  for (let cell = 0; cell < kept.length; cell++)
    for (let level = 0; level <= state.level; level++) kept[cell] += counts[cell * levels + level];
  return kept;
}

function drawMap() {
  const set = current(), map = set.map;
  const size = $("hexagons").clientWidth < 560 ? NARROW_MAP : MAP;
  const xs = array(map.x), ys = array(map.y), tokens = array(map.tokens);
  const plot = { x: size.left, y: size.top, w: size.width - size.left - size.right, h: size.height - size.top - size.bottom };
  const toX = (h) => plot.x + (h * plot.w + 8) * (plot.w - 16) / plot.w;
  const toY = (logarithm) => plot.y + plot.h - ((logarithm - map.bottom) / (map.top - map.bottom)) * plot.h;
  const picture = drawn("svg", {
    viewBox: `0 0 ${size.width} ${size.height}`, role: "group", "aria-label": "Density of tokens over student entropy and divergence",
  });
  for (let decade = Math.ceil(map.bottom); decade <= map.top; decade++) {
    picture.append(drawn("line", { class: "grid", x1: plot.x, x2: plot.x + plot.w, y1: toY(decade), y2: toY(decade) }));
    const label = drawn("text", { class: "tick", x: plot.x - 8, y: toY(decade) + 4, "text-anchor": "end" });
    label.append(decade >= -2 && decade <= 2 ? String(+(10 ** decade).toFixed(2)) : "10", ...(decade >= -2 && decade <= 2 ? [] : [exponent(decade)]));
    picture.append(label);
  }
  for (const h of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    const label = drawn("text", { class: "tick", x: toX(h), y: plot.y + plot.h + 17, "text-anchor": "middle" });
    label.append(String(h));
    picture.append(label);
  }
  const [low, high] = set.entropy_range;
  picture.append(
    text("text", { x: plot.x + plot.w / 2, y: size.height - 6, "text-anchor": "middle" },
      size === MAP ? `student entropy ĥ (min–max, clipped at the 98th percentile: ${nats(low)} to ${nats(high)} nats)` : `student entropy ĥ (${nats(low)} to ${nats(high)} nats)`),
    text("text", { transform: `translate(13 ${plot.y + plot.h / 2}) rotate(-90)`, "text-anchor": "middle" }, "divergence KL(student ‖ teacher), nats"),
  );
  const halfWidth = 0.5 / map.columns * (plot.w - 16), third = plot.h / map.rows / 3;
  const outline = (x, y, scale) =>
    [[.5, -.5], [.5, .5], [0, 1], [-.5, .5], [-.5, -.5], [0, -1]]
      .map(([dx, dy]) => `${(x + dx * 2 * halfWidth * scale).toFixed(1)},${(y + dy * third * scale).toFixed(1)}`).join(" ");
  const most = Math.log(tokens.reduce((a, b) => Math.max(a, b), 1)) || 1;
  const cells = [];
  const layer = drawn("g");
  xs.forEach((x, cell) => {
    const density = Math.log(tokens[cell]) / most;
    const hexagon = drawn("polygon", { class: "hexagon", points: outline(toX(x), toY(ys[cell]), 1), fill: densityColour(density) });
    const inner = drawn("polygon", { class: "kept", fill: densityColour(density, ORANGES) });
    layer.append(hexagon, inner);
    cells.push({ hexagon, inner, x: toX(x), y: toY(ys[cell]) });
    const tell = (event) => showTip(event, `${count(tokens[cell])} tokens (${percent(tokens[cell] / set.tokens)})\nĥ ≈ ${x.toFixed(2)} (${nats(low + x * (high - low))} nats), divergence ≈ ${nats(10 ** ys[cell])} nats\n${ruleName(set.rules[state.rule].name)} keeps ${percent(keptOfHexagons(set)[cell] / tokens[cell])} of them`);
    hexagon.addEventListener("pointermove", tell);
    hexagon.addEventListener("pointerleave", hideTip);
    hexagon.addEventListener("click", () => { hideTip(); chooseHexagon(cell); });
  });
  picture.append(layer);
  const [atEntropy, atDivergence] = set.thresholds;
  const borderX = toX(atEntropy), borderY = toY(Math.log10(atDivergence));
  picture.append(
    drawn("line", { class: "border", x1: borderX, x2: borderX, y1: plot.y, y2: plot.y + plot.h }),
    drawn("line", { class: "border", x1: plot.x, x2: plot.x + plot.w, y1: borderY, y2: borderY }),
    drawn("line", { class: "axis", x1: plot.x, x2: plot.x, y1: plot.y, y2: plot.y + plot.h }),
    drawn("line", { class: "axis", x1: plot.x, x2: plot.x + plot.w, y1: plot.y + plot.h, y2: plot.y + plot.h }),
  );
  for (const number of [1, 2, 3, 4]) {
    const right = number < 3, above = number % 2 === 1;
    const share = set.shares.tokens[number - 1] / set.tokens;
    // beside the border, where a map has fewer tokens than at its edges, if there is room
    const roomy = borderX - plot.x > 128, x = right ? borderX + 8 : roomy ? borderX - 8 : plot.x + 6, anchor = right || !roomy ? "start" : "end";
    // where the left side is narrower than its words they stand in rows of their own
    const aside = right || roomy ? 0 : 34;
    const y = above ? plot.y + 13 + aside : plot.y + plot.h - 21 - aside;
    picture.append(
      text("text", { class: "corner", x, y, "text-anchor": anchor }, `Q${number} · ${percent(share)}`),
      text("text", { class: "corner-name", x, y: y + 15, "text-anchor": anchor }, NAMES[number]),
    );
  }
  $("hexagons").replaceChildren(picture);

  drawMap.kept = () => {
    const kept = keptOfHexagons(set);
    cells.forEach(({ inner, x, y }, cell) => {
      const share = kept[cell] / tokens[cell];
      // the area is the share; a rim of blue stays
      inner.setAttribute("points", share > 0 ? outline(x, y, 0.9 * Math.sqrt(share)) : "");
    });
  };
  drawMap.chosen = () => cells.forEach(({ hexagon }, cell) => hexagon.classList.toggle("chosen", cell === state.hexagon));
  drawMap.kept();
  drawMap.chosen();
}
function text(tag, attributes, content) { const node = drawn(tag, attributes); node.append(content); return node; }
function exponent(value) { return text("tspan", { dy: -5, "font-size": 8.5 }, String(value)); }

function drawQuadrants() {
  const set = current(), shares = set.shares;
  const keptTokens = shares.kept_tokens[state.rule][state.level], keptMass = shares.kept_mass[state.rule][state.level];
  const total = shares.mass.reduce((a, b) => a + b, 0) || 1;
  const body = element("tbody");
  const row = (label, kind, share, range) => {
    const track = element("div", { class: "track" });
    const bar = element("div", { class: `fill ${kind}` });
    bar.style.width = `${100 * Math.min(1, share)}%`;
    track.append(bar);
    if (range) {
      const bracket = element("div", { class: "range", title: `paper: ${100 * range[0]}–${100 * range[1]} %` });
      bracket.style.left = `${100 * range[0]}%`;
      bracket.style.width = `${100 * (range[1] - range[0])}%`;
      track.append(bracket);
    }
    const name = element("td"), value = element("td"), figure = element("td");
    name.textContent = label; value.append(track); figure.textContent = percent(share);
    body.append(element("tr", {}, name, value, figure));
  };
  const heading = (tag, name, note) => {
    const head = element("th", { colspan: 3, scope: "rowgroup" }), bold = element("b");
    bold.textContent = tag;
    head.append(bold, name);
    if (note) { const small = element("span", { class: "small" }); small.textContent = `  ${note}`; head.append(small); }
    body.append(element("tr", {}, head));
  };
  const range = (key) => DATA.paper[key];
  const words = (key) => `paper ${Math.round(100 * range(key)[0])}–${Math.round(100 * range(key)[1])} %`;
  for (const number of [1, 2, 3, 4]) {
    const key = `q${number}`, own = shares.tokens[number - 1];
    heading(`Q${number}`, NAMES[number], range(key) ? words(key) : "");
    row("tokens", "tokens", own / set.tokens, range(key));
    row("divergence", "mass", shares.mass[number - 1] / total);
    row("kept", "held", own ? keptTokens[number - 1] / own : 0);
    if (number === 2) {
      heading("Q1 + Q2", "uncertain", words("q1+q2"));
      row("tokens", "tokens", (shares.tokens[0] + shares.tokens[1]) / set.tokens, range("q1+q2"));
    }
  }
  const add = (list) => list.reduce((a, b) => a + b, 0);
  heading("Kept", `by ${ruleAt(set.rules[state.rule], set.retentions[state.level])}`);
  row("tokens", "held", add(keptTokens) / set.tokens);
  row("divergence", "held", add(keptMass) / total);
  $("quadrants").querySelector("tbody")?.remove();
  $("quadrants").append(body);
  $("thresholds").textContent = `ĥ = ${set.thresholds[0]} and ${set.thresholds[1]} nats`;
  drawHeadline(add(keptTokens) / set.tokens, add(keptMass) / total, total);
}

function drawHeadline(keptTokens, keptMass, total) {
  const set = current(), share = set.shares.tokens[2] / set.tokens, mass = set.shares.mass[2] / total;
  $("headline").textContent =
    `${percent(share)} of the tokens are confident and wrong (Q3); they hold ${percent(mass)} of the divergence. ` +
    (set.rules[state.rule].whole
      ? `${ruleName(set.rules[state.rule].name)} keeps every token.`
      : `${ruleAt(set.rules[state.rule], set.retentions[state.level])} keeps ${percent(keptTokens)} of the tokens and ${percent(keptMass)} of the divergence.`);
  const facts = [`${count(set.tokens)} tokens in ${count(set.rollouts)} rollouts`];
  if (set.step !== null && set.step !== undefined) facts.push(`step ${set.step}`);
  const named = new Map(set.settings);
  if (named.get("scope") === "batch") facts.push("budgets are spent over all tokens");
  for (const key of ["student", "teacher"]) {
    const model = named.get(key) ?? named.get(`models · ${key}`);
    if (model) facts.push(`${key} ${model}`);
  }
  const known = named.get("settings · teacher top k");
  if (known) facts.push(`divergences are lower bounds: of the teacher the ${known} likeliest tokens are known`);
  if (set.differing > 0)
    facts.push(`${percent(set.differing)} of the tokens lie in another quadrant than recorded, since ĥ is normalised here over these tokens alone`);
  $("facts").textContent = facts.join(" · ");
}
