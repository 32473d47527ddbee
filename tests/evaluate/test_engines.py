"""What each engine writes, and what it says when it cannot."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill.evaluate.engines import Local, Sampling, Server, ServerError, as_fed, open_engine

SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(tiny_model_dir):
    path = tiny_model_dir("qwen3", "student")
    return Local(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), batch_size=3)


PROMPTS = ["Ada has 3 apples.", "A box", "Kurt shares 40 coins among 5 friends.", "Emmy"]


def test_greedy_completions_are_those_of_the_model_alone(engine):
    """Left padding, the batch and the checkpoint's own generation defaults change nothing."""
    engine.model.generation_config.temperature = 0.3  # a default that must not leak in
    greedy = Sampling(temperature=0, max_new_tokens=6)
    completions = [row for rows in engine.generate(PROMPTS, [0] * 4, greedy, chat=False) for row in rows]
    assert [row.index for row in completions] == [0, 1, 2, 3]
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
        for _ in range(6):
            following = engine.model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], 1)
            if following.item() == engine.tokenizer.eos_token_id:
                break
        written = ids[0, len(engine.tokenizer(prompt)["input_ids"]) :]
        assert completion.text == engine.tokenizer.decode(written, skip_special_tokens=True)
        assert completion.tokens == len(written)
        assert completion.finished == (written[-1].item() == engine.tokenizer.eos_token_id)


def test_a_seed_gives_the_same_completion_again_and_leaves_torchs_own_state(engine):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again = ([row.text for rows in engine.generate(PROMPTS, [5] * 4, SHORT) for row in rows] for _ in range(2))
    other = [row.text for rows in engine.generate(PROMPTS, [6] * 4, SHORT) for row in rows]
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_the_end_of_the_sequence_is_kept_where_it_is_asked_for(engine):
    greedy = Sampling(temperature=0, max_new_tokens=200)
    whole = next(engine.generate(["Ada", "Emmy", "Kurt"], [0] * 3, greedy, chat=False, special_tokens=True))
    without = next(engine.generate(["Ada", "Emmy", "Kurt"], [0] * 3, greedy, chat=False))
    for kept, left_out in zip(whole, without, strict=True):
        assert kept.text.endswith("<|end|>") == kept.finished
        assert "<|end|>" not in left_out.text
        assert kept.tokens == left_out.tokens <= 200


def test_prompts_go_through_the_chat_template_where_there_is_one(engine):
    chat = [{"role": "user", "content": "hi"}]
    assert as_fed(engine.tokenizer, "hi", None) == as_fed(engine.tokenizer, chat, False) == chat
    assert as_fed(engine.tokenizer, "hi", False) == "hi"

    class Bare:
        chat_template = None

    assert as_fed(Bare(), "hi", None) == "hi"
    with pytest.raises(ValueError, match="no chat template"):
        as_fed(Bare(), "hi", True)


def test_a_prompt_longer_than_the_model_is_refused(engine):
    with pytest.raises(ValueError, match=r"a prompt has .* tokens, and the model takes 512"):
        next(engine.generate(["apples " * 600], [0], SHORT, chat=False))


def sums(count, kind=""):
    return [f"{kind} {a} + {a} =" for a in range(count)]


def test_a_server_completes_texts_and_conversations(stub_server):
    server = Server(stub_server.url, "m", concurrency=4)
    plain = [row for rows in server.generate(sums(6), range(6), SHORT, chat=False) for row in rows]
    assert {row.index: row.text for row in plain} == {a: rf"So \boxed{{{2 * a}}}." for a in range(6)}
    assert all(row.finished and row.tokens == SHORT.max_new_tokens for row in plain)
    assert "prompt" in stub_server.bodies[0]
    chat = next(server.generate(sums(1), [3], SHORT))[0]
    assert chat.text == r"So \boxed{0}."
    body = stub_server.bodies[-1]
    assert body["messages"] == [{"role": "user", "content": " 0 + 0 ="}]
    assert "chat_template_kwargs" not in body
    next(Server(stub_server.url, "m", chat_template_kwargs={"enable_thinking": False}).generate(sums(1), [3], SHORT))
    assert stub_server.bodies[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["seed"], body["max_tokens"], body["temperature"], body["model"]) == (3, 6, 1.0, "m")


def test_a_server_is_asked_for_nothing_but_temperature_and_top_p(stub_server, caplog):
    """vLLM fills in top_k, min_p and repetition_penalty from the model's generation_config where they are left open."""
    nothing_else = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    server = Server(stub_server.url, "m", concurrency=1)
    assert len(list(server.generate(sums(2), [0, 1], SHORT))) == 2
    assert [{name: body.get(name) for name in nothing_else} for body in stub_server.bodies] == [nothing_else] * 2

    stub_server.unknown = "top_k"  # as hosted servers are, which know OpenAI's interface alone
    server = Server(stub_server.url, "m", concurrency=1)
    assert len(list(server.generate(sums(2), [0, 1], SHORT))) == 2
    assert ["top_k" in body for body in stub_server.bodies[2:]] == [True, False, False]
    assert len([record for record in caplog.records if "takes no top_k, min_p" in record.getMessage()]) == 1


def test_a_server_that_knows_no_top_k_refuses_it_where_it_is_asked_for(stub_server):
    server, asked = Server(stub_server.url, "m", concurrency=1), Sampling(max_new_tokens=9, top_k=20)
    assert len(list(server.generate(sums(1), [0], asked))) == 1
    assert stub_server.bodies[0]["top_k"] == 20
    stub_server.unknown = "top_k"
    with pytest.raises(ServerError, match="top_k"):
        list(server.generate(sums(1), [0], asked))


def test_a_server_goes_on_with_an_assistants_turn(stub_server):
    begun = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1 + 1 ="}]
    next(Server(stub_server.url, "m").generate([begun], [0], SHORT))
    assert stub_server.bodies[-1]["continue_final_message"] is True
    assert stub_server.bodies[-1]["add_generation_prompt"] is False


def test_a_key_is_sent_where_it_is_named_and_openais_own_to_openai_alone(stub_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    next(Server(stub_server.url, "m").generate(sums(1), [0], SHORT))
    next(Server(stub_server.url, "m", api_key_env="OPENAI_API_KEY").generate(sums(1), [0], SHORT))
    assert [headers.get("Authorization") for headers in stub_server.headers] == [None, "Bearer abc"]
    with pytest.raises(ValueError, match="api_key_env names the environment variable NO_SUCH_KEY, which is not set"):
        open_engine("m", base_url=stub_server.url, api_key_env="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="name it with base_url"):
        open_engine("m", api_key_env="OPENAI_API_KEY")


CHOICE = {"message": {"content": "4"}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"choices": [{**CHOICE, "message": {"content": 5}}], "usage": {"completion_tokens": 1}}, "text of a comp"),
        ({"choices": [CHOICE], "usage": {"completion_tokens": float("inf")}}, "completion_tokens is inf"),
        ({"choices": [CHOICE], "usage": {"completion_tokens": float("nan")}}, "completion_tokens is nan"),
        ({"choices": [CHOICE], "usage": {"completion_tokens": -1}}, "completion_tokens is -1"),
        ({"choices": [CHOICE], "usage": {"completion_tokens": True}}, "completion_tokens is True"),
        ({"choices": [CHOICE], "usage": {"completion_tokens": 10**11}}, "completion_tokens is 100000000000"),
        ({"choices": [CHOICE], "usage": {"completion_tokens": 7}}, "completion_tokens is 7, and at most 6 were asked"),
        ({"choices": [CHOICE, CHOICE], "usage": {"completion_tokens": 1}}, "2 choices"),
        ({"choices": [{**CHOICE, "finish_reason": 3}], "usage": {"completion_tokens": 1}}, "finish_reason is 3"),
        ({"choices": {"0": CHOICE}, "usage": {"completion_tokens": 1}}, "no choices"),
        ([1], "no choices"),
    ],
    ids=["content", "infinite", "nan", "negative", "true", "huge", "longer", "two", "reason", "mapping", "list"],
)
def test_an_answer_that_cannot_be_right_is_final_and_says_which_server(stub_server, reply, message):
    stub_server.answer = lambda body: reply
    with pytest.raises(ValueError, match=message) as raised:
        next(Server(stub_server.url, "m", pause=0.01).generate(sums(1), [0], SHORT))
    assert isinstance(raised.value, ServerError)  # what was sampled before is kept
    assert stub_server.url in str(raised.value)
    assert len(stub_server.bodies) == 1


def test_half_of_a_surrogate_pair_is_replaced(stub_server):
    stub_server.answer = lambda body: {
        "choices": [{"text": "4\ud800 \U0001f600", "finish_reason": "stop"}],
        "usage": {"completion_tokens": 3},
    }
    assert next(Server(stub_server.url, "m").generate(sums(1), [0], SHORT, chat=False))[0].text == "4? \U0001f600"


def test_a_length_limit_is_a_truncation(stub_server):
    stub_server.answer = lambda body: {
        "choices": [{"text": "So", "finish_reason": "length"}],
        "usage": {"completion_tokens": 6},
    }
    assert not next(Server(stub_server.url, "m").generate(sums(1), [0], SHORT, chat=False))[0].finished


@pytest.mark.parametrize("status", [500, None], ids=["error", "broken connection"])
def test_a_server_that_dies_keeps_what_was_done_and_says_so(stub_server, status):
    stub_server.dies_after, stub_server.status = 4, status
    server = Server(stub_server.url, "m", concurrency=2, attempts=2, pause=0.01)
    completions = []

    def collect():
        for rows in server.generate(sums(40), range(40), SHORT):
            completions.extend(rows)

    with pytest.raises(ServerError, match=r"the server at http://127\.0\.0\.1:\d+/v1/chat/completions failed"):
        collect()
    assert len(completions) == 4
    assert len(stub_server.bodies) <= 4 + 2 * 2  # the two in flight, twice each; those that waited are not sent


def test_a_server_that_recovers_is_asked_again(stub_server):
    answers = iter([{"no": "choices"}, None])
    stub_server.dies_after = 0
    server = Server(stub_server.url, "m", concurrency=1, attempts=5, pause=0.01)

    def recover(body):
        return next(answers)

    import threading

    threading.Timer(0.03, lambda: setattr(stub_server, "dies_after", None)).start()
    assert next(server.generate(sums(1), [0], SHORT))[0].text == r"So \boxed{0}."
    stub_server.answer = recover
    with pytest.raises(ServerError, match="no choices, finish_reason or usage"):
        next(server.generate(sums(1), [0], SHORT))


def test_a_refused_request_is_not_repeated(stub_server):
    stub_server.dies_after, stub_server.status = 0, 404
    with pytest.raises(ServerError, match="HTTP 404"):
        next(Server(stub_server.url, "m", pause=0.01).generate(sums(1), [0], SHORT))
    assert len(stub_server.bodies) == 1


def test_no_server_at_all():
    server = Server("http://127.0.0.1:9", "m", attempts=2, pause=0.01)
    with pytest.raises(ServerError, match="refused"):
        next(server.generate(sums(1), [0], SHORT))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="engine must be one of auto, transformers, vllm"):
        open_engine("m", "sglang")
    with pytest.raises(ValueError, match="must begin with http"):
        open_engine("m", base_url="localhost:8000")
    with pytest.raises(ValueError, match="batch_size and concurrency"):
        open_engine("m", batch_size=0)
    for bad in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)


def test_vllm_is_asked_for_by_name(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        open_engine("m", "vllm")
