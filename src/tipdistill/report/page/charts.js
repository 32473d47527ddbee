
"use strict";
// Line charts, the confusions, and the probe.

const CHART = { width: 380, height: 210, left: 44, right: 10, top: 8, bottom: 26 };

function lineStyle(number) { return { stroke: COLOURS[number % COLOURS.length], "stroke-dasharray": DASHES[(number + Math.floor(number / COLOURS.length)) % DASHES.length] }; }
function lineSample(number) {
  const picture = drawn("svg", { viewBox: "0 0 26 10", width: 26, height: 10, "aria-hidden": "true" });
  picture.append(drawn("line", { x1: 1, x2: 25, y1: 5, y2: 5, "stroke-width": 2.2, ...lineStyle(number) }));
  return picture;
}
function ticks(low, high, wanted = 4) {
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
  return found;
}

/** lines: [{name, number, x, y}]; percentages are drawn as such; a log axis where asked for. */
function lineChart(title, lines, { share = false, logX = false, logY = false, zero = false, xLabel = "step", markX = null, emphasis = -1, width = CHART.width, height = CHART.height } = {}) {
  const plot = { x: CHART.left, y: CHART.top, w: width - CHART.left - CHART.right, h: height - CHART.top - CHART.bottom };
  let xLow = Infinity, xHigh = -Infinity, yLow = Infinity, yHigh = -Infinity;
  for (const line of lines) for (let i = 0; i < line.x.length; i++) {
    xLow = Math.min(xLow, line.x[i]); xHigh = Math.max(xHigh, line.x[i]);
    const span = [line.y[i], ...(Array.isArray(line.interval?.[i]) ? line.interval[i].filter(isNumber) : [])];
    yLow = Math.min(yLow, ...span); yHigh = Math.max(yHigh, ...span);
  }
  if (zero && !logY) yLow = Math.min(0, yLow);
  if (share && yHigh > 0.9) yHigh = Math.max(1, yHigh);
  if (yHigh === yLow) { yHigh += Math.abs(yHigh) / 10 || 1; yLow -= zero ? 0 : Math.abs(yLow) / 10; }
  if (xHigh === xLow) xHigh += 1;
  const warpX = logX ? Math.log10 : (v) => v, warpY = logY ? Math.log10 : (v) => v;
  const toX = (v) => plot.x + ((warpX(v) - warpX(xLow)) / (warpX(xHigh) - warpX(xLow))) * plot.w;
  const toY = (v) => plot.y + plot.h - ((warpY(v) - warpY(yLow)) / (warpY(yHigh) - warpY(yLow))) * plot.h;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const yTicks = logY ? decades(yLow, yHigh) : ticks(yLow, yHigh);
  for (const at of yTicks) picture.append(
    drawn("line", { class: "grid", x1: plot.x, x2: plot.x + plot.w, y1: toY(at), y2: toY(at) }),
    text("text", { class: "tick", x: plot.x - 5, y: toY(at) + 4, "text-anchor": "end" }, share ? `${+(100 * at).toPrecision(3)} %` : short(at)),
  );
  const xTicks = logX ? [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].filter((at) => at >= xLow && at <= xHigh) : ticks(xLow, xHigh);
  for (const at of xTicks) picture.append(text("text", { class: "tick", x: toX(at), y: plot.y + plot.h + 15, "text-anchor": "middle" }, logX ? `${+(100 * at).toPrecision(2)} %` : short(at)));
  if (markX !== null) picture.append(drawn("line", { class: "border", x1: toX(markX), x2: toX(markX), y1: plot.y, y2: plot.y + plot.h }));
  picture.append(drawn("line", { class: "axis", x1: plot.x, x2: plot.x + plot.w, y1: plot.y + plot.h, y2: plot.y + plot.h }));
  for (const line of lines) {
    const points = line.x.map((x, i) => `${toX(x).toFixed(1)},${toY(line.y[i]).toFixed(1)}`).join(" ");
    const wide = emphasis < 0 ? 1.7 : emphasis === line.number ? 2.8 : 1.2;
    picture.append(drawn("polyline", { points, fill: "none", "stroke-width": wide, "stroke-linejoin": "round", opacity: emphasis >= 0 && emphasis !== line.number ? 0.65 : 1, ...lineStyle(line.number) }));
    line.interval?.forEach((interval, i) => {
      if (Array.isArray(interval) && interval.every(isNumber)) picture.append(drawn("line", { x1: toX(line.x[i]), x2: toX(line.x[i]), y1: toY(interval[0]), y2: toY(interval[1]), "stroke-width": 1, stroke: lineStyle(line.number).stroke }));
    });
    if (line.x.length <= 12 && (!logX || line.interval)) line.x.forEach((x, i) => picture.append(drawn("circle", { cx: toX(x), cy: toY(line.y[i]), r: 2.6, fill: lineStyle(line.number).stroke })));
  }
  const ruler = drawn("line", { class: "axis", y1: plot.y, y2: plot.y + plot.h, visibility: "hidden" });
  picture.append(ruler);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    const xs = [...new Set(lines.flatMap((line) => line.x))];
    const nearest = xs.reduce((best, x) => Math.abs(toX(x) - at) < Math.abs(toX(best) - at) ? x : best, xs[0]);
    ruler.setAttribute("x1", toX(nearest)); ruler.setAttribute("x2", toX(nearest)); ruler.setAttribute("visibility", "visible");
    const said = lines.map((line) => { const i = line.x.indexOf(nearest); return i < 0 ? null : `${line.name}: ${share ? percent(line.y[i]) : short(line.y[i])}`; });
    showTip(event, [`${xLabel} ${logX ? percent(nearest) : nearest}`, ...said.filter((one) => one !== null)].join("\n"));
  });
  picture.addEventListener("pointerleave", () => { hideTip(); ruler.setAttribute("visibility", "hidden"); });
  const head = element("h3");
  head.textContent = logY ? `${title}, log scale` : title;
  return element("div", { class: "chart" }, head, picture);
}
function decades(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) if (10 ** power >= low * 0.999 && 10 ** power <= high * 1.001) found.push(10 ** power);
  return found.length > 1 ? found : [low, high];
}

// What every rule keeps at every retention.

function drawBudgets() {
  const set = current(), shares = set.shares, total = shares.mass.reduce((a, b) => a + b, 0) || 1;
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const lines = (value) => set.rules.map((rule, number) => ({ name: ruleName(rule.name), number, x: set.retentions, y: set.retentions.map((_, level) => value(number, level)) }));
  const options = { share: true, logX: true, zero: true, xLabel: "retention", markX: set.retentions[state.level], emphasis: state.rule, width: 500, height: 260 };
  const legend = element("div", { class: "keys-of-lines" });
  set.rules.forEach((rule, number) => {
    const key = element("button", { type: "button", class: "key", "aria-pressed": number === state.rule });
    key.append(lineSample(number), ruleName(rule.name) + (rule.recorded ? " ●" : ""));
    key.title = rule.recorded ? "ranked by the recorded score" : "recomputed from the recorded statistics";
    key.addEventListener("click", () => { state.rule = number; $("rule").value = number; changed("rule"); });
    legend.append(key);
  });
  const note = element("p", { class: "small" });
  note.textContent = set.rules.some((rule) => rule.recorded) ? "● ranked by its recorded score; the others are recomputed from the recorded statistics." : "Recomputed from the recorded statistics.";
  legend.append(note);
  $("budget-charts").replaceChildren(
    lineChart("Share of the divergence kept", lines((rule, level) => sum(shares.kept_mass[rule][level]) / total), options),
    lineChart("Share of Q3 kept", lines((rule, level) => shares.kept_tokens[rule][level][2] / (shares.tokens[2] || 1)), options),
    legend,
  );
}

// Confusions.

function drawConfusions() {
  const found = current().confusions, total = current().shares.mass.reduce((a, b) => a + b, 0) || 1;
  const wrong = found.tokens - found.agreed;
  $("confusions-note").textContent = found.tokens
    ? `Of ${count(found.tokens)} Q3 tokens, ${count(wrong)} (${percent(wrong / found.tokens)}) have a student whose first choice is not the teacher's; they hold ${percent(found.mass / total)} of the divergence. In the others both prefer the same token, and the teacher is less sure of it.`
    : "There is no Q3 token.";
  const head = element("tr");
  for (const [name, kind] of [["context", ""], ["student → teacher", ""], ["times", "number"], ["of the divergence", "number"], ["as a bar", "wide hush"], ["mean p, student → teacher", "number"], ["in the text", "hush"]]) {
    const cell = element("th", { class: kind.replace("hush", ""), scope: "col" }), words = element("span", kind.includes("hush") ? { class: "hidden" } : {});
    words.textContent = name;
    cell.append(words);
    head.append(cell);
  }
  const rows = found.tables[Number($("context").value)];
  const most = Math.max(...rows.map((row) => row.mass), 0) || 1;
  const body = element("tbody");
  for (const row of rows) {
    const cell = (content, kind = "") => { const one = element("td", { class: kind }); one.append(content); return one; };
    const context = element("code"), choice = element("span"), student = element("code", { class: "wrong" }), teacher = element("code", { class: "right" });
    context.textContent = row.before === "" ? "" : `…${visible(row.before)}`;
    student.textContent = visible(row.student ?? ""); teacher.textContent = visible(row.teacher ?? "");
    choice.append(student, " → ", teacher);
    const track = element("div", { class: "track" }), bar = element("div", { class: "fill held" });
    bar.style.width = `${100 * row.mass / most}%`;
    track.append(bar);
    const walk = element("button", { type: "button" });
    walk.textContent = row.where.length ? "show" : "not in view";
    walk.disabled = !row.where.length;
    let turn = 0;
    walk.addEventListener("click", () => { resetFilters(); choose(row.where[turn++ % row.where.length]); view.spans.get(state.current)?.scrollIntoView({ block: "center" }); });
    body.append(element("tr", {}, cell(context), cell(choice), cell(`${count(row.count)}`, "number"), cell(percent(row.mass / total), "number"), cell(track, "wide"), cell(`${percent(row.student_probability)} → ${percent(row.teacher_probability)}`, "number"), cell(walk)));
  }
  $("confusion-table").replaceChildren(element("thead", {}, head), body);
}
function resetFilters() {
  state.query = ""; $("search").value = "";
  for (const box of $("filter").querySelectorAll("input")) box.checked = true;
  state.quadrants = new Set([1, 2, 3, 4]);
  arrange();
}

// Training.

const ACCURACY = /(^|[_/])(accuracy|(mean|pass|maj)(@|_at_)(\d+|k))$/i;
const DIVERGENCE = /^eval_(reverse|forward)_kl\w*\/mean$/;
const PANELS = [
  ["Loss", ["loss"], { logY: true }],
  ["Evaluation loss", ["eval_loss"], { logY: true }],
  ["Accuracy", ACCURACY, { share: true, zero: true }],
  ["Held-out divergence, nats", DIVERGENCE, { logY: true }],
  ["Share of tokens in Q1", ["quadrants/q1"], { share: true, zero: true }],
  ["Share of tokens in Q2", ["quadrants/q2"], { share: true, zero: true }],
  ["Share of tokens in Q3", ["quadrants/q3"], { share: true, zero: true }],
  ["Share of tokens in Q4", ["quadrants/q4"], { share: true, zero: true }],
  ["Share of the divergence kept", ["selection/kept_divergence_share"], { share: true, zero: true }],
  ["Share of the tokens kept", ["selection/kept_fraction"], { share: true, zero: true }],
  ["Divergence of dropped tokens, nats", ["selection/dropped_divergence"], { logY: true }],
  ["Reverse KL, nats", ["reverse_kl"], { logY: true }],
  ["Forward KL, nats", ["forward_kl"], { logY: true }],
  ["Log-ratio to the student that wrote, nats", ["rollout/log_ratio"], {}],
  ["Entropy, nats", ["entropy"], { zero: true }],
  ["Gradient norm", ["grad_norm"], { logY: true }],
  ["Completion length, tokens", ["completions/mean_length"], { zero: true }],
  ["Peak memory, GiB", ["memory/peak_gib"], { zero: true }],
  ["Tokens per second", ["tokens_per_second"], { zero: true }],
];
const STAGES = [["rollout", 0], ["teacher", 3], ["score", 5], ["select", 4], ["record", 6], ["loss", 1], ["optimizer", 2]];

function drawTraining() {
  $("run-legend").replaceChildren(...DATA.runs.map((run, number) => { const key = element("span", { class: "key" }); key.append(lineSample(number), run.name); return key; }));
  const charts = [];
  const add = (title, metric, options) => {
    const lines = DATA.runs.flatMap((run, number) => run.series[metric] ? [{ name: run.name, number, x: run.series[metric][0], y: run.series[metric][1] }] : []);
    if (!lines.length) return;
    const values = lines.flatMap((line) => line.y), low = Math.min(...values), high = Math.max(...values);
    charts.push(lineChart(title, lines, { ...options, logY: Boolean(options.logY) && low > 0 && high / low > 20, zero: options.zero || Boolean(options.logY) }));
  };
  for (const [title, metrics, options] of PANELS) {
    if (Array.isArray(metrics)) { for (const metric of metrics) add(title, metric, options); continue; }
    const named = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.series).filter((name) => metrics.test(name))))];
    for (const metric of named.slice(0, 8)) add(metric === "accuracy" ? title : metric.replace(/^eval_/, "").replace("_at_", "@").replace("/", ": "), metric, options);
  }
  const time = timeSplit();
  if (time) charts.push(time);
  $("training-note").textContent = lossesDiffer()
    ? "Each run's loss is the mean over the tokens that it kept, so losses of different rules do not compare; the reverse KL is over all tokens."
    : "";
  $("training-charts").replaceChildren(...charts);
}
/** What the page says first where it shows nothing but training. */
function runHeadline(run) {
  const told = [["reverse_kl", "the reverse KL"], ["loss", "the loss"]].find(([metric]) => run.series[metric]?.[1].length > 1);
  if (!told) return "";
  const [steps, values] = run.series[told[0]];
  return `Over ${count(steps[steps.length - 1])} steps ${told[1]} of ${run.name} went from ${short(values[0])} to ${short(values[values.length - 1])}.`;
}
/** Whether some runs kept other shares of the tokens than others, or by other rules. */
function lossesDiffer() {
  const shares = DATA.runs.map((run) => run.series["selection/kept_fraction"]?.[1]).filter((share) => share);
  const held = DATA.runs.map((run) => run.series["selection/kept_divergence_share"]?.[1]).filter((share) => share);
  const differ = (lists) => lists.some((list) => Math.abs(list[0] - lists[0][0]) > 0.005);
  return DATA.runs.length > 1 && (differ(shares) || differ(held));
}
function timeSplit() {
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  const rows = DATA.runs.map((run, number) => ({ number, name: run.name, parts: STAGES.map(([stage, colour]) => ({ stage, colour, seconds: run.series[`time/${stage}`] ? mean(run.series[`time/${stage}`][1]) : 0 })) }));
  const longest = Math.max(...rows.map((row) => row.parts.reduce((sum, part) => sum + part.seconds, 0)));
  if (!longest) return null;
  const height = 26 * rows.length + 40, picture = drawn("svg", { viewBox: `0 0 ${CHART.width} ${height}`, role: "img", "aria-label": "Seconds per step and stage" });
  rows.forEach((row, place) => {
    let x = 40;
    picture.append(drawn("line", { x1: 4, x2: 32, y1: 26 * place + 14, y2: 26 * place + 14, "stroke-width": 2.2, ...lineStyle(row.number) }));
    for (const part of row.parts) {
      const width = part.seconds / longest * (CHART.width - 90);
      const bar = drawn("rect", { x, y: 26 * place + 5, width, height: 18, fill: COLOURS[part.colour], stroke: "var(--bg)", "stroke-width": 0.8 });
      bar.addEventListener("pointermove", (event) => showTip(event, `${row.name}\n${part.stage}: ${short(part.seconds)} s per step`));
      bar.addEventListener("pointerleave", hideTip);
      picture.append(bar);
      x += width;
    }
    picture.append(text("text", { class: "tick", x: x + 5, y: 26 * place + 18 }, `${short(row.parts.reduce((sum, part) => sum + part.seconds, 0))} s`));
  });
  let x = 4;
  for (const [stage, colour] of STAGES) {
    picture.append(drawn("rect", { x, y: height - 22, width: 10, height: 10, fill: COLOURS[colour] }), text("text", { class: "tick", x: x + 14, y: height - 13 }, stage));
    x += 24 + 6.4 * stage.length;
  }
  const head = element("h3");
  head.textContent = "Where a step's time goes";
  return element("div", { class: "chart" }, head, picture);
}

// The probe.

function drawProbes() {
  $("probes").replaceChildren(...DATA.probes.map(({ name, probe }) => drawProbe(DATA.probes.length > 1 ? name : "", probe)));
}
const signed = (value) => `${value > 0 ? "+" : ""}${value.toFixed(3)}`;
const PROBE_COLUMNS = [
  ["kept", "tokens kept", percent], ["divergence_share", "divergence kept", percent], ["q3_share", "Q3 kept", percent],
  ["q2_of_kept", "Q2 among the kept", percent], ["cosine", "cosine to the full gradient", (value) => value.toFixed(3)],
  ["descent_share", "descent, of all tokens'", (value) => value.toFixed(2)], ["over_random", "descent over random", signed],
];
const PROBE_CHARTS = [
  ["descent_share", "First-order descent on held-out rollouts, of all tokens'"], ["cosine", "Cosine to the full gradient"],
  ["divergence_share", "Share of the divergence kept"], ["q3_share", "Share of Q3 kept"],
];
const HARD = "\u00a0"; // a space where no line breaks
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function drawProbe(name, probe) {
  const box = element("div"), advice = probe.recommendation ?? {};
  const rows = (probe.rows ?? []).filter((row) => row && isNumber(row.retention));
  const paragraph = (content, kind = "") => { const p = element("p", { class: kind }); p.textContent = content; box.append(p); };
  if (name) { const head = element("h3"); head.textContent = name; box.append(head); }
  paragraph(probe.student && probe.teacher ? `student ${probe.student}, teacher ${probe.teacher}` : "", "facts");
  if (advice.rule) paragraph(`Recommended: ${ruleName(advice.rule)}${isNumber(advice.retention) ? ` at ${percent(advice.retention)}` : ""}${advice.reason ? `: ${advice.reason}` : "."}`, "headline");
  if (probe.warnings?.length) {
    const list = element("ul", { class: "note" });
    for (const warning of probe.warnings) { const item = element("li"); item.textContent = String(warning); list.append(item); }
    box.append(list);
  }
  const rules = [...new Set(rows.map((row) => String(row.rule)))];
  const legend = element("div", { class: "legend" }), charts = element("div", { class: "charts" });
  rules.forEach((rule, number) => { const key = element("span", { class: "key" }); key.append(lineSample(number), ruleName(rule)); legend.append(key); });
  for (const [field, title] of PROBE_CHARTS) {
    const lines = rules.map((rule, number) => {
      const own = rows.filter((row) => row.rule === rule && isNumber(row[field]) && row.retention > 0).sort((a, b) => a.retention - b.retention);
      return { name: ruleName(rule), number, x: own.map((row) => row.retention), y: own.map((row) => row[field]), interval: own.map((row) => row[`${field}_interval`]) };
    }).filter((line) => line.x.length);
    if (lines.length) charts.append(lineChart(title, lines, { share: field !== "cosine", logX: true, zero: true, xLabel: "retention" }));
  }
  const columns = PROBE_COLUMNS.filter(([field]) => rows.some((row) => isNumber(row[field])));
  const head = element("tr"), body = element("tbody");
  for (const title of ["rule", "retention", ...columns.map(([, title]) => title), "most alike"]) {
    const cell = element("th", { scope: "col", class: title === "rule" || title === "most alike" ? "" : "number" });
    cell.textContent = title;
    head.append(cell);
  }
  for (const row of rows) {
    const line = element("tr", row.rule === advice.rule && row.retention === advice.retention ? { class: "best" } : {});
    const add = (content, kind = "number") => { const cell = element("td", { class: kind }); cell.textContent = content; line.append(cell); };
    add(ruleName(String(row.rule)), "");
    add(percent(row.retention));
    for (const [field, , format] of columns) {
      const interval = row[`${field}_interval`];
      add(isNumber(row[field]) ? format(row[field]) + (Array.isArray(interval) && interval.every(isNumber) ? ` (${interval.map(format).join(`${HARD}–${HARD}`)})` : "") : "");
    }
    const alike = Object.entries(row.jaccard ?? {}).filter(([rule, value]) => rule !== row.rule && isNumber(value)).sort((a, b) => b[1] - a[1])[0];
    add(alike ? `${ruleName(alike[0])} (Jaccard ${alike[1].toFixed(2)})` : "", "");
    body.append(line);
  }
  box.append(legend, charts, element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Rows of the probe" }, element("table", { class: "rows" }, element("thead", {}, head), body)));
  return box;
}
