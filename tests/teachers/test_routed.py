"""Several teachers, each for the rows that name it, against plain PyTorch and against one teacher alone."""

import pytest
import torch
from datasets import Dataset
from plain_loss import PLAIN, compare
from serving import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import TIPConfig, TIPTrainer

NAMES = ["maths", "code"]


@pytest.fixture
def models(tiny_model_dir):
    return {"maths": str(tiny_model_dir("qwen3", "teacher")), "code": str(tiny_model_dir("llama", "teacher"))}


@pytest.fixture
def make(tiny_model_dir, models, word_problems, tmp_path):
    def build(teachers=None, names=None, column="teacher", **settings):
        prompts = Dataset.from_json(str(word_problems))
        names = [NAMES[row % 2] for row in range(len(prompts))] if names is None else names
        prompts = prompts.add_column(column, names)
        settings = {"teachers": models if teachers is None else teachers, **PLAIN, **settings}
        args = TIPConfig(str(tmp_path / "run"), **settings)
        return TIPTrainer(str(tiny_model_dir("qwen3", "student")), args=args, train_dataset=prompts)

    return build


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalization": "micro_batch"},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"teacher_offload": True},
        {"scoring_tokens": 60},
    ],
    ids=["batch", "micro_batch", "whole", "offload", "small forwards"],
)
def test_loss_gradients_and_kept_tokens_are_those_of_each_rows_teacher(make, models, tiny_model_dir, settings):
    trainer = make(**settings)
    teachers = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in models.items()}
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
    rows = [trainer.train_dataset[row] for row in range(8)]
    asked = {}

    def teacher_of(row, prompt):
        asked[row] = name = trainer_rows["examples"][row]["teacher"]
        return teachers[name], prompt

    trainer.model.train()
    trainer_rows = trainer._prepare_inputs(rows)
    trainer._prepare_inputs = lambda _: trainer_rows
    compare(trainer, rows, student, teacher_of)
    assert set(asked.values()) == set(NAMES)


@pytest.mark.parametrize("kind", ["hidden states", "log-probabilities"])
def test_a_local_teacher_and_one_on_a_server_in_one_run(make, models, tiny_model_dir, tiny_tokenizer, kind):
    teachers = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in models.items()}
    with serving(teachers["code"], tiny_tokenizer, max_logprobs=-1) as server:
        served = {"url": server.url, "lm_head": models["code"]} if kind == "hidden states" else server.url
        trainer = make({"maths": models["maths"], "code": served})
        student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
        trainer.model.train()
        inputs = trainer._prepare_inputs([trainer.train_dataset[row] for row in range(8)])
        trainer._prepare_inputs = lambda _: inputs
        names = [row["teacher"] for row in inputs["examples"]]
        assert set(names) == set(NAMES)
        compare(trainer, [], student, lambda row, prompt: (teachers[names[row]], prompt))
        trainer = make({"maths": models["maths"], "code": served})
        trainer.train()
        (*_, last) = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert last["teacher/code/tokens_asked"] == last["teacher/code/tokens"] > 0


def test_each_teachers_tokens_and_divergence_are_logged(make, models, tiny_model_dir):
    """All tokens of "code" come from the student itself, which does not diverge from itself."""
    trainer = make({"maths": models["maths"], "code": str(tiny_model_dir("qwen3", "student"))}, max_steps=1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [entry[f"teacher/{name}/tokens"] for name in NAMES]
    assert min(tokens) > 0
    assert entry["teacher/code/reverse_kl"] == pytest.approx(0, abs=1e-6)
    share = [entry[f"teacher/{name}/kept_fraction"] for name in NAMES]
    assert sum(part * count for part, count in zip(share, tokens, strict=True)) / sum(tokens) == pytest.approx(
        entry["selection/kept_fraction"]
    )
    mean = entry["teacher/maths/reverse_kl"] * tokens[0] / sum(tokens)
    assert mean == pytest.approx(entry["reverse_kl"], rel=1e-5)
    assert trainer.teacher.name.startswith("maths: ")


SETTINGS = [
    {},
    {"normalization": "micro_batch"},
    {"selection_rule": "entropy"},
    {"selection_rule": "all", "retention": 1.0, "beta": 0.5},
    {"selection_rule": "gradient_norm_sampling", "selection_scope": "batch", "retention": 0.1},
    {"normalization": "running", "selection_rule": "soft_or"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda given: "-".join(map(str, given.values())) or "divergence")
def test_one_teacher_under_two_names_trains_like_one(make, models, settings):
    settings = {**settings, "generation_kwargs": {"do_sample": False}}
    runs = []
    for teachers in ({"default": models["maths"]}, dict.fromkeys(NAMES, models["maths"])):
        trainer = make(teachers, names=None if len(teachers) > 1 else [None] * 96, **settings)
        trainer.train()
        runs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for name in ("loss", "grad_norm", "selection/kept_fraction", "selection/trained_tokens"):
        # sums over float32 in another order
        assert [entry[name] for entry in runs[1]] == pytest.approx([entry[name] for entry in runs[0]], rel=1e-4)


def test_an_evaluation_is_the_mean_over_all_teachers_tokens(make, models, tiny_model_dir):
    trainer = make({"maths": models["maths"], "code": str(tiny_model_dir("qwen3", "student"))}, eval_strategy="no")
    rows = trainer.train_dataset
    both = trainer.evaluate(rows.select(range(8)))["eval_loss"]
    alone = trainer.evaluate(rows.select(range(0, 8, 2)))["eval_loss"]
    # of eight rollouts of like length four follow the student itself
    assert 0.3 < both / alone < 0.7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teachers": {}}, "names no teacher"),
        ({"teachers": {"maths": 3}}, "must be a directory, a hub id or a server's address"),
        ({"teachers": {"maths": {"modell": "x"}}}, "Did you mean 'model'"),
        ({"teachers": {"maths": {"model": "x", "url": "http://h/v1"}}}, "must name a model or a url"),
        ({"teachers": {"maths": {"model": "x", "top_k": 5}}}, "top_k is for a server"),
        ({"teachers": {"maths": {"url": "http://h/v1", "revision": "x"}}}, "revision is for a model"),
        ({"teachers": {"maths": "x"}, "teacher_url": "http://h/v1"}, "say it of the one"),
        ({"teachers": {"maths": "x"}, "teacher_api_key_env": "KEY"}, "say it of the one"),
        ({"teachers": {"maths": "http://h/v1"}, "normalization": "running"}, 'needs normalization="batch"'),
        ({"teacher_update": "ema:2"}, "ema:<decay between 0 and 1>"),
        ({"teacher_update": "every:0.5"}, "ema:<decay between 0 and 1>"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_configuration_that_names_teachers_wrongly_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        TIPConfig("run", **{**PLAIN, **given})


def test_rows_that_name_no_teacher_are_refused_with_their_number(make):
    names = ["maths", "code", None, *["maths"] * 93]
    with pytest.raises(ValueError, match=r"train_dataset, row 2 .*names no teacher.*one of maths, code"):
        make(names=names)
    with pytest.raises(ValueError, match=r"row 1 .*names the teacher 'cod'.*Did you mean code"):
        make(names=["maths", "cod", *["maths"] * 94])
    with pytest.raises(ValueError, match=r"no column 'teacher'.*Did you mean 'teachers'"):
        make(names=["maths"] * 96, column="teachers")


def test_a_row_without_a_name_goes_to_the_default(make, models):
    trainer = make({"default": models["maths"], "code": models["code"]}, names=["code", None, *[None] * 94])
    assert trainer.teacher.numbers([{"teacher": "code"}, {"teacher": None}, {}]) == [1, 0, 0]


def test_models_themselves_are_teachers_too(models, word_problems, tiny_model_dir, tmp_path):
    teachers = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in models.items()}
    prompts = Dataset.from_json(str(word_problems)).add_column("teacher", NAMES * 48)
    args = TIPConfig(str(tmp_path / "run"), **PLAIN)
    trainer = TIPTrainer(str(tiny_model_dir("qwen3", "student")), teachers, args, prompts)
    assert trainer.teacher.names == NAMES
    with pytest.raises(ValueError, match="are one object"):
        TIPTrainer(teachers["maths"], teachers, args, prompts)
    with pytest.raises(ValueError, match="each name the teacher"):
        TIPTrainer(models["maths"], models["code"], TIPConfig(str(tmp_path), teachers=models, **PLAIN), prompts)


def test_a_comparison_keeps_the_places_of_its_tokens(make):
    """`take` cuts each teacher's tokens, and what they say lands where they stand."""
    trainer = make()
    answers = trainer.teacher.answer(
        {
            "prompt_ids": torch.ones(3, 2, dtype=torch.int64),
            "prompt_mask": torch.ones(3, 2, dtype=torch.int64),
            "completion_ids": torch.arange(3, 12).view(3, 3),
            "completion_mask": torch.ones(3, 3, dtype=torch.int64),
            "examples": [{"teacher": name} for name in ("code", "maths", "code")],
        },
        torch.ones(3, 3, dtype=torch.bool),
    )
    kept = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
    with trainer.teacher.compare(answers) as comparison:
        assert [place.tolist() for place in comparison.places] == [[3, 4, 5], [0, 1, 2, 6, 7, 8]]
        taken = comparison.take(kept)
        assert [place.tolist() for place in taken.places] == [[2], [0, 1, 3, 4]]
        for part, whole, rows in zip(taken.parts, comparison.parts, ([2], [0, 2, 4, 5]), strict=True):
            assert torch.equal(part.head.hidden, whole.head.hidden[rows])


def test_each_teacher_has_room_for_the_prompts_that_it_reads_and_no_others(make, models, tiny_model_dir, tmp_path):
    """A teacher of few positions reads the short prompts, which is no business of the long ones."""
    short = AutoModelForCausalLM.from_pretrained(models["code"])
    short.config.max_position_embeddings = 40
    lengths = [len(row["prompt"]) for row in make().train_dataset]
    middle = sorted(lengths)[len(lengths) // 4]
    names = ["code" if length < middle else "maths" for length in lengths]
    short.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(models["code"]).save_pretrained(tmp_path / "short")
    teachers = {"maths": models["maths"], "code": str(tmp_path / "short")}
    make(teachers, names=names, max_steps=1).train()
    with pytest.raises(ValueError, match="more than the 40 positions of the teacher code"):
        make(teachers, names=["code"] * len(names), max_completion_length=30)
