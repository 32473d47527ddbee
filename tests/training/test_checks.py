"""What is refused before any weights are loaded, of what a script of TRL's may set; and what a row keeps."""

import pytest
from datasets import Dataset
from on_cpu import ON_CPU

from tipdistill import TIPConfig, TIPTrainer

BASE = {
    **ON_CPU,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
}
PROMPTS = [f"What is {number} and {number}?" for number in range(8)]


@pytest.fixture
def pair(tiny_model_dir):
    return [str(tiny_model_dir("qwen3", role)) for role in ("student", "teacher")]


@pytest.fixture
def make(pair, tmp_path):
    def build(teacher=None, columns=None, kind=Dataset.from_dict, **settings):
        dataset = kind({"prompt": PROMPTS, **(columns or {})})
        return TIPTrainer(pair[0], teacher, TIPConfig(str(tmp_path / "run"), **{**BASE, **settings}), dataset)

    return build


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1 would do nothing: .* no labels"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy = group_by_length .* shuffle_data"),
        ({"data_seed": 3}, "data_seed = 3 would do nothing: seed draws"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "num_return_sequences = 2 .* set num_generations"),
        ({"auto_find_batch_size": True, "gradient_accumulation_steps": 2}, "leave out half of the prompts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_would_do_nothing_or_something_else_is_refused(pair, make, monkeypatch, settings, said):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("weights"))
    with pytest.raises(ValueError, match=said):
        make(pair[1], **settings)


def test_settings_that_ask_for_nothing_are_taken(pair, make):
    make(pair[1], generation_kwargs={"num_return_sequences": 1, "top_k": 5}, auto_find_batch_size=True, data_seed=None)


@pytest.mark.parametrize("length", [None, 0, True])
def test_completions_have_a_length(tmp_path, length):
    """TRL takes none, and generate's own 20 tokens then."""
    with pytest.raises(ValueError, match="max_completion_length must be an integer ≥ 1, got"):
        TIPConfig(str(tmp_path), use_cpu=True, bf16=False, max_completion_length=length)


def test_the_teacher_of_the_configuration_is_the_teacher(pair, make):
    trainer = make(teacher_model_name_or_path=pair[1])
    assert trainer.teacher.name == pair[1]
    trainer.train()


@pytest.mark.parametrize("teacher", ["self", {"maths": "a"}], ids=str)
def test_a_teacher_and_another_in_the_configuration_are_refused(pair, make, teacher):
    with pytest.raises(ValueError, match=r"teacher_model = .* and teacher_model_name_or_path = .* name two teachers"):
        make(teacher, teacher_model_name_or_path=pair[1])


def test_a_teacher_that_both_name_is_one(pair, make):
    assert make(pair[1], teacher_model_name_or_path=pair[1]).teacher.name == pair[1]


@pytest.mark.parametrize("kind", [Dataset.from_dict, lambda rows: Dataset.from_dict(rows).to_iterable_dataset()])
def test_columns_that_teachers_read_are_not_unused(pair, make, kind):
    asked = []
    columns = {"other": PROMPTS, "teacher_prompt": [f"Think! {p}" for p in PROMPTS], "teacher": ["maths", "code"] * 4}
    trainer = make({"maths": pair[1], "code": pair[1]}, columns, kind, remove_unused_columns=True)
    answer = trainer.teacher.answer
    trainer.teacher.answer = lambda batch, *rest: (asked.extend(batch["examples"]), answer(batch, *rest))[1]
    trainer.train()
    assert len(asked) == 4
    assert all(row.keys() == {"prompt", "teacher", "teacher_prompt"} for row in asked)
