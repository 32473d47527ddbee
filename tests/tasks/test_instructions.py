"""Prompts from templates: enough of them, each once, and what is measured on apart from what is trained on."""

import pytest

from tipdistill.tasks import instructions, load_task


def test_nothing_that_is_measured_on_occurs_in_training():
    trained = instructions.train_prompts()
    held_out = instructions.heldout_prompts() + instructions.validation_prompts()
    asked = [problem.text[-1]["content"] for name in ("use_word", "capitals") for problem in load_task(name).problems]
    every = [*trained, *held_out, *asked]
    assert len(every) == len(set(every))
    assert len(trained) > 2000
    for subject in ("apples", "tea", "cat", "France"):  # the first of each list is held out
        assert any(subject in prompt for prompt in (*held_out, *asked))
        assert not any(f" {subject}?" in prompt or f" {subject} " in prompt for prompt in trained)


def test_topics_words_and_countries_are_listed_once():
    for values in (instructions.TOPICS, instructions.WORDS, instructions.CAPITALS):
        assert len(values) == len(set(values)) > 30
        assert all(value == value.strip() != "" for value in values)


def test_the_order_of_the_training_prompts_is_the_seeds():
    first, again, other = (instructions.train_prompts(seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)


@pytest.mark.parametrize(
    ("task", "answer", "right", "wrong"),
    [
        ("use_word", "cat", ["The cat sat.", "Two Cats!", "cat"], ["A catalogue of concatenation.", "A dog."]),
        ("use_word", "box", ["Boxes are full."], ["Boxing."]),
        ("capitals", "Paris", ["It is Paris.", "paris"], ["Parisian food.", "Lyon", ""]),
    ],
)
def test_an_answer_is_right_where_the_word_stands_in_it(task, answer, right, wrong):
    check = load_task(task).check
    assert all(check(response, answer) for response in right)
    assert not any(check(response, answer) for response in wrong)
