"""A teacher that reads its own prompt, against plain PyTorch; alone, and as one of several."""

import json

import pytest
from datasets import Dataset, IterableDataset
from plain_loss import PLAIN, compare, rollouts
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.records import open_records

HINTS = ["The answer is 42. ", "Count on your fingers, and then count once more: "]


@pytest.fixture
def rows(word_problems):
    """Prompts; every third row has no prompt for the teacher, the others a longer one."""
    prompts = [json.loads(line)["prompt"] for line in word_problems.read_text(encoding="utf-8").splitlines()]
    own = [None if row % 3 == 2 else HINTS[row % 3] + prompt for row, prompt in enumerate(prompts)]
    return {"prompt": prompts, "teacher_prompt": own, "teacher": ["maths", "code"] * (len(prompts) // 2)}


@pytest.fixture
def make(tiny_model_dir, rows, tmp_path):
    def build(teacher=None, dataset=None, **settings):
        args = TIPConfig(str(tmp_path / "run"), **{**PLAIN, **settings})
        teacher = teacher or (None if "teachers" in settings else str(tiny_model_dir("qwen3", "teacher")))
        dataset = Dataset.from_dict(rows) if dataset is None else dataset
        return TIPTrainer(str(tiny_model_dir("qwen3", "student")), teacher, args, dataset)

    return build


def read_by_the_teacher(trainer, tokenizer, model_of):
    """(row, the student's prompt) → the model and the prompt that the teacher reads, from the dataset's own text."""
    own = dict(zip(trainer.train_dataset["prompt"][:], trainer.train_dataset["teacher_prompt"][:], strict=True))
    names = dict(zip(trainer.train_dataset["prompt"][:], trainer.train_dataset["teacher"][:], strict=True))

    def teacher_of(row, prompt):
        text = tokenizer.decode(prompt)
        ids = prompt if own[text] is None else tokenizer(own[text])["input_ids"]
        return model_of(names[text]), ids

    return teacher_of


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalization": "micro_batch"}, {"teacher_offload": True, "scoring_tokens": 80}],
    ids=["batch", "micro_batch", "offload"],
)
def test_the_teacher_reads_its_own_prompt_and_the_students_completion(make, tiny_model_dir, settings):
    trainer = make(**settings)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "teacher")).eval()
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student"))
    teacher_of = read_by_the_teacher(trainer, tokenizer, lambda name: teacher)
    inputs = compare(trainer, [trainer.train_dataset[row] for row in range(8)], student, teacher_of)
    longer = [len(teacher_of(row, prompt)[1]) - len(prompt) for row, (prompt, _) in enumerate(rollouts(inputs))]
    assert max(longer) > 0


def test_several_teachers_with_prompts_of_their_own(make, tiny_model_dir):
    paths = {"maths": str(tiny_model_dir("qwen3", "teacher")), "code": str(tiny_model_dir("llama", "teacher"))}
    trainer = make(teachers=paths)
    teachers = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in paths.items()}
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student"))
    teacher_of = read_by_the_teacher(trainer, tokenizer, teachers.__getitem__)
    compare(trainer, [trainer.train_dataset[row] for row in range(8)], student, teacher_of)


def test_a_prompt_that_is_the_students_changes_nothing(make, rows):
    runs = []
    for own in (None, rows["prompt"]):
        dataset = Dataset.from_dict({"prompt": rows["prompt"], **({} if own is None else {"teacher_prompt": own})})
        trainer = make(dataset=dataset, generation_kwargs={"do_sample": False})
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)
    assert type(trainer.teacher).__name__ == "PromptedTeacher"


def test_conversations_are_dressed_by_the_teachers_own_template(make, tiny_model_dir, rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "teacher"))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|start|>", "<|start|><|start|>")
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "teacher"))
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")

    def chat(text):
        return [{"role": "user", "content": text}]

    dataset = Dataset.from_dict(
        {
            "prompt": list(map(chat, rows["prompt"])),
            "teacher_prompt": [chat(HINTS[0] + text) for text in rows["prompt"]],
        }
    )
    trainer = make(str(tmp_path / "teacher"), dataset)
    own = dict(zip(rows["prompt"], dataset["teacher_prompt"][:], strict=True))
    students = AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student"))

    def teacher_of(row, prompt):
        text = next(
            text
            for text in own
            if students.decode(prompt)
            == students.apply_chat_template(chat(text), add_generation_prompt=True, tokenize=False)
        )
        ids = tokenizer.apply_chat_template(own[text], add_generation_prompt=True, return_dict=True)["input_ids"]
        return teacher.eval(), ids

    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
    compare(trainer, [trainer.train_dataset[row] for row in range(8)], student, teacher_of)


def test_neither_prompt_is_held_to_the_other_models_positions(make, tiny_model_dir, rows, tmp_path):
    """The teacher has room for its long prompt, and the student does not and need not."""
    long = {**rows, "teacher_prompt": ["one two " * 12 + text for text in rows["prompt"]]}
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
    student.config.max_position_embeddings = 64
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student")).save_pretrained(tmp_path / "student")
    args = TIPConfig(str(tmp_path / "run"), **PLAIN)
    teacher = str(tiny_model_dir("qwen3", "teacher"))
    trainer = TIPTrainer(str(tmp_path / "student"), teacher, args, Dataset.from_dict(long))
    trainer.train()
    with pytest.raises(ValueError, match=r"more than the 64 positions of the student"):
        TIPTrainer(str(tmp_path / "student"), teacher, args, Dataset.from_dict({"prompt": long["teacher_prompt"]}))
    longer = {**rows, "teacher_prompt": ["one two three " * 300 + text for text in rows["prompt"]]}
    with pytest.raises(ValueError, match=r"more than the 512 positions of the teacher.*teacher_prompt"):
        TIPTrainer(str(tmp_path / "student"), teacher, args, Dataset.from_dict(longer))


def test_a_prompt_that_cannot_be_read_is_refused_with_its_row(make, rows):
    rows["teacher_prompt"][5] = "  "
    with pytest.raises(ValueError, match=r"column 'teacher_prompt' of train_dataset, row 5 .*the prompt is empty"):
        make()


def test_a_stream_is_read_as_it_comes(make, rows):
    def stream():
        for prompt, own in zip(rows["prompt"], rows["teacher_prompt"], strict=True):
            yield {"prompt": prompt, "teacher_prompt": own}

    trainer = make(dataset=IterableDataset.from_generator(stream), max_steps=1)
    trainer.train()
    assert type(trainer.teacher).__name__ == "PromptedTeacher"


def test_token_records_are_of_the_teacher_that_reads_its_own_prompt(make, rows, tmp_path):
    """The recorded divergence of all recorded tokens is not that after the student's prompt."""
    means = []
    for own in (rows["teacher_prompt"], rows["prompt"]):
        dataset = Dataset.from_dict({"prompt": rows["prompt"], "teacher_prompt": own})
        trainer = make(dataset=dataset, record_rollouts=4, max_steps=1)
        trainer.train()
        means.append(float(open_records(tmp_path / "run" / "records" / "step-0").scores().reverse_kl.mean()))
    assert abs(means[0] - means[1]) > 1e-4
