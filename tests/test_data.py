import json

import pytest
from datasets import Dataset, DatasetDict

from tipdistill.data import check_text_alone, drop_long_prompts, load_prompts, prepare_prompts, prompt_lengths

CHAT = [{"role": "user", "content": "1 + 1 ="}]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("prompt", ["1 + 1 =", CHAT], ids=["plain", "conversational"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved", "saved_dict", "folder"])
def test_every_local_form_gives_the_same_rows(tmp_path, kind, prompt):
    rows = [{"prompt": prompt, "answer": 2}, {"prompt": prompt}]
    expected = Dataset.from_dict({"prompt": [prompt, prompt], "answer": [2, None]})
    if kind == "jsonl":
        source = write(tmp_path / "d.jsonl", *rows)
    elif kind == "json":
        source = write(tmp_path / "d.json", json.dumps(rows, indent=1))
    elif kind == "parquet":
        source = tmp_path / "d.parquet"
        expected.to_parquet(source)
    elif kind == "saved":
        source = tmp_path / "d"
        expected.save_to_disk(source)
    elif kind == "saved_dict":
        source = tmp_path / "d"
        DatasetDict({"train": expected, "test": expected.select([0])}).save_to_disk(source)
        assert len(load_prompts(source, split="test")) == 1
    else:
        source = tmp_path / "d"
        source.mkdir()
        expected.to_parquet(source / "train.parquet")
    loaded = load_prompts(str(source))
    assert loaded[:] == expected[:]


def test_columns_come_from_every_row_and_not_the_first_alone(tmp_path):
    source = write(tmp_path / "d.jsonl", {"prompt": "a"}, {"prompt": "b", "answer": 3})
    assert load_prompts(source)["answer"][:] == [None, 3]


def test_a_named_column_takes_the_place_of_prompt(tmp_path):
    source = write(tmp_path / "d.jsonl", {"problem": "a", "prompt": "old"})
    assert load_prompts(source, column="problem")[:] == {"prompt": ["a"]}


@pytest.mark.parametrize("streaming", [False, True])
def test_template_and_chat(tmp_path, streaming):
    source = write(tmp_path / "d.jsonl", {"prompt": "1 + 1 ="})
    template = "{prompt}\nPut the answer within \\boxed{}."
    plain = load_prompts(source, template=template, streaming=streaming)
    assert next(iter(plain))["prompt"] == "1 + 1 =\nPut the answer within \\boxed{}."
    chat = load_prompts(source, template=template, as_chat=True, streaming=streaming)
    assert next(iter(chat))["prompt"] == [
        {"role": "user", "content": "1 + 1 =\nPut the answer within \\boxed{}."},
    ]


def test_chat_leaves_conversational_prompts_alone():
    assert prepare_prompts(Dataset.from_dict({"prompt": [CHAT]}), as_chat=True)["prompt"][0] == CHAT


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a"}, '{"prompt": \n'], r"line 2: not valid JSON"),
        (['{"prompt": "a"}\n', "\n", '["a"]\n'], r"line 3: expected an object"),
        ([{"prompt": "a"}, {"prompt": None}], r"row 1 \(counting from 0\): a prompt is a string or a list"),
        ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "  "}], r"row 2 .*the prompt is empty"),
        ([{"prompt": CHAT}, {"prompt": []}], r"row 1 .*no messages"),
        ([{"prompt": [{"role": "user"}]}], r"row 0 .*needs a 'role' and a 'content'"),
        ([{"prompt": [{"role": "user", "content": ""}]}], r"row 0 .*every message of the prompt is empty"),
        ([{"prompt": 7}], r"row 0 .*got 7"),
        ([{"prompt": "a"}, {"prompt": CHAT}], r"a string in row 0 and a list in row 1"),
        ([{"promt": "a", "x": 1}], r"no column 'prompt', its columns are promt, x\. Did you mean 'promt'\?"),
        ([{"prompt": "a", "n": 1}, {"prompt": "b", "n": "one"}], r"different types"),
        ([], r"no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / "d.jsonl", *lines))


def test_a_bad_row_of_a_stream_is_named_when_it_is_read(tmp_path):
    stream = load_prompts(write(tmp_path / "d.jsonl", {"prompt": "a"}, {"prompt": ""}), streaming=True)
    with pytest.raises(ValueError, match=r"row 1 .*the prompt is empty"):
        list(stream)


def test_what_is_not_there_is_named_with_what_is(tmp_path):
    source = write(tmp_path / "problems.jsonl", {"prompt": "a"})
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'problems.jsonl'"):
        load_prompts(tmp_path / "problem.jsonl")
    with pytest.raises(ValueError, match=r"no split 'trian', its splits are train\. Did you mean 'train'"):
        load_prompts(source, split="trian")
    with pytest.raises(ValueError, match=r"not '\.csv'"):
        load_prompts(write(tmp_path / "d.csv", "prompt\na\n"))
    with pytest.raises(ValueError, match=r"d\.parquet is no Parquet file"):
        load_prompts(write(tmp_path / "d.parquet", "no"))
    with pytest.raises(ValueError, match="neither a local file nor a dataset that the hub gave"):
        load_prompts("nobody/no-such-dataset")  # the hub is offline in tests


def test_bad_templates_are_refused():
    plain, chat = Dataset.from_dict({"prompt": ["a"]}), Dataset.from_dict({"prompt": [CHAT]})
    with pytest.raises(ValueError, match=r"must contain .\{prompt\}"):
        prepare_prompts(plain, template="{promt}")
    with pytest.raises(ValueError, match="goes around plain prompts"):
        prepare_prompts(chat, template="{prompt}!")


@pytest.mark.parametrize("as_chat", [False, True], ids=["plain", "conversational"])
def test_long_prompts_are_dropped_and_counted(tiny_tokenizer, as_chat):
    dataset = prepare_prompts(Dataset.from_dict({"prompt": ["a", "a b c d e f g h", "a b"]}), as_chat=as_chat)
    lengths = prompt_lengths(dataset["prompt"][:], tiny_tokenizer)
    template_tokens = len(tiny_tokenizer("<|start|>user\na<|end|>\n<|start|>assistant\n")["input_ids"])
    assert lengths[0] == (template_tokens if as_chat else 1)
    kept, dropped = drop_long_prompts(dataset, tiny_tokenizer, lengths[2])
    assert dropped == 1
    assert kept["prompt"][:] == [dataset["prompt"][0], dataset["prompt"][2]]
    assert drop_long_prompts(dataset, tiny_tokenizer, max(lengths)) == (dataset, 0)
    with pytest.raises(ValueError, match="every prompt is longer than max_prompt_length = 0"):
        drop_long_prompts(dataset, tiny_tokenizer, 0)


def test_chat_template_kwargs_count():
    class Tokenizer:
        def apply_chat_template(self, conversation, thinking=False, **settings):
            assert settings == {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return {"input_ids": [[0] * (5 if thinking else 3) for _ in conversation]}

    assert prompt_lengths([CHAT], Tokenizer()) == [3]
    assert prompt_lengths([CHAT], Tokenizer(), {"thinking": True}) == [5]


@pytest.mark.parametrize("column", ["images", "image", "problem"])
def test_an_image_is_refused_where_text_alone_is_read(column):
    """And not opened."""
    asked, shown = ([{"role": "user", "content": [{"type": kind}]}] for kind in ("text", "image"))
    columns = {"problem": [asked, asked, shown if column == "problem" else asked]}
    if column != "problem":
        columns[column] = [None, None, ["a.png"] if column == "images" else "a.png"]
    dataset = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=r"^d.jsonl, row 2 \(counting from 0\) has an image, and text alone is read"):
        check_text_alone(dataset, "d.jsonl", "problem")
    check_text_alone(dataset.select([0, 1]), "d.jsonl", "problem")


def test_what_is_no_image_is_none():
    values = {"problem": [None, "text"], "image": ["", None], "images": [[], [None]]}
    check_text_alone(Dataset.from_dict(values), "d.jsonl", "problem")


def test_a_file_that_is_not_utf8_names_itself(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "naïve"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl is not UTF-8 \(byte 14\)"):
        load_prompts(path)
