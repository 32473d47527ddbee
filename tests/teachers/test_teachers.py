"""Teachers of other kinds than those we ship, through the trainer's one interface and without a change to it."""

from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from plain_loss import PLAIN
from recorded import same_records
from transformers import AutoModelForCausalLM

import tipdistill.trainer
from tipdistill import Head, TIPConfig, TIPTrainer
from tipdistill.records import open_records
from tipdistill.teachers import ChosenTeacher, choose_teacher
from tipdistill.teachers.local import HeadComparison, HiddenStates, LocalTeacher
from tipdistill.teachers.routed import RoutedTeacher

SETUP = {**PLAIN, "selection_rule": "soft_or", "score_logging_steps": 10, "record_rollouts": 8}
SETUP |= {"generation_kwargs": {"do_sample": False}}


class OverTheWire:
    """Hidden states come as plain lists of numbers, and the lm_head alone is here."""

    model, callbacks, names, name = None, (), (), "over the wire"
    answers_in_loss, top_k = False, None

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
        args = TIPConfig(str(tmp_path / "run"), **{**SETUP, **settings})
        prompts = Dataset.from_json(str(word_problems))
        prompts = prompts.add_column("teacher", ["first", "second"] * (len(prompts) // 2))
        trainer = TIPTrainer(student, teacher, args, prompts)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        recorded = open_records(tmp_path / "run" / "records" / "step-0").read().to_pandas()
        return history, [parameter.detach() for parameter in trainer.model.parameters()], recorded

    return run


SETTINGS = [
    {},
    {"selection_rule": "gradient_norm_sampling", "selection_scope": "batch", "retention": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("selection_rule", "soft_or"))
@pytest.mark.parametrize("kind", ["several", "over the wire"])
def test_another_kind_of_teacher_gives_the_same_run(train, kind, settings):
    def make(model, trainer):
        if kind == "over the wire":
            return OverTheWire(model)
        teachers = {name: LocalTeacher(model, trainer, offload=False) for name in ("first", "second")}
        return RoutedTeacher(teachers, "teacher", trainer)

    (expected, weights, wanted), (history, trained, recorded) = train(**settings), train(make, **settings)
    for name in ("loss", "grad_norm", "selection/kept_fraction", "selection/trained_tokens"):
        # sums over float32 in another order
        assert [entry[name] for entry in history] == pytest.approx([entry[name] for entry in expected], rel=1e-4)
    for left, right in zip(trained, weights, strict=True):
        # Adam's first steps are as long as the rate, so a gradient near 0 may turn one about
        torch.testing.assert_close(left, right, rtol=0, atol=2 * PLAIN["learning_rate"])
    assert all(("teacher/second/tokens" in entry) == (kind == "several") for entry in history)
    same_records(recorded, wanted)
