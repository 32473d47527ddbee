"""Evaluations in which the model calls tools: what is kept, counted, resumed, and how a server is asked."""

import json
from dataclasses import replace

import pytest
from acting import NAMES, Shop, speaks_of_tools, turn_after
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import rollout
from tipdistill.cli.eval import table
from tipdistill.environments import Acting, Worlds
from tipdistill.evaluate.engines import Local, Sampling, Server, ServerError
from tipdistill.evaluate.run import run
from tipdistill.evaluate.task import Problem, Task

SAMPLING = Sampling(max_new_tokens=400)


def shop(count=6, environment=Shop):
    problems = [
        Problem([{"role": "user", "content": f"Buy a {name}."}], "-", {"wanted": "pear", "money": 3 + number})
        for number, name in enumerate(NAMES[:count])
    ]
    return Task("shop", tuple(problems), prompt="own", environment=environment)


@pytest.fixture
def tokenizer(tiny_model_dir):
    return speaks_of_tools(AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student")))


@pytest.fixture
def local(tiny_model_dir, tokenizer, monkeypatch):
    """An engine whose model follows a script; `batches` are the contexts of its turns."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
    engine = Local(model, tokenizer, batch_size=4)
    engine.batches = []

    def sample(model, tokenizer, prompts, most, seed, **options):
        engine.batches.append((list(prompts), seed))
        return [(turn_after(tokenizer, ids), True) for ids in prompts]

    monkeypatch.setattr(rollout, "_sample", sample)
    return engine


def test_an_evaluation_keeps_transcripts_and_counts_what_was_done(local, tmp_path):
    metrics = run([shop()], lambda: local, tmp_path / "eval", num_samples=2, sampling=SAMPLING)
    numbers = metrics["tasks"]["shop"]
    rows = [json.loads(line) for line in (tmp_path / "eval" / "samples" / "shop.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        bought = sum(range(1, row["calls"] + 1))
        assert row["figures"] == {"count": bought}
        assert row["parts"] == {"bought": bought == 1, "polite": True}
        assert row["correct"] == (bought == 1)
        assert [turn["role"] for turn in row["transcript"]] == ["student", "tool"] * row["calls"] + ["student"]
        assert row["turns"] == row["calls"] + 1
        texts = [turn["text"] for turn in row["transcript"] if turn["role"] == "student"]
        assert row["tokens"] == sum(len(local.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert numbers["mean_at_k"] == pytest.approx(sum(row["correct"] for row in rows) / 12)
    assert 0 < numbers["mean_at_k"] < 1
    assert numbers["turns"] == pytest.approx(sum(row["turns"] for row in rows) / 12)
    assert numbers["endings"] == {"answered": 1.0, "cut": 0.0, "no room": 0.0, "too many calls": 0.0}
    assert numbers["parts"]["polite"] == 1.0
    text = table(metrics)
    assert "| shop | 6 |" in text
    assert "answered 100%" in text


def test_an_evaluation_goes_on_after_a_kill_with_the_same_episodes(local, tmp_path):
    run([shop()], lambda: local, tmp_path / "whole", sampling=SAMPLING)
    whole = (tmp_path / "whole" / "samples" / "shop.jsonl").read_text()
    played = len(local.batches)
    run([shop()], lambda: local, tmp_path / "killed", sampling=SAMPLING)
    path = tmp_path / "killed" / "samples" / "shop.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])
    before = len(local.batches)
    run([shop()], lambda: local, tmp_path / "killed", sampling=SAMPLING, resume=True)
    assert path.read_text() == whole
    again = local.batches[before:]
    assert len(again) < played, "the first batch is on the disk, and not played again"
    assert again == local.batches[: 2 * played][-len(again) :]


def test_samples_that_are_no_episodes_are_refused_with_their_line(local, tmp_path):
    run([shop()], lambda: local, tmp_path / "eval", sampling=SAMPLING)
    path = tmp_path / "eval" / "samples" / "shop.jsonl"
    lines = path.read_text().splitlines()
    for name, value in (("ending", "lost"), ("figures", {"count": "many"}), ("parts", [1]), ("turns", None)):
        path.write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), name: value}), *lines[2:]]) + "\n")
        with pytest.raises(ValueError, match="line 2: no sample of this task"):
            run([shop()], lambda: local, tmp_path / "eval", sampling=SAMPLING, resume=True)


def test_other_rows_or_another_environment_are_other_problems():
    task = shop()
    other = replace(task, problems=tuple(replace(problem, row={"wanted": "fig"}) for problem in task.problems))
    prints = {task.fingerprint(), other.fingerprint(), replace(task, environment="acting.Counter").fingerprint()}
    assert len(prints) == 3


def test_an_environment_that_judges_nothing_is_refused_before_it_is_played(local, tmp_path):
    class Silent:
        def reset(self, **row):
            return None

        def act(self) -> str:
            """Act."""
            return ""

    with pytest.raises(ValueError, match="does not say what was done right"):
        run([shop(environment=Silent)], lambda: local, tmp_path / "eval", sampling=SAMPLING)
    assert not local.batches


def test_descriptions_of_tools_count_among_a_prompts_tokens(local, tmp_path):
    local.model.config.max_position_embeddings = 40  # a prompt alone has fewer
    with pytest.raises(ValueError, match="and the model takes 40"):
        run([shop()], lambda: local, tmp_path / "eval", sampling=SAMPLING)
    assert not local.batches


def test_a_check_beside_an_environment_is_refused():
    with pytest.raises(ValueError, match="judges what was done"):
        replace(shop(), check=lambda response, answer: True)


# Servers: every turn is a request with token ids.


def served(stub_server, tokenizer, tmp_path, **behaviour):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    def answer(body):
        ids = turn_after(own, body["prompt"])
        choice = {"text": own.decode(ids), "token_ids": ids, "finish_reason": "stop", **behaviour}
        return {"choices": [choice], "usage": {"completion_tokens": len(ids)}}

    stub_server.answer = answer
    return Server(stub_server.url, "m", concurrency=3, pause=0.01, attempts=2, tokenizer=str(tmp_path / "tokenizer"))


def episodes_of(engine, task):
    acting = Acting(Worlds(factory=Shop), [problem.row for problem in task.problems])
    prompts = [problem.text for problem in task.problems]
    batches = engine.generate(prompts, range(len(prompts)), SAMPLING, acting=acting)
    return {completion.index: completion for batch in batches for completion in batch}


def test_a_server_plays_the_episodes_that_a_local_model_plays(stub_server, tokenizer, local, tmp_path):
    task = shop()
    by_server = episodes_of(served(stub_server, tokenizer, tmp_path), task)
    by_model = episodes_of(local, task)
    assert by_server == by_model
    assert all(body["return_token_ids"] is True and isinstance(body["prompt"], list) for body in stub_server.bodies)
    for body in stub_server.bodies:
        begun = tokenizer.decode(body["prompt"]).partition("<|start|>assistant\n")[2]
        used = len(tokenizer(begun, add_special_tokens=False)["input_ids"])
        assert body["max_tokens"] == 400 - used


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"token_ids": None}, "has no token_ids.*return_token_ids"),
        ({"token_ids": [1, -2]}, "-2 for a token"),
        ({"token_ids": []}, "0 token_ids"),
        ({"token_ids": [1] * 401}, "401 token_ids"),
    ],
)
def test_a_server_whose_tokens_cannot_be_right_is_named(stub_server, tokenizer, tmp_path, behaviour, said):
    with pytest.raises(ServerError, match=said):
        episodes_of(served(stub_server, tokenizer, tmp_path, **behaviour), shop())


def test_a_server_without_a_tokenizer_here_is_refused(stub_server):
    with pytest.raises(ValueError, match="--tokenizer"):
        episodes_of(Server(stub_server.url, "no/such-model"), shop())
    assert not stub_server.bodies
