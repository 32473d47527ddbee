"""The page in a real browser: headless Chromium, offline. Skipped, and said so, where there is none."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from tipdistill import TokenScores, quadrants, select
from tipdistill.report.page import write_report

SMILE = "🙂".encode()
HEBREW = "שלום עולם"
HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>"
LINK = "[x](javascript:window.pwned=1)"
TOKENS = [
    ["The", " sum", " is", " 1", "2", ".", "\n", "\n\n", "Done", "\t", "."],
    ["Hi", " ", SMILE[:2], SMILE[2:], " there", " 👋🏽", " ", SMILE[:1], SMILE[1:3], SMILE[3:], "!"],
    [*HEBREW, " ", "1", "2"],
    [HOSTILE, " ", LINK, "\u202e", "evil", "\u0000", "<b>", "&amp;"],
    *[[f" word{number % 7}" for number in range(60)] for _ in range(12)],
]
TEXTS = [
    b"".join(token if isinstance(token, bytes) else token.encode() for token in rollout).decode() for rollout in TOKENS
]
COUNT = sum(map(len, TOKENS))
ROLLOUT = torch.arange(len(TOKENS)).repeat_interleave(torch.tensor([len(rollout) for rollout in TOKENS]))


PROBE = {
    "student": "small",
    "teacher": HOSTILE,
    "recommendation": {"rule": "q3", "retention": 0.1, "reason": "it keeps most of the descent."},
    "warnings": [HOSTILE],
    "rows": [
        {
            "rule": rule,
            "retention": retention,
            "kept": retention,
            "divergence_share": 0.5,
            "q3_share": float("nan"),
            "cosine": 0.9 * retention,
            "cosine_interval": [0.8 * retention, retention],
            "jaccard": {"soft_or": 0.2, "q3": 0.1, "random": 0.05},
        }
        for rule in ("soft_or", "q3", "random")
        for retention in (0.1, 0.5)
    ],
}


def figure(mean, half, **compared):
    none = {"to_all": None, "to_random": None, "gain_share": None}
    return {"mean": mean, "interval": [mean - half, mean + half], "seeds": 3, **none, **compared}


def sweep_row(name, rule, retention, figure):
    facts = {"learning_rate": 1e-3, "trained_tokens": 1000.0, "seconds": 3.2, "peak_memory_gib": 0.5}
    return {"name": name, "rule": rule, "retention": retention, "tasks": {"sums": figure} if figure else {}, **facts}


SWEEP = {
    "num_samples": 4,
    "test": ["sums"],
    "seeds": [1, 2, 3],
    "learning_rates": [1e-3],
    "validation": {"task": None, "seeds": []},
    "interval": "95 %",
    "before": {"sums": {**figure(0.2, 0.05), "correct": {"1": "0 1"}}},
    "rows": [
        sweep_row("all", "all", 1.0, figure(0.9, 0.05)),
        sweep_row(HOSTILE, "soft_or", 0.2, figure(0.8, 0.1, to_all=figure(-0.1, 0.05), to_random=figure(0.3, 0.1))),
        sweep_row("random", "random", 0.2, figure(0.5, 0.1, to_all=figure(-0.4, 0.1))),
        sweep_row("q3", "q3", 0.1, None),
    ],
    "failed": {"q3-10-rate0.001-seed1": "it burnt"},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page's path, and the columns that it was made of."""
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("records_for_the_browser", Path(__file__).with_name("conftest.py"))
    helpers = module_from_spec(spec)
    spec.loader.exec_module(helpers)
    root = tmp_path_factory.mktemp("report")
    prompts = [f"{HOSTILE} prompt {number}" for number in range(len(TOKENS))]
    table = helpers.write_records(
        root / "run" / "records" / "step-0", TOKENS, prompts, seed=1, sidecar={"rule": "soft_or", "retention": 0.2}
    )
    helpers.write_records(
        root / "run" / "records" / "step-9",
        TOKENS[::-1],
        seed=2,
        sidecar={"rule": "q3", "retention": 0.1, "step": 9, "settings": {"teacher_top_k": 20}},
    )
    for name in ("run", "other"):
        history = [
            {
                "step": step,
                "loss": 2.0 / step,
                "entropy": 0.3,
                "quadrants/q3": 0.1 / step,
                "time/rollout": 1.0,
                "time/loss": 0.5,
            }
            for step in range(1, 20)
        ] + [{"step": step, "eval_addition/mean_at_4": step / 20} for step in (1, 10, 19)]
        (root / name).mkdir(exist_ok=True)
        (root / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (root / "other" / "probe.json").write_text(json.dumps(PROBE))
    (root / "other" / "sweep.json").write_text(json.dumps(SWEEP))
    return write_report([root / "run", root / "other"], root / "report.html", figures=False), table


@pytest.fixture
def open_page(open_offline, report):
    return partial(open_offline, report[0])


def scores_of(table):
    entropy, reverse_kl, forward_kl = (
        torch.tensor(table[name].to_numpy()) for name in ("entropy", "reverse_kl", "forward_kl")
    )
    return TokenScores(entropy_norm=entropy, reverse_kl=reverse_kl, forward_kl=forward_kl)


def classes(page):
    """Classes of every token, in order; all rollouts are in the feed."""
    classes_of = page.eval_on_selector_all(
        "#feed .t", "all => all.map(one => [Number(one.dataset.token), one.className.split(' ')])"
    )
    assert [token for token, _ in classes_of] == list(range(COUNT))
    return [names for _, names in classes_of]


def test_it_loads_offline_and_shades_by_quadrant(open_page, report):
    page = open_page()
    quadrant = quadrants(scores_of(report[1])).tolist()
    assert [next(name for name in names if name in ("q1", "q2", "q3", "q4")) for names in classes(page)] == [
        f"q{number}" for number in quadrant
    ]
    share = quadrant.count(3) / COUNT
    assert f"Q3 · {100 * share:.{0 if share > 0.0995 else 1}f} %" in page.locator("#hexagons").text_content()


def test_pointing_at_a_token_shows_both_models_top_five(open_page, report):
    page, table = open_page(), report[1]
    for token in (3, 40, 200):
        page.locator(f'[data-token="{token}"]').hover()
        for whose in ("student", "teacher"):
            items = page.locator(f"#detail .{whose} li").all()
            expected = table[f"{whose}_top5"][token].as_py()
            assert len(items) == 5
            for item, choice in zip(items, expected, strict=True):
                figure = item.locator("span").text_content()
                assert figure == "<0.1 %" or float(figure.rstrip(" %")) == pytest.approx(
                    100 * choice["probability"], abs=0.06
                )
                shown, known = item.locator("code").text_content(), choice["token"]
                if known.isprintable() and known.isascii():
                    assert shown.replace("␣", " ") == known


def test_rule_and_retention_change_what_is_kept(open_page, report):
    page, scores = open_page(), scores_of(report[1])
    page.select_option("#shade", "kept")
    retentions = page.evaluate("current().retentions")
    seen = set()
    for rule, label in (
        ("q3", "Q3"),
        ("entropy", "entropy"),
        ("divergence", "divergence"),
        ("complement:soft_or", "bottom by Soft-OR"),
    ):
        page.select_option("#rule", label=label)
        for retention in (0.1, 0.5):
            page.locator("#retention").fill(str(retentions.index(retention)))
            kept = ["hold" in names for names in classes(page)]
            assert kept == select(scores, rule, retention, ROLLOUT).mask.tolist()
            assert page.locator("#retained").text_content() == f"{100 * retention:.0f} %"
            seen.add(tuple(kept))
    assert len(seen) == 8


def test_shades_by_statistics(open_page, report):
    page = open_page()
    page.select_option("#shade", "entropy")
    alpha = page.eval_on_selector_all(
        "#feed .t", "all => all.map(one => Number((one.style.background.match(/[/] *([0-9.]+)/) ?? [0, 0])[1]))"
    )
    order = np.argsort(report[1]["entropy"].to_numpy(), kind="stable")
    assert (np.diff(np.array(alpha)[order]) >= -0.011).all()
    assert max(alpha) > 0.7
    assert min(alpha) == 0
    page.select_option("#shade", "recorded:soft_or")
    assert ["hold" in names for names in classes(page)] == report[1]["kept"].to_pylist()


def test_the_keyboard_walks_through_q3(open_page, report):
    page = open_page()
    wrong = [token for token, number in enumerate(quadrants(scores_of(report[1])).tolist()) if number == 3]
    assert len(wrong) > 3
    focused = "Number(document.activeElement.dataset.token)"
    walked = []
    for _ in range(len(wrong) + 1):
        page.keyboard.press("n")
        walked.append(page.evaluate(focused))
    assert walked == [*wrong, wrong[0]]
    page.keyboard.press("p")
    assert page.evaluate(focused) == wrong[-1]
    assert "Q3" in page.locator("#detail").text_content()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    first = int((ROLLOUT[wrong[-1]] == ROLLOUT).nonzero()[0])
    assert page.evaluate(focused) == first + 1
    assert page.locator(".t.current").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".t.current").count() == 0


def test_text_is_whole_and_hostile_text_stays_text(open_page):
    page = open_page()
    shown = page.eval_on_selector_all("#feed .text", "all => all.map(one => one.textContent)")
    # what shows nothing is drawn as a mark by the style sheet, which is no text
    expected = [text.replace("\u202e", "").replace("\u0000", "") for text in TEXTS]
    assert shown == expected
    assert page.locator('[data-code="U+202E"]').count() == 1
    assert page.evaluate("window.pwned") is None
    assert page.locator("#feed a, #feed img, #feed script, a[href^=javascript]").count() == 0
    assert HOSTILE in page.locator("#feed .prompt").first.text_content()
    page.locator(f'[data-token="{len(TOKENS[0]) + len(TOKENS[1]) + len(TOKENS[2])}"]').hover()
    assert "</script>" in page.locator("#detail h3").text_content()
    assert page.evaluate("window.pwned") is None


def test_the_page_runs_no_script_but_its_own(open_page):
    page = open_page()
    blocked = """() => new Promise(done => {
        document.addEventListener('securitypolicyviolation', event => done(event.violatedDirective), { once: true });
        const script = document.createElement('script');
        script.textContent = 'window.pwned = 1';
        document.body.append(script);
        setTimeout(() => done('nothing was blocked'), 2000);
    })"""
    context = page.context
    quiet = context.new_page()  # the browser reports what it blocks on the console
    quiet.goto(page.url)
    quiet.wait_for_selector("html[data-ready]")
    assert quiet.evaluate(blocked) == "script-src-elem"
    assert quiet.evaluate("window.pwned") is None


def test_characters_over_several_tokens_and_line_breaks(open_page):
    page, start = open_page(), len(TOKENS[0])
    texts = page.eval_on_selector_all("#feed .t", "all => all.map(one => one.textContent)")
    assert texts[start + 2 : start + 4] == ["🙂", ""]
    assert texts[start + 7 : start + 10] == ["🙂", "", ""]
    assert "part" in classes(page)[start + 3]
    page.locator(f'[data-token="{start + 3}"]').hover()
    assert "⟨99 82⟩" in page.locator("#detail h3").text_content()
    lines = page.evaluate(
        "[5, 8].map(token => document.querySelector(`[data-token='${token}']`).getBoundingClientRect().top)"
    )
    line = page.evaluate("parseFloat(getComputedStyle(document.querySelector('#feed .text')).lineHeight)")
    assert lines[1] - lines[0] == pytest.approx(3 * line, abs=2)


def test_right_to_left_text_runs_right_to_left(open_page):
    page, start = open_page(), len(TOKENS[0]) + len(TOKENS[1])
    places = page.eval_on_selector_all("#feed .t", "all => all.map(one => one.getBoundingClientRect().left)")
    hebrew = places[start : start + len(HEBREW)]
    assert hebrew == sorted(hebrew, reverse=True)
    digits = places[start + len(HEBREW) + 1 : start + len(TOKENS[2])]
    assert digits == sorted(digits)
    assert places[0] < places[1]


def wait_for_rollouts(page, count):
    from playwright.sync_api import expect

    expect(page.locator("#feed .rollout")).to_have_count(count)


def test_search_sort_and_filter(open_page, report):
    page = open_page()
    page.keyboard.press("/")
    page.keyboard.type("WORD3 word4")
    wait_for_rollouts(page, 12)
    matched = page.eval_on_selector_all("#feed .t.match", "all => all.map(one => one.textContent)")
    assert matched[:2] == [" word3", " word4"]
    assert len(matched) == len(TOKENS[4:]) * sum(number % 7 in (3, 4) for number in range(59))
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == " word3"
    page.locator("#search").fill("")
    wait_for_rollouts(page, 16)
    quadrant = quadrants(scores_of(report[1]))
    wrong = torch.zeros(len(TOKENS)).index_add(0, ROLLOUT, (quadrant == 3).float())
    page.select_option("#sort", "q3")
    shown = [int(text.split()[1]) for text in page.locator("#feed .rollout header b").all_text_contents()]
    assert shown == sorted(range(len(TOKENS)), key=lambda rollout: (-wrong[rollout], rollout))
    for number in (1, 2, 4):
        page.locator(f"#filter input[value='{number}']").uncheck()
    assert page.locator("#feed .rollout").count() == int((wrong > 0).sum())
    dim = page.eval_on_selector_all(
        "#feed .t", "all => all.map(one => [Number(one.dataset.token), one.classList.contains('dim')])"
    )
    assert all(is_dim == bool(quadrant[token] != 3) for token, is_dim in dim)


def test_a_hexagon_leads_to_its_tokens(open_page):
    page = open_page()
    fullest = page.evaluate("array(current().map.tokens).indexOf(Math.max(...array(current().map.tokens)))")
    page.locator("#hexagons .hexagon").nth(fullest).click(force=True)
    framed = page.locator("#feed .t.in-hexagon").count()
    assert framed == page.evaluate(f"array(current().map.tokens)[{fullest}]")
    assert page.evaluate("document.activeElement.classList.contains('in-hexagon')")


def test_confusions_lead_to_their_tokens(open_page):
    page = open_page()
    page.select_option("#context", label="1")
    page.locator("#confusion-table tbody button").first.click()
    row = page.locator("#confusion-table tbody tr").first
    assert page.locator("#detail .student li code").first.text_content() == row.locator(".wrong").text_content()
    assert page.locator("#detail .teacher li code").first.text_content() == row.locator(".right").text_content()
    assert "Q3" in page.locator("#detail h3").text_content()


def test_runs_are_overlaid_and_records_switched(open_page):
    page = open_page()
    assert page.locator("#run-legend .key").all_text_contents() == ["run", "other"]
    titles = page.locator("#training-charts h3").all_text_contents()
    assert {"Loss", "Share of tokens in Q3", "Entropy, nats", "addition: mean@4", "Where a step's time goes"} <= {
        title.removesuffix(", log scale") for title in titles
    }
    for chart in page.locator("#training-charts .chart").all()[: len(titles) - 1]:
        assert chart.locator("polyline").count() == 2
    assert "lower bounds" not in page.locator("#facts").text_content()
    page.select_option("#set", label="run · step-9")
    assert "step 9" in page.locator("#facts").text_content()
    assert "divergences are lower bounds: of the teacher the 20 likeliest" in page.locator("#facts").text_content()
    assert page.locator("#rule option:checked").text_content() == "Soft-OR"  # what was being looked at
    assert page.locator("#feed .rollout .text").first.text_content() == TEXTS[-1]


def test_the_probe_has_its_advice_its_warnings_and_its_rows(open_page):
    page = open_page()
    shown = page.locator("#probe")
    assert "Recommended: Q3 at 10 %: it keeps most of the descent." in shown.text_content()
    assert shown.locator(".note").text_content() == HOSTILE
    assert page.evaluate("window.pwned") is None
    assert shown.locator("tbody tr").count() == len(PROBE["rows"])
    best = [text.replace("\xa0", " ") for text in shown.locator("tr.best td").all_text_contents()]
    assert best == ["Q3", "10 %", "10 %", "50 %", "0.090 (0.080 – 0.100)", "Soft-OR (Jaccard 0.20)"]
    assert shown.locator(".chart").count() == 2  # what is not there is not drawn
    assert shown.locator(".chart").first.locator("polyline").count() == 3


def test_the_sweep_is_sorted_by_any_column_and_its_intervals_are_drawn(open_page):
    page = open_page()
    shown = page.locator("#sweep")
    rows = shown.locator("tbody tr")

    def names():
        return [row.split("\t")[0] for row in rows.all_inner_texts()]

    assert names() == ["all", HOSTILE, "random", "Q3"]
    assert page.evaluate("window.pwned") is None
    cells = [text.replace("\xa0", " ") for text in rows.nth(1).locator("td").all_text_contents()]
    assert cells[:5] == [HOSTILE, "20 %", "0.800 [0.700, 0.900]", "−0.100 [−0.150, −0.050]", "+0.300 [+0.200, +0.400]"]
    assert rows.nth(3).locator("td").nth(2).text_content() == "failed"
    accuracy = shown.locator("th", has_text="accuracy")
    shown.get_by_role("button", name="accuracy").click()
    assert accuracy.get_attribute("aria-sort") == "descending"
    assert names() == ["all", HOSTILE, "random", "Q3"]
    shown.get_by_role("button", name="accuracy").click()
    assert accuracy.get_attribute("aria-sort") == "ascending"
    assert names() == ["random", HOSTILE, "all", "Q3"]  # what failed stays last
    shown.get_by_role("button", name="rule").click()
    assert names()[0] == HOSTILE
    assert shown.locator(".chart").count() == 3
    assert shown.locator(".chart").first.locator("circle").count() == 3
    assert shown.locator(".chart").nth(2).locator("circle").count() == 1
    assert "Failed: q3-10-rate0.001-seed1: it burnt" in shown.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_leaves_the_text_readable(open_page, scheme):
    page = open_page(color_scheme=scheme)
    # WCAG: at least 4.5 : 1 between the text and what is behind it
    contrast = """() => {
        const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
        const over = (colours) => {
            for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const light = (rgb) => {
            const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = rgb.map((v) => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const paper = getComputedStyle(document.body).backgroundColor;
        return [...document.querySelectorAll('#feed .t')].map((one) => {
            const style = getComputedStyle(one);
            const behind = light(over([paper, style.backgroundColor])), ink = light(over([paper, style.color]));
            return (Math.max(ink, behind) + 0.05) / (Math.min(ink, behind) + 0.05);
        });
    }"""
    for shade in page.eval_on_selector_all("#shade option", "all => all.map(one => one.value)"):
        page.select_option("#shade", shade)
        assert min(page.evaluate(contrast)) >= 4.5, shade


@pytest.mark.parametrize("width", [360, 800])
def test_narrow_screens_need_no_sideways_scrolling(open_page, width):
    page = open_page(viewport={"width": width, "height": 800})
    page.keyboard.press("n")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.evaluate("document.activeElement.getBoundingClientRect().toJSON()")
    detail = page.locator("#detail").bounding_box()
    assert box["bottom"] <= detail["y"] or box["right"] <= detail["x"]


def test_in_print_the_text_is_there_and_the_controls_are_not(open_page):
    page = open_page()
    page.emulate_media(media="print")
    assert not page.locator("nav.bar").is_visible()
    assert not page.locator(".tools").is_visible()
    assert page.locator("#feed .text").first.is_visible()
    assert page.locator("#hexagons svg").is_visible()
    style = page.evaluate("getComputedStyle(document.querySelector('.t.q3')).textDecorationLine")
    assert style == "underline"  # the colours of a printer may be off
    assert len(page.pdf()) > 10_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(open_page, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    found = axe.Axe().run(page).response
    told = [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
    assert told == []
    assert len(found["passes"]) > 20


def boxes(page, selector):
    return page.eval_on_selector_all(
        selector,
        "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.top, box.right, box.bottom])",
    )


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_quadrants_names_do_not_collide(open_page, width):
    page = open_page(viewport={"width": width, "height": 900})
    names = boxes(page, "#hexagons .corner, #hexagons .corner-name")
    assert len(names) == 8
    for place, (left, top, right, bottom) in enumerate(names):
        for other in names[place + 1 :]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] + 3 or other[3] <= top + 3
            assert apart, (names[place], other)


def test_wide_tables_fit_where_there_is_room(open_page):
    page = open_page(viewport={"width": 1280, "height": 900})
    for one in page.locator(".scroll").all():
        assert one.evaluate("box => box.scrollWidth - box.clientWidth") <= 1


def test_losses_of_other_tokens_are_said_not_to_compare(open_page):
    note = open_page().locator("#training-note").text_content()
    assert note == ""  # both runs of this page kept the same
    page = open_page()
    page.evaluate(
        "DATA.runs.forEach((run, number) => { run.series['selection/kept_fraction'] = [[1], [0.1 + number]]; });"
        "drawTraining()"
    )
    assert "losses of different rules do not compare" in page.locator("#training-note").text_content()


def test_a_page_without_records_has_a_headline(browser, tmp_path):
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "sweep.json").write_text(json.dumps(SWEEP))
    (tmp_path / "trained").mkdir()
    history = [{"step": step, "loss": 2.0 / step, "reverse_kl": 1.0 / step} for step in (1, 2, 4)]
    (tmp_path / "trained" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    for name, said in (
        ("swept", "On sums, all tokens have the best accuracy of 3 rows: 0.900, before 0.200."),
        ("trained", "Over 4 steps the reverse KL of trained went from 1 to 0.25."),
    ):
        address = write_report([tmp_path / name], figures=False).as_uri()
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        assert page.locator("#headline").text_content().startswith(said)
        page.close()
