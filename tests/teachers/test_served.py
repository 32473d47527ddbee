"""A teacher on a server: the client against faults, whatever it asks for; log-probabilities against a local teacher.

tests/teachers/test_hidden.py has what is peculiar to hidden states.
"""

import logging
import math
import random
import threading

import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from recorded import same_records
from serving import serving
from transformers import AutoModelForCausalLM

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.http import WrongAnswerError
from tipdistill.records import open_records
from tipdistill.replies import model_names, token_ids
from tipdistill.score.reference import logits
from tipdistill.teachers.hidden import HiddenServer
from tipdistill.teachers.lm_head import read_lm_head
from tipdistill.teachers.served import Question, TeacherServer, TeacherUnavailableError
from tipdistill.training.checkpoints import last_complete_checkpoint

IDS = [5, 9, 30, 41, 7, 12, 80, 3]


@pytest.fixture(scope="module")
def teacher(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "teacher"))


@pytest.fixture
def served(teacher, tiny_tokenizer):
    with serving(teacher, tiny_tokenizer) as server:
        yield server


PATIENCE = {"time_limit": 5.0, "pause": 0.01, "timeout": 5.0}


def client(served, tokenizer=None, **settings):
    found = TeacherServer(served.url, **{**PATIENCE, **settings})
    if tokenizer is not None:
        found.connect(tokenizer)
    return found


@pytest.fixture(scope="module")
def lm_head(tiny_model_dir):
    return read_lm_head(str(tiny_model_dir("qwen3", "teacher")))


@pytest.fixture(params=["log-probabilities", "hidden states"])
def connect(request, served, lm_head):
    """A client of either kind, connected."""

    def build(tokenizer, **settings):
        if request.param == "log-probabilities":
            return client(served, tokenizer, top_k=4, **settings)
        server = HiddenServer(served.url, lm_head, **{**PATIENCE, **settings})
        server.connect(tokenizer)
        return server

    build.hidden = request.param == "hidden states"
    return build


def likeliest(answer, lm_head):
    """log P of the 4 likeliest tokens, from an answer of either kind."""
    if hasattr(answer, "logprob"):
        return answer.logprob[:, :4]
    return logits(lm_head.of(answer.hidden), lm_head.rows).log_softmax(-1).topk(4).values


def log_probabilities(teacher, ids):
    with torch.no_grad():
        return torch.log_softmax(teacher(torch.tensor([ids])).logits[0], -1)


# the server runs the sequence as far as it is asked about, so its sums over float32 run in another order
ROUNDING = {"rtol": 1e-6, "atol": 1e-5}


@pytest.mark.parametrize("top_k", [None, 0])
def test_the_whole_vocabulary_where_the_server_gives_it(served, teacher, tiny_tokenizer, top_k, caplog):
    served.max_logprobs = -1
    server = client(served, tiny_tokenizer, top_k=top_k)
    assert server.gives_all
    assert server.vocabulary == teacher.config.vocab_size
    assert "are exact" in caplog.text
    (found,) = server.ask([Question(IDS[:3], IDS[3:], [0, 2, 4])])
    wanted = log_probabilities(teacher, IDS)[[2, 4, 6]]
    assert found.token_ids is None
    torch.testing.assert_close(found.logprob, wanted, **ROUNDING)
    torch.testing.assert_close(found.sampled, wanted[range(3), [IDS[3], IDS[5], IDS[7]]], **ROUNDING)


def test_likeliest_tokens_and_the_sampled_one_where_it_does_not(served, teacher, tiny_tokenizer, caplog):
    server = client(served, tiny_tokenizer)
    assert server.top_k == 20
    assert "lower bounds" in caplog.text
    (found,) = server.ask([Question(IDS[:3], IDS[3:], [1, 3])])
    wanted = log_probabilities(teacher, IDS)[[3, 5]]
    torch.testing.assert_close(found.logprob[:, :20], wanted.topk(20).values, **ROUNDING)
    assert torch.equal(found.token_ids[:, :20], wanted.topk(20).indices)
    for row, token in enumerate((IDS[4], IDS[6])):
        inside = token in found.token_ids[row, :20].tolist()
        assert found.token_ids[row, 20] == (-1 if inside else token)
        assert found.sampled[row] == pytest.approx(
            float(wanted[row, token]), rel=ROUNDING["rtol"], abs=ROUNDING["atol"]
        )


def test_only_what_is_needed_is_sent(served, tiny_tokenizer):
    server = client(served, tiny_tokenizer, top_k=4)
    served.bodies.clear()
    server.traffic.__init__()
    found = server.ask([Question(IDS[:3], IDS[3:], [0, 1]), Question(IDS[:3], IDS[3:], [])])
    assert found[1] is None
    assert [body["prompt"] for body in served.bodies] == [IDS[:5]]
    assert (served.bodies[0]["temperature"], served.bodies[0]["prompt_logprobs"]) == (1.0, 4)
    traffic = server.traffic
    assert (traffic.answered, traffic.asked, traffic.left_out) == (5, 2, 3 + 8)
    assert traffic.sent > 0
    assert traffic.saved == round(11 * traffic.received / 5)


@pytest.mark.parametrize("fault", ["refuse", "cut", "short", "hang"])
def test_a_fault_is_asked_again_and_leaves_the_runs_random_numbers(served, connect, tiny_tokenizer, fault, caplog):
    server = connect(tiny_tokenizer)
    server.timeout = 0.15
    served.faults = [fault, fault]
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    (found,) = server.ask([Question(IDS[:3], IDS[3:], [0])])
    assert len(found) == 1
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert caplog.text.count("gives no answer") == 1
    assert "answers again" in caplog.text


def test_many_questions_survive_many_faults(served, connect, lm_head, teacher, tiny_tokenizer):
    server = connect(tiny_tokenizer, concurrency=4)
    served.faults = ["refuse", None, "cut", "cut", None, "refuse"] * 2
    sequences = [[*IDS[:3], *range(20 + n, 26 + n)] for n in range(12)]
    found = server.ask([Question(ids[:3], ids[3:], range(6)) for ids in sequences])
    for ids, rows in zip(sequences, found, strict=True):
        wanted = log_probabilities(teacher, ids)[2:8]
        torch.testing.assert_close(likeliest(rows, lm_head), wanted.topk(4).values, **ROUNDING)


def test_a_server_that_stays_away_ends_it_at_the_time_limit(served, connect, tiny_tokenizer):
    server = connect(tiny_tokenizer, time_limit=0.3)
    served.dead = True
    with pytest.raises(TeacherUnavailableError, match=r"no answer for .*teacher_time_limit is 0\.3.*HTTP 503"):
        server.ask([Question(IDS[:3], IDS[3:], [0])] * 5)
    with pytest.raises(TeacherUnavailableError, match="refused"):
        TeacherServer("http://127.0.0.1:9/v1", time_limit=0.2, pause=0.01).connect(tiny_tokenizer)


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("fault", ["nan", "logits"])
def test_what_is_no_log_probability_is_refused_by_rollout_and_token(served, tiny_tokenizer, fault, top_k):
    served.max_logprobs = -1
    server = client(served, tiny_tokenizer, top_k=top_k)
    served.faults = [fault]
    with pytest.raises(ValueError, match=r"rollout 0, token 4: the teacher's answers are no log-probabilities"):
        server.ask([Question(IDS[:3], IDS[3:], [4])])


def test_what_cannot_be_right_is_refused_at_the_start(served, connect, tiny_tokenizer):
    from tipdistill.tasks.arithmetic import build_tokenizer

    with pytest.raises(ValueError, match="reads text as other tokens"):
        connect(build_tokenizer())
    with pytest.raises(ValueError, match=r"does not serve 'other'; it serves teacher"):
        connect(tiny_tokenizer, model="other")
    served.name = "a,b"
    with pytest.raises(ValueError, match="say which with teacher_served_name"):
        connect(tiny_tokenizer)
    served.name = "teacher"
    served.key = "secret"
    with pytest.raises(ValueError, match="HTTP 401"):
        connect(tiny_tokenizer)
    connect(tiny_tokenizer, api_key="secret")
    assert served.headers[-1]["Authorization"] == "Bearer secret"


def test_a_whole_vocabulary_that_the_server_does_not_give_is_refused_at_the_start(served, tiny_tokenizer):
    with pytest.raises(ValueError, match="start it with --max-logprobs -1"):
        client(served, tiny_tokenizer, top_k=0)


def of_last(change):
    """The answer with the entry of its last token changed."""

    def changed(body, reply):
        rows = reply["choices"][0]["prompt_logprobs"]
        rows[-1] = change(rows[-1])
        return reply

    return changed


ENTRY = {"logprob": -9.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, str(10**11): ENTRY}, "'100000000000' is no token id"),
        (lambda row: {**row, "-5": ENTRY}, "'-5' is no token id"),
        (lambda row: {**row, "1.5": ENTRY}, r"'1\.5' is no token id"),
        (lambda row: {**row, "Infinity": ENTRY}, "'Infinity' is no token id"),
        (lambda row: {**row, "٣": ENTRY}, "is no token id"),
        (lambda row: {**row, "9" * 5000: ENTRY}, "is no token id"),
        (lambda row: {token: {"logprob": "-1"} for token in row}, "is '-1', and not a number"),
        (lambda row: {token: {"logprob": True} for token in row}, "is True, and not a number"),
        (lambda row: {token: {"logprob": -(10**400)} for token in row}, "no number that a float holds"),
        (lambda row: {token: value for token, value in row.items() if token != "7"}, "no log-probability of the token"),
        (lambda row: dict(list(row.items())[:2]) | {"7": row["7"]}, "gave 3 log-probabilities, and 4 were asked"),
        (lambda row: {**row, **{str(token): ENTRY for token in range(90, 99)}}, "log-probabilities, and 4 were asked"),
        (lambda row: {token: {"rank": 1} for token in row}, "has no logprob"),
        (lambda row: {token: {"logprob": -math.inf} for token in row}, r"rollout 0, token 1: .* sum to 0\)"),
        (lambda row: {**row, "7": {"logprob": -math.inf}}, "rollout 0, token 1: the teacher gives token 7 prob"),
        (lambda row: None, "of the prompt has no entry"),
        (lambda row: [], "of the prompt has no entry"),
    ],
    ids=[
        *("huge", "negative", "fraction", "infinite", "arabic", "digits", "text", "true", "overflow"),
        *("unsampled", "fewer", "more", "no logprob", "impossible", "impossible sampled", "null", "list"),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused_at_once(served, tiny_tokenizer, change, message):
    server = client(served, tiny_tokenizer, top_k=4)
    asked = len(served.bodies)
    served.change = of_last(change)
    with pytest.raises(ValueError, match=message) as raised:
        server.ask([Question(IDS[:3], IDS[3:], [1])])
    assert served.url in str(raised.value)
    assert len(served.bodies) == asked + 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, r"has no list of choices: \{\}"),
        ([], r"has no list of choices: \[\]"),
        (None, "has no list of choices: None"),
        ({"choices": []}, "has no list of prompt_logprobs"),
        ({"choices": ["a"]}, "has no list of prompt_logprobs"),
        ({"choices": [{"text": ""}]}, "has no list of prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": None}]}, "has no list of prompt_logprobs"),
        ({"error": "x" * 10**5}, "has no list of choices"),
    ],
    ids=["empty", "list", "null", "none", "text", "no logprobs", "null logprobs", "long"],
)
def test_an_answer_that_lacks_a_part_is_refused_at_once(served, tiny_tokenizer, reply, message):
    server = client(served, tiny_tokenizer, top_k=4)
    asked = len(served.bodies)
    served.change = lambda *_: reply
    with pytest.raises(ValueError, match=message) as raised:
        server.ask([Question(IDS[:3], IDS[3:], [1])])
    assert served.url in str(raised.value)
    assert len(str(raised.value)) < 500
    assert len(served.bodies) == asked + 1


def test_a_web_page_for_an_answer_is_refused_at_once(served, connect, tiny_tokenizer):
    server = connect(tiny_tokenizer)
    asked = len(served.bodies)
    served.faults = ["garbage"]
    with pytest.raises(ValueError, match=r"(JSON|bytes) but '<html>502 Bad Gateway</html>'\.$") as raised:
        server.ask([Question(IDS[:3], IDS[3:], [1])])
    assert served.url.removesuffix("/v1") in str(raised.value)
    assert len(served.bodies) == asked + 1


@pytest.mark.parametrize("reply", [{}, [], [{"id": "m"}], {"data": None}, None], ids=repr)
def test_models_and_tokens_that_lack_their_list_are_refused(reply):
    with pytest.raises(WrongAnswerError, match="has no list of data"):
        model_names(reply)
    with pytest.raises(WrongAnswerError, match="has no list of tokens"):
        token_ids(reply, 10)


def test_a_thousand_long_names_do_not_fill_the_screen(served, tiny_tokenizer):
    served.name = ",".join(f"{number}{'x' * 200}" for number in range(1000))
    for model in (None, "teacher"):
        with pytest.raises(ValueError, match="995 more") as raised:
            client(served, tiny_tokenizer, model=model)
        assert len(str(raised.value)) < 500


def test_a_model_without_a_name_and_a_token_that_is_none_are_refused(served, tiny_tokenizer):
    served.name = ""
    with pytest.raises(ValueError, match=rf"{served.url}/models gives a wrong answer: a model of /models has no id"):
        client(served, tiny_tokenizer)
    served.name = "teacher"
    for token in (10**11, -1, True, 1.5, "1"):
        served.tokenizer = lambda *_, token=token, **__: {"input_ids": [token]}
        with pytest.raises(ValueError, match=r"/tokenize gives .* for a token"):
            client(served, tiny_tokenizer)


def test_an_answer_may_be_as_large_as_what_was_asked_and_no_larger(served, connect, tiny_tokenizer):
    server = connect(tiny_tokenizer)
    if connect.hidden:
        served.change = lambda body, reply: (reply[0], bytes(2**21))
    else:
        served.change = lambda body, reply: {**reply, "padding": "x" * 2**21}
    with pytest.raises(ValueError, match=r"answers with more than 1,0\d\d,\d\d\d bytes"):
        server.ask([Question(IDS[:3], IDS[3:], [1])])


# Training.

PLAIN = {
    **ON_CPU,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "record_rollouts": 0,
    "teacher_time_limit": 20.0,
    "normalization": "batch",
}


@pytest.fixture
def make(tiny_model_dir, word_problems, tmp_path, served):
    def build(url=True, **settings):
        extra = {"teacher_url": served.url} if url else {}
        if settings.pop("hidden", False):
            extra["teacher_lm_head"] = str(tiny_model_dir("qwen3", "teacher"))
        config = TIPConfig(
            str(settings.pop("output_dir", tmp_path / "run")), **{**PLAIN, "max_steps": 2, **extra, **settings}
        )
        return TIPTrainer(
            str(tiny_model_dir("qwen3", "student")),
            None if url else str(tiny_model_dir("qwen3", "teacher")),
            config,
            Dataset.from_json(str(word_problems)).select(range(32)),
            Dataset.from_json(str(word_problems)).select(range(4)),
        )

    return build


def logged(trainer, *names):
    return [[entry[name] for entry in trainer.state.log_history if "loss" in entry] for name in names]


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_rule": "soft_or", "retention": 0.3},
        {"selection_rule": "all"},
        {"selection_rule": "entropy", "retention": 0.3, "score_logging_steps": 0, "gradient_accumulation_steps": 2},
        {"selection_rule": "gradient_norm", "retention": 0.3, "temperature": 0.8, "beta": 0.5},
        {"selection_rule": "cumulative_advantage", "beta": 0.0},
    ],
    ids=lambda settings: settings["selection_rule"],
)
def test_a_whole_vocabulary_trains_as_the_local_teacher_does(make, served, settings):
    served.max_logprobs = -1
    losses = []
    for url in (True, False):
        trainer = make(url, **settings)
        trainer.train()
        losses.append(logged(trainer, "loss", "grad_norm", "selection/kept_fraction"))
    for found, wanted in zip(*losses, strict=True):
        assert found == pytest.approx(wanted, rel=2e-4)


def test_likeliest_tokens_train_on_a_lower_bound(make, served):
    exact = make(False, selection_rule="entropy", retention=0.3)
    bound = make(selection_rule="entropy", retention=0.3, teacher_top_k=5)
    for trainer in (exact, bound):
        trainer.train()
    assert logged(bound, "selection/kept_fraction") == logged(exact, "selection/kept_fraction")
    assert 0 < logged(bound, "loss")[0][0] < logged(exact, "loss")[0][0]


def test_two_rounds_ask_about_what_is_kept_alone(make, served):
    trainer = make(selection_rule="position", retention=1.0, teacher_top_k=4, score_logging_steps=0)
    trainer.train()
    everything = logged(trainer, "teacher/tokens_asked")[0]
    served.bodies.clear()
    trainer = make(
        selection_rule="random", selection_scope="batch", retention=0.1, teacher_top_k=4, score_logging_steps=0
    )
    trainer.train()
    asked, saved, received = (
        logged(trainer, f"teacher/{name}")[0] for name in ("tokens_asked", "bytes_saved", "bytes_received")
    )
    kept = logged(trainer, "selection/trained_tokens")[0]
    assert asked[0] == kept[0] < 0.2 * everything[0]
    assert min(saved) > 0
    assert min(received) > 0
    # a rule that reads the teacher asks about everything
    trainer = make(selection_rule="divergence", retention=0.1, teacher_top_k=4)
    trainer.train()
    assert logged(trainer, "teacher/tokens_asked")[0] == pytest.approx(everything, rel=0.5)


def test_evaluation_asks_about_every_token(make, served):
    served.max_logprobs = -1
    losses = [make(url, selection_rule="entropy", retention=0.2).evaluate()["eval_loss"] for url in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)  # the rollouts are drawn anew
    assert make(selection_rule="entropy", per_device_eval_batch_size=4).evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_rule": "teachability_soft_or", "gradient_accumulation_steps": 2, "num_generations": 2},
        {"selection_rule": "entropy", "retention": 0.25},
        {"selection_rule": "all", "temperature": 0.8},
        {"selection_rule": "gradient_norm_sampling", "selection_scope": "batch", "beta": 0.5},
    ],
    ids=lambda settings: settings["selection_rule"],
)
def test_records_of_a_whole_vocabulary_are_those_of_the_local_teacher(make, served, tmp_path, settings):
    served.max_logprobs = -1
    settings = {"score_logging_steps": 1, "max_steps": 1, "retention": 0.4, **settings}
    tables, sidecars = [], []
    for url in (True, False):
        make(url, output_dir=tmp_path / str(url), record_rollouts=3, **settings).train()
        records = open_records(tmp_path / str(url) / "records" / "step-0")
        tables.append(records.read().to_pandas())
        sidecars.append(records.sidecar)
    # a question at the start and one of each rollout: the records ask none of them again
    assert len(served.bodies) == 1 + 4 * settings.get("gradient_accumulation_steps", 1)
    same_records(*tables)
    assert len(set(tables[0]["rollout"])) == 3
    assert sidecars[0]["settings"] == sidecars[1]["settings"]
    assert (sidecars[0]["teacher"], sidecars[0]["vocabulary"]) == ("teacher", sidecars[1]["vocabulary"])


def test_records_of_likeliest_tokens_say_that_divergences_are_bounds(make, tmp_path):
    settings = {"selection_rule": "q3", "score_logging_steps": 2, "max_steps": 3, "record_rollouts": 2}
    runs = []
    for count in (0, 2):
        trainer = make(teacher_top_k=4, **{**settings, "record_rollouts": count})
        trainer.train()
        runs.append(logged(trainer, "loss", "grad_norm", "teacher/tokens_asked"))
    assert runs[0] == runs[1]
    directory = tmp_path / "run" / "records"
    assert sorted(path.name for path in directory.iterdir()) == ["step-0", "step-2"]
    records = open_records(directory / "step-2")
    assert records.sidecar["settings"]["teacher_top_k"] == 4
    table = records.read().to_pydict()
    assert {len(top) for top in table["teacher_top5"]} == {4}
    assert {len(top) for top in table["student_top5"]} == {5}


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True], ids=["log-probabilities", "hidden states"])
def test_a_teacher_that_dies_and_comes_back_changes_nothing(make, served, hidden):
    served.max_logprobs = -1
    calm = make(selection_rule="soft_or", retention=0.3, max_steps=3, hidden=hidden)
    calm.train()
    trainer = make(selection_rule="soft_or", retention=0.3, max_steps=3, hidden=hidden)
    served.dies_after = len(served.bodies) + 6  # in the middle of the second step

    def come_back():
        served.dies_after, served.dead = None, False

    timer = threading.Timer(4.0, come_back)
    timer.start()
    trainer.train()
    timer.join()
    assert logged(trainer, "loss", "grad_norm") == logged(calm, "loss", "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True], ids=["log-probabilities", "hidden states"])
def test_a_teacher_that_stays_away_costs_nothing_that_was_done(make, served, tmp_path, hidden):
    """The run stops with a checkpoint, and resumed from it ends at the very weights of one that was never disturbed."""
    served.max_logprobs = -1
    # 8 steps are an epoch
    settings = {"selection_rule": "soft_or", "retention": 0.3, "max_steps": 11, "hidden": hidden}
    calm = make(output_dir=tmp_path / "calm", **settings)
    calm.train()
    for step in (3, 8):
        run = tmp_path / f"stops-after-{step}"
        trainer = make(output_dir=run, teacher_time_limit=0.5, **settings)
        served.dies_after = len(served.bodies) + 4 * step + 1
        with pytest.raises(TeacherUnavailableError, match=rf"Step {step} was saved to .*checkpoint-{step}: go on with"):
            trainer.train()
        served.dies_after, served.dead = None, False
        assert last_complete_checkpoint(run) == str(run / f"checkpoint-{step}")
        resumed = make(output_dir=run, **settings)
        resumed.train(resume_from_checkpoint=True)
        for name, weight in calm.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], weight), (step, name)


@pytest.mark.parametrize("asks", [{"teacher_top_k": 4}, {"hidden": True}], ids=["log-probabilities", "hidden states"])
def test_a_teacher_that_never_answers_leaves_nothing_behind(make, served, tmp_path, asks):
    trainer = make(teacher_time_limit=0.3, **asks)
    served.dead = True
    with pytest.raises(TeacherUnavailableError, match="No step was taken since the start"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_model_name_or_path": "t"}, "name two teachers"),
        ({"normalization": "micro_batch"}, 'needs normalization="batch"'),
        ({"teacher_offload": True}, "nothing to move"),
        ({"teacher_top_k": 5, "temperature": 0.5}, "needs the teacher's whole vocabulary"),
        ({"teacher_top_k": -2}, "teacher_top_k must be"),
        ({"teacher_time_limit": 0}, "teacher_time_limit must be"),
        ({"teacher_concurrency": 0}, "teacher_concurrency must be"),
        ({"teacher_lm_head": "t", "teacher_top_k": 5}, "asks the server for log-probabilities"),
        ({"teacher_lm_head": "t", "teacher_url": None}, "set teacher_url"),
        ({"teacher_lm_head": ""}, "must be a directory or a hub id"),
        ({"teacher_lm_head": "t", "normalization": "running"}, 'needs normalization="batch"'),
    ],
)
def test_settings_that_contradict_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TIPConfig(str(tmp_path), **{**PLAIN, "teacher_url": "http://127.0.0.1:9/v1", **settings})


@pytest.mark.parametrize(("given", "expected"), [(1800, 1800 + 600 + 600), (9000, 9000)])
def test_processes_that_wait_for_one_that_waits_do_not_take_it_for_dead(given, expected, tmp_path):
    settings = {**PLAIN, "ddp_timeout": given, "teacher_time_limit": 1800.0}
    assert TIPConfig(str(tmp_path), **settings).ddp_timeout == given
    assert TIPConfig(str(tmp_path), **settings, teacher_url="http://127.0.0.1:9/v1").ddp_timeout == expected


def test_what_the_server_cannot_serve_is_refused_before_weights_are_loaded(make, served, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(ValueError, match=r"reads signal_to_curvature, which cannot be had"):
        make(selection_rule="signal_to_curvature")
    with pytest.raises(ValueError, match=r"temperature = 0\.5 needs the teacher's whole vocabulary"):
        make(temperature=0.5)
    with pytest.raises(ValueError, match="each name the teacher"):
        TIPTrainer("s", "t", TIPConfig(str(tmp_path), **PLAIN, teacher_url=served.url), [])
