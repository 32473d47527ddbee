"""Images beside text: trained on, refused before weights are loaded, or read as text where a column holds none."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from on_cpu import ON_CPU
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
)
from trl import DistillationConfig, DistillationTrainer

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.arrow import dataset_of
from tipdistill.integrations._trl import take_rollouts, without_false_counts
from tipdistill.records import open_records
from tipdistill.training.images import prepared, text_alone, with_images

ASK = [{"role": "user", "content": "?"}]
SEES, READS = ProcessorMixin.__new__(ProcessorMixin), SimpleNamespace()
BLIND = "the student reads text alone: remove the images, or train a model that sees."
PICTURE = {"bytes": b"no picture is decoded", "path": None}
TYPES = {"images": List(Image()), "image": Image()}


def config(tmp_path, **settings):
    settings = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_completion_length": 2,
        **settings,
    }
    options = {"report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "max_steps": 1}
    return TIPConfig(str(tmp_path / "run"), disable_tqdm=True, **options, **settings)


def rows(column, values):
    stored = [None if value is None else [PICTURE] * value if column == "images" else PICTURE for value in values]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": List(message), column: TYPES[column]})
    return Dataset.from_dict({"prompt": [ASK] * len(values), column: stored}, features=features)


@pytest.mark.parametrize("column", ["images", "image"])
def test_an_image_after_rows_of_text_is_refused_with_its_row_before_weights(tmp_path, column):
    dataset, run = rows(column, [None] * 8 + [1, None]), config(tmp_path)
    with pytest.raises(
        ValueError, match=r"train_dataset, row 8 \(counting from 0\) has an image, and the student reads"
    ):
        prepared(dataset, "train_dataset", run, READS, BLIND)
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\], row 8 .* has an image, and the student reads text"):
        prepared({"a": dataset}, "eval_dataset", run, READS, BLIND)
    assert column in prepared(dataset, "train_dataset", run, SEES, None).column_names
    with pytest.raises(ValueError, match=r"row 2 "):
        prepared(dataset.select([0, 9, 8]), "train_dataset", run, READS, BLIND)
    plain = dataset.remove_columns("prompt").add_column("prompt", ["a"] * 10)
    with pytest.raises(ValueError, match=r"row 8 .*its prompt is plain"):
        prepared(plain, "train_dataset", run, SEES, None)


def test_an_image_in_a_message_is_refused_for_a_student_that_reads_text_alone(tmp_path):
    """Its template would write `[{'type': 'image'}]`, or nothing."""
    text, image = ([{"role": "user", "content": [{"type": kind}]}] for kind in ("text", "image"))
    dataset = Dataset.from_dict({"prompt": [text] * 3 + [image]})
    with pytest.raises(ValueError, match=r"train_dataset, row 3 .* has an image, and the student reads text alone"):
        prepared(dataset, "train_dataset", config(tmp_path), READS, BLIND)
    assert prepared(dataset.select([0]), "train_dataset", config(tmp_path), READS, BLIND) is not None
    assert prepared(dataset, "train_dataset", config(tmp_path), SEES, None) is dataset
    written = dataset_of({"prompt": [ASK, image]})
    with pytest.raises(ValueError, match=r"train_dataset, row 1 .* has an image, and the student reads text alone"):
        prepared(written, "train_dataset", config(tmp_path), READS, BLIND)
    with pytest.raises(ValueError, match=r"row 1 of the batch .* has an image, and the student reads text alone"):
        with_images([{"prompt": ASK}, {"prompt": image}], BLIND)
    assert with_images([{"prompt": ASK}], BLIND) == [{"prompt": ASK}]


def test_a_begun_turn_is_refused_for_a_model_that_sees(tmp_path):
    dataset = Dataset.from_dict({"prompt": [ASK, [*ASK, {"role": "assistant", "content": "Well"}]]})
    with pytest.raises(ValueError, match=r"row 1 .*a model that sees images cannot go on"):
        prepared(dataset, "train_dataset", config(tmp_path), SEES, None)
    assert prepared(dataset, "train_dataset", config(tmp_path), READS, BLIND) is dataset


def test_a_stream_is_refused_at_the_first_image():
    """Before that batch is sampled."""
    text, image = {"prompt": ASK, "image": None}, {"prompt": ASK, "image": object()}
    assert with_images([text, text], BLIND) == [{"prompt": ASK}] * 2
    with pytest.raises(ValueError, match=r"row 1 of the batch .* has an image, and the student reads text alone"):
        with_images([text, image], BLIND)
    given = [text, image, {"prompt": ASK, "image": ""}, {"prompt": ASK, "images": [None, 1]}]
    assert [row["images"] for row in with_images(given, None)] == [[], [image["image"]], [], [1]]
    block = {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}
    with pytest.raises(ValueError, match=r"row 1 of the batch .* has an image"):
        with_images([text, block], BLIND)


@pytest.mark.parametrize("asked", [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")])
def test_where_the_part_that_sees_is_sharded_every_row_has_an_image(tmp_path, monkeypatch, asked):
    """One process would wait for another that has no picture in its micro-batch."""
    mixed, run = rows("images", [1, 2, None]), config(tmp_path)
    assert prepared(mixed, "train_dataset", run, SEES, None) is mixed
    monkeypatch.setenv(*asked)
    with pytest.raises(
        ValueError, match=r"train_dataset, row 0 .* has an image and row 2 has none: where FSDP or ZeRO-3"
    ):
        prepared(mixed, "train_dataset", run, SEES, None)
    assert prepared(mixed.select([0, 1]), "train_dataset", run, SEES, None) is not None
    none = prepared(mixed.select([2]), "train_dataset", run, SEES, None)
    assert none.column_names == ["prompt"]


def test_models_that_read_text_alone_are_named(tmp_path, tiny_model_dir, seeing_pair):
    sees, reads = seeing_pair[1], str(tiny_model_dir("qwen3", "teacher"))
    assert text_alone(sees, config(tmp_path), SEES) is None
    assert text_alone("self", config(tmp_path), SEES) is None
    assert text_alone(sees, config(tmp_path), READS) == BLIND
    assert text_alone(reads, config(tmp_path), SEES).startswith("the teacher reads text alone: remove the images, or")
    assert text_alone({"a": sees, "b": reads}, config(tmp_path), SEES).startswith("the teacher b reads text alone")
    served = {"a": sees, "b": "http://localhost:1/v1"}
    assert text_alone(served, config(tmp_path), SEES).startswith("the teacher b is behind a server, which is sent text")
    served = config(tmp_path, teacher_url="http://localhost:1/v1")
    assert text_alone(None, served, SEES).startswith("the teacher is behind a server")


@pytest.mark.parametrize("values", [[None] * 4, [0] * 4], ids=["null", "empty"])
@pytest.mark.parametrize("normalization", ["batch", "micro_batch"])
def test_a_column_without_any_image_is_no_column(tiny_model_dir, tmp_path, values, normalization):
    pair = [str(tiny_model_dir("qwen3", who)) for who in ("student", "teacher")]
    dataset = rows("images", values)
    trainer = TIPTrainer(*pair, config(tmp_path, normalization=normalization), dataset)
    assert trainer.train_dataset.column_names == ["prompt"]
    trainer.train()


def test_a_text_model_refuses_images_before_weights_are_loaded(tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch):
    pair = [str(tiny_model_dir("qwen3", who)) for who in ("student", "teacher")]
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("weights"))
    with pytest.raises(ValueError, match=r"row 2 .* the student reads text alone"):
        TIPTrainer(*pair, config(tmp_path), rows("image", [None, None, 1, 1]), processing_class=tiny_tokenizer)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "a prompt is a string or a list of messages, got None"),
        ("", "the prompt is empty"),
        ([], "the prompt has no messages"),
        ([{"role": "user", "content": None}], "a message needs a 'role' and a 'content'"),
        ([*ASK, {"role": "assistant", "content": " \n"}], "has no text, or blanks alone"),
    ],
    ids=["null", "empty", "no messages", "no content", "blank turn"],
)
def test_a_prompt_that_is_none_is_refused_with_its_row(tmp_path, bad, message):
    dataset = Dataset.from_dict({"prompt": ["a" if not isinstance(bad, list) else ASK] * 5 + [bad]})
    with pytest.raises(ValueError, match=rf"^train_dataset, row 5 \(counting from 0\): .*{message}"):
        prepared(dataset, "train_dataset", config(tmp_path), READS, BLIND)
    with pytest.raises(ValueError, match=rf"^the batch, row 1 \(counting from 0\): .*{message}"):
        with_images([dataset[0], {"prompt": bad}], BLIND)


@pytest.mark.parametrize("column", ["chat_template_kwargs", "tools"])
def test_a_stream_that_does_not_tell_its_columns_is_refused_at_the_first_row_that_has_one(
    tiny_model_dir, tmp_path, column
):
    pair = [str(tiny_model_dir("qwen3", who)) for who in ("student", "teacher")]
    stream = IterableDataset.from_generator(lambda: ({"prompt": ASK, column: [{"a": 1}]} for _ in range(4)))
    assert stream.column_names is None
    trainer = TIPTrainer(*pair, config(tmp_path), stream)
    with pytest.raises(ValueError, match=f"the dataset has a column '{column}'"):
        trainer.train()
    with_images([{"prompt": ASK, column: None}], BLIND)


CONTENT = (
    "{% for message in messages %}{% for block in message['content'] %}"
    "{{ '<image>' if block['type'] == 'image' else block['text'] }}{% endfor %}{% endfor %}"
)


@pytest.fixture
def seeing_pair(tiny_model_dir, tmp_path):
    """Directories of two tiny models that see images, and their processor."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("llama", "student"), padding_side="left")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(images, tokenizer, 4, "default", chat_template=CONTENT, num_additional_image_tokens=1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pair = []
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config = LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **sizes},
            text_config={"model_type": "llama", "vocab_size": 416, "initializer_range": 0.2, **sizes, **ends},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        )
        model = LlavaForConditionalGeneration(config)
        for parameter in model.model.multi_modal_projector.parameters():
            torch.nn.init.normal_(parameter)  # so that what is in a picture matters
        model.save_pretrained(tmp_path / role)
        processor.save_pretrained(tmp_path / role)
        pair.append(str(tmp_path / role))
    return pair


def pictured(counts, **columns):
    """Rows with so many pictures each, none alike."""
    from_array, draw = pytest.importorskip("PIL.Image").fromarray, numpy.random.default_rng(0)
    pictures = [
        [from_array(draw.integers(0, 256, (9 + row, 12, 3), dtype=numpy.uint8)) for _ in range(count)]
        for row, count in enumerate(counts)
    ]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": List(message), "images": List(Image())} | dict.fromkeys(columns, Value("string")))
    asked = [[{"role": "user", "content": f"What is in picture {row}?"}] for row in range(len(counts))]
    return Dataset.from_dict({"prompt": asked, "images": pictures, **columns}, features=features)


def trained(trainer, config, pair, dataset, directory, **settings):
    """What two steps of a training logged."""
    settings = {
        **ON_CPU,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
        **settings,
    }
    options = {"peft_config": settings.pop("peft_config")} if "peft_config" in settings else {}
    run = trainer(*pair, config(str(directory), **settings), dataset, **options)
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]


def test_a_student_that_sees_images_is_trained_as_by_trl(seeing_pair, tmp_path):
    dataset = pictured([1] * 8)
    theirs = trained(DistillationTrainer, DistillationConfig, seeing_pair, dataset, tmp_path / "trl")
    ours = {"selection_rule": "all", "retention": 1.0}
    of_all = trained(TIPTrainer, TIPConfig, seeing_pair, dataset, tmp_path / "all", **ours)
    for key in ("loss", "grad_norm", "entropy"):
        assert [entry[key] for entry in of_all] == pytest.approx([entry[key] for entry in theirs], rel=1e-3)


def test_an_evaluation_on_images_is_that_of_trl(seeing_pair, tmp_path):
    losses = []
    for trainer, config in ((DistillationTrainer, DistillationConfig), (TIPTrainer, TIPConfig)):
        args = config(str(tmp_path), **ON_CPU, max_completion_length=6, per_device_eval_batch_size=2, beta=1.0)
        run = trainer(*seeing_pair, args, pictured([1] * 8), pictured([1] * 4))
        torch.manual_seed(0)
        losses.append(run.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_evaluation_routes_images_to_their_teachers(seeing_pair, tmp_path):
    """Of two teachers one is the student, who has nothing to learn from it; rows have two pictures, one or none."""
    student, other = seeing_pair
    losses = {}
    for name in ("a", "b", "ab"):
        asked = {"a": "aaaa", "b": "bbbb", "ab": "aabb"}[name]
        sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_completion_length": 6}
        args = TIPConfig(str(tmp_path), **ON_CPU, **sizes, beta=1.0)
        rows = pictured([2, 0, 1, 0], teacher=list(asked))
        run = TIPTrainer(student, {"a": other, "b": student}, args, rows, rows)
        torch.manual_seed(0)
        losses[name] = run.evaluate()["eval_loss"]
    assert losses["b"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < losses["ab"] < losses["a"]


@pytest.mark.parametrize("teacher", ["local", "offloaded", "several", "adapter"])
@pytest.mark.parametrize("rule", ["soft_or", "entropy"])  # the teacher is asked about every token, or about the kept
def test_tokens_of_images_are_chosen_ahead_of_the_loss_as_inside_it(seeing_pair, tmp_path, teacher, rule):
    """Pieces of a scoring pass hold the pictures of their rollouts: some have two, some none, and one piece has none.

    A micro-batch of the whole batch is scored in the forward of its loss, which cuts nothing.
    """
    student, local = seeing_pair
    dataset = pictured([2, 1, 0, 0, 1, 0, 2, 1], teacher=["a", "b", "a", "b"] * 2)
    pair = {"several": (student, {"a": local, "b": student}), "adapter": (student, "self")}.get(
        teacher, (student, local)
    )
    settings = {"selection_rule": rule, "retention": 0.5, "record_rollouts": 0, "num_generations": 1}
    settings["normalization"] = "batch"
    if teacher == "adapter":
        settings |= {
            "teacher_update": "base",
            "peft_config": LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False),
        }
        dataset = dataset.remove_columns("teacher")
    ahead, inside = (
        trained(
            TIPTrainer,
            TIPConfig,
            pair,
            dataset,
            tmp_path / str(accumulated),
            gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=4 // accumulated,
            teacher_offload=teacher == "offloaded" and accumulated == 4,
            **settings,
        )
        for accumulated in (4, 1)
    )
    compared = ["loss", "grad_norm", "entropy", "selection/kept_fraction"]
    if rule == "soft_or":
        compared.append("selection/kept_divergence_share")
    for key in compared:
        assert [entry[key] for entry in ahead] == pytest.approx([entry[key] for entry in inside], rel=1e-4), key
    assert all(0 < entry["selection/kept_fraction"] < 1 for entry in ahead)


def test_an_engine_is_told_of_no_images_as_trl_tells_it(seeing_pair, tmp_path, monkeypatch):
    """vLLM takes the first image of every list that is there."""
    told, write = [], DistillationTrainer._generate_single_turn

    def watched(self, prompt_ids, images, *rest):
        told.append(images)
        return write(self, prompt_ids, images, *rest)

    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", watched)
    trained(TIPTrainer, TIPConfig, seeing_pair, pictured([1, 0, 2, 0]), tmp_path / "run", max_steps=1)
    assert [[image and len(image) for image in images] for images in told] == [[1, None, 2, None]]


def test_records_of_rollouts_with_images(seeing_pair, tmp_path):
    trained(TIPTrainer, TIPConfig, seeing_pair, pictured([1, 0, 2, 1]), tmp_path / "run", record_rollouts=4)
    records = open_records(tmp_path / "run" / "records" / "step-0")
    assert records.rollouts.num_rows == 4
    assert records.scores().reverse_kl.isfinite().all()


def labelled(*counts):
    """Rows of each rollout in turn, as many as `counts`, each with the rollout's number in it."""
    return torch.cat([torch.full((count, 2), float(row)) for row, count in enumerate(counts)])


LAYOUTS = {
    # rollout 0 has two pictures, 1 none, 2 one; as the models of each name lay them out
    "llava": {"pixel_values": labelled(2, 0, 1), "image_sizes": labelled(2, 0, 1)},
    "qwen": {
        "pixel_values": labelled(5, 0, 6),
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 1, 3], [1, 2, 3]]),
        "mm_token_type_ids": labelled(1, 1, 1),
    },
    "gemma": {"pixel_values": labelled(2, 0, 1), "image_position_ids": labelled(2, 0, 1)},
    "lfm2": {
        "pixel_values": labelled(4, 0, 2),
        "pixel_attention_mask": labelled(4, 0, 2),
        "spatial_shapes": labelled(4, 0, 2),
        "num_tiles": [4, 0, 2],
    },
    "internvl": {"pixel_values": labelled(7, 0, 3), "num_tiles": [7, 0, 3]},
    "idefics": {
        "pixel_values": torch.arange(3.0).repeat_interleave(2).reshape(3, 2, 1, 1, 1),
        "pixel_attention_mask": labelled(1, 1, 1),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taken", [[0], [1], [2], [0, 2], [1, 2], [0, 1, 2]], ids=str)
def test_rollouts_are_taken_with_their_pictures(layout, taken):
    batch = {"prompt_ids": torch.arange(3)[:, None], "num_images": [2, 0, 1], "examples": ["a", "b", "c"]}
    batch |= LAYOUTS[layout]
    part = take_rollouts(without_false_counts(batch), torch.tensor(taken))
    assert part["prompt_ids"][:, 0].tolist() == taken
    assert part["examples"] == [batch["examples"][row] for row in taken]
    for key, value in LAYOUTS[layout].items():
        if key == "image_grid_thw":
            grids = {0: [[1, 1, 2], [1, 1, 3]], 1: [], 2: [[1, 2, 3]]}
            assert part[key].tolist() == [grid for row in taken for grid in grids[row]]
        elif key != "num_tiles":
            own = [row for row in value.flatten(1)[:, 0].tolist() if row in taken]
            assert part[key].flatten(1)[:, 0].tolist() == own, key
