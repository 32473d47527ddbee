"""Images beside text: trained on, refused before weights are loaded, or read as text where a column holds none."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
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
from tipdistill.training.images import prepared, with_images

ASK = [{"role": "user", "content": "?"}]
SEES, READS = ProcessorMixin.__new__(ProcessorMixin), SimpleNamespace()
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
    dataset = rows(column, [None] * 8 + [1, None])
    with pytest.raises(ValueError, match=r"train_dataset, row 8 \(counting from 0\) has an image, and normalization="):
        prepared(dataset, "train_dataset", config(tmp_path), SEES)
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\], row 8 .* has an image, and the student reads text"):
        prepared({"a": dataset}, "eval_dataset", config(tmp_path), READS)
    for settings in ({"normalization": "micro_batch"}, {"selection_rule": "all", "retention": 1.0}):
        assert column in prepared(dataset, "train_dataset", config(tmp_path, **settings), SEES).column_names
    selected = dataset.select([0, 9, 8])
    with pytest.raises(ValueError, match=r"row 2 "):
        prepared(selected, "train_dataset", config(tmp_path), SEES)
    plain = dataset.remove_columns("prompt").add_column("prompt", ["a"] * 10)
    with pytest.raises(ValueError, match=r"row 8 .*its prompt is plain"):
        prepared(plain, "train_dataset", config(tmp_path, normalization="micro_batch"), SEES)


def test_an_image_in_a_message_is_refused_too(tmp_path):
    blocks = [{"type": "image"}, {"type": "text", "text": "?"}]
    dataset = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": [blocks[1]]}], [{"role": "user", "content": blocks}]]}
    )
    with pytest.raises(ValueError, match=r"row 1 .* has an image"):
        prepared(dataset, "train_dataset", config(tmp_path), SEES)
    assert prepared(dataset.select([0]), "train_dataset", config(tmp_path), SEES) is not None


def test_an_image_in_a_message_is_refused_for_a_student_that_reads_text_alone(tmp_path):
    """Its template would write `[{'type': 'image'}]`, or nothing."""
    text, image = ([{"role": "user", "content": [{"type": kind}]}] for kind in ("text", "image"))
    dataset = Dataset.from_dict({"prompt": [text] * 3 + [image]})
    with pytest.raises(ValueError, match=r"train_dataset, row 3 .* has an image, and the student reads text alone"):
        prepared(dataset, "train_dataset", config(tmp_path), READS)
    written = dataset_of({"prompt": [ASK, image]})
    with pytest.raises(ValueError, match=r"train_dataset, row 1 .* has an image, and the student reads text alone"):
        prepared(written, "train_dataset", config(tmp_path), READS)
    with pytest.raises(ValueError, match=r"row 1 of the batch .* has an image, and the student reads text alone"):
        with_images([{"prompt": ASK}, {"prompt": image}], config(tmp_path), READS)
    assert with_images([{"prompt": ASK}], config(tmp_path), READS) == [{"prompt": ASK}]


def test_a_begun_turn_is_refused_for_a_model_that_sees(tmp_path):
    dataset = Dataset.from_dict({"prompt": [ASK, [*ASK, {"role": "assistant", "content": "Well"}]]})
    with pytest.raises(ValueError, match=r"row 1 .*a model that sees images cannot go on"):
        prepared(dataset, "train_dataset", config(tmp_path), SEES)
    assert prepared(dataset, "train_dataset", config(tmp_path), READS) is dataset


def test_a_stream_is_refused_at_the_first_image(tmp_path):
    """Before that batch is sampled."""
    text, image = {"prompt": ASK, "image": None}, {"prompt": ASK, "image": object()}
    assert with_images([text, text], config(tmp_path), SEES) == [{"prompt": ASK}] * 2
    with pytest.raises(ValueError, match=r'row 1 of the batch .* has an image, and normalization="batch"'):
        with_images([text, image], config(tmp_path), SEES)
    shown = with_images([text, image], config(tmp_path, normalization="micro_batch"), SEES)
    assert [row["images"] for row in shown] == [[], [image["image"]]]
    block = {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}
    with pytest.raises(ValueError, match=r"row 1 of the batch .* has an image"):
        with_images([text, block], config(tmp_path), SEES)


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
        prepared(dataset, "train_dataset", config(tmp_path), READS)
    with pytest.raises(ValueError, match=rf"^the batch, row 1 \(counting from 0\): .*{message}"):
        with_images([dataset[0], {"prompt": bad}], config(tmp_path), READS)


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
    with_images([{"prompt": ASK, column: None}], config(tmp_path), READS)


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


def pictured(count):
    from_array, draw = pytest.importorskip("PIL.Image").fromarray, numpy.random.default_rng(0)
    pictures = [[from_array(draw.integers(0, 256, (9 + row, 12, 3), dtype=numpy.uint8))] for row in range(count)]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": List(message), "images": List(Image())})
    asked = [[{"role": "user", "content": f"What is in picture {row}?"}] for row in range(count)]
    return Dataset.from_dict({"prompt": asked, "images": pictures}, features=features)


def test_a_student_that_sees_images_is_trained_as_by_trl(seeing_pair, tmp_path):
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    logged = {}
    for name, trainer, config, ours in (
        ("trl", DistillationTrainer, DistillationConfig, {}),
        ("all", TIPTrainer, TIPConfig, {"selection_rule": "all", "retention": 1.0}),
        ("some", TIPTrainer, TIPConfig, {"normalization": "micro_batch", "selection_rule": "divergence"}),
    ):
        run = trainer(*seeing_pair, config(str(tmp_path / name), **settings, **ours), pictured(8))
        run.train()
        logged[name] = [entry for entry in run.state.log_history if "loss" in entry]
    for key in ("loss", "grad_norm", "entropy"):
        theirs, of_all = ([entry[key] for entry in logged[name]] for name in ("trl", "all"))
        assert of_all == pytest.approx(theirs, rel=1e-3)
    for entry in logged["some"]:
        assert 0.4 < entry["selection/kept_fraction"] <= 0.5
        assert entry["selection/kept_divergence_share"] > entry["selection/kept_fraction"]
