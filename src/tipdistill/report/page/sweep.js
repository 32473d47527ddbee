
"use strict";
// Sweeps: one table per test task, sorted by any column, and its intervals.

const MINUS = "\u2212";
const signedShare = (value) => `${value < 0 ? MINUS : "+"}${Math.abs(value).toFixed(3)}`;
const SWEEP_COLUMNS = [
  { title: "rule", value: (row) => ruleName(row.name) },
  { title: "retention", value: (row) => row.retention, text: (value) => percent(value) },
  { title: "", measured: (figure) => figure, text: (value) => value.toFixed(3) },
  { title: `${MINUS} all tokens`, measured: (figure) => figure.to_all, text: signedShare },
  { title: `${MINUS} random`, measured: (figure) => figure.to_random, text: signedShare },
  { title: "share of the gain", measured: (figure) => figure.gain_share, text: (value) => percent(value, 0) },
  { title: "tokens trained on", value: (row) => row.trained_tokens, text: (value) => count(Math.round(value)) },
  { title: "time, s", value: (row) => row.seconds, text: short },
  { title: "peak memory, GiB", value: (row) => row.peak_memory_gib, text: short },
  { title: "rate", value: (row) => row.learning_rate, text: short },
];

function drawSweeps() {
  $("sweeps").replaceChildren(...DATA.sweeps.flatMap(({ name, sweep }) => sweep.test.map((task) => drawSweep(DATA.sweeps.length > 1 ? name : "", sweep, task))));
}
/** What the page says first where it shows no records: how the best row compares, on the first task. */
function sweepHeadline({ sweep }) {
  const task = sweep.test[0], rows = sweep.rows.filter((row) => row.tasks[task]);
  if (!rows.length) return `No row of ${task} is finished.`;
  const least = rows.some((row) => row.tasks[task].divergence), sign = least ? -1 : 1;
  const mean = (row) => row.tasks[task].mean, named = (row) => (row.rule === "all" ? "all tokens" : `${ruleName(row.name)} at ${percent(row.retention)}`);
  const best = rows.reduce((a, b) => (sign * mean(b) > sign * mean(a) ? b : a)), whole = rows.find((row) => row.rule === "all");
  const what = least ? "the least divergence" : "the best accuracy", started = sweep.before[task];
  const parts = [`On ${task}, ${named(best)} ${best.rule === "all" ? "have" : "has"} ${what} of ${count(rows.length)} rows: ${mean(best).toFixed(3)}`];
  if (whole && whole !== best) parts.push(`all tokens ${mean(whole).toFixed(3)}`);
  if (started) parts.push(`before ${started.mean.toFixed(3)}`);
  return `${parts.join(", ")}. Rows whose intervals overlap are not told apart.`;
}
function drawSweep(name, sweep, task) {
  const box = element("div", { class: "sweep" }), head = element("h3"), note = element("p", { class: "small" });
  head.textContent = [name, task].filter((part) => part).join(" · ");
  const facts = [
    `mean@${sweep.num_samples}, seeds ${sweep.seeds.join(", ")}; in brackets: ${sweep.interval}.`,
    sweep.learning_rates.length > 1 ? `Each row's rate was chosen of ${sweep.learning_rates.join(", ")} on ${sweep.validation.task}, seeds ${sweep.validation.seeds.join(", ")}.` : "",
    ...Object.entries(sweep.failed).map(([cell, why]) => `Failed: ${cell}: ${why}`),
  ];
  note.textContent = facts.filter((fact) => fact).join(" ");
  const rows = sweep.rows.map((row, number) => ({ row, number, figure: row.tasks[task] ?? null }));
  const outcome = [sweep.before[task], ...rows.map(({ figure }) => figure)].some((figure) => figure?.divergence) ? "divergence, nats" : "accuracy";
  const columns = SWEEP_COLUMNS.map((column) => (column.title ? column : { ...column, title: outcome })).filter((column) => !column.measured || rows.some(({ figure }) => figure && column.measured(figure)));
  const plots = element("div", { class: "charts intervals" });
  const table = element("table", { class: "rows" });
  const order = { column: -1, down: true };
  const cellOf = (column, { row, figure }) => (column.measured ? (figure && column.measured(figure)) || null : column.value(row));
  const keyOf = (column, entry) => { const value = cellOf(column, entry); return column.measured && value ? value.mean : value; };
  const show = () => {
    const sorted = [...rows];
    if (order.column >= 0) {
      const column = columns[order.column];
      sorted.sort((a, b) => {
        const [first, second] = [keyOf(column, a), keyOf(column, b)];
        if (first === null || second === null) return (first === null) - (second === null) || a.number - b.number;
        const difference = typeof first === "string" ? first.localeCompare(second) : first - second;
        return (order.down ? -difference : difference) || a.number - b.number;
      });
    }
    const line = element("tr");
    columns.forEach((column, place) => {
      const sorting = order.column === place;
      const button = element("button", { type: "button", class: "sort" });
      button.textContent = `${column.title}${sorting ? (order.down ? " ↓" : " ↑") : ""}`;
      button.addEventListener("click", () => { order.down = sorting ? !order.down : place > 0; order.column = place; show(); table.querySelectorAll("th button")[place].focus(); });
      line.append(element("th", { scope: "col", class: place ? "number" : "", "aria-sort": sorting ? (order.down ? "descending" : "ascending") : "none" }, button));
    });
    const body = element("tbody");
    for (const entry of sorted) {
      const tr = element("tr");
      columns.forEach((column, place) => {
        const value = cellOf(column, entry), cell = element("td", { class: place ? "number" : "" });
        const text = column.text ?? String;
        if (value !== null) cell.textContent = column.measured ? `${text(value.mean)} [${value.interval.map(text).join(`,${HARD}`)}]` : text(value);
        else if (place === 2) cell.textContent = "failed";
        tr.append(cell);
      });
      body.append(tr);
    }
    table.replaceChildren(element("thead", {}, line), body);
    const shown = sorted.filter(({ figure }) => figure);
    const started = sweep.before[task];
    plots.replaceChildren(
      intervalPlot(outcome[0].toUpperCase() + outcome.slice(1), shown.map((entry) => [entry, entry.figure]), started ? started.mean : null, "before", (value) => value.toFixed(2)),
      ...[["to_all", "Difference to all tokens"], ["to_random", "Difference to random at the same retention"]]
        .filter(([field]) => shown.some(({ figure }) => figure[field]))
        .map(([field, title]) => intervalPlot(title, shown.filter(({ figure }) => figure[field]).map((entry) => [entry, entry.figure[field]]), 0, "", signedShare)),
    );
  };
  show();
  box.append(head, plots, element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Rows of ${task}` }, table), note);
  return box;
}
/** A dot and a line per row, its name before it; a mark where `at` is. */
function intervalPlot(title, entries, at, mark, format) {
  const width = 420, left = 142, right = 14, top = mark ? 14 : 0, step = 19, height = top + step * entries.length + 34;
  const values = [...entries.flatMap(([, estimate]) => estimate.interval), ...entries.map(([, estimate]) => estimate.mean), ...(at === null ? [] : [at])];
  const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
  const x = (value) => left + (value - low + 0.03 * span) / (1.06 * span) * (width - left - right);
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: mean and interval of each row` });
  for (const tick of ticks(low, high)) {
    picture.append(drawn("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 4, y2: height - 24 }), text("text", { class: "tick", x: x(tick), y: height - 10, "text-anchor": "middle" }, String(+tick.toPrecision(3)).replace("-", MINUS)));
  }
  if (at !== null) {
    picture.append(drawn("line", { class: "border", x1: x(at), x2: x(at), y1: 2, y2: height - 24 }));
    if (mark) picture.append(text("text", { class: "tick", x: x(at) + 4, y: 11 }, mark));
  }
  entries.forEach(([{ row }, estimate], place) => {
    const y = top + step * place + 14, colour = row.rule === "random" ? COLOURS[6] : row.rule === "all" ? "var(--ink)" : COLOURS[0];
    const name = row.rule === "all" ? ruleName(row.name) : `${ruleName(row.name)} ${percent(row.retention)}`;
    const group = drawn("g", { tabindex: 0 });
    group.append(
      text("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, name.length > 22 ? `${name.slice(0, 21)}…` : name),
      drawn("line", { x1: x(estimate.interval[0]), x2: x(estimate.interval[1]), y1: y, y2: y, stroke: colour, "stroke-width": 2.2 }),
      drawn("circle", { cx: x(estimate.mean), cy: y, r: 4, fill: colour, stroke: "var(--bg)", "stroke-width": 1 }),
      drawn("rect", { x: 0, y: y - step / 2, width, height: step, fill: "transparent" }),
    );
    const said = (event) => showTip(event, `${name}\n${format(estimate.mean)} [${estimate.interval.map(format).join(", ")}]\n${estimate.seeds} seeds`);
    for (const kind of ["pointermove", "focus"]) group.addEventListener(kind, said);
    for (const kind of ["pointerleave", "blur"]) group.addEventListener(kind, hideTip);
    picture.append(group);
  });
  const head = element("h4");
  head.textContent = title;
  return element("div", { class: "chart" }, head, picture);
}
