"""Several processes and sharded models against one process: DDP, FSDP2, ZeRO-2 and ZeRO-3 over gloo, no GPU needed.

Every engine runs the same prompts in the same order, so losses, gradient norms and (with SGD, whose step is the
gradient) final weights must be those of one process. All runs are made once, by forks of one process.
"""

import importlib.util
import itertools
import json
import os
import socket
from pathlib import Path

import forks
import pytest
import sharded_run
import torch
from filelock import FileLock
from recorded import same_records
from safetensors.torch import load_file
from serving import serving
from transformers import AutoModelForCausalLM

from tipdistill.records import open_records

pytestmark = pytest.mark.slow

PLAIN = {
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "shuffle_dataset": False,
    "retention": 0.3,
    "record_rollouts": 2,
    "score_logging_steps": 2,
    # greedy, so that two ways to run the same step write the same rollouts
    "generation_kwargs": {"do_sample": False},
}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]
NAMES = [name for name in ("ddp", "fsdp2", "zero2", "zero3") if HAS_DEEPSPEED or not name.startswith("zero")]
# kind of run: (settings, what tests/sharded_run.py is told beside them); 8 rollouts a step in all of them
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2}  # and killed in the third step
KINDS = {
    # 1 micro-batch a step, and nothing between the gradient and the weights
    "whole": (SGD, {"collectives": True}),
    # a budget over the batch that leaves most micro-batches, and often a rank, without a kept token
    "few": ({**SGD, "retention": 0.02, "selection_scope": "batch"}, {}),
    # the last four rollouts hold nothing of the student's: with two processes, all that the last one has
    "empty": (SGD, {"empty": 4}),
    "empty_micro_batch": ({**SGD, "normalization": "micro_batch", "selection_rule": "divergence"}, {"empty": 4}),
    # thresholds and scales of the step before, over all ranks
    "running": ({**SGD, "normalization": "running", "retention": 0.1, "selection_scope": "batch"}, {}),
    # the student goes forward twice inside one forward of its engine
    "kept": ({**SGD, "backward": "kept", "retention": 0.1, "selection_scope": "batch"}, {}),
    "kept_running": ({**SGD, "backward": "kept", "normalization": "running", "retention": 0.1}, {"empty": 4}),
    # rollouts of the step before, by the run's own engine and by a server that one process talks to
    "ahead": ({**SGD, "rollout_ahead": 1}, {}),
    "ahead_server": ({**SGD, "rollout_ahead": 1}, {"server": True}),
    "adam": ({**SAVED, "max_steps": 4}, {}),
    # two teachers, one of them for none of the first process's rollouts, and prompts of the teachers' own
    "several": (
        {**SGD, **SAVED, "max_steps": 3, "retention": 0.1, "selection_scope": "batch"},
        {"columns": True},
    ),
    "several_micro_batch": (
        {**SGD, "normalization": "micro_batch", "selection_rule": "divergence", "record_rollouts": 0},
        {"columns": True},
    ),
    # a student that calls tools, in as many turns as its prompt says, so that ranks have unequal numbers of them
    "acting": ({**SGD, "max_completion_length": 400, "retention": 0.5}, {"acting": True}),
    # the student as its own teacher, a model beside it that follows it
    # (by Adam: torch does not load the state of an SGD under FSDP2, since there is none)
    "itself": (
        {**SAVED, "max_steps": 4, "teacher_update": "ema:0.5"},
        {"columns": True, "teacher": "self"},
    ),
}
# of a teacher on a server: one rule that asks about every token, one that asks about few and of some ranks none
SERVED = {
    "reads": {"selection_rule": "soft_or"},
    "asks_afterwards": {
        "selection_rule": "entropy",
        "score_logging_steps": 0,
        "retention": 0.02,
        "selection_scope": "batch",
    },
    "hidden_states": {"selection_rule": "signal_to_curvature", "temperature": 0.8},
}
# Which of them in two processes. What is sharded is where they differ; ZeRO-2 shards no weight, and is DDP to our code.
KINDS_OF = {
    "ddp": ("whole", "few", "empty", "running", "kept", "ahead", "ahead_server", "several", "itself", "acting"),
    "fsdp2": (
        *("whole", "few", "empty_micro_batch", "running", "kept", "kept_running", "several", "several_micro_batch"),
        *("ahead", "acting"),
    ),
    "zero2": ("few",),
    "zero3": ("whole", "few", "empty", "several", "acting"),
}
SHARDED = tuple(name for name in ("fsdp2", "zero3") if name in NAMES)  # killed, and in more tiles
# micro-batches a step on two processes; a first, a last and two between them are seen in "few"
ACCUMULATED = {
    "few": 4,
    "empty_micro_batch": 2,
    "running": 2,
    "kept": 2,
    "ahead": 2,
    "ahead_server": 2,
    "adam": 2,
    "several": 2,
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def figures(out):
    return json.loads((Path(out) / "figures.json").read_text())


class Jobs:
    """Writes jobs: a student with tied embeddings, or a bias, and an untied teacher of another architecture."""

    def __init__(self, root, tiny_model_dir, data):
        self.root, self.models, self.data = root, tiny_model_dir, data

    def job(self, engine, processes, name, student, settings, **told):
        return {
            "engine": engine,
            "processes": processes,
            "student": str(self.models(student, "student")),
            "data": str(self.data),
            "settings": {**PLAIN, **settings},
            "out": str(self.root / name),
            "port": free_port(),
            **told,
        }

    def sharded(self, engine, processes, kind, suffix="", **more):
        settings, told = KINDS[kind]
        accumulation = ACCUMULATED.get(kind, 1) if processes == 2 else 1
        settings = {
            **settings,
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": 8 // processes // accumulation,
        }
        told = {"teacher": str(self.models("llama", "teacher")), **told, **more}
        if kind.startswith("several"):
            settings["teachers"] = {name: str(self.models(name, "teacher")) for name in ("llama", "phi")}
            told["teacher"] = None
        student = "phi" if kind == "few" else "qwen3"
        return self.job(engine, processes, f"{engine}-{processes}-{kind}{suffix}", student, settings, **told)

    def served(self, kind, processes, name, urls, **told):
        settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, **SERVED[kind]}
        settings |= {"teacher_time_limit": 1.0, "gradient_accumulation_steps": 2}
        settings |= {"per_device_train_batch_size": 4 // processes}
        if kind == "hidden_states":
            settings |= {"teacher_lm_head": str(self.models("llama", "teacher"))}
        return self.job("ddp", processes, f"served-{name}", "qwen3", settings, teacher=None, urls=urls, **told)

    def all(self, url, dying):
        """Every job of this file, in order: each kind in one process, in two by engine, and on two hosts.

        "adam" is killed in its third step and resumed. `url` and `dying` are teachers on servers; the one of the last
        process goes away in "stopped".
        """
        jobs = {("one", kind): self.sharded("ddp", 1, kind) for kind in KINDS}
        for engine in NAMES:
            for kind in KINDS_OF[engine]:
                jobs[engine, kind] = self.sharded(engine, 2, kind)
            if engine in SHARDED:
                jobs[engine, "tiles"] = self.sharded(engine, 2, "whole", "-tiles", tiles=True)
                jobs[engine, "killed"] = self.sharded(engine, 2, "adam", dies=3)
                jobs[engine, "adam"] = self.sharded(engine, 2, "adam", resume=True)
        jobs["several", "killed"] = self.sharded("ddp", 2, "several", "-killed", dies=3)
        jobs["several", "resumed"] = self.sharded("ddp", 2, "several", "-killed", resume=True)
        jobs["itself", "killed"] = self.sharded("fsdp2", 2, "itself", dies=3)
        jobs["fsdp2", "itself"] = self.sharded("fsdp2", 2, "itself", resume=True)
        jobs["hosts"] = self.sharded("fsdp2", 4, "whole", "-hosts", hosts=2)
        for kind, processes in itertools.product(SERVED, (1, 2)):
            jobs["served", kind, processes] = self.served(kind, processes, f"{kind}-{processes}", [url] * processes)
        jobs["stopped"] = self.served("reads", 2, "outage", [url, dying], stops=True)
        jobs["resumed"] = self.served("reads", 2, "outage", [url, url], resume=True)
        return jobs


@pytest.fixture(scope="module")
def ran(tiny_model_dir, tiny_tokenizer, word_problems, tmp_path_factory):
    """Figures and directory of each job; a second worker of pytest-xdist waits for the first, and reads its files."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sharded"
    root.mkdir(exist_ok=True)
    jobs = Jobs(root, tiny_model_dir, word_problems)
    with FileLock(root / "lock"):
        if not (root / "done").exists():
            teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama", "teacher"))
            with (
                serving(teacher, tiny_tokenizer, max_logprobs=-1) as server,
                serving(teacher, tiny_tokenizer, max_logprobs=-1) as dying,
            ):
                dying.dies_after = 1 + 2 * 4 + 2  # a probe, two steps, and in the middle of the third
                asked = list(jobs.all(server.url, dying.url).values())
                (root / "jobs.json").write_text(json.dumps(asked))
                code = forks.run(sharded_run.main, root / "jobs.json", log=root / "log", seconds=500)
            assert code == 0, (root / "log").read_text()[-6000:]
            (root / "done").touch()
    return {key: (figures(asked["out"]), Path(asked["out"])) for key, asked in jobs.all("", "").items()}


def assert_same(found, expected, weights=True, normalized_together=True):
    (figures, directory), (expected_figures, expected_directory) = found, expected
    names = ["loss", "grad_norm", "selection/kept_fraction", "selection/trained_tokens", "reverse_kl"]
    if normalized_together:
        names += ["quadrants/q1"]
    for name in [name for name in names if name in figures | expected_figures]:  # a run may leave the divergence out
        # float32 sums over ranks and micro-batches in another order
        assert figures[name] == pytest.approx(expected_figures[name], rel=1e-4), name
    if weights:
        weight, expected_weight = (load_file(path / "model.safetensors") for path in (directory, expected_directory))
        if weight.keys() != expected_weight.keys():  # some engines write the tied weight under both of its names
            assert torch.equal(weight.pop("lm_head.weight"), weight["model.embed_tokens.weight"])
        assert weight.keys() == expected_weight.keys()
        for name, value in weight.items():
            torch.testing.assert_close(value, expected_weight[name], rtol=1e-4, atol=1e-6, msg=name)


HOLDS = {
    "ddp": ("MULTI_CPU", ["whole: all"], ["whole: all"]),
    # accelerate leaves the final norm and the lm_head gathered after a forward, and no backward shards the teacher's
    "fsdp2": ("FSDP", ["DTensor"], ["DTensor", "whole: lm_head.weight, model.norm.weight"]),
    "zero2": ("DEEPSPEED", ["whole: all"], ["whole: all"]),
    "zero3": ("DEEPSPEED", ["partition"], ["partition"]),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one_in_losses_gradients_and_weights(engine, ran):
    first = KINDS_OF[engine][0]
    found = ran[engine, first]
    assert found[0]["processes"] == 2
    kind, student, teacher = HOLDS[engine]
    assert found[0]["engine"] == kind
    assert found[0]["parameters"] == {"student": student, "teacher": teacher}
    assert_same(found, ran["one", first])


@pytest.mark.parametrize(
    ("engine", "kind"), [(engine, kind) for engine in NAMES for kind in KINDS_OF[engine] if kind != "whole"]
)
def test_ranks_without_a_token_neither_hang_nor_change_the_result(engine, kind, ran):
    together = not kind.endswith("micro_batch")
    assert_same(ran[engine, kind], ran["one", kind], weights=kind != "itself", normalized_together=together)


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_ranks_with_unequal_numbers_of_turns_play_the_episodes_of_one_process(engine, ran):
    figures, expected = ran[engine, "acting"][0], ran["one", "acting"][0]
    names = [name for name in expected if name.startswith(("episodes/", "tools/"))]
    assert len(names) > 10
    for name in names:
        assert figures[name] == pytest.approx(expected[name]), name
    assert min(expected["episodes/turns"]) > 1
    assert max(expected["episodes/answered"]) == 1


@pytest.mark.parametrize("engine", SHARDED)
def test_a_run_killed_on_one_rank_resumes_to_the_figures_of_one_process(engine, ran):
    figures, directory = ran[engine, "adam"]
    assert len(figures["loss"]) == 4
    assert (directory / "checkpoint-2").is_dir()
    # Adam divides by the root of tiny second moments, so weights may differ where gradients are nearly zero
    assert_same(ran[engine, "adam"], ran["one", "adam"], weights=False)


def test_a_run_of_several_teachers_killed_on_one_rank_goes_on(ran):
    assert (ran["several", "resumed"][1] / "checkpoint-2").is_dir()
    assert_same(ran["several", "resumed"], ran["one", "several"])


def test_a_teacher_that_follows_a_sharded_student_goes_on_where_it_was(ran):
    directory = ran["fsdp2", "itself"][1]
    assert {path.name for path in (directory / "checkpoint-2").glob("teacher-*")} == {
        "teacher-00000.safetensors",
        "teacher-00001.safetensors",
    }
    assert_same(ran["fsdp2", "itself"], ran["one", "itself"], weights=False)  # as in "adam"


@pytest.mark.parametrize("engine", SHARDED)
def test_collectives_do_not_grow_with_the_tiles(engine, ran):
    few, many = (ran[engine, kind][0] for kind in ("whole", "tiles"))
    assert many["tiles"] > 10 * few["tiles"]
    assert len(few["collectives"]) == 2
    assert sum(few["collectives"][0].values()) > 0
    assert many["collectives"] == few["collectives"]
    assert_same(ran[engine, "tiles"], ran[engine, "whole"])


def test_two_hosts_of_two_processes_equal_one(ran):
    """As a launcher on each of two hosts tells its processes: ranks of 4, local ranks of 2."""
    assert ran["hosts"][0]["processes"] == 4
    assert ran["hosts"][0]["local_ranks"] == [0, 1, 0, 1]
    assert_same(ran["hosts"], ran["one", "whole"])


@pytest.mark.parametrize("kind", SERVED)
def test_a_served_teacher_in_two_processes_equals_one(kind, ran):
    assert [ran["served", kind, processes][0]["processes"] for processes in (1, 2)] == [1, 2]
    assert_same(ran["served", kind, 2], ran["served", kind, 1])
    asked = [ran["served", kind, processes][0]["teacher/tokens_asked"] for processes in (1, 2)]
    assert asked[0] == asked[1]
    written = [sorted((ran["served", kind, processes][1] / "records").glob("step-*")) for processes in (1, 2)]
    full_steps = [] if kind == "asks_afterwards" else ["step-0", "step-2"]
    assert [[path.name for path in paths] for paths in written] == [full_steps] * 2
    for paths in zip(*written, strict=True):
        # the main process writes, and the first rollout is its own in either case
        tables = [open_records(path).read().to_pandas() for path in paths]
        same_records(*(table[table["rollout"] == 0] for table in tables))


def test_a_server_that_is_gone_for_one_process_stops_both_which_then_go_on(ran):
    directory = ran["resumed"][1]
    messages = [(directory / f"stopped-{rank}").read_text() for rank in (0, 1)]
    assert "another process had no answer" in messages[0]
    assert "HTTP 503" in messages[1]
    for message in messages:
        assert f"Step 2 was saved to {directory / 'checkpoint-2'}: go on with" in message
    assert {path.name for path in (directory / "checkpoint-2").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert_same(ran["resumed"], ran["served", "reads", 2])
