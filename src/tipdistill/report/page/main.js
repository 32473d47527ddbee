
"use strict";
// Puts the page together, and keeps its parts in step.

function fillSet() {
  const set = current();
  $("rule").replaceChildren(...set.rules.map((rule, number) => option(number, ruleName(rule.name))));
  state.rule = Math.min(state.rule, set.rules.length - 1);
  $("rule").value = state.rule;
  $("retention").max = set.retentions.length - 1;
  $("retention").value = state.level;
  $("context").replaceChildren(...set.confusions.contexts.map((context, place) => option(place, String(context))));
  $("context").value = Math.min(2, set.confusions.contexts.length - 1);
  $("record-settings").replaceChildren(...set.settings.flatMap(([name, value]) => {
    const term = element("dt"), meaning = element("dd");
    term.textContent = name; meaning.textContent = value;
    return [term, meaning];
  }));
}
function firstLevel(set) {
  const wanted = DATA.retention ?? Number(new Map(set.settings).get("retention") ?? new Map(set.settings).get("settings · retention") ?? 0.5);
  let best = 0;
  set.retentions.forEach((retention, level) => { if (Math.abs(retention - wanted) < Math.abs(set.retentions[best] - wanted)) best = level; });
  return best;
}
function showRetention() {
  $("retained").textContent = percent(current().retentions[state.level]);
  $("retention").setAttribute("aria-valuetext", $("retained").textContent);
}

watch((what) => {
  if (what.has("set")) {
    fillSet();
    loadView();
    fillShades();
    drawMap();
    drawConfusions();
    fillSorts();
    arrange();
    describe(-1);
  }
  if (what.has("rule") && !what.has("set")) {
    drawMap.kept();
    repaint();
    describe(state.current);
  }
  if (what.has("set") || what.has("rule")) {
    showRetention();
    drawQuadrants();
    drawBudgets();
    drawEpisodes();
  }
});

function setUp() {
  DATA.sets.forEach((set, number) => $("set").append(option(number, set.name)));
  state.level = firstLevel(current());
  $("set").addEventListener("change", () => {
    const retention = current().retentions[state.level], rule = current().rules[state.rule].name;
    state.set = Number($("set").value);
    state.level = current().retentions.reduce((best, offered, level, all) => Math.abs(offered - retention) < Math.abs(all[best] - retention) ? level : best, 0);
    state.rule = Math.max(0, current().rules.findIndex((offered) => offered.name === rule));
    changed("set");
  });
  $("rule").addEventListener("change", () => { state.rule = Number($("rule").value); changed("rule"); });
  $("retention").addEventListener("input", () => { state.level = Number($("retention").value); changed("rule"); });
  $("context").addEventListener("change", drawConfusions);
  setUpTokens();
  changed("set");
}

$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  if (DATA.sets.length) drawMap();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (DATA.sets.length) drawMap(); });

(async () => {
  try {
    if (DATA.sets.length) { await unpackAll(); setUp(); }
    if (DATA.runs.length) drawTraining();
    if (!DATA.sets.length) $("headline").textContent = DATA.sweeps.length ? sweepHeadline(DATA.sweeps[0]) : DATA.runs.length ? runHeadline(DATA.runs[0]) : "";
    if (DATA.probes.length) drawProbes();
    if (DATA.sweeps.length) drawSweeps();
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    $("trouble").hidden = false;
    $("trouble").textContent = typeof DecompressionStream === "undefined"
      ? "This browser cannot unpack the data (no DecompressionStream): use Chrome 80, Firefox 113, Safari 16.4 or newer."
      : `The page could not be drawn: ${error.message}`;
    throw error;
  }
})();
