"""The student as its own teacher: how its weights follow, with and without an adapter, and through a kill."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from plain_loss import PLAIN, compare
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.records import open_records
from tipdistill.teachers.itself import teacher_of

HINT = "The answer is 42. "
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def path(tiny_model_dir):
    return str(tiny_model_dir("qwen3", "student"))


@pytest.fixture
def dataset(word_problems):
    prompts = [json.loads(line)["prompt"] for line in word_problems.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_dict({"prompt": prompts, "teacher_prompt": [HINT + prompt for prompt in prompts]})


@pytest.fixture
def make(path, dataset, tmp_path):
    def build(model=None, rows=None, extra=None, output="run", **settings):
        args = TIPConfig(str(tmp_path / output), **{**PLAIN, **settings})
        return TIPTrainer(model or path, "self", args, dataset if rows is None else rows, **(extra or {}))

    return build


def adapted(path, seed=3, lm_head=False):
    """A student whose adapter has been trained, as its tensors say."""
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(seed)
    saved = {"modules_to_save": ["lm_head"], "ensure_weight_tying": False} if lm_head else {}
    model = get_peft_model(model, LoraConfig(**LORA, **saved))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
    return model


class Weights(TrainerCallback):
    """The student's trained weights after every step, and the gradients' owner untouched."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append(trained(model))


def trained(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def after_its_hint(path, teacher):
    tokenizer = AutoTokenizer.from_pretrained(path)
    return lambda row, prompt: (teacher, tokenizer(HINT + tokenizer.decode(prompt))["input_ids"])


@pytest.mark.parametrize("normalization", ["batch", "micro_batch"])
def test_a_frozen_copy_that_knows_more_against_plain_pytorch(make, path, dataset, normalization):
    trainer = make(normalization=normalization)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval() for _ in range(2))
    compare(trainer, [dataset[row] for row in range(8)], student, after_its_hint(path, teacher))


@pytest.mark.parametrize("normalization", ["batch", "micro_batch"])
@pytest.mark.parametrize("lm_head", [False, True], ids=["", "lm_head"])
@pytest.mark.parametrize("update", ["base", "frozen"])
def test_under_an_adapter_against_plain_pytorch(make, path, dataset, update, lm_head, normalization):
    """base: the model without its adapter; frozen: with the adapter that it had, although the student's has moved."""
    student, teacher = (adapted(path, lm_head=lm_head) for _ in range(2))
    trainer = make(adapted(path, lm_head=lm_head), teacher_update=update, normalization=normalization)
    for model in (trainer.model, student):
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.requires_grad:
                    value.mul_(1.5 if "lora" in name else 1.01)
    if update == "base":
        teacher = AutoModelForCausalLM.from_pretrained(path)
    before = trained(trainer.model)
    compare(trainer, [dataset[row] for row in range(8)], student.eval(), after_its_hint(path, teacher.eval()))
    after = trained(trainer.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "the teacher leaves no trace"


def test_no_second_model_is_held_under_an_adapter(make, path):
    trainer = make(adapted(path), teacher_update="ema:0.9")
    own = sum(value.numel() for value in trained(trainer.model).values())
    assert trainer.teacher.model is None
    assert sum(value.numel() for value in trainer.teacher._teacher._adapter.values()) == own


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("update", ["ema:0.75", "every:2", "frozen"])
def test_the_teachers_weights_follow_as_the_update_says(make, path, kind, update):
    seen = Weights()
    trainer = make(
        adapted(path) if kind == "adapter" else None, teacher_update=update, max_steps=3, extra={"callbacks": [seen]}
    )
    expected = trained(trainer.model)
    trainer.train()
    for step, student in enumerate(seen.after, 1):
        for name in expected:
            if update.startswith("ema"):
                expected[name] = 0.75 * expected[name] + 0.25 * student[name]
            elif update.startswith("every") and step % 2 == 0:
                expected[name] = student[name]
    teacher = trainer.teacher._teacher
    weights = teacher._adapter if kind == "adapter" else dict(teacher._plain.named_parameters())
    moved = [name for name in expected if not torch.equal(expected[name], seen.after[-1][name])]
    assert moved, "the student has moved on"
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


def test_an_average_of_half_precision_weights_is_kept_in_float32(make, path):
    """A thousandth of a small change is less than bfloat16 can add: the teacher would stand still."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    trainer = make(model, teacher_update="ema:0.999", learning_rate=1e-4, max_steps=1)
    start = {name: value.detach().float().clone() for name, value in trainer.model.named_parameters()}
    (follow,) = trainer.teacher.callbacks
    for step in range(50):
        with torch.no_grad():
            for value in trainer.model.parameters():
                value.copy_((start_of(value, step)).to(value.dtype))
        follow.on_step_end(trainer.args, trainer.state, trainer.control)
    name, tensor = next(iter(trainer.teacher._teacher._plain.named_parameters()))
    exact = start[name].double()
    for step in range(50):
        exact = 0.999 * exact + 0.001 * start_of(tensor, step).to(torch.bfloat16).double()
    torch.testing.assert_close(follow._average[name].double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(tensor, follow._average[name].to(torch.bfloat16))


def start_of(value, step):
    return torch.full_like(value, 1.0 + step / 64, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("update", ["ema:0.9", "every:2"])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(make, path, tmp_path, kind, update):
    settings = {"teacher_update": update, "save_strategy": "steps", "save_steps": 3, "max_steps": 5}

    def run(output, resume=None):
        trainer = make(adapted(path) if kind == "adapter" else None, output=output, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trained(trainer.model), [entry for entry in trainer.state.log_history if "loss" in entry]

    weights, history = run("whole")
    again, resumed = run("whole", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in history]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_checkpoint_of_another_teacher_is_refused(make, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(teacher_update="ema:0.9", **settings).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    later = {**settings, "max_steps": 2}
    with pytest.raises(ValueError, match=r"is the teacher of another run.*ema:0.9.*ema:0.99"):
        make(teacher_update="ema:0.99", **later).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "run" / "checkpoint-1" / "teacher-00000.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no state of the teacher"):
        make(teacher_update="ema:0.9", **later).train(resume_from_checkpoint=checkpoint)


def test_what_the_student_cannot_be_taught_is_refused(make, path, dataset):
    alike = dataset.remove_columns("teacher_prompt")
    with pytest.raises(ValueError, match="there is nothing to learn: give the dataset a column 'teacher_prompt'"):
        make(rows=alike)
    with pytest.raises(ValueError, match="the model under an adapter, and this student has none"):
        make(teacher_update="base")
    with pytest.raises(ValueError, match="teacher_offload moves a second model"):
        make(adapted(path), teacher_offload=True)
    with pytest.raises(ValueError, match='is for the teacher "self"'):
        TIPTrainer(path, path, TIPConfig("run", teacher_update="ema:0.9", **PLAIN), dataset)


def test_an_adapter_is_kept_near_the_model_under_it_without_a_hint(make, path, dataset):
    """A trained adapter and its base differ on the same prompt, so there is something to learn."""
    trainer = make(adapted(path), rows=dataset.remove_columns("teacher_prompt"), teacher_update="base", max_steps=2)
    trainer.train()
    first, last = (entry["reverse_kl"] for entry in trainer.state.log_history if "loss" in entry)
    assert first > 0
    assert last != first
    assert isinstance(trainer.model, PeftModel)


@pytest.mark.parametrize("update", ["base", "frozen", "ema:0.5"])
def test_an_adapter_given_through_transformers_is_one_too(make, path, update):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.add_adapter(LoraConfig(**LORA))
    trainer = make(model, teacher_update=update)
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    trainer.train()
    assert trainer.teacher.model is None
    assert frozen == [name for name, value in model.named_parameters() if not value.requires_grad]


def test_records_are_written_of_a_student_that_teaches_itself(make, path, tmp_path):
    trainer = make(adapted(path), record_rollouts=2, max_steps=1)
    trainer.train()
    records = open_records(tmp_path / "run" / "records" / "step-0")
    assert records.sidecar["teacher"] == "self (frozen)"
    assert float(records.scores().reverse_kl.mean()) > 0


@pytest.mark.parametrize(
    ("engine", "settings", "said"),
    [
        ("FSDP", {"teacher_update": "ema:0.9"}, "changes the adapter's tensors.*holds in parts: take base"),
        ("DEEPSPEED", {"teacher_update": "base", "normalization": "running"}, 'needs normalization="batch"'),
    ],
    ids=["ema", "running"],
)
def test_what_a_sharded_adapter_cannot_be_taught_is_refused(path, engine, settings, said):
    student = adapted(path)
    accelerator = SimpleNamespace(distributed_type=DistributedType[engine])
    trainer = SimpleNamespace(accelerator=accelerator, plain_student=lambda: student)
    args = {"normalization": "batch", "teacher_offload": False, **settings}
    with pytest.raises(ValueError, match=said):
        teacher_of(trainer, SimpleNamespace(**args))


def test_a_whole_student_in_partitions_is_refused(path):
    engine = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=engine)
    student = AutoModelForCausalLM.from_pretrained(path)
    trainer = SimpleNamespace(accelerator=accelerator, plain_student=lambda: student)
    with pytest.raises(ValueError, match="give the student's directory as the teacher"):
        teacher_of(trainer, SimpleNamespace(normalization="batch", teacher_offload=False, teacher_update="frozen"))


@pytest.mark.parametrize(
    ("given", "normalization"), [({}, "batch"), ({"normalization": "running"}, "running")], ids=["usual", "named"]
)
def test_a_teacher_that_the_trainer_is_told_of_has_its_say_in_the_usual_normalization(make, given, normalization):
    assert TIPConfig("run", **{**PLAIN, **given}).normalization == "running"
    assert make(**given).args.normalization == normalization


def test_a_normalization_that_was_set_after_all_stays(path, dataset, tmp_path):
    args = TIPConfig(str(tmp_path / "run"), **PLAIN)
    args.normalization = "micro_batch"
    assert TIPTrainer(path, "self", args, dataset).args.normalization == "micro_batch"
