"""Teachers of other kinds than those we ship, through the trainer's one interface and without a change to it."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import tipdistill.trainer
from tipdistill import Head, TIPConfig, TIPTrainer, TokenScores
from tipdistill.teachers import ChosenTeacher, choose_teacher
from tipdistill.teachers.local import HeadComparison, HiddenStates, LocalTeacher

PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "retention": 0.3,
    "generation_kwargs": {"do_sample": False},
}


@dataclass(frozen=True)
class FromOne:
    """An answer, and the teacher that gave it."""

    teacher: int
    answer: Any

    def __len__(self):
        return len(self.answer)

    def map(self, function):
        return FromOne(self.teacher, self.answer.map(function))


@dataclass(frozen=True)
class Apart:
    """Comparisons with several teachers, each of its own tokens."""

    places: list
    parts: list

    def take(self, kept):
        number = kept.cumsum(0) - 1
        places = [number[place[kept[place]]] for place in self.places]
        return Apart(places, [part.take(kept[place]) for place, part in zip(self.places, self.parts, strict=True)])

    def scores(self, student, fields, temperature, token_ids):
        merged = {}
        for place, part in zip(self.places, self.parts, strict=True):
            ids = None if token_ids is None else token_ids[place]
            for name, value in part.scores(_rows(student, place), fields, temperature, ids).present():
                merged.setdefault(name, value.new_zeros(len(student.hidden)))[place] = value
        return TokenScores(**merged)

    def loss(self, student, weight, *, denominator, fields=(), **options):
        weight = torch.ones(len(student.hidden)) if weight is None else weight
        denominator = weight.sum() if denominator is None else denominator
        total, merged = 0.0, {}
        for place, part in zip(self.places, self.parts, strict=True):
            loss, scores = part.loss(
                _rows(student, place), weight[place], denominator=denominator, fields=fields, **options
            )
            total = total + loss
            for name, value in scores.present():
                merged.setdefault(name, value.new_zeros(len(student.hidden)))[place] = value
        return total, TokenScores(**merged)


def _rows(student, place):
    return replace(student, hidden=student.hidden[place])


class SeveralTeachers:
    """Each rollout's teacher is named by a column of the dataset."""

    model, callbacks, name = None, (), "several"
    answers_in_loss = gives_hidden_states = False

    def __init__(self, *teachers):
        self.teachers = teachers
        self.vocabulary = min(teacher.vocabulary for teacher in teachers)

    def answer(self, batch, asked, pieces=None):
        own = torch.tensor([example["teacher"] for example in batch["examples"]])
        given = [
            teacher.answer(batch, asked & (own == number)[:, None], pieces)
            for number, teacher in enumerate(self.teachers)
        ]
        return [FromOne(number, given[number][row]) for row, number in enumerate(own.tolist())]

    @contextmanager
    def compare(self, answers):
        of_token = torch.cat([torch.full((len(answer),), answer.teacher) for answer in answers])
        with ExitStack() as stack:
            parts = [
                stack.enter_context(
                    teacher.compare([HiddenStates(torch.zeros(0, teacher.model.config.hidden_size))])
                    if not any(answer.teacher == number for answer in answers)
                    else teacher.compare([answer.answer for answer in answers if answer.teacher == number])
                )
                for number, teacher in enumerate(self.teachers)
            ]
            yield Apart([(of_token == number).nonzero()[:, 0] for number in range(len(parts))], parts)

    def metrics(self):
        return {"teacher/number": float(len(self.teachers))}


class OverTheWire:
    """Hidden states come as plain lists of numbers, and the lm_head alone is here."""

    model, callbacks, name = None, (), "over the wire"
    answers_in_loss, gives_hidden_states = False, True

    def __init__(self, model):
        self.remote, self.weight = model.eval(), model.get_output_embeddings().weight.detach()
        self.vocabulary = len(self.weight)

    def answer(self, batch, asked, pieces=None):
        answers = []
        for row in range(len(asked)):
            inside = batch["prompt_mask"][row].bool(), batch["completion_mask"][row].bool()
            ids = [*batch["prompt_ids"][row][inside[0]].tolist(), *batch["completion_ids"][row][inside[1]].tolist()]
            with torch.no_grad():
                states = self.remote.base_model(torch.tensor([ids])).last_hidden_state[0].tolist()
            first = int(inside[0].sum()) - 1
            sent = [states[first + place] for place in asked[row].nonzero()[:, 0].tolist()]
            answers.append(HiddenStates(torch.tensor(sent).reshape(-1, self.weight.shape[1])))
        return answers

    @contextmanager
    def compare(self, answers):
        yield HeadComparison(Head(torch.cat([answer.hidden for answer in answers]), self.weight))

    def metrics(self):
        return {}


@pytest.fixture
def train(tiny_model_dir, word_problems, tmp_path, monkeypatch):
    """Train with a teacher made by a function of (model, trainer), None: the one that is chosen by itself."""
    student, teacher = (str(tiny_model_dir("qwen3", role)) for role in ("student", "teacher"))

    def run(make=None, **settings):
        def choose(*arguments):
            if make is None:
                return choose_teacher(*arguments)
            return ChosenTeacher(lambda trainer: make(AutoModelForCausalLM.from_pretrained(teacher), trainer))

        monkeypatch.setattr(tipdistill.trainer, "choose_teacher", choose)
        args = TIPConfig(str(tmp_path / "run"), **{**PLAIN, **settings})
        prompts = Dataset.from_json(str(word_problems))
        prompts = prompts.add_column("teacher", [row % 2 for row in range(len(prompts))])
        trainer = TIPTrainer(student, teacher, args, prompts)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return history, [parameter.detach() for parameter in trainer.model.parameters()]

    return run


SETTINGS = [
    {},
    {"normalization": "micro_batch", "selection_rule": "divergence"},
    {"selection_rule": "entropy"},
    {"selection_rule": "all", "retention": 1.0, "beta": 0.5},
    {"selection_rule": "gradient_norm_sampling", "selection_scope": "batch", "retention": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("selection_rule", "soft_or"))
@pytest.mark.parametrize("kind", ["several", "over the wire"])
def test_another_kind_of_teacher_gives_the_same_run(train, kind, settings):
    def make(model, trainer):
        if kind == "over the wire":
            return OverTheWire(model)
        return SeveralTeachers(*(LocalTeacher(model, trainer, offload=False) for _ in range(2)))

    (expected, weights), (history, trained) = train(**settings), train(make, **settings)
    for name in ("loss", "grad_norm", "selection/kept_fraction", "selection/trained_tokens"):
        # sums over float32 in another order
        assert [entry[name] for entry in history] == pytest.approx([entry[name] for entry in expected], rel=1e-4)
    for left, right in zip(trained, weights, strict=True):
        # Adam's first steps are as long as the rate, so a gradient near 0 may turn one about
        torch.testing.assert_close(left, right, rtol=0, atol=2 * PLAIN["learning_rate"])
    assert all(entry.get("teacher/number") == (2.0 if kind == "several" else None) for entry in history)


def test_two_different_teachers_are_each_followed_in_their_own_rollouts(train, tiny_model_dir):
    """The divergence of a batch is the mean of two runs with one teacher each, rollout by rollout."""

    def mixed(model, trainer):
        student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
        return SeveralTeachers(*(LocalTeacher(one, trainer, offload=False) for one in (model, student)))

    settings = {"selection_rule": "all", "retention": 1.0, "max_steps": 1, "score_logging_steps": 1}
    (alone, _), (both, _) = train(**settings), train(mixed, **settings)
    # half of the rollouts meet the student itself, from which it does not diverge
    assert 0.3 < both[0]["reverse_kl"] / alone[0]["reverse_kl"] < 0.7
