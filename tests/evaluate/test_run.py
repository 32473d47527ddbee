"""Sampling, keeping, checking and counting; what is on the disk is the evaluation."""

import json
import math
import time

import forks
import pytest

from tipdistill.cli import main
from tipdistill.evaluate import Verifiers, mean_at_k, pass_at_k
from tipdistill.evaluate.engines import Completion, Sampling
from tipdistill.evaluate.run import run
from tipdistill.evaluate.task import Problem, Task

TASK = Task("sums", tuple(Problem(f"{a} + 1 =", str(a + 1)) for a in range(4)), prompt="own")


@pytest.fixture(scope="module")
def verifiers():
    with Verifiers(1) as started:
        yield started


class Scripted:
    """An engine that writes what a table says, two at a time, and stops where it is told to."""

    def __init__(self, table, stop_after=None):
        self.table, self.stop_after, self.asked = table, stop_after, []

    def generate(self, prompts, seeds, sampling, chat=None, special_tokens=False):
        written = 0
        for first in range(0, len(prompts), 2):
            rows = []
            for index in range(first, min(first + 2, len(prompts))):
                if self.stop_after is not None and written >= self.stop_after:
                    raise OSError("the engine died")
                text = self.table(prompts[index], seeds[index])
                rows.append(Completion(index, text, len(text), not text.endswith("...")))
                self.asked.append((prompts[index], seeds[index]))
                written += 1
            yield rows


def by_seed(prompt, seed):
    """Right three times of four; in two spellings, one in a hundred cut off."""
    right = int(prompt.split()[0]) + 1
    if seed % 4 == 0:
        return rf"\boxed{{{right + 1}}}"
    return rf"\boxed{{0{right}}}" if seed % 3 == 0 else rf"so \boxed{{{right}.0}}"


def evaluate(root, verifiers, engine=None, task=TASK, **options):
    engine = engine or Scripted(by_seed)
    return run([task], lambda: engine, root, verifiers=verifiers, **{"num_samples": 4, **options})


def samples(root, name="sums"):
    lines = (root / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_numbers_are_those_of_the_samples(tmp_path, verifiers):
    metrics = evaluate(tmp_path, verifiers, num_samples=6)
    rows = samples(tmp_path)
    assert [(row["problem"], row["sample"]) for row in rows] == [(p, s) for p in range(4) for s in range(6)]
    correct = [[row["correct"] for row in rows[6 * p : 6 * p + 6]] for p in range(4)]
    assert 0 < sum(map(sum, correct)) < 24
    numbers = metrics["tasks"]["sums"]
    mean, error = mean_at_k(correct)
    assert (numbers["mean_at_k"], numbers["standard_error"]) == (mean, error)
    columns = [sum(column) / 4 for column in zip(*correct, strict=True)]
    spread = math.sqrt(sum((value - sum(columns) / 6) ** 2 for value in columns) / 5)
    assert numbers["deviation_over_samples"] == pytest.approx(spread)
    assert list(numbers["pass_at_k"]) == ["1", "2", "4", "6"]
    assert numbers["pass_at_k"]["2"] == pytest.approx(sum(pass_at_k(6, sum(row), 2) for row in correct) / 4)
    assert numbers["mean_tokens"] == pytest.approx(sum(len(row["response"]) for row in rows) / 24)
    assert json.loads((tmp_path / "metrics.json").read_text())["tasks"]["sums"] == numbers


def test_maj_merges_equivalent_answers(tmp_path, verifiers):
    """Three spellings of 1/2 outvote two equal wrong ones; a response without an answer has no vote."""
    answers = iter([r"\boxed{2}", r"\boxed{0.5}", r"\boxed{2}", r"\boxed{\frac{1}{2}}", r"\boxed{1/2}", "hm ..."])
    task = Task("half", (Problem("1 / 2 =", "0.5"),))
    metrics = evaluate(tmp_path, verifiers, Scripted(lambda *_: next(answers)), task, num_samples=6, pass_k=[6])
    numbers = metrics["tasks"]["half"]
    assert (numbers["mean_at_k"], numbers["maj_at_k"], numbers["truncated"]) == (0.5, 1.0, 1 / 6)
    assert numbers["unanswered"] == 1 / 6
    assert numbers["pass_at_k"] == {"6": 1.0}
    assert json.loads((tmp_path / "metrics.json").read_text())["tasks"]["half"]["standard_error"] is None


def test_a_run_that_stopped_goes_on_and_ends_as_if_it_had_not(tmp_path, verifiers):
    whole = evaluate(tmp_path / "whole", verifiers)
    with pytest.raises(OSError, match="died"):
        evaluate(tmp_path / "cut", verifiers, Scripted(by_seed, stop_after=6))
    assert len(samples(tmp_path / "cut")) == 6
    rest = Scripted(by_seed)
    resumed = evaluate(tmp_path / "cut", verifiers, rest, resume=True)
    assert len(rest.asked) == 10
    assert resumed["tasks"] == whole["tasks"]
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")


def test_a_torn_last_line_is_sampled_again(tmp_path, verifiers):
    whole = evaluate(tmp_path, verifiers)
    path = tmp_path / "samples" / "sums.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    rest = Scripted(by_seed)
    assert evaluate(tmp_path, verifiers, rest, resume=True)["tasks"] == whole["tasks"]
    assert len(rest.asked) == 1
    assert path.read_bytes() == content


def test_a_finished_evaluation_opens_no_engine(tmp_path, verifiers):
    whole = evaluate(tmp_path, verifiers)

    def none():
        raise AssertionError("nothing is missing")

    again = run([TASK], none, tmp_path, num_samples=4, resume=True, verifiers=verifiers)
    assert again["tasks"] == whole["tasks"]
    fewer = run([TASK], none, tmp_path, num_samples=2, resume=True, verifiers=verifiers)
    assert fewer["tasks"]["sums"]["num_samples"] == 2


def test_more_samples_are_added(tmp_path, verifiers):
    evaluate(tmp_path, verifiers, num_samples=2)
    more = Scripted(by_seed)
    evaluate(tmp_path, verifiers, more, num_samples=3, resume=True)
    assert len(more.asked) == 4


def test_kept_samples_are_checked_again(tmp_path, verifiers):
    whole = evaluate(tmp_path, verifiers)
    path = tmp_path / "samples" / "sums.jsonl"
    path.write_text(path.read_text().replace('"correct": true', '"correct": false'))
    assert evaluate(tmp_path, verifiers, resume=True)["tasks"]["sums"]["mean_at_k"] == 0
    assert evaluate(tmp_path, verifiers, regrade=True)["tasks"] == whole["tasks"]


def test_a_hostile_answer_costs_itself(tmp_path):
    task = Task("sums", TASK.problems[:2], prompt="own")
    table = {"0": r"\boxed{9^{9^{9^{9}}}}", "1": r"\boxed{2}"}
    engine = Scripted(lambda prompt, seed: table[prompt[0]])
    with Verifiers(1, seconds=1) as impatient:
        numbers = evaluate(tmp_path, impatient, engine, task, num_samples=2)["tasks"]["sums"]
    assert (numbers["mean_at_k"], numbers["maj_at_k"], numbers["undecided"]) == (0.5, 0.5, 2)


def test_a_tasks_own_check_and_length(tmp_path, verifiers):
    seen = []

    class Spy(Scripted):
        def generate(self, prompts, seeds, sampling, chat=None, special_tokens=False):
            seen.append((sampling, chat, special_tokens))
            return super().generate(prompts, seeds, sampling)

    task = Task(
        "own",
        TASK.problems,
        prompt="Q: {problem}",
        chat=False,
        check=lambda response, answer: response == f"Q: {int(answer) - 1} + 1 =!",
        extract=lambda response: None,
        special_tokens=True,
        max_new_tokens=5,
    )
    numbers = evaluate(tmp_path, verifiers, Spy(lambda prompt, _: f"{prompt}!"), task)["tasks"]["own"]
    assert (numbers["mean_at_k"], numbers["maj_at_k"], numbers["unanswered"]) == (1.0, 0.0, 1.0)
    assert seen == [(Sampling(max_new_tokens=5), False, True)]


def test_what_does_not_fit_is_refused_before_anything_is_sampled(tmp_path, verifiers):
    engine = Scripted(by_seed)
    with pytest.raises(ValueError, match="pass@8 needs 8 samples of each problem, and num_samples is 4"):
        evaluate(tmp_path, verifiers, engine, pass_k=[8])
    with pytest.raises(ValueError, match="num_samples must be an integer ≥ 1, got 0"):
        evaluate(tmp_path, verifiers, engine, num_samples=0)
    with pytest.raises(ValueError, match="each of another name"):
        run([TASK, TASK], lambda: engine, tmp_path, verifiers=verifiers)
    assert engine.asked == []
    assert not any(tmp_path.iterdir())
    evaluate(tmp_path, verifiers)
    with pytest.raises(ValueError, match="holds an evaluation already: resume continues it"):
        evaluate(tmp_path, verifiers)
    with pytest.raises(ValueError, match="was sampled with seed = 0, and 1 is asked for"):
        evaluate(tmp_path, verifiers, resume=True, seed=1)
    with pytest.raises(ValueError, match="other problems, prompts or lengths of 'sums'"):
        evaluate(tmp_path, verifiers, task=Task("sums", TASK.problems, prompt="boxed"), resume=True)
    path = tmp_path / "samples" / "sums.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ValueError, match=r"sums\.jsonl, line 1: no sample of this task"):
        evaluate(tmp_path, verifiers, resume=True)


@pytest.mark.parametrize(
    "names",
    [("my sums", "my_sums"), ("a[:50]", "a__50_"), ("Sums", "sums"), ("a/b", "a_b"), ("ﬁt", "fit")],
    ids=["space", "slice", "case", "slash", "ligature"],
)
def test_samples_of_two_tasks_are_never_kept_in_one_file(tmp_path, verifiers, names):
    engine, tasks = Scripted(by_seed), [Task(name, TASK.problems, prompt="own") for name in names]
    with pytest.raises(ValueError, match="would be kept in one file"):
        run(tasks, lambda: engine, tmp_path, 4, verifiers=verifiers)
    assert engine.asked == []
    assert not any(tmp_path.iterdir())
    # nor by a later run in the same directory
    evaluate(tmp_path, verifiers, task=tasks[0])
    with pytest.raises(ValueError, match="would be kept in one file"):
        evaluate(tmp_path, verifiers, engine, tasks[1], resume=True)
    assert engine.asked == []


@pytest.mark.parametrize("name", ["", "  "], ids=["empty", "spaces"])
def test_a_task_without_a_name_is_refused(tmp_path, verifiers, name):
    with pytest.raises(ValueError, match="a task needs a name"):
        evaluate(tmp_path, verifiers, task=Task(name, TASK.problems))


def test_long_and_odd_names_have_files_of_their_own(tmp_path, verifiers):
    long = "Aufgaben über Brüche " * 30
    names = [long + "1", long + "2", "../up", "nul\0", "\ud800", "sums[1:]"]
    tasks = [Task(name, TASK.problems[index % 4 :], prompt="own") for index, name in enumerate(names)]
    numbers = run(tasks, lambda: Scripted(by_seed), tmp_path, 2, verifiers=verifiers)["tasks"]
    assert [numbers[task.name]["problems"] for task in tasks] == [len(task.problems) for task in tasks]
    files = sorted((tmp_path / "samples").iterdir())
    assert len(files) == len(names)
    assert [path.name for path in files if path.name.startswith("sums")] == ["sums_1__.jsonl"]  # as it always was


# The command.


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{a} + {a}", "answer": 2 * a}) + "\n" for a in range(8)))
    return path


def command(url, problems, output_dir, *more):
    flags = ["--model", "m", "--tasks", str(problems), "--base_url", url, "--num_samples", "2", "--verifiers", "1"]
    return ["eval", *flags, "--output_dir", str(output_dir), *more]


def test_the_command_writes_metrics_and_prints_a_table(stub_server, problems, tmp_path, capsys):
    assert main(command(stub_server.url, problems, tmp_path / "out")) == 0
    assert "| sums | 8 | 1.000 ± 0.000 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["tasks"]["sums"]["mean_at_k"] == 1.0
    assert len(stub_server.bodies) == 16
    prompt = stub_server.bodies[0]["messages"][0]["content"]
    assert prompt.endswith(r"put your final answer within \boxed{}.")


def test_a_killed_command_resumes_without_sampling_twice(stub_server, problems, tmp_path):
    stub_server.seconds = 0.1
    flags = command(stub_server.url, problems, tmp_path / "out", "--concurrency", "1")
    log = tmp_path / "log"
    process = forks.start(forks.command, flags, log=log)
    path = tmp_path / "out" / "samples" / "sums.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.exitcode is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = samples(tmp_path / "out")
    assert 4 <= len(kept) < 16
    stub_server.seconds = 0.0
    asked_before = len(stub_server.bodies)
    assert main([*flags, "--resume"]) == 0
    assert len(stub_server.bodies) - asked_before == 16 - len(kept)
    rows = samples(tmp_path / "out")
    assert [(row["problem"], row["sample"]) for row in rows] == [(p, s) for p in range(8) for s in range(2)]
    for row in kept:
        assert rows[2 * row["problem"] + row["sample"]]["response"] == row["response"]


def test_a_server_that_dies_is_one_clear_line_and_nothing_is_lost(stub_server, problems, tmp_path, capsys, monkeypatch):
    from tipdistill.evaluate import engines

    monkeypatch.setattr(engines.Server.__init__, "__defaults__", (32, 2, 60.0, 0.01, None))
    stub_server.dies_after = 5
    flags = command(stub_server.url, problems, tmp_path / "out", "--concurrency", "1")
    assert main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the server at http://127.0.0.1" in error
    assert len(samples(tmp_path / "out")) == 5
    stub_server.dies_after = None
    assert main([*flags, "--resume"]) == 0
    assert len(samples(tmp_path / "out")) == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "math50"], "there is no task 'math50'"),
        (["--tasks", "absent.jsonl"], "there is no dataset at absent.jsonl"),
        (["--pass_k", "1,16"], "pass@16 needs 16 samples"),
        (["--num_samples", "0"], "num_samples must be an integer ≥ 1"),
        (["--prompt", "Solve it."], "a template with '{problem}' in it"),
        (["--temperature", "-1"], "temperature must be ≥ 0"),
        (["--base_url", "localhost"], "base_url must begin with http"),
        (["--num_sample", "2"], "there is no flag --num_sample. Did you mean '--num_samples'"),
        (["--chat_template_kwargs", "1"], "expected a JSON object"),
        (["--limit", "0"], "limit is a number of problems"),
    ],
)
def test_bad_flags_are_one_clear_line(problems, tmp_path, capsys, flags, message):
    assert main([*command("http://127.0.0.1:9", problems, tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "samples").exists()


def test_the_page_says_what_the_code_does(tmp_path, verifiers):
    from pathlib import Path

    from tipdistill.tasks import TASKS

    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    exec(page.split("```python\n")[1].split("```")[0], {})
    del TASKS["sums"]
    of_directories = (Path(__file__).parents[2] / "docs" / "deepplanning.md").read_text(encoding="utf-8")
    for name, task in TASKS.items():
        if isinstance(task, dict) and "directory" in task:  # a benchmark with a page of its own
            assert f"`{name}=DIR`" in of_directories
            continue
        assert f"| `{name}` |" in page
        assert not isinstance(task, dict) or "dataset" not in task or f"`{task['dataset']}`" in page
    numbers = evaluate(tmp_path, verifiers, num_samples=1)["tasks"]["sums"]
    assert {name for name in numbers if f"`{name}`" not in page} == {"problems", "num_samples"}
    assert {name for name in samples(tmp_path)[0] if f"`{name}`" not in page} == set()
