"""What two models are used to: each difference is one line, and what could never end is refused."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from tipdistill.conventions import differences, end_pair, usual_end

END = 2  # <|end|> of the tiny tokenizer; 0 is <|endoftext|>, 1 <|start|>


def lines(student, teacher, ends=((END,), (END,)), differing=None, **settings):
    return differences((student, teacher), ends, differing or {}, **settings)


def with_template(tokenizer, text):
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    return other


def with_start(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", pair="$A $B", special_tokens=[("<|start|>", 1)]
    )
    return other


def test_nothing_is_said_of_what_agrees(tiny_tokenizer):
    assert lines(tiny_tokenizer, tiny_tokenizer) == []
    padded = copy.deepcopy(tiny_tokenizer)
    padded.pad_token, padded.padding_side = "<|start|>", "left"
    assert lines(tiny_tokenizer, padded) == []  # padding is masked


def test_ends_are_named_with_the_remedy(tiny_tokenizer):
    (line,) = lines(tiny_tokenizer, tiny_tokenizer, ((0,), (END,)))
    assert "the student ends with <|endoftext|>, the teacher with <|end|>" in line
    assert "set end_as_teacher" in line
    (line,) = lines(tiny_tokenizer, tiny_tokenizer, ((0,), (END,)), alike=True)
    assert "The teacher's <|end|> counts as the student's <|endoftext|> (end_as_teacher)" in line
    assert lines(tiny_tokenizer, tiny_tokenizer, ((0,), ())) == []  # the teacher's are not known
    (line,) = lines(tiny_tokenizer, tiny_tokenizer, ((0,), range(2, 99)))
    assert """the teacher with <|end|>, !, ", #, $, 92 more. The teacher""" in line
    (line,) = lines(tiny_tokenizer, tiny_tokenizer, ((END,), (END, 0)))
    assert "end_as_teacher" not in line  # which would change nothing: both reply with <|end|>


def test_the_usual_end_is_what_the_template_puts_after_a_reply(tiny_tokenizer):
    assert usual_end(tiny_tokenizer, [0, END]) == END
    assert usual_end(tiny_tokenizer, [0, 1]) == 0  # neither the template's nor the tokenizer's own is among them
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|endoftext|>"  # as Gemma's, whose replies end with <end_of_turn>
    assert usual_end(other, [0, END]) == END
    other.chat_template = None
    assert usual_end(other, [END, 0]) == 0


def test_a_pair_of_ends_needs_both(tiny_tokenizer):
    both = (tiny_tokenizer, tiny_tokenizer)
    assert end_pair(both, ([0], [END])) == (0, END)
    assert end_pair(both, ([END], [END, 0])) is None
    with pytest.raises(ValueError, match=r"end_as_teacher needs .* those of the teacher are not known"):
        end_pair(both, ([0], []))


def test_a_student_that_could_never_end_is_refused(tiny_tokenizer):
    reserved = {END: ("<|end|>", "<|stop|>")}
    with pytest.raises(ValueError, match=r"ends with <\|end\|>, which its teacher's tokenizer lacks .* end_as_teacher"):
        lines(tiny_tokenizer, tiny_tokenizer, differing=reserved)
    assert len(lines(tiny_tokenizer, tiny_tokenizer, ((END, 0), (0,)), reserved)) == 2  # it ends with 0 as well
    (told, ends) = lines(tiny_tokenizer, tiny_tokenizer, ((END,), (0,)), reserved, alike=True)
    assert "2 (the student's '<|end|>', the teacher's '<|stop|>')" in told
    assert "counts as the student's <|end|>" in ends


def test_what_is_put_before_a_plain_prompt_is_compared(tiny_tokenizer):
    other = with_start(tiny_tokenizer)
    (line,) = lines(tiny_tokenizer, other)
    assert "the student's tokenizer makes … of a text, the teacher's <|start|>…" in line
    assert "add_bos_token" in line
    assert lines(other, other) == []
    assert lines(tiny_tokenizer, other, conversational=True) == []  # a chat template writes it itself


TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
GREETS = "{% if messages[0]['role'] != 'system' %}Hello. {% endif %}"


def test_chat_templates_are_compared_by_what_they_write(tiny_tokenizer):
    other = with_template(tiny_tokenizer, TEMPLATE)  # without a line break after a turn
    (line,) = lines(tiny_tokenizer, other)
    assert "after '<|start|>user\\n1 + 1?<|end|>' the student's has '\\n<|start|>assistant\\n'" in line
    assert "the teacher's '<|start|>assistant\\n'" in line
    assert lines(tiny_tokenizer, other, conversational=False) == []
    # a template that differs in its text alone
    assert lines(other, with_template(tiny_tokenizer, "{# the same #}" + TEMPLATE)) == []
    # no message of the system, on one side
    assert lines(other, with_template(tiny_tokenizer, REFUSES + TEMPLATE)) == []
    assert len(lines(tiny_tokenizer, with_template(tiny_tokenizer, REFUSES + TEMPLATE))) == 1
    # a system message of its own where there is none
    (line,) = lines(other, with_template(tiny_tokenizer, GREETS + TEMPLATE))
    assert "at once the student's has '<|start|>user\\n1 + 1?<|end|><|s', the teacher's 'Hello. <|start|>" in line


def test_settings_of_the_template_count(tiny_tokenizer):
    other = with_template(tiny_tokenizer, "{% if thinking %}Think. {% endif %}" + TEMPLATE)
    plain = with_template(tiny_tokenizer, TEMPLATE)
    assert lines(plain, other) == []
    (line,) = lines(plain, other, chat_template_kwargs={"thinking": True})
    assert "the teacher's 'Think. " in line


def test_one_without_a_template(tiny_tokenizer):
    without = with_template(tiny_tokenizer, None)
    (line,) = lines(tiny_tokenizer, without)
    assert "it has no chat template of its own" in line
    assert lines(without, tiny_tokenizer) == []  # its prompts are plain
