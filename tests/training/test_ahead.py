"""Rollouts written one step ahead: by whom, for which step, and what survives a kill or an engine that dies."""

import copy
import json

import pytest
import torch
import vllm_server
from datasets import Dataset, IterableDataset
from on_cpu import ON_CPU
from transformers import TrainerCallback
from vllm_server import greedy, logprobs

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.teachers import TeacherUnavailableError
from tipdistill.training import ahead
from tipdistill.training.ahead import RolloutsUnavailableError

SETTINGS = {
    **ON_CPU,
    "max_completion_length": 8,
    "record_rollouts": 0,
    "optim": "sgd",
    "learning_rate": 3.0,  # so that each step's student writes something else
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "rollout_ahead": 1,
}
GREEDY = {"generation_kwargs": {"do_sample": False}}


class Watched(TIPTrainer):
    """Keeps the rollouts of each step and the student that they were trained on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollouts, self.students, self.micro_batches = [], [], []

    def _generate_and_select(self, inputs):
        batch = super()._generate_and_select(inputs)
        self.rollouts.append(
            [
                (prompt[asked.bool()].tolist(), completion[written.bool()].tolist())
                for prompt, asked, completion, written in zip(
                    *(batch[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")),
                    strict=True,
                )
            ]
        )
        self.students.append(copy.deepcopy(self.plain_student()))
        return batch


@pytest.fixture
def build(tiny_model_dir, word_problems, tmp_path):
    def make(rows=32, kind=Watched, dataset=None, eval_rows=0, **settings):
        path = str(tiny_model_dir("qwen3", "student"))
        config = TIPConfig(str(settings.pop("output_dir", tmp_path / "run")), **{**SETTINGS, **settings})
        prompts = Dataset.from_json(str(word_problems)).select(range(rows)) if dataset is None else dataset
        measured = Dataset.from_json(str(word_problems)).select(range(eval_rows)) if eval_rows else None
        return kind(path, str(tiny_model_dir("qwen3", "teacher")), config, prompts, measured)

    return make


def logged(trainer, name):
    return [entry.get(name) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_trains_on_what_the_student_wrote_one_step_before(build, accumulation):
    trainer = build(**GREEDY, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert len(trainer.rollouts) == 4
    moved = 0
    for step, rollouts in enumerate(trainer.rollouts):
        for prompt, completion in rollouts:
            assert completion == greedy(trainer.students[max(0, step - 1)], prompt)
            moved += completion != greedy(trainer.students[step], prompt)
    assert moved > 4


def test_the_prompts_of_each_step_are_those_of_a_run_that_waits(build, tmp_path):
    runs = []
    for steps_ahead in (1, 0):
        trainer = build(rollout_ahead=steps_ahead, output_dir=tmp_path / f"run-{steps_ahead}")
        trainer.train()
        runs.append(trainer.rollouts)
    asked = [[[prompt for prompt, _ in rollouts] for rollouts in rollouts_of_run] for rollouts_of_run in runs]
    assert asked[0] == asked[1]
    assert runs[0][0] == runs[1][0]
    assert runs[0][1:] != runs[1][1:]


def test_the_first_batch_of_an_epoch_is_written_when_it_is_needed(build):
    trainer = build(rows=8, max_steps=5, **GREEDY)  # two steps each
    trainer.train()
    for step, rollouts in enumerate(trainer.rollouts):
        writer = trainer.students[step if step % 2 == 0 else step - 1]
        assert all(completion == greedy(writer, prompt) for prompt, completion in rollouts)
    assert [ratio is None for ratio in logged(trainer, "rollout/log_ratio")] == [True, False, True, False, True]


def test_a_stream_is_read_one_step_ahead(build, word_problems):
    rows = [json.loads(line) for line in word_problems.read_text().splitlines()][:16]
    trainer = build(dataset=IterableDataset.from_generator(lambda: iter(rows)), shuffle_dataset=False, **GREEDY)
    trainer.train()
    for step, rollouts in enumerate(trainer.rollouts):
        writer = trainer.students[max(0, step - 1)]
        assert all(completion == greedy(writer, prompt) for prompt, completion in rollouts)


RULES = [
    {"selection_rule": "soft_or", "retention": 0.5},
    {"selection_rule": "entropy", "retention": 0.2, "score_logging_steps": 0},
    {"selection_rule": "soft_or", "retention": 0.5, "gradient_accumulation_steps": 2},
    {"selection_rule": "divergence", "retention": 0.5, "normalization": "micro_batch"},
    {"selection_rule": "soft_or", "retention": 0.5, "normalization": "running"},
    {"selection_rule": "soft_or", "retention": 0.5, "normalization": "running", "backward": "kept"},
    {"selection_rule": "all"},
    {"selection_rule": "all", "gradient_accumulation_steps": 2, "temperature": 0.7},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_the_logged_ratio_is_of_the_student_that_trains_to_the_one_that_wrote(build, settings):
    trainer = build(max_steps=3, **settings)
    trainer.train()
    first, *ratios = logged(trainer, "rollout/log_ratio")
    assert first is None
    for step, ratio in enumerate(ratios, 1):
        now, writer = (
            torch.cat(
                [logprobs(student, *rollout, settings.get("temperature", 1.0)) for rollout in trainer.rollouts[step]]
            )
            for student in (trainer.students[step], trainer.students[step - 1])
        )
        assert ratio == pytest.approx(float((now - writer).mean()), abs=1e-5)
        assert abs(ratio) > 1e-3


@pytest.mark.parametrize("settings", RULES[:5:4], ids=str)
def test_a_run_goes_on_to_the_same_weights_from_any_checkpoint(build, tmp_path, settings):
    saves = {"save_strategy": "steps", "save_steps": 1, "rows": 12, "max_steps": 6, "learning_rate": 1.0}  # two epochs
    straight = build(output_dir=tmp_path / "straight", **saves, **settings)
    straight.train()
    for step in (1, 2, 3, 4):
        checkpoint = tmp_path / "straight" / f"checkpoint-{step}"
        assert (checkpoint / "rollout-ahead-0.json").exists() == (step != 3)  # the end of an epoch
        resumed = build(output_dir=tmp_path / f"resumed-{step}", **saves, **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.rollouts == straight.rollouts[step:]
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, straight.model.state_dict()[name]), name
    assert not (tmp_path / "straight" / "checkpoint-6" / "rollout-ahead-0.json").exists()


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_run_begun_again_leaves_what_a_stopped_one_wrote(build):
    prompts = Dataset.from_list(
        [{"prompt": "Ada has 12 apples and buys 3 more."}] * 16
    )  # nothing tells two batches apart
    trainer = build(dataset=prompts, **GREEDY)
    stops = Stops()
    trainer.add_callback(stops)
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.remove_callback(stops)
    before = greedy(trainer.students[0], trainer.rollouts[0][0][0])
    trainer.rollouts.clear()
    trainer.students.clear()
    trainer.train()
    assert trainer.rollouts[0][0][1] != before
    for step, rollouts in enumerate(trainer.rollouts):
        writer = trainer.students[max(0, step - 1)]
        assert all(completion == greedy(writer, prompt) for prompt, completion in rollouts)


class TeacherThatLeaves(Watched):
    """Its teacher is gone once, in the loss of step 3, when the rollouts of step 4 are written."""

    leaves = True

    def compute_loss(self, *args, **kwargs):
        if self.leaves and self.state.global_step == 3:
            raise TeacherUnavailableError("the teacher is gone")
        return super().compute_loss(*args, **kwargs)


def test_a_run_that_was_stopped_in_the_middle_of_a_step_goes_on_with_its_rollouts(build, tmp_path):
    settings = {"max_steps": 6, "learning_rate": 1.0}
    straight = build(output_dir=tmp_path / "straight", **settings)
    straight.train()
    with pytest.raises(TeacherUnavailableError, match="Step 3 was saved"):
        build(kind=TeacherThatLeaves, **settings).train()
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.rollouts == straight.rollouts[3:]
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name]), name


def test_conversations_are_written_ahead_too(build, word_problems):
    rows = [json.loads(line)["prompt"] for line in word_problems.read_text().splitlines()][:16]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row}]} for row in rows])
    trainer = build(dataset=prompts, **GREEDY)
    trainer.train()
    for step, rollouts in enumerate(trainer.rollouts):
        writer = trainer.students[max(0, step - 1)]
        assert all(completion == greedy(writer, prompt) for prompt, completion in rollouts)


def test_rollouts_of_other_prompts_are_left(build, tmp_path, caplog):
    saves = {"save_strategy": "steps", "save_steps": 1}
    build(**saves, max_steps=2).train()
    path = tmp_path / "run" / "checkpoint-1" / "rollout-ahead-0.json"
    stored = json.loads(path.read_text())
    resumed = build(output_dir=tmp_path / "resumed", seed=5, **GREEDY)  # in another order
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert caplog.text.count("are of other prompts, and are written anew") == 1
    assert [prompt for prompt, _ in resumed.rollouts[0]] != stored["prompt_ids"]
    assert all(completion == greedy(resumed.students[0], prompt) for prompt, completion in resumed.rollouts[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: [],
        lambda stored: {**stored, "logprobs": [[0.0]]},
        lambda stored: {**stored, "completion_ids": [["a"] for _ in stored["prompt_ids"]]},
        lambda stored: {**stored, "completion_ids": stored["completion_ids"][1:]},
        lambda stored: {**stored, "completion_ids": [[] for _ in stored["prompt_ids"]], "logprobs": None},
    ],
)
def test_a_damaged_file_is_named(build, tmp_path, damage):
    build(save_strategy="steps", save_steps=1, max_steps=2).train()
    path = tmp_path / "run" / "checkpoint-1" / "rollout-ahead-0.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"rollout-ahead-0.json holds no rollouts .* delete it"):
        build(output_dir=tmp_path / "resumed").train(resume_from_checkpoint=str(path.parent))


def test_an_engine_that_works_in_turn_is_said(build, caplog):
    type(ahead.logger).warning_once.cache_clear()
    build(max_steps=1).train()
    build(max_steps=2, rollout_ahead=0).train()
    assert "in turn" not in caplog.text
    build(max_steps=2).train()
    assert "works in turn with the training here" in caplog.text


# A vLLM server, by TRL's own engine and a client that stands in for the server.


@pytest.fixture
def served(build, tiny_model_dir):
    def make(kind=Watched, **settings):
        trainer = build(kind=kind, vllm_sync_tolerance=0, **settings)
        vllm_server.use(trainer, str(tiny_model_dir("qwen3", "student")), most=8)
        return trainer

    return make


def test_a_server_writes_while_the_step_is_trained(served):
    class Overlapping(Watched):
        """Lets the server write once the loss is computed: had the rollout been waited for, neither would come."""

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.was_writing.append(self.server.is_writing)
            self.server.may_write.set()
            return loss

    trainer = served(kind=Overlapping)
    trainer.was_writing = []
    # the rollouts of a step are there before the next are asked for, so the server may be held from then on
    take = trainer._ahead.take

    def take_and_hold(prompt_ids):
        written = take(prompt_ids)
        if written is not None:
            trainer.server.may_write.clear()
        return written

    trainer._ahead.take = take_and_hold
    trainer.train()
    assert trainer.was_writing[1:3] == [True, True]
    for step, rollouts in enumerate(trainer.rollouts):
        writer = trainer.students[max(0, step - 1)]
        assert all(completion == greedy(writer, prompt) for prompt, completion in rollouts)
    # weights once a step, and one batch more than steps are not asked for
    assert trainer.server.told == ["weights", 4, 4, "weights", 4, "weights", 4]


def test_what_a_server_says_of_its_tokens_is_the_writers_part_of_the_ratio(served, build, tmp_path):
    of_server, in_turn = served(**GREEDY), build(output_dir=tmp_path / "turn", **GREEDY)
    for trainer in (of_server, in_turn):
        trainer.train()
    assert of_server.rollouts == in_turn.rollouts
    ratios = [logged(trainer, "rollout/log_ratio")[1:] for trainer in (of_server, in_turn)]
    assert ratios[0] == pytest.approx(ratios[1], abs=1e-5)
    warm = served(temperature=0.7)
    warm.train()
    assert logged(warm, "rollout/log_ratio") == [None] * 4  # a server's are at temperature 1


def test_an_evaluation_waits_for_the_server(served):
    trainer = served(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3, eval_rows=3)
    trainer.train()
    # the evaluation after step 1 gets that step's weights, once the rollouts of step 2 are there
    assert trainer.server.told[:6] == ["weights", 4, 4, "weights", 3, 4]
    for step, rollouts in enumerate(trainer.rollouts):
        writer = trainer.students[max(0, step - 1)]
        assert all(completion == greedy(writer, prompt) for prompt, completion in rollouts)


def test_a_server_that_dies_loses_no_step(served, tmp_path):
    trainer = served()
    trainer.server.dies_at = 3  # the rollouts of step 2, asked for in step 1
    with pytest.raises(RolloutsUnavailableError) as stopped:
        trainer.train()
    directory = tmp_path / "run" / "checkpoint-2"
    message = str(stopped.value)
    assert "the vLLM server that writes the rollouts gave none (ConnectionError: connection refused)" in message
    assert f"Step 2 was saved to {directory}: go on with resume_from_checkpoint." in message
    assert "\n" not in message
    resumed = served()
    resumed.train(resume_from_checkpoint=str(directory))
    assert resumed.state.global_step == 4
    for prompt, completion in resumed.rollouts[0]:
        assert completion == greedy(resumed.students[0], prompt)


def test_a_checkpoint_waits_for_what_the_server_writes(served, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0}
    straight = served(**saves)
    straight.train()
    resumed = served(output_dir=tmp_path / "resumed", **saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.rollouts == straight.rollouts[2:]
    assert resumed.server.told == ["weights", 4]


# What is refused.


@pytest.mark.parametrize("value", [2, -1, True, 0.5])
def test_one_step_ahead_is_the_most(tmp_path, value):
    with pytest.raises(ValueError, match="rollout_ahead must be 0 or 1 steps, got"):
        TIPConfig(str(tmp_path), use_cpu=True, bf16=False, rollout_ahead=value)


def test_tools_and_environments_are_refused(build, tiny_model_dir, tmp_path):
    def look(place: str) -> str:
        """Look somewhere.

        Args:
            place: where.
        """
        return place

    with pytest.raises(ValueError, match="tools answer between turns: leave out one of the two"):
        build(kind=lambda *args: Watched(*args, tools=[look]))
    with pytest.raises(ValueError, match=r"tipdistill.tasks.trip.Trip answers between turns: leave out one"):
        TIPConfig(str(tmp_path), use_cpu=True, bf16=False, rollout_ahead=1, environment="tipdistill.tasks.trip.Trip")
