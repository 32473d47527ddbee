
"use strict";
// Episodes: where their signals sit, and each as a conversation between the student and its tools.

const ENDINGS = {
  answered: "ended with an answer", cut: "cut at the token limit", "no room": "ended: a result had no room",
  "too many calls": "ended: it called again after the last call allowed",
};
const KINDS = ["thought", "call", "argument", "answer", "text"];
const KIND_NAMES = {
  thought: "thought", call: "call (form, name)", argument: "arguments", answer: "answer", text: "other text",
};

function episodeOf(rollout) { return current().view.rollouts[rollout].episode; }
function resultsOf(episode) { return episode ? episode.turns.filter((turn) => typeof turn !== "number").flat() : []; }
function failuresOf(episode) { return resultsOf(episode).filter((result) => result.outcome !== "ok").length; }
function turnsOf(episode) { return episode ? episode.turns.filter((turn) => typeof turn === "number").length : 0; }
function holds(result, query) { return [result.name, result.text, result.end, result.outcome].some((text) => text.toLowerCase().includes(query)); }
function many(number, what) { return `${count(number)} ${what}${number === 1 ? "" : "s"}`; }
function words(tag, className, text) { const node = element(tag, className ? { class: className } : {}); node.textContent = text; return node; }

/** What the list says of an episode before anything else. */
function episodeFacts(episode) {
  const failed = failuresOf(episode), facts = [];
  if (episode.correct !== null) facts.push(words("span", `judged ${episode.correct ? "good" : "bad"}`, episode.correct ? "✓ correct" : "✗ not correct"));
  facts.push(words("span", "", `${many(turnsOf(episode), "turn")} · ${many(resultsOf(episode).length, "call")}`));
  if (failed) facts.push(words("span", "bad", `${count(failed)} failed`));
  return facts;
}
function placeInEpisode(token) {
  const { turn, kind } = current().view;
  if (!turn || !array(turn)[token]) return "";
  return `turn ${array(turn)[token] - 1}, ${KINDS[array(kind)[token] - 1]}, `;
}

/** The student's turns with every token, the results between them folded, the verdict beside the last turn. */
function conversation(episode, from) {
  const blocks = [];
  let token = from, number = 0, last = null;
  for (const turn of episode.turns) {
    if (typeof turn !== "number") { blocks.push(...turn.map(resultBlock)); continue; }
    last = element("div", { class: "turn" }, words("span", "who", `turn ${number++}`), textOfTokens(token, token + turn));
    blocks.push(last);
    token += turn;
  }
  const verdict = verdictOf(episode);
  if (!last) return [...blocks, verdict];
  last.classList.add("last");
  last.append(verdict);
  return blocks;
}

function resultBlock(result) {
  const failed = result.outcome !== "ok", block = element("details", { class: failed ? "result failed" : "result" });
  const head = element("summary"), body = element("div", { class: "said", dir: "auto", tabindex: 0, role: "group", "aria-label": "result" });
  head.append(words("b", "", result.name === "" ? "unreadable call" : visible(result.name)), " ");
  if (failed) head.append(words("span", "outcome", visible(result.outcome)), " ");
  if (result.arguments !== "") head.append(words("code", "", visible(result.arguments)), " ");
  head.append(words("span", "peek", visible(result.text.slice(0, 160))));
  block.append(head, body);
  const unfold = () => {
    if (body.firstChild) return;
    fill(body, result.text);
    if (result.cut) body.append(words("span", "cut", `${count(result.cut)} characters are not shown`));
    fill(body, result.end);
    if (!body.firstChild) body.append(words("span", "cut", "nothing"));
  };
  block.addEventListener("toggle", unfold);
  if (state.query && holds(result, state.query.toLowerCase())) { block.open = true; unfold(); }
  return block;
}

function verdictOf(episode) {
  const block = element("div", { class: "verdict" });
  if (episode.correct !== null) block.append(words("p", episode.correct ? "good" : "bad", episode.correct ? "✓ correct" : "✗ not correct"));
  if (episode.parts.length) {
    const list = element("ul");
    for (const [name, holding] of episode.parts) {
      const mark = words("span", holding ? "good" : "bad", holding ? "✓" : "✗");
      mark.setAttribute("aria-hidden", "true");
      list.append(element("li", { class: holding ? "holds" : "fails" }, mark, words("span", "hidden", holding ? "holds: " : "does not hold: "), words("span", "name", visible(name))));
    }
    block.append(list);
  }
  if (episode.more_parts) block.append(words("p", "small", `and ${count(episode.more_parts)} more`));
  const figures = episode.figures.map(([name, value]) => `${visible(name)} ${+value.toPrecision(6)}`);
  block.append(words("p", "small", [ENDINGS[episode.ending] ?? episode.ending, ...figures].join(" · ")));
  return block;
}

// Where the signals sit.

function drawEpisodes() {
  const played = current().episodes, section = $("episodes");
  if (!section) return;
  section.hidden = !played;
  document.querySelector('a[href="#episodes"]').hidden = !played;
  if (!played) return;
  const listed = (pairs) => pairs.map(([name, number]) => `${visible(name)} ${count(number)}`).join(", ");
  const failed = played.failures.reduce((sum, [, number]) => sum + number, 0);
  $("episodes-note").textContent = [
    `${many(played.count, "episode")}, of ${short(played.turns / played.count)} turns and ${short(played.calls / played.count)} calls each.`,
    played.judged ? `Correct: ${percent(played.correct / played.judged)} of ${count(played.judged)}.` : "",
    failed ? `Failed calls: ${percent(failed / played.calls)} (${listed(played.failures)}).` : played.calls ? "No call failed." : "",
    `Endings: ${listed(played.endings)}.`,
  ].filter((sentence) => sentence).join(" ");
  const rule = current().rules[state.rule], head = element("tr");
  const columns = ["the student's", "tokens", "share", "Q1", "Q2", "Q3", "Q4", `kept by ${ruleAt(rule, current().retentions[state.level])}`, "nats a token", "of the divergence"];
  columns.forEach((name, place) => { const cell = words("th", place ? "number" : "", name); cell.scope = "col"; head.append(cell); });
  const total = played.kinds.reduce((sum, row) => sum + row.tokens, 0), mass = played.kinds.reduce((sum, row) => sum + row.mass, 0) || 1;
  const bodies = [played.kinds, played.by_turn].map((rows) => element("tbody", {}, ...rows.map((row) => {
    const name = words("th", "", KIND_NAMES[row.name] ?? row.name);
    name.scope = "row";
    const figures = [
      count(row.tokens), percent(row.tokens / total), ...row.quadrants.map((number) => percent(number / row.tokens)),
      percent(row.kept[state.rule][state.level] / row.tokens), nats(row.mass / row.tokens), percent(row.mass / mass),
    ];
    return element("tr", {}, name, ...figures.map((figure) => words("td", "number", figure)));
  })));
  $("signals").replaceChildren(element("thead", {}, head), ...bodies);
}
