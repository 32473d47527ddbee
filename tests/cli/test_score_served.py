"""`tipdistill score` and `probe` with a teacher on a server: what a local one gives, or lower bounds that say so."""

import json

import numpy as np
import pytest
from recorded import same_records
from serving import serving
from transformers import AutoModelForCausalLM

from tipdistill.cli import main
from tipdistill.probe import RULES
from tipdistill.records import open_records
from tipdistill.score.top_k_teacher import unavailable
from tipdistill.select import rule_fields

EVERY = "soft_or,q3,gradient_norm,teachability_soft_or,prefix_compatibility,selectkd,entropy_jsd_sampling"


PADDED = pytest.mark.parametrize("served", [432], indirect=True, ids=["padded"])  # the student's lm_head has 400 rows


@pytest.fixture
def served(request, tiny_model_dir, tiny_tokenizer):
    directory = tiny_model_dir("qwen3", "teacher", vocab_rows=getattr(request, "param", 400))
    with serving(AutoModelForCausalLM.from_pretrained(directory), tiny_tokenizer) as server:
        server.directory = str(directory)
        yield server


@pytest.fixture
def run(tiny_model_dir, word_problems, tmp_path, served):
    """Run score or probe against the server (or the teacher itself) and open its records."""

    def command(name, *flags, url=True, code=0):
        directory = tmp_path / f"{name}-{'served' if url else 'local'}"
        whose = ("--teacher_url", served.url) if url else ("--teacher", served.directory)
        student = "--model", str(tiny_model_dir("qwen3", "student")), "--dataset", str(word_problems)
        shape = "--max_prompts", "6", "--max_new_tokens", "8", "--batch_size", "4", "--device", "cpu"
        assert main([name, *student, *whose, *shape, "--output_dir", str(directory), *flags]) == code
        return open_records(directory) if code == 0 else directory

    return command


@PADDED
@pytest.mark.parametrize("temperature", ["1", "0.7"])
def test_a_whole_vocabulary_scores_as_the_local_teacher_does(run, served, temperature, capsys):
    served.max_logprobs = -1
    flags = "--rules", EVERY, "--retention", "0.3", "--temperature", temperature, "--num_generations", "2"
    over_the_wire, local = (run("score", *flags, url=url) for url in (True, False))
    same_records(over_the_wire.read().to_pandas(), local.read().to_pandas())
    ours, theirs = over_the_wire.sidecar, local.sidecar
    assert ours["teacher"] == "teacher"
    assert ours["vocabulary"] == theirs["vocabulary"] == 400
    # where it was is no setting: a server that comes back elsewhere is the same teacher
    assert {**ours["settings"], "teacher_revision": None} == theirs["settings"]
    shown = capsys.readouterr().out
    assert f"# teacher   teacher at {served.url}, which gives its whole vocabulary\n" in shown
    assert "lower bounds" not in shown


def test_likeliest_tokens_give_bounds_and_the_records_say_so(run, served, capsys):
    local = run("score", "--rules", "soft_or,selectkd", url=False).read().to_pandas()
    assert "lower bounds" not in capsys.readouterr().out
    # what the padding of the student's lm_head says is never sampled beside a teacher that does not tell its own
    records = run("score", "--rules", "soft_or,selectkd", "--teacher_top_k", "7")
    table = records.read().to_pandas()
    assert records.sidecar["settings"]["teacher_top_k"] == 7
    assert "Divergences are lower bounds: of the teacher the 7 likeliest tokens are known" in capsys.readouterr().out
    same = (table["token_id"] == local["token_id"]) & (table["position"] == 0)  # the same tokens after the same prompt
    assert same.sum() >= 3
    table, local = table[same], local[same]
    for name in ("reverse_kl", "forward_kl", "teacher_entropy"):
        assert (table[name] <= local[name] + 1e-5).all(), name
        assert (table[name] < 0.99 * local[name]).any(), name
    for name in ("entropy", "student_logprob", "teacher_logprob"):
        np.testing.assert_allclose(table[name], local[name], rtol=1e-4, atol=1e-5)
    for name in ("student_top5", "teacher_top5"):
        for found, wanted in zip(table[name], local[name], strict=True):
            assert [entry["token_id"] for entry in found] == [entry["token_id"] for entry in wanted]


def test_three_known_tokens_are_three_of_the_teachers_five(run):
    table = run("score", "--teacher_top_k", "3").read()
    assert {len(top) for top in table["teacher_top5"].to_pylist()} == {3}
    assert {len(top) for top in table["student_top5"].to_pylist()} == {5}


@PADDED
def test_a_whole_vocabulary_is_probed_as_the_local_teacher_is(run, served):
    served.max_logprobs = -1
    flags = "--retentions", "0.5,0.25", "--random_seeds", "2", "--bootstrap", "20"
    run("probe", *flags, "--rules", "soft_or,q3,teachability")
    run("probe", *flags, "--rules", "soft_or,q3,teachability", url=False)
    asked = [body["prompt"] for body in served.bodies[1:]]
    assert len(asked) == 6  # each rollout once, for its records and its gradients alike
    directory = run("probe", code=2)
    results = [
        json.loads((directory.with_name(f"probe-{which}") / "probe.json").read_text()) for which in ("served", "local")
    ]
    for result in results:
        for name in ("seconds", "teacher"):
            del result[name]
    assert_close(*results)


def assert_close(found, wanted):
    """The same JSON, numbers to the rounding of sums over float32."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert_close(found[name], value)
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    else:
        assert found == wanted


def test_a_probe_of_likeliest_tokens_warns_of_bounds(run, capsys):
    flags = "--teacher_top_k", "5", "--retentions", "0.5", "--random_seeds", "1", "--bootstrap", "5"
    run("probe", *flags, "--rules", "soft_or")
    assert "! Divergences are lower bounds: of the teacher the 5 likeliest tokens are known" in capsys.readouterr().out


def test_the_probes_own_rules_can_be_had_of_every_server():
    assert not [rule for rule in RULES if unavailable(rule_fields(rule) or (), 1)]


def test_an_interrupted_scoring_goes_on_and_ends_with_the_same_records(run, served, capsys):
    served.max_logprobs = -1
    whole = run("score").read()
    asked = len(served.bodies)
    served.dies_after = asked + 1 + 4 + 1  # the probe at the start, a batch, and in the middle of the next
    directory = run("score", "--overwrite_output_dir", "--teacher_time_limit", "0.2", code=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"tipdistill score: the teacher at {served.url}")
    assert "teacher_time_limit is 0.2" in said
    assert said.endswith("The 4 rollouts that are scored are kept: the same command goes on from there.")
    assert len(list((directory / "parts").glob("tokens-*"))) == 1
    served.dies_after, served.dead = None, False
    served.bodies.clear()
    assert run("score", "--overwrite_output_dir").read().equals(whole)
    assert len(served.bodies) == 1 + 2  # the probe at the start, and the rollouts of the second batch


def test_a_server_that_comes_back_is_waited_for(run, served):
    served.max_logprobs = -1
    calm = run("score").read()
    served.faults = [None, "refuse", "cut", None, "refuse"]
    assert run("score", "--overwrite_output_dir").read().equals(calm)


def test_what_is_no_log_probability_is_refused_by_rollout_and_token(run, served, capsys):
    served.faults = [None, None, "nan"]
    run("score", "--teacher_concurrency", "1", "--teacher_top_k", "4", code=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{served.url}, rollout 1, token 7: the teacher's answers are no log-probabilities" in said
    served.faults = [*[None] * 5, "nan"]  # in the second batch
    run("score", "--teacher_concurrency", "1", "--teacher_top_k", "4", code=2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "rollout 0, token 7" in said
    assert said.endswith("(Rollout 0 of these is number 4 of the records.)")


@pytest.fixture
def loads_nothing(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("tipdistill.pair.load_models", load)
    monkeypatch.setattr("tipdistill.cli.probe.load_models", load)


@pytest.mark.parametrize("name", ["score", "probe"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--teacher", "t"], "--teacher t and --teacher_url {url} each name the teacher: give one of them"),
        (["--teacher_url", "http://me:secret@host/v1"], "teacher_url holds a user name or a password"),
        (["--teacher_url", "host:8000"], "teacher_url must begin with http:// or https://"),
        (["--teacher_revision", "main"], "--teacher_revision is of a teacher loaded here, and this one is on a server"),
        (["--teacher_api_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY, which is not set"),
        (["--teacher_top_k", "-1"], "must be at least 0, got -1"),
        (["--teacher_time_limit", "0"], "must be a positive number, got 0"),
        (["--teacher_served_name", "other"], "does not serve 'other'; it serves teacher"),
        (["--teacher_url", "http://127.0.0.1:9/v1", "--teacher_time_limit", "0.1"], "gave no answer"),
        (["--temperature", "0.5"], "temperature = 0.5 needs the teacher's whole vocabulary"),
        (["--rules", "q3,signal_to_curvature"], "reads signal_to_curvature, which cannot be had"),
        (["--rules", "prefix_compatibility", "--teacher_top_k", "15"], "the 15 likeliest tokens that {url} gives"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_refused_before_weights_are_loaded(run, served, name, extra, message, capsys, loads_nothing):
    run(name, *extra, code=2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert message.format(url=served.url) in said.splitlines()[-1]
    assert "secret" not in said


@pytest.mark.parametrize("name", ["score", "probe"])
def test_a_tokenizer_of_another_kind_is_refused_before_weights_are_loaded(run, served, name, capsys, loads_nothing):
    from tipdistill.tasks.arithmetic import build_tokenizer

    served.tokenizer = build_tokenizer()
    run(name, code=2)
    assert "reads text as other tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["score", "probe"])
def test_a_teacher_is_needed_and_settings_of_a_server_need_one(
    name, tiny_model_dir, word_problems, tmp_path, capsys, loads_nothing
):
    student = str(tiny_model_dir("qwen3", "student"))
    rest = "--model", student, "--dataset", str(word_problems), "--output_dir", str(tmp_path / "out")
    assert main([name, *rest]) == 2
    assert "a teacher is needed: --teacher, a directory or a hub id, --teacher_url" in capsys.readouterr().err
    assert main([name, *rest, "--teacher", student, "--teacher_top_k", "5"]) == 2
    error = capsys.readouterr().err
    assert "--teacher_top_k is of a teacher on a server, and this one is loaded here: leave it out" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["score", "probe"])
def test_help_says_when_the_tokenizer_is_checked(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "its tokenizer is compared with the student's before weights are loaded" in shown
