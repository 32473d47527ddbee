"""Every token of a turn has its kind: as the template's own parser reads it, in whatever pieces it was written."""

import time
from itertools import groupby

import pytest
import trl.chat_template_utils as templates
from episodes import SCRIPTS, acting_tokenizer, call, played

from tipdistill.kinds import KINDS, token_kinds
from tipdistill.vocabulary import token_bytes

QWEN = templates.qwen3_template
WEATHER = '{"name": "f", "arguments": {"city": "a } b", "days": [1, 2]}}'


def cut(text, template=QWEN, before="", called=False):
    """Stretches of one kind, of a text in single characters."""
    kinds = token_kinds([character.encode() for character in text], template, before, called)
    assert set(kinds) <= set(KINDS)
    stretches = groupby(zip(kinds, text, strict=True), key=lambda pair: pair[0])
    return [(kind, "".join(character for _, character in pairs)) for kind, pairs in stretches]


def test_a_turn_is_thought_text_calls_and_their_arguments():
    text = f"<think>\nNo <tool_call> yet.</think>\n\nSo:\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n"
    text += '{"arguments": {}, "name": "g"}\n</tool_call><|im_end|>'
    assert cut(text) == [
        ("thought", "<think>\nNo <tool_call> yet.</think>\n\n"),
        ("text", "So:\n"),
        ("call", '<tool_call>\n{"name": "f", "arguments": '),
        ("argument", '{"city": "a } b", "days": [1, 2]}'),
        ("call", '}\n</tool_call>\n<tool_call>\n{"arguments": '),
        ("argument", "{}"),
        ("call", ', "name": "g"}\n</tool_call>'),
        ("text", "<|im_end|>"),
    ]


def test_what_a_turn_without_calls_says_is_the_answer():
    assert cut("<think>\n</think>\n\nTrain 3.<|im_end|>") == [
        ("thought", "<think>\n</think>\n\n"),
        ("answer", "Train 3.<|im_end|>"),
    ]
    assert cut("Train 3.") == [("answer", "Train 3.")]
    assert cut("f(x)", None, called=True) == [("text", "f(x)")]  # the template does not tell calls, and it was answered
    assert cut("") == []


def test_a_thought_that_the_prompt_began_goes_on():
    before = "<|im_start|>assistant\n<think>an old one, never closed<|im_start|>assistant\n<think>\n"
    assert cut("hm</think>\n\nYes", before=before) == [("thought", "hm</think>\n\n"), ("answer", "Yes")]
    assert cut("hm", before="<|im_start|>assistant\n") == [("answer", "hm")]
    assert cut("hm", before=before.removesuffix("<think>\n")) == [("answer", "hm")]


def test_of_two_openings_at_one_place_the_longer_counts():
    fields = {"thinking": {"open": "<t", "close": ">"}, "tool_calls": {"open": ["<to", "<tool>"], "close": "</tool>"}}
    assert cut('<tool>{"arguments": 1}</tool><t>', {"fields": fields}) == [
        ("call", '<tool>{"arguments": '),
        ("argument", "1"),
        ("call", "}</tool>"),
        ("thought", "<t>"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>{not JSON}</tool_call>!", ["call", "text"]),
        ("<tool_call>f(x)", ["call"]),
        ('<tool_call>{"name": "f", "arguments": {"a": "x', ["call", "argument"]),
        ('<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>', ["call", "argument", "call"]),
        ('<tool_call>{"name": "arguments"}</tool_call>', ["call"]),
        ('<tool_call>{"name": "\\"arguments\\": 1"}</tool_call>', ["call"]),
        (
            '<tool_call>[{"arguments": 1}, {"arguments": "2"}]</tool_call>',
            ["call", "argument", "call", "argument", "call"],
        ),
        ("<tool_call>]]}}</tool_call>", ["call"]),
        ("<think>cut off <tool_call>", ["thought"]),
        ("</tool_call>", ["answer"]),
    ],
)
def test_malformed_turns_have_kinds_too(text, expected):
    assert [kind for kind, _ in cut(text)] == expected


@pytest.mark.parametrize(
    ("name", "before", "text", "argument"),
    [
        ("llama3", "", '{"name": "f", "parameters": {"a": 1}}<|eot_id|>', '{"a": 1}'),
        ("gptoss", "", 'to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', '{"a": 1}'),
        ("gemma4", "", "<|tool_call>call:f{a:1}<tool_call|>", "{a:1}"),
        ("lfm2_2_5", "", "<|tool_call_start|>[f(a=1)]<|tool_call_end|>", "a=1"),
        ("glm4moe", "", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value></tool_call>", "<arg_key>a"),
        ("qwen3_5", "", "<tool_call>\n<function=f><parameter=a>1</parameter></tool_call>", "<parameter=a>1"),
        ("nemotron_3", "<|im_start|>assistant\n<think>\n", "<tool_call>\n<function=f><parameter=a>1", "<parameter=a>1"),
    ],
)
def test_other_models_ways_of_calling_are_told_by_their_templates(name, before, text, argument):
    stretches = cut(text, getattr(templates, f"{name}_template"), before)
    assert {kind for kind, _ in stretches} <= {"call", "argument"}
    assert "".join(part for kind, part in stretches if kind == "argument").startswith(argument)


def test_tokens_may_be_of_many_characters_or_parts_of_one():
    smile = "🙂".encode()
    pieces = [b"<think>", smile[:1], smile[1:], b"</think>a ", smile[:2], b"", smile[2:], b"<tool_call>", b'{"x', b""]
    kinds = ["thought"] * 4 + ["text"] * 3 + ["call"] * 3
    assert token_kinds(pieces, QWEN) == kinds
    # bytes that are no UTF-8 at all, and a token that reaches into the next stretch
    assert token_kinds([b"\xff<think>", b"\xed\xa0\x80", b"</think> \xf0", b"\x9f"], QWEN) == [
        *("answer", "thought", "thought", "answer")
    ]
    assert token_kinds([b"", b""], QWEN) == ["answer", "answer"]


def test_the_parser_and_the_kinds_agree_on_what_was_called():
    tokenizer = acting_tokenizer()
    pieces = token_bytes(tokenizer)
    for rollout in played(tokenizer, SCRIPTS.values()):
        for turn, after in zip(rollout.turns, [*rollout.turns[1:], None], strict=True):
            if turn.role == "tool":
                continue
            ids = rollout.completion_ids[turn.first : turn.first + turn.tokens]
            raw = [pieces[index] for index in ids]
            told = list(zip(token_kinds(raw, tokenizer.response_template), raw, strict=True))
            assert any(kind == "call" for kind, _ in told) == (after is not None)
            written = b"".join(piece for kind, piece in told if kind == "argument").decode()
            results = after.results if after else ()
            assert written == "".join(result.arguments for result in results)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" + '{"arguments":"' * 10_000,
        '<tool_call>"' + '\\"' * 50_000 + "\\",
        "<think></think>" * 40_000,
        call("f") * 3_000,
        '<tool_call>{"arguments":' + "[" * 100_000,
    ],
    ids=["keys", "escapes", "thoughts", "calls", "brackets"],
)
def test_no_text_takes_long(text):
    begun = time.process_time()
    cut(text)
    assert time.process_time() - begun < 5
