"""Prompts as they are fed: what the file's row renders to, by every way in; nulls, turns, settings of the template."""

import copy
import json
from functools import partial

import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_from_disk
from transformers import AutoTokenizer

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.arrow import as_written
from tipdistill.chat import check_chat_template_kwargs, encode_prompts
from tipdistill.cli import main
from tipdistill.data import check_prompt, load_prompts, prepare_prompts
from tipdistill.evaluate.engines import Local, Sampling
from tipdistill.pair import PairConfig, read_pair, sampled
from tipdistill.tasks import load_task

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}{% if 'tool_calls' in m %}"
    "{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


def asked(arguments, **message):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call], **message},
        {"role": "tool", "content": "3"},
    ]


ARGUMENTS = [
    {"a": 1},
    {"city": "X", "at": None},
    {"a": "1"},
    {"where": {"x": 0.1234567890123456, "y": [1, {"z": None}]}},
    {},
    {"id": 2**63 + 1, "é": "\u2028"},
]
ROWS = [asked(arguments) for arguments in ARGUMENTS] + [
    asked({}, content=None),
    asked({}, content=""),
    [{"role": "user", "content": "1 + 1?"}],
    [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "That is "}],
]
# of a dataset that is in Arrow: one type per key, and every null is taken as absent
ARROW = [asked(arguments) for arguments in ({"a": 1}, {"city": "X"}, {"a": 2, "city": "Y"})] + [ROWS[8], ROWS[9]]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = TEMPLATE
    return own


@pytest.fixture
def pair(tiny_model_dir, tokenizer, tmp_path):
    paths = []
    for who in ("student", "teacher"):
        source, path = tiny_model_dir("qwen3", who), tmp_path / who
        path.mkdir()
        for file in source.iterdir():
            (path / file.name).symlink_to(file)
        for file in path.glob("chat_template*"):
            file.unlink()
        (path / "chat_template.jinja").write_text(TEMPLATE)
        paths.append(str(path))
    return paths


def rendered(tokenizer, prompt, **settings):
    """The row as its file has it, by the tokenizer alone."""
    begun = prompt[-1]["role"] == "assistant"
    turn = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    return tokenizer.apply_chat_template(prompt, tokenize=False, **turn, **settings)


def write(path, rows):
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_file_is_fed_as_it_is_written(tokenizer, tmp_path, kind, streaming):
    source = write(tmp_path / "d.jsonl", ROWS)
    if kind == "json":
        source = tmp_path / "d.json"
        source.write_text(json.dumps([{"prompt": row} for row in ROWS]))
    loaded = load_prompts(source, streaming=streaming)
    prompts = [row["prompt"] for row in loaded]
    assert prompts == ROWS
    fed = [tokenizer.decode(ids) for ids in encode_prompts(prompts, tokenizer)]
    assert fed == [rendered(tokenizer, row) for row in ROWS]


def test_another_column_of_a_file_is_fed_as_it_is_written(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps({"messages": row, "about": {"n": i}}) + "\n" for i, row in enumerate(ROWS)))
    loaded = load_prompts(source, column="messages")
    assert loaded["prompt"][:] == ROWS
    assert loaded.select([1, 0])[:]["prompt"] == [ROWS[1], ROWS[0]]
    assert loaded[1] == {"prompt": ROWS[1], "about": {"n": 1}}


@pytest.mark.parametrize("kind", ["made", "parquet", "saved", "stream", "transformed"])
def test_arrows_nulls_are_left_out(tokenizer, tmp_path, kind):
    dataset = Dataset.from_dict({"prompt": ARROW})
    assert dataset[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "city": None}
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "d.parquet")
        loaded = load_prompts(tmp_path / "d.parquet")
    elif kind == "saved":
        dataset.save_to_disk(tmp_path / "d")
        loaded = prepare_prompts(load_from_disk(str(tmp_path / "d")))
    elif kind == "stream":
        loaded = prepare_prompts(dataset.to_iterable_dataset())
    else:
        if kind == "transformed":
            dataset = dataset.with_transform(lambda batch: {**batch, "prompt": [*batch["prompt"]]})
        loaded = prepare_prompts(prepare_prompts(dataset))
    assert [row["prompt"] for row in loaded] == ARROW


@pytest.mark.parametrize("way", ["joined", "interleaved", "format", "parquet", "jsonl", "saved", "with plain"])
def test_rows_of_a_file_stay_conversations_however_they_are_passed_on(tokenizer, tmp_path, way):
    """`datasets` drops the transform that reads what is stored."""
    loaded, expected = load_prompts(write(tmp_path / "d.jsonl", ROWS)), ROWS
    if way == "joined":
        made, expected = concatenate_datasets([loaded, loaded]), ROWS * 2
    elif way == "interleaved":
        made, expected = interleave_datasets([loaded, loaded]), [row for row in ROWS for _ in range(2)]
    elif way == "with plain":
        made, expected = concatenate_datasets([Dataset.from_dict({"prompt": ["1+1"]}), loaded]), ["1+1", *ROWS]
    elif way == "format":
        made = loaded.with_format(None)
    elif way == "saved":
        loaded.with_format(None).save_to_disk(tmp_path / "s")
        made = load_from_disk(str(tmp_path / "s"))
    else:
        (loaded.to_parquet if way == "parquet" else loaded.to_json)(tmp_path / f"s.{way}")
        made = load_prompts(tmp_path / f"s.{way}")
    assert as_written(made)["prompt"][:] == expected  # what a trainer reads
    again = prepare_prompts(made)
    assert again["prompt"][:] == expected
    fed = encode_prompts(again["prompt"][:], tokenizer)
    assert fed == encode_prompts(expected, tokenizer)


def test_stored_text_that_is_read_by_nothing_is_refused(tokenizer, tmp_path):
    stored = load_prompts(write(tmp_path / "d.jsonl", ROWS)).with_format(None)["prompt"][:]
    with pytest.raises(ValueError, match=r"prompt 1 \(counting from 0\) is the text that load_prompts stores"):
        encode_prompts(["1+1", *stored], tokenizer)
    with pytest.raises(ValueError, match=r"^the batch, row 0 \(counting from 0\): the prompt is the text that"):
        check_prompt(stored[0], 0, "the batch")
    rows = [{"prompt": text} for text in stored]
    stream = prepare_prompts(IterableDataset.from_generator(lambda: iter(rows)))
    assert [row["prompt"] for row in stream] == ROWS


def test_a_tasks_problems_gain_no_nulls(tmp_path):
    Dataset.from_dict({"problem": ARROW[:3], "answer": ["1"] * 3}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"problem": row, "answer": 1}) + "\n" for row in ROWS[:7]))
    assert [problem.text for problem in load_task(str(tmp_path / "d.parquet")).problems] == ARROW[:3]
    assert [problem.text for problem in load_task(str(tmp_path / "d.jsonl")).problems] == ROWS[:7]


def test_a_template_that_asks_for_a_key_sees_no_key_of_another_row(tokenizer):
    """As Llama's do ("'tool_calls' in message"), which fail on a null."""
    loaded = prepare_prompts(Dataset.from_dict({"prompt": ARROW}))
    assert "tool_calls" not in loaded[0]["prompt"][0]
    encode_prompts(loaded["prompt"][:], tokenizer)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "assistant"}], r"needs a 'role' and a 'content' \(or 'tool_calls'\)"),
        ([{"role": "user", "content": 3}], "text or a list of blocks, got 3"),
        ([{"role": "user", "content": [3]}], "text or a list of blocks"),
        ([{"role": 1, "content": "a"}], "needs a 'role'"),
        (asked({"a": 1})[:2], "ends with a turn of the assistant, .* has no text"),
        ([*ROWS[8], {"role": "assistant", "content": ""}], "ends with a turn of the assistant, .* has no text"),
        ([*ROWS[8], {"role": "assistant", "content": "\n "}], "ends with a turn of the assistant, .* blanks alone"),
    ],
    ids=["no content", "number", "list of numbers", "role", "ends with a call", "ends empty", "ends blank"],
)
def test_messages_that_are_none_are_refused_with_their_row(tmp_path, prompt, message):
    with pytest.raises(ValueError, match=rf"row 1 .*{message}"):
        load_prompts(write(tmp_path / "d.jsonl", [ROWS[0], prompt]))


def test_plain_and_begun_prompts_of_one_batch_keep_their_order(tokenizer):
    prompts = [ROWS[9], "plain", ROWS[8], ROWS[9]]
    ids = encode_prompts(prompts, tokenizer)
    assert ids == [encode_prompts([prompt], tokenizer)[0] for prompt in prompts]
    assert tokenizer.decode(ids[0]).endswith("<|start|>assistant\nThat is ")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": "?"}, {"role": "system", "content": "s"}], "system message must be first"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "drop"}], "continue_final_message"),
        ([{"role": "odd", "content": "?"}], "no role"),
    ],
    ids=["raises", "drops the turn", "another error"],
)
def test_what_a_template_refuses_is_told_with_its_row(tokenizer, prompt, message):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
        "{{ raise_exception('system message must be first') }}{% endif %}"
        "{% if m['role'] == 'odd' %}{{ none['no role'] + 1 }}{% endif %}"
        "{% if 'drop' not in m['content'] %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    good = [ROWS[8], ROWS[9], "plain"]
    assert len(encode_prompts(good, tokenizer)) == 3
    with pytest.raises(ValueError, match=rf"^the prompt of row 4 \(counting from 0\) does not pass .*{message}"):
        encode_prompts([*good, ROWS[8], prompt, prompt], tokenizer)


# The settings of a template.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"enable_thinkin": False},
            r"reads no 'enable_thinkin' .*but enable_thinking\. Did you mean 'enable_thinking'",
        ),
        ({"enable_thinking": False, "x": 1}, "reads no 'x'"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is no setting of a chat template"),
        ({"tools": []}, "'tools' is no setting"),
        ({"max_length": 3}, "reads no 'max_length'"),
    ],
    ids=["misspelt", "one of two", "generation prompt", "tools", "truncation"],
)
def test_settings_that_the_template_does_not_read_are_refused(tokenizer, pair, tmp_path, capsys, settings, message):
    with pytest.raises(ValueError, match=message):
        check_chat_template_kwargs(settings, tokenizer)
    prompts = write(tmp_path / "d.jsonl", ROWS)
    flags = ["--dataset", str(prompts), "--model", pair[0], "--teacher", pair[1], "--output_dir", str(tmp_path / "o")]
    for command in ("score", "probe"):
        assert main([command, *flags, "--chat_template_kwargs", json.dumps(settings)]) == 2
        assert "chat template" in capsys.readouterr().err
    flags = ["--dataset_name", str(prompts), "--model_name_or_path", pair[0], "--teacher_model_name_or_path", pair[1]]
    flags += ["--output_dir", str(tmp_path / "o"), "--use_cpu", "--chat_template_kwargs", json.dumps(settings)]
    assert main(["train", *flags, "--dry_run"]) == 2
    assert "chat template" in capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        TIPTrainer(
            "no model",
            "no teacher",
            tiny(tmp_path, settings),
            Dataset.from_dict({"prompt": ["a"] * 8}),
            processing_class=tokenizer,
        )
    flags = ["--model", pair[0], "--tasks", "arithmetic", "--output_dir", str(tmp_path / "e")]
    assert main(["eval", *flags, "--engine", "transformers", "--chat_template_kwargs", json.dumps(settings)]) == 2
    assert "chat template" in capsys.readouterr().err


def test_settings_without_a_template_are_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has none"):
        check_chat_template_kwargs({"enable_thinking": False}, tokenizer)
    check_chat_template_kwargs({}, tokenizer)


@pytest.mark.parametrize("column", ["chat_template_kwargs", "tools"])
def test_columns_that_dress_a_row_in_its_own_way_are_refused_by_name(tmp_path, tokenizer, column):
    rows = {"prompt": ROWS[8:9] * 8, column: [{"enable_thinking": False}] + [None] * 7}
    dataset = Dataset.from_dict(rows)
    for given in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"has a column '{column}'"):
            list(prepare_prompts(given))
        with pytest.raises(ValueError, match=f"train_dataset has a column '{column}'"):
            TIPTrainer("no model", "no teacher", tiny(tmp_path), given, processing_class=tokenizer)
    prepare_prompts(Dataset.from_dict({**rows, column: [None] * 8}))
    prepare_prompts(Dataset.from_dict({**rows, "prompt": ["plain"] * 8}))


# One row, one list of ids, wherever it is read.


def tiny(tmp_path, settings=None, **more):
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "max_steps": 1}
    options |= {"save_strategy": "no", "per_device_train_batch_size": 8, "max_completion_length": 2, **more}
    return TIPConfig(str(tmp_path / "run"), chat_template_kwargs=settings, disable_tqdm=True, **options)


@pytest.mark.parametrize("settings", [None, {"enable_thinking": False}], ids=["default", "without thinking"])
def test_train_score_probe_and_eval_feed_the_same_ids(tokenizer, pair, tmp_path, settings):
    path = write(tmp_path / "d.jsonl", ROWS)
    expected = [tokenizer(rendered(tokenizer, row, **(settings or {})))["input_ids"] for row in ROWS]

    config = PairConfig(
        pair[0], pair[1], str(path), chat_template_kwargs=settings, max_new_tokens=1, batch_size=4, device="cpu"
    )
    checked = read_pair(config)
    trainer = TIPTrainer(
        pair[0],
        pair[1],
        tiny(tmp_path, settings, per_device_train_batch_size=len(ROWS), shuffle_dataset=False),
        load_prompts(path),
    )
    # what score and probe sample
    scored = [rollout for batch in sampled(config, checked, trainer.plain_student()) for rollout in batch]
    assert [list(rollout.prompt_ids) for rollout in scored] == expected
    # what is trained on
    seen = []
    original = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *rest: seen.append(ids) or original(ids, *rest)
    trainer.train()
    assert [list(ids) for ids in seen[0]] == expected
    # what a task is measured on
    engine = Local(trainer.plain_student(), AutoTokenizer.from_pretrained(pair[0]), 4, settings)
    fed = []
    generate = engine.model.generate
    engine.model.generate = lambda **given: fed.append(given) or generate(**given)
    list(engine.generate(ROWS, range(len(ROWS)), Sampling(max_new_tokens=1)))
    rows = [
        ids[mask.bool()].tolist()
        for given in fed
        for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    assert rows == expected


def _noting(seen, original, ids, *rest):
    seen.append(ids)
    return original(ids, *rest)


def test_a_trainers_own_dataset_and_stream_gain_no_nulls(tokenizer, pair, tmp_path):
    expected = [tokenizer(rendered(tokenizer, row))["input_ids"] for row in ARROW]
    for make in (lambda d: d, Dataset.to_iterable_dataset):
        dataset = make(Dataset.from_dict({"prompt": ARROW}))
        config = tiny(tmp_path, per_device_train_batch_size=len(ARROW), shuffle_dataset=False)
        trainer = TIPTrainer(pair[0], pair[1], config, dataset, processing_class=tokenizer)
        seen = []
        original = trainer._generate_single_turn
        trainer._generate_single_turn = partial(_noting, seen, original)
        trainer.train()
        assert sorted(map(list, seen[0])) == sorted(expected), isinstance(dataset, IterableDataset)
