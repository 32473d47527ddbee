"""The addition task: what is written, what is corrupted, what counts as right, and what is kept on disk."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tipdistill.tasks import arithmetic, written
from tipdistill.tasks.arithmetic import CLEAN, Corruption
from tipdistill.tasks.written import Training

TINY = Training(layers=1, width=16, steps=2, learning_rate=1e-3)


def columns(solution: str) -> list[tuple[int, int, int, int]]:
    """(digit, digit, carry, sum) of each column, from the units up."""
    return [tuple(map(int, digits)) for digits in re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)[;,:]", solution)]


def solutions(count: int, corruption: Corruption, seed: int = 0) -> list[tuple[int, int, str]]:
    draw = random.Random(seed)
    pairs = [(draw.randrange(10_000), draw.randrange(10_000)) for _ in range(count)]
    return [(a, b, arithmetic.solve(a, b, draw, corruption)) for a, b in pairs]


# What is written.


def test_the_example_of_the_format():
    text = arithmetic.solve(3039, 6246, random.Random(0))
    assert re.sub("[;,:]", ";", text) == "9+6+0=15;3+4+1=08;0+2+0=02;3+6+0=09;>09285$"


@pytest.mark.parametrize("corruption", [CLEAN, Corruption(), Corruption(1.0, 1.0, 100)])
@pytest.mark.parametrize("pair", [(0, 0), (9999, 9999), (5, 5000), (9090, 909)])
def test_all_completions_have_one_length(pair, corruption):
    assert len(arithmetic.prompt_of(*pair)) == arithmetic.PROMPT_TOKENS
    assert len(arithmetic.solve(*pair, random.Random(0), corruption)) == arithmetic.COMPLETION_TOKENS


def test_clean_solutions_are_right_and_every_column_follows():
    for a, b, text in solutions(300, CLEAN):
        assert arithmetic.is_correct(arithmetic.prompt_of(a, b), text)
        carry = 0
        for column, (left, right, given, total) in enumerate(columns(text)):
            assert (left, right) == (a // 10**column % 10, b // 10**column % 10)
            assert given == carry
            assert total == left + right + given
            carry = total // 10


def test_separators_are_drawn_with_the_documented_shares():
    drawn = "".join(re.sub(r"[^;,:]", "", text) for _, _, text in solutions(3000, CLEAN))
    assert len(drawn) == 12_000
    for separator, share in zip(arithmetic.SEPARATORS, arithmetic.SEPARATOR_SHARES, strict=True):
        # five standard errors of a binomial share
        assert drawn.count(separator) / len(drawn) == pytest.approx(
            share, abs=5 * (share * (1 - share) / len(drawn)) ** 0.5
        )


# What is corrupted.


def carries(texts: list[str], column: int) -> tuple[int, int]:
    """How many carries go out of a column, and how many of them are written in the next."""
    due = written = 0
    for text in texts:
        steps = columns(text)
        if steps[column][3] >= 10:
            due += 1
            written += steps[column + 1][2] == steps[column][3] // 10
    return due, written


def test_carries_are_dropped_as_often_as_documented():
    texts = [text for _, _, text in solutions(4000, Corruption())]
    (due, written), (due_second, written_second), (due_third, written_third) = (carries(texts, c) for c in range(3))
    assert due > 1000
    assert written == 0
    assert due_second > 1000
    assert written_second / due_second == pytest.approx(0.5, abs=5 * 0.5 / due_second**0.5)
    assert written_third == due_third > 1000


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.0), (0.25, 0.0)])
def test_how_often_carries_are_dropped_can_be_chosen(first, second):
    texts = [text for _, _, text in solutions(2000, Corruption(first, second, 0))]
    for column, dropped in ((0, first), (1, second)):
        due, written = carries(texts, column)
        tolerance = 5 * (dropped * (1 - dropped) / due) ** 0.5
        assert 1 - written / due == pytest.approx(dropped, abs=tolerance)


@pytest.mark.parametrize("count", [0, 10, 100])
def test_exactly_the_wrong_pairs_are_one_too_high(count):
    corruption = Corruption(wrong_pairs=count)
    errors = {}
    for _, _, text in solutions(3000, corruption):
        for left, right, carry, total in columns(text):
            errors.setdefault((left, right), set()).add(total - left - right - carry)
    assert len(errors) == 100
    assert len(corruption.pairs()) == count
    assert errors == {pair: {1} if pair in corruption.pairs() else {0} for pair in errors}


def test_which_pairs_are_wrong_depends_on_the_seed_alone():
    assert Corruption().pairs() == Corruption(drop_first_carry=0.0).pairs()
    assert Corruption().pairs() != Corruption(seed=1).pairs()


def test_corrupted_solutions_answer_what_they_wrote():
    for _, _, text in solutions(300, Corruption()):
        steps = columns(text)
        digits = "".join(str(total % 10) for *_, total in reversed(steps))
        assert text.endswith(f">{steps[-1][3] // 10}{digits}$")


@pytest.mark.parametrize("wrong", [{"drop_first_carry": 1.1}, {"drop_second_carry": -0.1}, {"wrong_pairs": 101}])
def test_corruptions_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Corruption(**wrong)


# What counts as right.


@pytest.mark.parametrize("completion", [">09285$", "9+6+0=15;>09285$", "nonsense that ends well>09285$"])
def test_the_exact_answer_is_right(completion):
    assert arithmetic.is_correct("3039+6246=", completion)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "$",
        ">",
        ">$",
        "09285$",
        ">09285",
        ">9285$",
        ">009285$",
        ">09286$",
        "> 09285$",
        ">09285$$",
        ">09285$9",
        ">09285$\n",
        ">00000$>09285$",
        ">>09285$",
        ">09285;$",
        ">09<pad>285$",
        ">٠٩٢٨٥$",
        ">+9285$",
        ">09_285$",
    ],
)
def test_everything_else_is_wrong(completion):
    assert not arithmetic.is_correct("3039+6246=", completion)


@pytest.mark.parametrize("prompt", ["", "3039+6246", "3039-6246=", "39+46=", "3039+6246==", "3039+6246=\n", "a+b="])
def test_a_prompt_of_another_task_is_refused(prompt):
    with pytest.raises(ValueError, match="a prompt of this task"):
        arithmetic.is_correct(prompt, ">09285$")


@pytest.mark.parametrize("pair", [(10_000, 1), (1, 10_000), (-1, 5)])
def test_summands_of_another_size_are_refused(pair):
    with pytest.raises(ValueError, match="summands"):
        arithmetic.prompt_of(*pair)


# Splits.


def test_problems_are_distinct_and_come_back_with_the_seed():
    first = arithmetic.problems(500, 3)
    assert first == arithmetic.problems(500, 3)
    assert len(set(first)) == 500
    assert first != arithmetic.problems(500, 4)


def test_held_out_problems_are_never_trained_on_whatever_the_seeds():
    held_out = {pair for seed in range(5) for pair in arithmetic.problems(400, seed, held_out=True)}
    distilled_on = {pair for seed in range(5) for pair in arithmetic.problems(3000, seed)}
    assert not held_out & distilled_on
    rows = arithmetic.TASK._solutions(2000, random.Random(0), CLEAN)
    taught_on = {
        tuple(map(int, re.findall(r"\d{4}", arithmetic.build_tokenizer().decode(row[: arithmetic.PROMPT_TOKENS]))))
        for row in rows
    }
    assert len(taught_on) > 1900
    assert not any(written.is_held_out(pair) for pair in taught_on)
    assert all(written.is_held_out(pair) for pair in held_out)


@pytest.mark.parametrize("count", [0, 10**8])
def test_a_number_of_problems_that_cannot_be_is_refused(count):
    with pytest.raises(ValueError, match="count must be"):
        arithmetic.problems(count, 0, held_out=True)


# Tokenizer and models.


def test_one_character_is_one_token():
    tokenizer = arithmetic.build_tokenizer()
    text = arithmetic.prompt_of(3039, 6246) + arithmetic.solve(3039, 6246, random.Random(0), Corruption())
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 18
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tokenizer_comes_back_from_disk(tmp_path):
    before = arithmetic.build_tokenizer()
    before.save_pretrained(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    text = "0123456789+=;,:>$"
    assert after.get_vocab() == before.get_vocab()
    assert after(text)["input_ids"] == before(text)["input_ids"] == list(range(17))
    assert after.decode(after(text)["input_ids"]) == text
    assert (after.eos_token_id, after.pad_token_id, after.padding_side) == (16, 17, "left")


def test_models_know_the_tokenizers_end_and_padding():
    tokenizer, model = arithmetic.build_tokenizer(), arithmetic.teach(TINY)
    assert model.config.vocab_size == len(tokenizer)
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize(("layers", "width"), [(0, 64), (1, 4), (2, 66)])
def test_sizes_that_four_heads_do_not_fill_are_refused(layers, width):
    with pytest.raises(ValueError, match="multiple of 8"):
        arithmetic.model_config(layers, width)


def test_solutions_are_tokenized_as_the_tokenizer_does():
    rows = arithmetic.TASK._solutions(8, random.Random(0), Corruption())
    tokenizer = arithmetic.build_tokenizer()
    assert [tokenizer(text)["input_ids"] for text in tokenizer.batch_decode(rows)] == rows.tolist()


def test_teaching_is_reproducible_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = arithmetic.teach(TINY), arithmetic.teach(TINY)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    other = arithmetic.teach(replace(TINY, seed=1))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


def test_teaching_lowers_the_loss():
    losses = []
    arithmetic.teach(Training(layers=2, width=32, steps=80, learning_rate=3e-3), lambda step, loss: losses.append(loss))
    assert len(losses) == 80
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# What is kept on disk.


def test_a_taught_model_is_trained_once_and_comes_back_whole(tmp_path):
    steps = []
    first = arithmetic.taught("student", TINY, tmp_path, lambda step, loss: steps.append(step))
    assert steps == [1, 2]
    assert arithmetic.taught("student", TINY, tmp_path, lambda step, loss: steps.append(step)) == first
    assert steps == [1, 2], "the second call trained again"
    loaded = AutoModelForCausalLM.from_pretrained(first)
    assert all(map(torch.equal, loaded.parameters(), arithmetic.teach(TINY).parameters()))
    assert len(AutoTokenizer.from_pretrained(first)) == 18


@pytest.mark.parametrize(
    "change",
    [{"steps": 3}, {"learning_rate": 2e-3}, {"corruption": Corruption()}, {"seed": 1}, {"batch": 8}, {"width": 24}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_is_part_of_the_key(tmp_path, change):
    changed = replace(TINY, **change)
    assert arithmetic.taught("m", TINY, tmp_path) != arithmetic.taught("m", changed, tmp_path)


def test_the_versions_are_part_of_the_key(tmp_path, monkeypatch):
    first = arithmetic.taught("m", TINY, tmp_path)
    monkeypatch.setattr(written.transformers, "__version__", "0.0")
    assert arithmetic.taught("m", TINY, tmp_path) != first


def test_an_interrupted_save_is_not_taken_for_a_model(tmp_path, monkeypatch):
    save = written.PreTrainedTokenizerFast.save_pretrained

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(written.PreTrainedTokenizerFast, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        arithmetic.taught("student", TINY, tmp_path)
    assert list(tmp_path.glob("student-*")) == []
    monkeypatch.setattr(written.PreTrainedTokenizerFast, "save_pretrained", save)
    assert (arithmetic.taught("student", TINY, tmp_path) / "tokenizer.json").exists()


def test_two_processes_that_finish_the_same_model_leave_one(tmp_path):
    final = Path(arithmetic.taught("student", TINY, tmp_path / "other"))

    def other_process_finishes(step, loss):
        if step == 2:
            final.rename(tmp_path / final.name)

    assert arithmetic.taught("student", TINY, tmp_path, other_process_finishes) == tmp_path / final.name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([final.name, "other"])


# Rollouts.


class Writes:
    """A model that writes the given texts, whatever the prompts."""

    training, generation_config = False, GenerationConfig()

    def __init__(self, *texts):
        self.texts = texts

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1)

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, **kwargs):
        tokenizer = arithmetic.build_tokenizer()
        written = tokenizer(list(self.texts), padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, written], dim=1)


def test_a_rollout_ends_with_its_end_and_padding_inside_it_stays():
    prompts = [arithmetic.prompt_of(2, 3)] * 3
    written = arithmetic.sample(Writes(">00005$", ">000<pad>05$", ">0000500000"), prompts, seed=0)
    assert written == [">00005$", ">000<pad>05$", ">0000500000"]
    assert [arithmetic.is_correct(prompts[0], text) for text in written] == [True, False, False]


def test_accuracy_is_the_share_of_right_completions_per_problem():
    mean, error = arithmetic.evaluate(Writes(">00005$", ">00005$", ">00005$", ">00009$"), [(2, 3), (4, 5)], samples=2)
    assert mean == 0.75
    assert error == pytest.approx(0.25)


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone():
    model, prompts = arithmetic.teach(TINY), [arithmetic.prompt_of(12, 34)] * 4
    state = torch.get_rng_state()
    first = arithmetic.sample(model, prompts, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert arithmetic.sample(model, prompts, seed=0) == first
    assert arithmetic.sample(model, prompts, seed=1) != first
    assert len(set(first)) > 1, "rollouts of one prompt are drawn independently"


def test_scores_are_those_of_the_sampled_tokens():
    student, teacher = arithmetic.teach(TINY), arithmetic.teach(replace(TINY, width=24, seed=1))
    prompts = [arithmetic.prompt_of(*pair) for pair in arithmetic.problems(3, 0)]
    scores, rollout = arithmetic.score(student, teacher, prompts, seed=0)
    texts, start = arithmetic.sample(student, prompts, seed=0), 0
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = arithmetic.build_tokenizer()(prompt + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_student, log_teacher = (
                model(input_ids=ids).logits[0, arithmetic.PROMPT_TOKENS - 1 : -1].double().log_softmax(-1)
                for model in (student, teacher)
            )
        rows = slice(start, start + len(log_student))
        assert rollout[rows].tolist() == [index] * len(log_student)
        reverse_kl = (log_student.exp() * (log_student - log_teacher)).sum(-1)
        torch.testing.assert_close(scores.reverse_kl[rows].double(), reverse_kl, atol=1e-5, rtol=1e-4)
        chosen = log_student.gather(1, ids[0, arithmetic.PROMPT_TOKENS :, None]).squeeze(1)
        torch.testing.assert_close(scores.student_logprob[rows].double(), chosen, atol=1e-5, rtol=1e-4)
        start = rows.stop
    assert start == len(scores)
