"""Episodes in a real browser: a conversation whose results fold, fail in red and stay text, whatever they hold."""

from dataclasses import replace

import pytest
from episodes import HOSTILE, SCRIPTS, acting_tokenizer, drawn, played

from tipdistill.records import About, RecordsWriter, open_records
from tipdistill.report.page import write_report
from tipdistill.types import Rollout

TOKENIZER = acting_tokenizer()
ABOUT = About("student", "teacher", len(TOKENIZER), rules=("soft_or", "q3"), retention=0.2)
TEN_MEGABYTES = HOSTILE * (10**7 // len(HOSTILE))
NAMES = list(SCRIPTS)
ENTRIES = {name: f"#feed .rollout >> nth={place}" for place, name in enumerate(NAMES)}


def written():
    """The episodes; what one result says is ten megabytes of markup, controls and special tokens."""
    rollouts = played(TOKENIZER, SCRIPTS.values())
    turns = list(rollouts[NAMES.index("hostile")].turns)
    turns[1] = replace(turns[1], results=(replace(turns[1].results[0], text=TEN_MEGABYTES),))
    rollouts[NAMES.index("hostile")] = replace(rollouts[NAMES.index("hostile")], turns=tuple(turns))
    return rollouts


ROLLOUTS = written()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    plain = [Rollout(0, "p", (1,), tuple(range(40)), True)]
    for name, rollouts in (("episodes", ROLLOUTS), ("plain", plain)):
        with RecordsWriter(root / name, TOKENIZER, ABOUT) as writer:
            writer.write(rollouts, drawn(rollouts, ABOUT, len(TOKENIZER)))
    return write_report([root / "episodes", root / "plain"], root / "report.html", figures=False)


@pytest.fixture
def page(open_offline, path):
    return open_offline(path)


def shown(text):
    """A text as the page holds it: what shows nothing is drawn by the style sheet."""
    return text.replace("\u202e", "").replace("\u0000", "")


def box(locator):
    return locator.bounding_box()


def test_turns_are_text_and_results_between_them_are_folded(page):
    for name, rollout in zip(NAMES, ROLLOUTS, strict=True):
        entry = page.locator(ENTRIES[name])
        blocks = entry.locator("> .turn, > .result").all()
        expected = [block for turn in rollout.turns for block in ([turn] if turn.role == "student" else turn.results)]
        assert len(blocks) == len(expected)
        for block, meant in zip(blocks, expected, strict=True):
            if hasattr(meant, "role"):
                assert block.locator(".text").text_content() == meant.text
            else:
                assert block.evaluate("node => node.open") is False
                assert not block.locator(".said").is_visible()
                assert block.locator("b").text_content() == (meant.name or "unreadable call")
    # a token of the student's each, and none of the tools'
    assert page.locator("#feed .t").count() == sum(len(rollout.student_ids) for rollout in ROLLOUTS)


def test_a_click_or_a_key_unfolds_a_result(page):
    from playwright.sync_api import expect

    results = page.locator(f"{ENTRIES['correct']} >> .result")
    first, second = results.nth(0), results.nth(1)
    first.locator("summary").click()
    assert first.locator(".said").is_visible()
    expect(first.locator(".said")).to_have_text('{"train": "ICE 1", "origin": "Köln", "price": 40}')
    first.locator("summary").click()
    assert not first.locator(".said").is_visible()
    second.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(second.locator(".said")).to_contain_text('{"train": "ICE 2"')
    assert page.locator(".t.current").count() == 0


def test_failures_are_red_and_say_what_failed(page):
    failed = page.locator(f"{ENTRIES['failures']} >> .result.failed")
    assert failed.locator(".outcome").all_text_contents() == ["raised", "unknown tool", "bad arguments", "malformed"]
    for one in failed.all():
        red, green, blue = one.evaluate("node => getComputedStyle(node).borderTopColor.match(/\\d+/g).map(Number)")
        assert red > 150 > 60 > max(green, blue)
        assert one.locator(".outcome").is_visible()
    assert "no room in Köln" in failed.first.locator(".peek").text_content()
    assert page.locator(f"{ENTRIES['correct']} >> .failed").count() == 0


def test_the_verdict_stands_beside_the_plan(page):
    for name, rollout in zip(NAMES, ROLLOUTS, strict=True):
        entry = page.locator(ENTRIES[name])
        assert entry.locator(".verdict").count() == 1
        last = entry.locator("> .turn").last
        verdict = last.locator(".verdict")
        listed = [
            (item.locator(".name").text_content(), item.locator("span").first.text_content())
            for item in verdict.locator("li").all()
        ]
        parts = rollout.verdict.parts.items()
        assert [name.replace("⟨U+202E⟩", "\u202e").replace("⟨U+0000⟩", "\u0000") for name, _ in listed] == [
            name for name, _ in parts
        ]
        assert [mark for _, mark in listed] == ["✓" if holds else "✗" for _, holds in parts]
        text = box(last.locator(".text"))
        assert box(verdict)["x"] >= text["x"] + text["width"]
    said = page.locator(".verdict").all_text_contents()
    assert "✓ correct" in said[0]
    assert "✗ not correct" in said[1]
    assert "share 0.333333" in said[1]
    assert "cut at the token limit" in said[3]


def test_the_list_says_how_each_episode_went(page):
    heads = [text.replace("\xa0", " ") for text in page.locator("#feed .rollout > header").all_inner_texts()]
    heads = [" ".join(head.split()) for head in heads]
    assert heads[0].startswith("Rollout 0 ✓ correct 3 turns · 3 calls 244 tokens")
    assert heads[1].startswith("Rollout 1 ✗ not correct 5 turns · 4 calls 4 failed 197 tokens")
    assert heads[3].startswith("Rollout 3 ✗ not correct 2 turns · 1 call 72 tokens")


def test_hostile_results_stay_text_and_do_not_make_the_page_huge(page, path):
    assert path.stat().st_size < 1_000_000
    result = page.locator(f"{ENTRIES['hostile']} >> .result")
    result.locator("summary").click()
    said = result.locator(".said")
    mark = said.locator(".cut").text_content()
    assert mark == f"{len(TEN_MEGABYTES) - 4000:,} characters are not shown"
    text = said.text_content()
    assert text == shown(TEN_MEGABYTES[:3000]) + mark + shown(TEN_MEGABYTES[-1000:])
    assert said.locator('[data-code="U+0000"]').count() > 10
    assert said.locator('[data-code="U+202E"]').count() > 10
    assert page.evaluate("window.pwned") is None
    assert page.locator("#feed script, #feed img, #feed a, #feed .said div").count() == 0
    assert page.locator("#feed .rollout").count() == len(ROLLOUTS)
    assert page.locator("body > *").evaluate_all("all => all.map(one => one.tagName)").count("MAIN") == 1


def test_tokens_of_every_turn_are_pointed_at_and_walked_through(page):
    turns = [turn for turn in ROLLOUTS[0].turns if turn.role == "student"]
    before = turns[1].text[: turns[1].text.index("Köln")]
    inside = turns[0].tokens + len(TOKENIZER(before)["input_ids"])
    page.locator(f'[data-token="{inside}"]').hover()
    detail = page.locator("#detail")
    assert f"rollout 0, turn 1, argument, token {inside}" in detail.text_content()
    assert detail.locator(".student li").count() == detail.locator(".teacher li").count() == 5
    page.locator(f'[data-token="{turns[0].tokens - 1}"]').click()
    page.keyboard.press("ArrowRight")  # over the result
    focused = "Number(document.activeElement.dataset.token)"
    assert page.evaluate(focused) == turns[0].tokens
    assert "turn 1, call" in detail.text_content()
    wrong = page.evaluate("[...view.rollout.keys()].filter((token) => quadrantOf(token) === 3)")
    page.keyboard.press("Escape")
    walked = []
    for _ in wrong:
        page.keyboard.press("n")
        walked.append(page.evaluate(focused))
    assert walked == wrong
    assert len({page.evaluate(f"array(current().view.turn)[{token}]") for token in wrong}) > 2


def test_search_sort_and_filter_know_episodes(page):
    from playwright.sync_api import expect

    page.locator("#search").fill('ICE 3",')  # what a tool said
    expect(page.locator("#feed .rollout")).to_have_count(1)
    opened = page.locator("#feed details.result[open]")
    assert opened.count() == 1
    assert '"ICE 3"' in opened.locator(".said").text_content()
    page.locator("#search").fill("")
    expect(page.locator("#feed .rollout")).to_have_count(len(ROLLOUTS))
    page.select_option("#sort", label="not correct")
    order = page.locator("#feed .rollout header b").all_text_contents()
    assert order == ["Rollout 1", "Rollout 3", "Rollout 0", "Rollout 2"]
    page.select_option("#sort", label="most failed calls")
    assert page.locator("#feed .rollout header b").first.text_content() == "Rollout 1"
    for number in (1, 2, 4):
        page.locator(f'#filter input[value="{number}"]').uncheck()
    dim = page.eval_on_selector_all("#feed .t", "all => all.map(one => one.classList.contains('dim'))")
    assert any(dim)
    assert dim.count(False) == page.evaluate(
        "view.order.reduce((sum, place) => sum + sumOver(place, (token) => quadrantOf(token) === 3), 0)"
    )


def test_the_table_says_where_the_signals_sit(page, path):
    table = open_records(path.parent / "episodes").read(["turn", "kind", "quadrant", "reverse_kl"]).to_pandas()
    page.select_option("#rule", label="Q3")
    page.locator("#retention").fill(str(page.evaluate("current().retentions.indexOf(0.1)")))
    rows = [
        [cell.replace("\xa0", " ") for cell in row.locator("th, td").all_text_contents()]
        for row in page.locator("#signals tbody tr").all()
    ]
    assert [row[0] for row in rows] == [
        *("thought", "call (form, name)", "arguments", "answer", "other text"),
        *(f"turn {number}" for number in range(5)),
    ]
    groups = [table[table.kind == kind] for kind in ("thought", "call", "argument", "answer", "text")]
    groups += [table[table.turn == number] for number in range(5)]
    for row, group in zip(rows, groups, strict=True):
        assert row[1] == f"{len(group):,}"
        for number in (1, 2, 3, 4):
            share = 100 * (group.quadrant == number).mean()
            assert float(row[2 + number].rstrip(" %")) == pytest.approx(share, abs=0.51)
        assert float(row[8]) == pytest.approx(group.reverse_kl.mean(), rel=0.02)
    whole = sum(len(group) for group in groups[:5])
    kept = sum(float(row[7].rstrip(" %")) / 100 * len(group) for row, group in zip(rows[:5], groups[:5], strict=True))
    assert kept / whole == pytest.approx(0.1, abs=0.02)
    assert "kept by Q3 at 10 %" in page.locator("#signals thead").text_content().replace("\xa0", " ")
    note = page.locator("#episodes-note").text_content()
    assert note.startswith("4 episodes, of 3 turns and 2.25 calls each. Correct: 50 % of 4.")
    assert "Failed calls: 44 % (raised 1, unknown tool 1, bad arguments 1, malformed 1)" in note.replace("\xa0", " ")
    assert "Endings: answered 3, cut 1." in note


def test_records_without_episodes_show_nothing_of_them(page):
    page.select_option("#set", label="plain")
    assert not page.locator("#episodes").is_visible()
    assert not page.locator('a[href="#episodes"]').is_visible()
    assert page.locator("#feed .turn, #feed .result, #feed .verdict").count() == 0
    assert page.locator("#feed .text").count() == 1
    assert "not correct" not in page.locator("#sort").text_content()
    page.locator('[data-token="3"]').hover()
    assert "rollout 0, token 3" in page.locator("#detail").text_content()
    page.select_option("#set", label="episodes")
    assert page.locator("#episodes").is_visible()
    assert page.locator("#feed .verdict").count() == len(ROLLOUTS)


@pytest.mark.parametrize("width", [320, 360, 800])
def test_a_phone_shows_a_conversation_without_sideways_scrolling(open_offline, path, width):
    page = open_offline(path, viewport={"width": width, "height": 800})
    for summary in page.locator("#feed summary").all():
        summary.evaluate("node => { node.parentElement.open = true; }")
    assert page.locator("#feed .said").last.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for one in page.locator("#feed .result, #feed .turn, #feed .verdict").all():
        assert box(one)["x"] + box(one)["width"] <= width
    last = page.locator(f"{ENTRIES['correct']} >> .turn.last")
    text, verdict = box(last.locator(".text")), box(last.locator(".verdict"))
    assert verdict["y"] >= text["y"] + text["height"]
    outcome = page.locator(f"{ENTRIES['failures']} >> .outcome").first
    assert box(outcome)["x"] + box(outcome)["width"] <= width


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_axe_finds_nothing_in_a_conversation(open_offline, path, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_offline(path, color_scheme=scheme, viewport={"width": width, "height": 900})
    for summary in page.locator("#feed summary").all()[:4]:
        summary.evaluate("node => { node.parentElement.open = true; }")
    page.evaluate("describe(3)")
    found = axe.Axe().run(page).response
    told = [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
    assert told == []
