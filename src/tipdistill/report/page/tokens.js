
"use strict";
// The rollouts as text: every token shaded, both models' choices beside it, and ways to walk through them.

const PAGE_TOKENS = 2500; // tokens that are added to the feed at a time
const view = { order: [], starts: [], rollout: null, parts: new Map(), spans: new Map(), shown: 0, matches: new Set(), texts: new Map() };

function loadView() {
  const data = current().view;
  view.starts = [];
  let start = 0;
  for (const rollout of data.rollouts) { view.starts.push(start); start += rollout.tokens; }
  view.rollout = new Uint32Array(start);
  data.rollouts.forEach((rollout, place) => view.rollout.fill(place, view.starts[place], view.starts[place] + rollout.tokens));
  view.parts = new Map(data.parts);
  view.texts = new Map();
  state.current = -1;
  state.hexagon = -1;
  const all = data.rollouts.length === current().rollouts;
  $("sampled").textContent = all
    ? `All ${count(current().rollouts)} rollouts, each prompt above its completion.`
    : `${count(data.rollouts.length)} of ${count(current().rollouts)} rollouts, drawn at random (${count(data.tokens)} of ${count(current().tokens)} tokens). The map, the shares and the confusions count every token.`;
}

// What a token holds.

function textOf(token) {
  const part = view.parts.get(token);
  return part ?? current().view.strings[array(current().view.text)[token]];
}
function quadrantOf(token) { return array(current().view.quadrant)[token]; }
function statistic(name, token) { return array(current().view.statistics[name])[token]; }
function levelOf(token, rule = state.rule) { return array(current().view.levels[rule])[token]; }
function isKept(token) { return levelOf(token) <= state.level; }
function scoreOf(token, rule = state.rule) {
  const where = current().view.scores[rule];
  return where === null ? null : typeof where === "string" ? statistic(where, token) : array(where)[token];
}
function tokensOf(rollout) { return [view.starts[rollout], view.starts[rollout] + current().view.rollouts[rollout].tokens]; }
function sumOver(rollout, value) {
  const [from, to] = tokensOf(rollout);
  let sum = 0;
  for (let token = from; token < to; token++) sum += value(token);
  return sum;
}
function wholeText(rollout) {
  if (!view.texts.has(rollout)) {
    const [from, to] = tokensOf(rollout);
    let whole = "";
    const offsets = [];
    for (let token = from; token < to; token++) { offsets.push(whole.length); whole += textOf(token); }
    view.texts.set(rollout, { whole, lower: whole.toLowerCase(), offsets });
  }
  return view.texts.get(rollout);
}

// Shades.

const SHADES = {
  quadrant: { name: "quadrant" },
  kept: { name: "kept by the rule" },
  score: { name: "score of the rule", ramp: "violet" },
  entropy: { name: "student entropy", ramp: "blue" },
  reverse_kl: { name: "reverse KL, KL(student ‖ teacher)", ramp: "orange", log: true },
  forward_kl: { name: "forward KL, KL(teacher ‖ student)", ramp: "orange", log: true },
  teacher_entropy: { name: "teacher entropy", ramp: "blue" },
  student_logprob: { name: "student's surprise, −log p", ramp: "violet", sign: -1 },
  teacher_logprob: { name: "teacher's surprise, −log p", ramp: "violet", sign: -1 },
};
const scale = { of: "", low: 0, high: 1, log: false };
const NONE = 0.03, STRONGEST = 0.72;

function shadeValue(token) {
  if (state.shade === "score") return scoreOf(token);
  return (SHADES[state.shade].sign ?? 1) * statistic(state.shade, token);
}
function setScale() {
  const shade = SHADES[state.shade];
  if (!shade?.ramp) return;
  const values = [];
  for (let token = 0; token < view.rollout.length; token++) { const value = shadeValue(token); if (value !== null) values.push(value); }
  values.sort((a, b) => a - b);
  const at = (share) => values.length ? values[Math.min(values.length - 1, Math.floor(share * values.length))] : 0;
  scale.log = Boolean(shade.log);
  scale.high = at(0.995) || 1;
  // three decades, so that what is rounding stays white
  scale.low = scale.log ? scale.high / 1000 : Math.min(0, at(0));
}
function strength(value) {
  if (value === null) return 0;
  const share = scale.log ? Math.log(Math.max(value, scale.low) / scale.low) / Math.log(scale.high / scale.low) : (value - scale.low) / (scale.high - scale.low);
  return Math.max(0, Math.min(1, share || 0));
}

function paint(span, token) {
  const classes = ["t"], text = textOf(token);
  if (text === "") classes.push(view.parts.has(token) ? "part" : "empty");
  const quadrant = quadrantOf(token), shade = state.shade;
  let colour = "";
  if (shade === "quadrant") classes.push(`q${quadrant}`);
  else if (shade === "kept") classes.push(isKept(token) ? "hold" : "drop");
  else if (shade.startsWith("recorded:")) classes.push(array(current().view.kept[shade.slice(9)])[token] ? "hold" : "drop");
  else {
    const share = strength(shadeValue(token)) * STRONGEST;
    if (share > NONE) colour = `rgb(var(--ramp-${SHADES[shade].ramp}) / ${share.toFixed(2)})`;
  }
  if (!state.quadrants.has(quadrant)) classes.push("dim");
  if (view.matches.has(token)) classes.push("match");
  if (state.hexagon >= 0 && array(current().view.hexagon)[token] === state.hexagon) classes.push("in-hexagon");
  if (token === state.current) classes.push("current");
  span.className = classes.join(" ");
  span.style.background = colour;
}
function repaint() {
  setScale();
  for (const [token, span] of view.spans) paint(span, token);
  drawLegend();
}

function drawLegend() {
  const legend = $("legend"), items = [];
  const swatch = (className, words) => {
    const item = element("span"), mark = element("span", { class: `t ${className}` });
    mark.textContent = " token ";
    item.append(mark, " ", words);
    items.push(item);
  };
  if (state.shade === "quadrant") for (const number of [1, 2, 3, 4]) swatch(`q${number}`, `Q${number} ${NAMES[number]}`);
  else if (!SHADES[state.shade]?.ramp) {
    const what = state.shade === "kept" ? ruleAt(current().rules[state.rule], current().retentions[state.level]) : "as recorded";
    swatch("hold", `kept: ${what}`);
    swatch("drop", "dropped");
  } else if (state.shade === "score" && current().view.scores[state.rule] === null) {
    items.push(element("span", {}, `${ruleName(current().rules[state.rule].name)} draws without looking: it has no score.`));
  } else {
    const ramp = element("span", { class: "ramp" }), item = element("span");
    ramp.style.background = `linear-gradient(to right, ${[0, .25, .5, .75, 1].map((share) => `rgb(var(--ramp-${SHADES[state.shade].ramp}) / ${share * STRONGEST})`).join(", ")})`;
    const unit = state.shade === "score" ? "" : " nats";
    item.append(nats(scale.low), ramp, `${nats(scale.high)}${unit}${scale.log ? " (log scale)" : ""}`);
    items.push(item);
  }
  legend.replaceChildren(...items);
}

// The feed.

const SORTS = {
  rollout: { name: "number", by: (rollout) => rollout },
  q3: { name: "most Q3 tokens", by: (rollout) => -sumOver(rollout, (token) => quadrantOf(token) === 3) },
  q3_share: { name: "highest share of Q3", by: (rollout) => -sumOver(rollout, (token) => quadrantOf(token) === 3) / current().view.rollouts[rollout].tokens },
  mass: { name: "most divergence", by: (rollout) => -sumOver(rollout, (token) => statistic("reverse_kl", token)) },
  mean: { name: "highest mean divergence", by: (rollout) => -sumOver(rollout, (token) => statistic("reverse_kl", token)) / current().view.rollouts[rollout].tokens },
  entropy: { name: "highest mean entropy", by: (rollout) => -sumOver(rollout, (token) => statistic("entropy", token)) / current().view.rollouts[rollout].tokens },
  kept: { name: "most divergence kept", by: (rollout) => -sumOver(rollout, (token) => isKept(token) * statistic("reverse_kl", token)) },
  long: { name: "longest", by: (rollout) => -current().view.rollouts[rollout].tokens },
  brief: { name: "shortest", by: (rollout) => current().view.rollouts[rollout].tokens },
  wrong: { name: "not correct", by: (rollout) => Number(episodeOf(rollout)?.correct !== false), episodes: true },
  failures: { name: "most failed calls", by: (rollout) => -failuresOf(episodeOf(rollout)), episodes: true },
  turns: { name: "most turns", by: (rollout) => -turnsOf(episodeOf(rollout)), episodes: true },
};

function arrange() {
  const rollouts = current().view.rollouts, query = state.query.toLowerCase();
  view.matches = new Set();
  const chosen = [];
  rollouts.forEach((rollout, place) => {
    const [from, to] = tokensOf(place);
    if (state.quadrants.size < 4) {
      let any = false;
      for (let token = from; token < to && !any; token++) any = state.quadrants.has(quadrantOf(token));
      if (!any) return;
    }
    if (query) {
      const { lower, offsets } = wholeText(place);
      let any = rollout.prompt.toLowerCase().includes(query) || resultsOf(rollout.episode).some((result) => holds(result, query));
      for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, at + query.length)) {
        any = true;
        for (let token = tokenAt(offsets, at); token < offsets.length && offsets[token] < at + query.length; token++) view.matches.add(from + token);
      }
      if (!any) return;
    }
    chosen.push(place);
  });
  const keys = new Map(chosen.map((place) => [place, SORTS[state.sort].by(place)]));
  view.order = chosen.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  const words = chosen.length < rollouts.length ? [`${count(chosen.length)} of them hold what is looked for`] : [];
  if (query) words.push(`${count(view.matches.size)} tokens match`);
  if (state.hexagon >= 0) words.push("the tokens of the chosen hexagon are framed");
  $("found").textContent = words.length ? `${words.join(" · ")}.` : "";
  $("feed").replaceChildren();
  $("feed").classList.toggle("brief", chosen.length > 0 && !current().episodes && chosen.reduce((sum, place) => sum + rollouts[place].tokens, 0) / chosen.length < 80);
  view.spans = new Map();
  view.shown = 0;
  setScale();
  more();
  drawLegend();
}
function tokenAt(offsets, at) {
  let low = 0, high = offsets.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (offsets[middle] <= at) low = middle; else high = middle - 1; }
  return low;
}

const sentinel = element("button", { type: "button", class: "more" });
sentinel.textContent = "More rollouts";
sentinel.addEventListener("click", () => more());
new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) more(); }, { rootMargin: "600px" }).observe(sentinel);

/** Append rollouts to the feed: some thousand tokens, or up to a place in the order. */
function more(upTo = -1) {
  let added = 0;
  while (view.shown < view.order.length && (added < PAGE_TOKENS || view.shown <= upTo)) {
    const rollout = view.order[view.shown++];
    added += current().view.rollouts[rollout].tokens;
    $("feed").append(rolloutCard(rollout));
  }
  sentinel.remove();
  if (view.shown < view.order.length) $("feed").append(sentinel);
}

function rolloutCard(place) {
  const rollout = current().view.rollouts[place], [from, to] = tokensOf(place);
  const counts = [0, 0, 0, 0, 0];
  for (let token = from; token < to; token++) counts[quadrantOf(token)]++;
  const head = element("header"), number = element("b");
  number.textContent = `Rollout ${rollout.rollout}`;
  const strip = element("span", { class: "strip", role: "img", "aria-label": [1, 2, 3, 4].map((q) => `Q${q} ${percent(counts[q] / rollout.tokens)}`).join(", ") });
  for (const quadrant of [3, 1, 2]) {
    const part = element("i");
    part.style.width = `${100 * counts[quadrant] / rollout.tokens}%`;
    part.style.background = `var(--q${quadrant}-line)`;
    strip.append(part);
  }
  const facts = element("span"), episode = rollout.episode;
  facts.textContent = [
    `${count(rollout.tokens)} tokens`,
    `${counts[3]} in Q3`,
    `divergence ${nats(sumOver(place, (token) => statistic("reverse_kl", token)) / rollout.tokens)} nats a token`,
    ...(rollout.finished === false && !episode ? ["cut at the length limit"] : []),
  ].join(" · ");
  head.append(number, ...(episode ? episodeFacts(episode) : []), strip, facts);
  const card = element("article", { class: "rollout" }, head);
  if (rollout.prompt) card.append(promptOf(rollout.prompt));
  card.append(...(episode ? conversation(episode, from) : [textOfTokens(from, to)]));
  return card;
}
function textOfTokens(from, to) {
  const body = element("div", { class: "text", dir: "auto" });
  for (let token = from; token < to; token++) {
    const span = element("span", { tabindex: -1 });
    span.dataset.token = token;
    fill(span, textOf(token));
    paint(span, token);
    view.spans.set(token, span);
    body.append(span);
  }
  return body;
}
function promptOf(prompt) {
  if (prompt.length <= 200) { const short = element("div", { class: "prompt", dir: "auto" }); fill(short, prompt); return short; }
  const whole = element("details", { class: "prompt" }), first = element("summary");
  first.textContent = `Prompt: ${prompt.slice(0, 140).replace(/\s+/g, " ")}…`;
  const rest = element("div", { dir: "auto" });
  fill(rest, prompt);
  whole.append(first, rest);
  return whole;
}

// The token under the eye.

function tokenOfEvent(event) {
  const span = event.target instanceof Element ? event.target.closest(".t[data-token]") : null;
  return span ? Number(span.dataset.token) : -1;
}
function choose(token, { scroll = true } = {}) {
  const before = view.spans.get(state.current);
  state.current = token;
  if (before) { before.tabIndex = -1; paint(before, Number(before.dataset.token)); }
  if (token < 0) { describe(-1); return; }
  const place = view.order.indexOf(view.rollout[token]);
  if (place < 0) return;
  if (!view.spans.has(token)) more(place);
  const span = view.spans.get(token);
  paint(span, token);
  span.tabIndex = 0;
  span.setAttribute("aria-label", `${visible(textOf(token))}, Q${quadrantOf(token)}, ${NAMES[quadrantOf(token)]}`);
  span.focus({ preventScroll: true });
  const box = span.getBoundingClientRect();
  if (scroll && (box.top < 140 || box.bottom > innerHeight * (innerWidth > 900 ? 0.87 : 0.55))) span.scrollIntoView({ block: innerWidth > 900 ? "center" : "start", behavior: "instant" });
  describe(token);
}

const TARGETS = {
  q3: { name: "Q3 tokens", is: (token) => quadrantOf(token) === 3 },
  q1: { name: "Q1 tokens", is: (token) => quadrantOf(token) === 1 },
  q2: { name: "Q2 tokens", is: (token) => quadrantOf(token) === 2 },
  kept: { name: "kept tokens", is: isKept },
  match: { name: "search matches", is: (token) => view.matches.has(token) },
  hexagon: { name: "hexagon's tokens", is: (token) => array(current().view.hexagon)[token] === state.hexagon },
};
/** Move to the next (or previous) target after the current token, in the order of the feed, round and round. */
function jump(direction) {
  const order = view.order, steps = order.length;
  if (!steps) return;
  const is = TARGETS[state.target].is;
  let place = state.current < 0 ? -1 : order.indexOf(view.rollout[state.current]);
  const inside = place >= 0;
  if (!inside) place = direction > 0 ? 0 : steps - 1;
  for (let step = 0; step <= steps; step++) {
    const [from, to] = tokensOf(order[place]);
    let token = step === 0 && inside ? state.current + direction : direction > 0 ? from : to - 1;
    for (; token >= from && token < to; token += direction) if (is(token)) { choose(token); return; }
    place = (place + direction + steps) % steps;
  }
  $("found").textContent = `There are no ${TARGETS[state.target].name} in the rollouts shown.`;
}
function step(direction) {
  if (state.current < 0) { jump(direction); return; }
  const [from, to] = tokensOf(view.rollout[state.current]);
  choose(Math.max(from, Math.min(to - 1, state.current + direction)));
}
function stepRollout(direction) {
  const place = view.order.indexOf(view.rollout[state.current]) + direction;
  if (place >= 0 && place < view.order.length) choose(view.starts[view.order[place]]);
}
function chooseHexagon(cell) {
  state.hexagon = cell;
  state.target = "hexagon";
  $("target").value = "hexagon";
  drawMap.chosen();
  arrange();
  if (array(current().view.hexagon).includes(cell)) { jumpFromStart(); $("tokens").scrollIntoView(); choose(state.current); }
  else $("found").textContent = "None of that hexagon's tokens is in the rollouts drawn for this view.";
}
function jumpFromStart() { state.current = -1; jump(1); }

function describe(token) {
  const panel = $("detail");
  if (token < 0) { panel.replaceChildren(element("p", { class: "small" }, "Point at a token, or press n for the next one: both models' five most probable tokens appear here.")); return; }
  const data = current().view, quadrant = quadrantOf(token), rollout = data.rollouts[view.rollout[token]];
  const title = element("h3"), code = element("code"), badge = element("span", { class: `badge q${quadrant}` }), where = element("span", { class: "small" });
  code.textContent = visible(data.strings[array(data.text)[token]]);
  badge.textContent = `Q${quadrant} ${NAMES[quadrant]}`;
  where.textContent = `rollout ${rollout.rollout}, ${placeInEpisode(token)}token ${token - view.starts[view.rollout[token]]}`;
  title.append(code, badge);
  const models = element("div", { class: "models" });
  for (const whose of ["student", "teacher"]) {
    const column = element("div", { class: whose }), head = element("h4"), list = element("ol");
    head.textContent = whose === "student" ? "Student's top 5" : "Teacher's top 5";
    column.append(head, list);
    const tokens = array(data[`${whose}_top`]), probabilities = array(data[`${whose}_probability`]);
    for (let place = 0; place < 5; place++) {
      const at = place * data.tokens + token, share = probabilities[at] / 1000;
      if (tokens[at] === 0 && probabilities[at] === 0) continue;
      const item = element("li"), bar = element("div", { class: "amount" }), what = element("code"), figure = element("span");
      if (tokens[at] === array(data.text)[token]) item.className = "sampled";
      bar.style.width = `${100 * share}%`;
      what.textContent = visible(data.strings[tokens[at]]);
      figure.textContent = share > 0 ? percent(share, 1) : "<0.1 %";
      item.append(bar, what, figure);
      list.append(item);
    }
    models.append(column);
  }
  const table = element("table"), body = element("tbody");
  const row = (name, value, className = "") => {
    const left = element("td"), right = element("td", { class: className });
    left.textContent = name; right.textContent = value;
    body.append(element("tr", {}, left, right));
  };
  for (const [name, label] of Object.entries(STATISTIC_NAMES))
    if (data.statistics[name]) {
      const value = statistic(name, token), logarithm = name.endsWith("logprob");
      row(logarithm ? `${name.startsWith("student") ? "student" : "teacher"}'s p of this token` : label, logarithm ? probability(Math.exp(value)) : `${nats(value)} nats`);
    }
  const retentions = current().retentions;
  current().rules.forEach((rule, number) => {
    const level = levelOf(token, number), kept = level <= state.level;
    row(`${ruleName(rule.name)} keeps it from`, `${rule.whole ? "any" : percent(retentions[level])} ${kept ? "✓" : "–"}`, kept ? "yes" : "no");
  });
  table.append(body);
  panel.replaceChildren(title, where, models, table);
}

function setUpTokens() {
  const feed = $("feed");
  feed.addEventListener("pointerover", (event) => { const token = tokenOfEvent(event); if (token >= 0) describe(token); });
  feed.addEventListener("pointerleave", () => describe(state.current));
  feed.addEventListener("click", (event) => { const token = tokenOfEvent(event); if (token >= 0) choose(token, { scroll: false }); });
  feed.addEventListener("focusin", (event) => { const token = tokenOfEvent(event); if (token >= 0 && token !== state.current) choose(token, { scroll: false }); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target instanceof Element && event.target.closest("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      if (event.key === "Enter" && event.target.id === "search" && view.matches.size) { state.target = "match"; $("target").value = "match"; jump(1); }
      return;
    }
    const onToken = document.activeElement?.closest?.(".t[data-token]");
    const actions = { n: () => jump(1), p: () => jump(-1), "/": () => $("search").focus() };
    if (onToken) Object.assign(actions, {
      ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => stepRollout(1), ArrowUp: () => stepRollout(-1),
      Home: () => choose(tokensOf(view.rollout[state.current])[0]), End: () => choose(tokensOf(view.rollout[state.current])[1] - 1),
      Escape: () => { onToken.blur(); choose(-1); },
    });
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  });
  for (const [value, target] of Object.entries(TARGETS)) $("target").append(option(value, target.name));
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; arrange(); });
  $("target").addEventListener("change", () => { state.target = $("target").value; });
  $("shade").addEventListener("change", () => { state.shade = $("shade").value; repaint(); });
  $("next").addEventListener("click", () => jump(1));
  $("previous").addEventListener("click", () => jump(-1));
  let waiting = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.query = $("search").value; arrange(); }, 150);
  });
  for (const number of [1, 2, 3, 4]) {
    const box = element("input", { type: "checkbox", value: number });
    box.checked = true;
    box.addEventListener("change", () => { if (box.checked) state.quadrants.add(number); else state.quadrants.delete(number); arrange(); });
    $("filter").append(element("label", {}, box, ` Q${number}`));
  }
}
function fillSorts() {
  const offered = Object.entries(SORTS).filter(([, sort]) => !sort.episodes || current().episodes);
  $("sort").replaceChildren(...offered.map(([value, sort]) => option(value, sort.name)));
  if (!offered.some(([value]) => value === state.sort)) state.sort = "rollout";
  $("sort").value = state.sort;
}
function fillShades() {
  const data = current().view, offered = [];
  for (const [value, shade] of Object.entries(SHADES))
    if (!shade.ramp || value === "score" || data.statistics[value]) offered.push(option(value, shade.name));
  for (const name of Object.keys(data.kept)) offered.push(option(`recorded:${name}`, `kept as recorded: ${ruleName(name)}`));
  $("shade").replaceChildren(...offered);
  if (![...$("shade").options].some((offered) => offered.value === state.shade)) state.shade = "quadrant";
  $("shade").value = state.shade;
}
