"""A teacher whose hidden states come over a wire and whose lm_head is here: against plain PyTorch, and what is refused.

tests/teachers/test_served.py has the faults of a server, for every kind of teacher on one.
"""

import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from serving import serving
from transformers import AutoModelForCausalLM, LlamaConfig

from tipdistill import Head, TIPConfig, TIPTrainer, select
from tipdistill.records import open_records
from tipdistill.select import rule_fields
from tipdistill.teachers.hidden import _TEXT, HiddenServer, held_in
from tipdistill.teachers.lm_head import read_lm_head
from tipdistill.teachers.local import HeadComparison
from tipdistill.teachers.served import Question

IDS = [5, 9, 30, 41, 7, 12, 80, 3]
QUESTION = Question(IDS[:3], IDS[3:], [0, 2, 4])


@pytest.fixture(scope="module")
def teacher_dir(tiny_model_dir):
    return str(tiny_model_dir("qwen3", "teacher"))


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return AutoModelForCausalLM.from_pretrained(teacher_dir)


@pytest.fixture
def served(teacher, tiny_tokenizer):
    with serving(teacher, tiny_tokenizer) as server:
        yield server


def connected(served, tokenizer, lm_head, **settings):
    server = HiddenServer(served.url, lm_head, **{"time_limit": 5.0, "pause": 0.01, "timeout": 5.0, **settings})
    server.connect(tokenizer)
    return server


@pytest.fixture
def server(served, tiny_tokenizer, teacher_dir):
    return connected(served, tiny_tokenizer, read_lm_head(teacher_dir))


# What is asked, and what comes.


def test_no_more_is_sent_than_what_predicts_the_last_token_asked_about(served, server, teacher):
    served.bodies.clear()
    server.traffic.__init__()
    answer, nothing = server.ask([QUESTION, Question(IDS[:3], IDS[3:], [])])
    assert nothing is None
    with torch.no_grad():
        wanted = teacher.model(torch.tensor([IDS])).last_hidden_state[0]
    # the server runs the sequence as far as it is asked about, so its sums over float32 run in another order
    torch.testing.assert_close(answer.hidden, wanted[[2, 4, 6]], rtol=1e-6, atol=1e-5)
    (body,) = served.bodies
    assert body["input"] == IDS[:7]
    assert body["use_activation"] is False
    traffic = server.traffic
    assert (traffic.answered, traffic.asked, traffic.left_out) == (7, 3, 1 + 8)
    assert traffic.received == 7 * 48 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_travel_in_the_dtype_that_the_server_computes_in(teacher, tiny_tokenizer, teacher_dir, dtype):
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=dtype)
    with serving(model, tiny_tokenizer) as served:
        server = connected(served, tiny_tokenizer, read_lm_head(teacher_dir))
        assert server.dtype == dtype
        (answer,) = server.ask([QUESTION])
    with torch.no_grad():
        wanted = model.model(torch.tensor([IDS[:7]])).last_hidden_state[0, [2, 4, 6]]
    assert answer.hidden.dtype == dtype
    assert torch.equal(answer.hidden, wanted)
    assert served.bodies[-1]["embed_dtype"] == str(dtype).removeprefix("torch.")
    assert server.gives.startswith(f"hidden states of width 48 in {str(dtype).removeprefix('torch.')}")


def test_no_number_of_a_shorter_dtype_is_taken_for_it():
    assert held_in(torch.tensor([70000.0, 0.5])) == torch.float32  # more than float16 holds, finer than bfloat16
    assert held_in(torch.tensor([1e-9])) == torch.float32
    assert held_in(torch.tensor([1 + 2.0**-10])) == torch.float16


# What is refused, before weights are loaded.


def test_states_of_length_one_are_refused(served, tiny_tokenizer, teacher_dir):
    served.states = lambda hidden: torch.nn.functional.normalize(hidden, dim=-1)
    with pytest.raises(ValueError, match=r"hidden states of length 1: it normalises them"):
        connected(served, tiny_tokenizer, read_lm_head(teacher_dir))


def test_states_before_the_final_norm_are_refused(served, tiny_tokenizer, teacher, teacher_dir):
    def before_the_norm(hidden):
        before = []
        with torch.no_grad():
            hook = teacher.model.norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
            teacher.model(torch.tensor([served.bodies[-1]["input"]]))
            hook.remove()
        return before[0][0]

    served.states = before_the_norm
    with pytest.raises(ValueError, match=r"did not come out of the final norm of .*must be the model that the server"):
        connected(served, tiny_tokenizer, read_lm_head(teacher_dir))


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory, tiny_tokenizer):
    """A model that has learned the sentences that a server is tried with."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=400, **sizes, pad_token_id=0, bos_token_id=None))
    ids = torch.tensor([tiny_tokenizer(_TEXT)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    path = tmp_path_factory.mktemp("trained")
    model.save_pretrained(path)
    return str(path)


def test_the_lm_head_of_a_model_with_another_norm_is_refused(served, tiny_tokenizer, trained_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.5, 3, 48))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did not come out of the final norm"):
        connected(served, tiny_tokenizer, read_lm_head(str(tmp_path)))


@pytest.mark.parametrize("which", ["its own", "with its rows in another order", "an untrained model's"])
def test_an_lm_head_that_makes_nothing_of_a_text_is_warned_of(tiny_tokenizer, trained_dir, which, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(trained_dir)
    with serving(AutoModelForCausalLM.from_pretrained(trained_dir), tiny_tokenizer) as served:
        with torch.no_grad():
            if which == "with its rows in another order":
                model.lm_head.weight.copy_(model.lm_head.weight[torch.randperm(400)])
            elif which == "an untrained model's":
                model.lm_head.weight.normal_()
        model.save_pretrained(tmp_path)
        connected(served, tiny_tokenizer, read_lm_head(str(tmp_path)))
    assert ("is no likelier in its own order" in caplog.text) == (which != "its own")


def test_an_lm_head_of_another_width_is_refused(served, tiny_tokenizer, tiny_model_dir):
    with pytest.raises(ValueError, match=r"of the shape \[\d+, 48\], and the lm_head needs \[\d+, 32\]"):
        connected(served, tiny_tokenizer, read_lm_head(str(tiny_model_dir("qwen3", "student"))))


def test_a_server_of_log_probabilities_is_told_how_to_start(served, tiny_tokenizer, teacher_dir):
    served.pooling = None
    with pytest.raises(ValueError, match=r"HTTP 404.*start it with vllm serve MODEL --runner pooling"):
        connected(served, tiny_tokenizer, read_lm_head(teacher_dir))


# What is refused when it comes.


def metadata(**changed):
    return lambda body, reply: ({"data": [reply[0]["data"][0] | changed]}, reply[1])


ANSWERS = {
    "no header": (lambda body, reply: (None, reply[1]), "no hidden states as bytes but"),
    "no JSON": (lambda body, reply: ("{", reply[1]), r"header metadata is no JSON: '\{'"),
    "nested": (lambda body, reply: ("[" * 30000, reply[1]), "rollout 0: the header metadata is no JSON|gave no answer"),
    "a number": (lambda body, reply: ("1", reply[1]), "has no list of data"),
    "no data": (lambda body, reply: ({}, reply[1]), "has no list of data"),
    "two": (lambda body, reply: ({"data": reply[0]["data"] * 2}, reply[1]), "one answer was asked for"),
    "a word": (lambda body, reply: ({"data": ["a"]}, reply[1]), "one answer was asked for"),
    "fewer rows": (metadata(shape=[6, 48]), r"shape \[6, 48\], and the lm_head needs \[7, 48\]"),
    "more rows": (metadata(shape=[8, 48]), r"shape \[8, 48\]"),
    "another width": (metadata(shape=[7, 64]), r"shape \[7, 64\]"),
    "flat": (metadata(shape=[336]), r"shape \[336\]"),
    "no shape": (metadata(shape=None), "shape None"),
    "true": (metadata(shape=[7, True]), "shape"),
    "huge": (metadata(shape=[7, 10**400]), "shape"),
    "another dtype": (metadata(embed_dtype="fp8_e4m3"), "'fp8_e4m3', 'little', and float32, little were asked for"),
    "another order": (metadata(endianness="big"), "'float32', 'big', and"),
    "more bytes": (lambda body, reply: (reply[0], reply[1] + b"1234"), "1,348 bytes of numbers, and 1,344"),
    "NaN": (lambda body, reply: (reply[0], reply[1][:-4] + b"\x00\x00\xc0\x7f"), "rollout 0, token 4.* is NaN, or inf"),
    "infinite": (
        lambda body, reply: (reply[0], reply[1][:-4] + b"\x00\x00\x80\xff"),
        "rollout 0, token 4.* NaN, or",
    ),
    "junk": (lambda body, reply: (reply[0], reply[1][:-192] + b"7" * 192), "rollout 0, token 4.* final norm"),
    "zeros": (lambda body, reply: (reply[0], bytes(len(reply[1]))), "rollout 0, token 0.* final norm"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_cannot_be_right_is_refused_at_once(served, server, what):
    asked = len(served.bodies)
    served.change, message = ANSWERS[what]
    server.time_limit = 0.0  # a header that the client's library refuses is asked for again
    with pytest.raises((ValueError, OSError), match=message) as raised:
        server.ask([QUESTION])
    assert served.url.removesuffix("/v1") in str(raised.value)
    assert len(str(raised.value)) < 500
    assert len(served.bodies) == asked + 1


def test_a_prompt_without_tokens_is_refused(server):
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        server.ask([Question([], IDS, [0])])


# Against plain PyTorch on the same ids.


def divergence_of(log_s, log_t, name, beta):
    if name == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    if name == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    mixed = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return beta * (log_t.exp() * (log_t - mixed)).sum(-1) + (1 - beta) * (log_s.exp() * (log_s - mixed)).sum(-1)


@pytest.mark.parametrize("rule", ["soft_or", "signal_to_curvature", "teachability", "entropy"])
@pytest.mark.parametrize(("divergence", "beta"), [("reverse_kl", 1.0), ("forward_kl", 0.0), ("jsd", 0.3)])
def test_loss_gradient_and_kept_tokens_are_those_of_plain_pytorch(
    server, teacher, tiny_model_dir, rule, divergence, beta
):
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student")).requires_grad_(False)
    rows, temperature = [[*IDS[:3], *range(20 + n, 32 + n)] for n in range(3)], 0.7
    answers = server.ask([Question(ids[:3], ids[3:], range(12)) for ids in rows])
    tokens, rollout = torch.tensor([ids[3:] for ids in rows]).flatten(), torch.arange(3).repeat_interleave(12)
    of_student = student.model(torch.tensor(rows)).last_hidden_state[:, 2:-1].flatten(0, 1)
    weight = student.lm_head.weight.clone().requires_grad_()
    head = Head(of_student, weight)
    comparison = HeadComparison(server.lm_head.of(torch.cat([answer.hidden for answer in answers])))
    fields = ("reverse_kl", "forward_kl", "teacher_logprob", "entropy", *rule_fields(rule))
    scores = comparison.scores(head, fields, temperature, tokens)
    kept = select(scores, rule, 0.4, rollout)
    loss, _ = comparison.take(kept.mask).loss(
        Head(of_student[kept.mask], weight),
        kept.weight[kept.mask],
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        denominator=kept.total,
    )
    loss.backward()

    plain = student.lm_head.weight.double().clone().requires_grad_()
    log_s = (of_student.double() @ plain.T / temperature).log_softmax(-1)
    with torch.no_grad():
        log_t = (teacher(torch.tensor(rows)).logits[:, 2:-1].flatten(0, 1).double() / temperature).log_softmax(-1)
    per_token = divergence_of(log_s, log_t, divergence, beta)
    wanted = {
        "reverse_kl": divergence_of(log_s, log_t, "reverse_kl", None),
        "forward_kl": divergence_of(log_s, log_t, "forward_kl", None),
        "teacher_logprob": log_t.gather(1, tokens[:, None])[:, 0],
        "entropy": -(log_s.exp() * log_s).sum(-1),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(scores.require(name).double(), value, rtol=1e-4, atol=1e-4, msg=name)
    assert kept.mask.sum() == (12 if rule != "teachability" else 14)
    expected = (per_token[kept.mask] * kept.weight[kept.mask]).sum() / kept.total
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), plain.grad, rtol=1e-3, atol=1e-5)


# Training, against the same teacher in this process.

PLAIN = {
    **ON_CPU,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "teacher_time_limit": 20.0,
    "normalization": "batch",
}


def of_task(entry):
    return {name: value for name, value in entry.items() if name.startswith("eval_reverse_kl_heldout/")}


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_rule": "soft_or", "retention": 0.3, "record_rollouts": 4, "score_logging_steps": 1},
        {"selection_rule": "all", "beta": 0.5, "eval_tasks": "reverse_kl", "eval_steps": 2},
        {"selection_rule": "entropy", "retention": 0.3, "score_logging_steps": 0, "gradient_accumulation_steps": 2},
        {"selection_rule": "signal_to_curvature", "retention": 0.3, "temperature": 0.8},
        {"selection_rule": "teachability", "beta": 0.0, "temperature": 1.3},
    ],
    ids=lambda settings: settings["selection_rule"],
)
def test_a_run_is_that_of_the_local_teacher(served, tiny_model_dir, teacher_dir, word_problems, tmp_path, settings):
    (tmp_path / "heldout.jsonl").write_text("".join(word_problems.read_text().splitlines(keepends=True)[:4]))
    if "eval_tasks" in settings:
        settings = {**settings, "eval_tasks": f"reverse_kl={tmp_path / 'heldout.jsonl'}"}
    figures = ("loss", "grad_norm", "selection/kept_fraction", "entropy")
    runs = []
    for place in ("wire", "local"):
        extra = {"teacher_url": served.url, "teacher_lm_head": teacher_dir} if place == "wire" else {}
        config = TIPConfig(str(tmp_path / place), **{**PLAIN, "record_rollouts": 0, **extra, **settings})
        trainer = TIPTrainer(
            str(tiny_model_dir("qwen3", "student")),
            None if extra else teacher_dir,
            config,
            Dataset.from_json(str(word_problems)).select(range(32)),
        )
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append([[entry[name] for name in figures] for entry in history])
        runs[-1] += [list(of_task(entry).values()) for entry in trainer.state.log_history if of_task(entry)]
        if place == "wire":
            assert min(entry["teacher/bytes_received"] for entry in history) > 0
            assert trainer.vocabulary == 400
    assert len(runs[0]) == (4 if "eval_tasks" in settings else 2)
    for wire, local in zip(*runs, strict=True):
        assert wire == pytest.approx(local, rel=2e-4)
    if settings.get("record_rollouts"):
        wire, local = (open_records(tmp_path / place / "records" / "step-1") for place in ("wire", "local"))
        assert len(wire.rollouts) == 4
        assert wire.read(["token", "kept"]) == local.read(["token", "kept"])
        for name in ("reverse_kl", "forward_kl", "teacher_logprob"):
            ours, theirs = (records.read([name])[name].to_numpy() for records in (wire, local))
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
