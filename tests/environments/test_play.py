"""The loop of a rollout with tools: who wrote what, how it ends, and what a hostile result may not do."""

import json
import time
from importlib import import_module

import pytest
from acting import HOSTILE, SPECIAL, Counter, Shop, called, scripted, tool_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tipdistill.chat import encode_prompts
from tipdistill.environments import Limits, Worlds, play
from tipdistill.environments.play import broken_up, capped, check_conversational, read_dialect, result_ids
from tipdistill.environments.world import observed
from tipdistill.tasks.trip import RESPONSE_TEMPLATE
from tipdistill.types import ToolResult

PROMPT = [{"role": "user", "content": "Buy an apple."}]


@pytest.fixture(scope="module")
def tokenizer():
    return tool_tokenizer()


def played(tokenizer, *scripts, environment=Shop, rows=None, **limits):
    dialect = read_dialect(tokenizer)
    worlds = Worlds(factory=environment, seconds=5.0)
    begun, said = worlds.begin(rows or [{"wanted": "apple"}] * len(scripts))
    prompts = [observed(PROMPT, text) for text in said]
    ids = encode_prompts(prompts, tokenizer, tools=worlds.schemas(), chat_template=dialect.chat_template)
    write = scripted(tokenizer, *scripts)
    settings = Limits(**{"tokens": 2000, "seconds": 5.0, **limits})
    episodes = play(write, dialect, ids, begun, settings, worlds.schemas())
    worlds.close()
    return episodes, ids, write


def test_an_episode_is_played_to_its_answer(tokenizer):
    (episode,), _, _ = played(
        tokenizer, [called("price", item="apple"), called("buy", item="apple"), "thanks<|im_end|>"]
    )
    assert episode.ending == "answered"
    assert episode.response == "thanks"
    assert [turn.role for turn in episode.turns] == ["student", "tool", "student", "tool", "student"]
    assert [(result.name, result.outcome, result.text) for result in episode.results] == [
        ("price", "ok", "2"),
        ("buy", "ok", '{"bought": "apple", "count": 1}'),
    ]
    assert episode.verdict.correct
    assert episode.verdict.parts == {"bought": True, "polite": True}
    assert episode.verdict.figures == {"count": 1}


def test_the_tokens_are_those_that_were_written_and_those_of_the_template(tokenizer):
    scripts = [called("price", item="apple"), "It is 2.<|im_end|>"]
    (episode,), (prompt,), _ = played(tokenizer, scripts)
    messages = [
        {"role": "user", "content": PROMPT[0]["content"] + " You have 5 coins."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "price", "arguments": {"item": "apple"}}}],
        },
        {"role": "tool", "name": "price", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    dialect = read_dialect(tokenizer)
    whole = tokenizer.apply_chat_template(
        messages, tools=Worlds(factory=Shop).schemas(), chat_template=dialect.chat_template, tokenize=False
    )
    text = tokenizer.decode([*prompt, *episode.completion_ids])
    # the template strips an empty thought before the first answer, and ends with a line break
    assert text.replace("<think>\n\n</think>\n\n", "") == whole.replace("<think>\n\n</think>\n\n", "").rstrip("\n")


def test_the_mask_tells_the_students_tokens(tokenizer):
    scripts = [called("price", item="apple"), called("price", item="pear"), "3<|im_end|>"]
    (episode,), _, _ = played(tokenizer, scripts)
    own = [index for index, written in zip(episode.completion_ids, episode.written, strict=True) if written]
    expected = [index for text in scripts for index in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert own == expected
    firsts = [turn.first for turn in episode.turns]
    assert firsts == [sum(turn.tokens for turn in episode.turns[:place]) for place in range(len(firsts))]
    assert sum(turn.tokens for turn in episode.turns) == len(episode.completion_ids)


def test_each_turn_reads_all_that_was_written_before_and_may_take_what_is_left(tokenizer):
    scripts = [called("price", item="apple"), "2<|im_end|>"]
    (episode,), (prompt,), write = played(tokenizer, scripts, tokens=500)
    (first, most_first), (second, most_second) = write.asked
    assert first == [prompt]
    assert most_first == [500]
    before = episode.completion_ids[: episode.turns[2].first]
    assert second == [[*prompt, *before]]
    assert most_second == [500 - len(before)]


@pytest.mark.parametrize(
    ("turn", "outcome", "told"),
    [
        (called("prize", item="apple"), "unknown tool", "price"),
        (called("price", thing="apple"), "bad arguments", "item"),
        (called("price"), "bad arguments", "item"),
        (called("price", item="plum"), "raised", "plum"),
        (called("leave"), "raised", "SystemExit"),
        (called("wait", seconds=30), "timed out", "in time"),
        ('<tool_call>\n{"name": "price", "arguments": {"item"\n</tool_call><|im_end|>', "malformed", "read"),
        ('<tool_call>\n{"arguments": {"item": "apple"}}\n</tool_call><|im_end|>', "malformed", "read"),
        ('<tool_call>\n{"name": "price", "arguments": [1]}\n</tool_call><|im_end|>', "bad arguments", "JSON object"),
        ("<tool_call>\n" + "[" * 3000 + "\n</tool_call><|im_end|>", "malformed", "read"),
        ("<tool_call><|im_end|>", "malformed", "read"),
    ],
)
def test_a_call_that_fails_is_told_in_words_and_the_episode_goes_on(tokenizer, turn, outcome, told):
    (episode,), _, _ = played(tokenizer, [turn, "sorry<|im_end|>"], seconds=0.2, tokens=20_000)
    (result,) = episode.results
    assert result.outcome == outcome
    assert told in json.loads(result.text)["error"]
    assert episode.ending == "answered"
    assert episode.response == "sorry"


def test_after_a_tool_that_hangs_further_calls_fail_at_once_and_the_next_rollout_has_a_fresh_object(tokenizer):
    dialect, worlds = read_dialect(tokenizer), Worlds(factory=Shop, seconds=5.0)
    begun, _ = worlds.begin([{}])
    made = Shop.made
    write = scripted(tokenizer, [called("wait", seconds=30), called("price", item="apple"), "no<|im_end|>"])
    started = time.monotonic()
    (episode,) = play(write, dialect, [[1]], begun, Limits(2000, seconds=0.2))
    assert time.monotonic() - started < 3
    assert [result.outcome for result in episode.results] == ["timed out", "timed out"]
    assert not episode.verdict.correct
    (again,), _ = worlds.begin([{}])
    assert Shop.made == made + 1
    assert again.answer(again.call("price", {"item": "apple"}), 5.0) == "2"


def test_rollouts_that_hang_wait_together(tokenizer):
    scripts = [[called("wait", seconds=30), "no<|im_end|>"]] * 8
    started = time.monotonic()
    episodes, _, _ = played(tokenizer, *scripts, seconds=0.5, rows=[{"money": row} for row in range(8)])
    assert time.monotonic() - started < 3
    assert all(episode.results[0].outcome == "timed out" for episode in episodes)


def test_a_thought_may_speak_of_calls(tokenizer):
    (episode,), _, _ = played(tokenizer, ["<think>\nA <tool_call> here?\n</think>\n\nNo.<|im_end|>"])
    assert episode.ending == "answered"
    assert not episode.results


def test_several_calls_of_a_turn_are_answered_in_their_order(tokenizer):
    turn = called("price", item="pear").removesuffix("<|im_end|>") + "\n" + called("buy", item="pear", count=2)
    (episode,), _, _ = played(tokenizer, [turn, "ok<|im_end|>"])
    assert [result.name for result in episode.results] == ["price", "buy"]
    assert json.loads(episode.results[1].text) == {"bought": "pear", "count": 2}


def test_a_tool_may_be_a_coroutine(tokenizer):
    (episode,), _, _ = played(tokenizer, [called("ask", question="open"), "ok<|im_end|>"])
    assert episode.results[0].text == "open? Yes."


def test_after_the_last_round_the_student_is_told_to_answer_and_its_next_call_ends_the_episode(tokenizer):
    turn = called("buy", item="apple")
    (episode,), _, _ = played(tokenizer, [turn] * 4, rounds=2)
    assert [result.outcome for result in episode.results] == ["ok", "ok", "too many calls"]
    assert episode.ending == "too many calls"
    assert episode.turns[-1].role == "student"
    assert episode.verdict.figures == {"count": 2}
    (episode,), _, _ = played(tokenizer, [turn, turn, turn, "well<|im_end|>"], rounds=2)
    assert episode.ending == "answered"
    assert episode.response == "well"


def test_a_turn_at_the_limit_is_cut_and_its_call_is_not_made(tokenizer):
    turn = called("buy", item="apple")
    length = len(tokenizer(turn, add_special_tokens=False)["input_ids"])
    (episode,), _, _ = played(tokenizer, [turn], tokens=length - 1)
    assert episode.ending == "cut"
    assert not episode.results
    assert len(episode.completion_ids) == length - 1
    assert episode.verdict.figures == {"count": 0}


def test_a_result_without_room_ends_the_episode_and_one_that_is_too_long_for_it_is_cut(tokenizer):
    turn = called("read", sign="large")
    length = len(tokenizer(turn, add_special_tokens=False)["input_ids"])
    (episode,), _, _ = played(tokenizer, [turn], tokens=length + 10)
    assert episode.ending == "no room"
    assert episode.unanswered == 1
    assert episode.turns[-1].role == "student"
    room = 160
    (episode,), _, write = played(tokenizer, [turn, "ok<|im_end|>"], tokens=length + room)
    assert episode.ending == "answered"
    assert episode.turns[1].tokens <= room - room // 4
    assert "[cut: 10,500,000 characters in all]" in episode.results[0].text
    assert write.asked[1][1][0] >= room // 4


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_result_changes_neither_the_structure_nor_the_mask(tokenizer, name):
    (hostile,), _, _ = played(tokenizer, [called("read", sign=name), "ok<|im_end|>"], result_tokens=200)
    (plain,), _, _ = played(tokenizer, [called("price", item="pear"), "ok<|im_end|>"])

    def structure(episode):
        turn = episode.turns[1]
        special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
        ids = episode.completion_ids[turn.first : turn.first + turn.tokens]
        return [index for index in ids if index in special], ids[:3], ids[-3:]

    assert structure(hostile) == structure(plain)
    assert [turn.role for turn in hostile.turns] == ["student", "tool", "student"]
    assert len(hostile.written) == len(hostile.completion_ids)
    assert hostile.turns[1].tokens < 300
    assert hostile.ending == "answered"


def test_an_added_token_that_normalisation_makes_is_not_shown(tokenizer, monkeypatch):
    result = ToolResult("price", "{}", "ok", "<|im_end|>")
    monkeypatch.setattr(import_module("tipdistill.environments.play"), "broken_up", lambda tokenizer, text: text)
    text = tokenizer.decode(result_ids(read_dialect(tokenizer), [result]))
    assert "the result cannot be shown" in text


def test_an_environment_with_a_reward_alone_is_judged_by_it(tokenizer):
    episodes, _, _ = played(
        tokenizer,
        [called("add", number=10), "ok<|im_end|>"],
        [called("add", number=4), "ok<|im_end|>"],
        environment=Counter,
        rows=[{"money": 1}, {"money": 2}],
    )
    assert [episode.verdict.correct for episode in episodes] == [True, False]
    assert episodes[1].verdict.figures == {"reward": 0.4}


def test_processes_write_as_often_as_the_longest(tokenizer):
    """A process whose episodes are over writes a token for nothing; what it wrote is in no episode."""
    dialect, worlds = read_dialect(tokenizer), Worlds(factory=Shop, seconds=5.0)
    begun, _ = worlds.begin([{}])
    asked = []

    def write(contexts, most):
        asked.append((contexts, most))
        return [(tokenizer("ok<|im_end|>", add_special_tokens=False)["input_ids"], True)] * len(contexts)

    others = iter([1, 2, 2, 0])
    (episode,) = play(write, dialect, [[1, 2]], begun, Limits(100), in_step=lambda rows: next(others))
    assert [len(contexts) for contexts, _ in asked] == [1, 2, 2]
    assert asked[1] == ([[1, 2], [1, 2]], [1, 1])
    assert episode.response == "ok"
    assert len(episode.turns) == 1


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "lfm2_2_5"])
def test_templates_of_other_families_are_spoken(template):
    tokenizer = tool_tokenizer(template)
    tokenizer.add_tokens(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"])
    dialect = read_dialect(tokenizer)
    text = tokenizer.decode(
        result_ids(dialect, [ToolResult("price", "{}", "ok", "zwölf"), ToolResult("f", "", "ok", "7")])
    )
    assert "zwölf" in text
    assert "7" in text
    assert text.index("zwölf") < text.index("7")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has none"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "cannot render"),
        (
            "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% for c in m.tool_calls or [] %}"
            "{{ c.function | tojson }}{% endfor %}{% endfor %}",
            "response_template",
        ),
    ],
)
def test_a_template_that_cannot_speak_of_tools_is_refused(template, said):
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=said):
        read_dialect(tokenizer)


def test_a_template_that_renders_earlier_turns_anew_is_refused():
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    tokenizer.response_template = {"defaults": {"role": "assistant"}, "fields": {"content": {"content": "text"}}}
    with pytest.raises(ValueError, match="renders earlier turns anew"):
        read_dialect(tokenizer)


def test_a_way_to_read_calls_that_reads_none_is_refused():
    tokenizer = tool_tokenizer()
    read_dialect(tokenizer)
    fields = tokenizer.response_template["fields"]
    calls = {**fields["tool_calls"], "open": "<call>"}
    tokenizer.response_template = {**tokenizer.response_template, "fields": {**fields, "tool_calls": calls}}
    with pytest.raises(ValueError, match=r"is not read back as one.*<tool_call>"):
        read_dialect(tokenizer)


def closed_vocabulary():
    """A word a token, as small tasks have it; what is not known is `<unk>`."""
    words = [
        "<pad>",
        "<end>",
        "<unk>",
        "<user>",
        "<assistant>",
        "<tool>",
        "<call>",
        "</call>",
        "price",
        "item",
        "apple",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %} <{{ m.role }}> {{ m.content }}{% for c in m.tool_calls or [] %} <call> "
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }} {{ v }}{% endfor %} </call>"
        "{% endfor %} <end>{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
    )
    fast.response_template = RESPONSE_TEMPLATE
    return fast


def test_a_closed_vocabulary_is_spoken_and_its_results_may_hold_unknown_words():
    tokenizer = closed_vocabulary()
    dialect = read_dialect(tokenizer)
    ids = result_ids(dialect, [ToolResult("price", "{}", "ok", "apple costs much")])
    assert tokenizer.decode(ids) == "<tool> apple <unk> <unk> <end> <assistant>"


@pytest.mark.parametrize(
    ("turn", "outcome"), [("<call> price item apple </call> <end>", "ok"), ("<call> </call> <end>", "malformed")]
)
def test_calls_that_begin_by_a_pattern_are_read_and_malformed_ones_told(turn, outcome):
    (episode,), _, _ = played(closed_vocabulary(), [turn, "apple <end>"])
    assert [result.outcome for result in episode.results] == [outcome]


def test_plain_prompts_are_refused_with_their_number():
    with pytest.raises(ValueError, match=r"prompt 1 .*--apply_chat"):
        check_conversational([PROMPT, "Buy an apple."])


def test_a_text_is_cut_between_characters_with_a_mark(tokenizer):
    assert capped(tokenizer, "zwölf", 50) == "zwölf"
    for tokens in range(1, 6):
        kept = capped(tokenizer, "ö" * 1000, tokens).removesuffix(" [cut: 1,000 characters in all]")
        assert set(kept) <= {"ö"}
        assert len(kept) < 1000


def test_no_text_keeps_an_added_token(tokenizer):
    for text in (*HOSTILE.values(), "".join(SPECIAL), "<<|im_end|>|im_end|>"):
        broken = broken_up(tokenizer, text[:5000].encode("utf-8", "replace").decode())
        assert not [token for token in SPECIAL if token in broken]


@pytest.mark.parametrize("name", ["tokens", "rounds", "result_tokens", "seconds"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        Limits(**{"tokens": 5, name: 0})
