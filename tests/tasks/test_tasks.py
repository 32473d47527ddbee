"""Tasks by name, by file and by dotted path, and what is refused."""

import json

import pytest

from tipdistill.evaluate.task import Problem, Task
from tipdistill.tasks import TASKS, load_task


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_file_with_problem_and_answer(tmp_path):
    task = load_task(
        write(tmp_path / "mine.jsonl", [{"problem": "1 + 1", "answer": 2}, {"problem": "2", "answer": -3}])
    )
    assert task.name == "mine"
    assert task.problems == (Problem("1 + 1", "2"), Problem("2", "-3"))
    assert task.prompt_of(task.problems[0]) == (
        "1 + 1\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_problems_with_an_image_are_refused(tmp_path):
    """The model would be asked about what it does not see."""
    rows = [{"problem": "1 + 1", "answer": 2, "image": None}, {"problem": "How many?", "answer": 3, "image": "a.png"}]
    with pytest.raises(ValueError, match=r"seen.jsonl, row 1 .* has an image, and text alone is read here"):
        load_task(write(tmp_path / "seen.jsonl", rows))
    assert len(load_task(write(tmp_path / "unseen.jsonl", rows[:1])).problems) == 1


def test_a_local_copy_of_a_known_task_is_read_as_that_task(tmp_path):
    path = write(tmp_path / "copy.jsonl", [{"question": "Q", "answer": "It is 3 + 4 = 7.\n#### 7"}])
    task = load_task(f"gsm8k={path}")
    assert (task.name, task.problems) == ("gsm8k", (Problem("Q", "7"),))
    path = write(tmp_path / "math.jsonl", [{"problem": "P", "answer": "p - q"}])
    assert load_task(f"math500={path}").problems == (Problem("P", "p - q"),)


def test_prompt_styles_and_limits(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"problem": "a {b} \\boxed{}", "answer": "1"}] * 3)
    assert load_task(path, prompt="own").prompt_of(Problem("a {b}", "1")) == "a {b}"
    task = load_task(path, limit=2, prompt="Q: {problem}\nA:")
    assert len(task.problems) == 2
    assert task.prompt_of(task.problems[0]) == "Q: a {b} \\boxed{}\nA:"
    chat = Problem([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "1")
    assert task.prompt_of(chat) == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q: U\nA:"}]


def test_registered_tasks(monkeypatch):
    monkeypatch.setitem(TASKS, "sums", {"problems": [("1 + 1 =", "2")], "prompt": "own"})
    monkeypatch.setitem(TASKS, "made", lambda: TASKS["sums"])
    monkeypatch.setitem(TASKS, "ready", Task("ready", (Problem("p", "a"),)))
    assert load_task("sums").problems == load_task("made").problems == (Problem("1 + 1 =", "2"),)
    assert load_task("ready").name == "ready"


def test_dotted_paths(tmp_path, monkeypatch):
    (tmp_path / "my_tasks_of_test.py").write_text(
        "def sums():\n    return {'problems': [('1 + 1 =', 2)]}\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("my_tasks_of_test.sums").problems == (Problem("1 + 1 =", "2"),)
    assert load_task("my_tasks_of_test:sums").problems == (Problem("1 + 1 =", "2"),)
    with pytest.raises(ValueError, match=r"is a int, not a Task or a mapping"):
        load_task("my_tasks_of_test.number")
    with pytest.raises(ValueError, match=r"there is no task 'my_tasks_of_test\.sum'"):
        load_task("my_tasks_of_test.sum")


def test_the_arithmetic_task_wants_the_sum_and_the_end():
    task = load_task("arithmetic")
    a, b = map(int, task.problems[0].text.rstrip("=").split("+"))
    answer = task.problems[0].answer
    assert int(answer) == a + b
    assert task.check(f"0+0+0=00;>{answer}$", answer)
    assert not task.check(f"0+0+0=00;>{answer}", answer)
    assert not task.check(f"{answer}$", answer)
    assert not task.check(f">{int(answer) + 1:05d}$", answer)


def test_fingerprints_tell_sets_and_prompts_apart():
    task = Task("t", (Problem("p", "a"),))
    assert task.fingerprint() == Task("other", (Problem("p", "a"),)).fingerprint()
    others = [Task("t", (Problem("p", "b"),)), Task("t", task.problems, prompt="own"), Task("t", task.problems * 2)]
    assert len({task.fingerprint(), *(task.fingerprint() for task in others)}) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "p"}], "has no column 'answer'"),
        ([{"problm": "p", "answer": "1"}], r"no column 'problem' or 'question' or 'prompt'.* Did you mean 'problm'"),
        (
            [{"problem": "p", "answer": "1"}, {"problem": "p", "answer": " "}],
            r"row 1 \(counting from 0\): an answer is",
        ),
        ([{"problem": "p", "answer": "1"}, {"problem": "p"}], r"row 1 \(counting from 0\): an answer is"),
        ([{"problem": "p", "answer": ["1"]}], "row 0 .*: an answer is"),
        ([{"problem": " ", "answer": "1"}], "row 0 .*: a problem is"),
        ([], "has no problem|is empty|no column"),
    ],
)
def test_bad_answers_files_name_the_row(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task(write(tmp_path / "bad.jsonl", rows))


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n{"problem"\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load_task(str(path))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"problems": [("p", "a")], "promt": "own"}, r"unknown field 'promt'\. Did you mean 'prompt'"),
        ({"prompt": "own"}, "needs 'problems'"),
        ({"problems": []}, "has no problem"),
        ({"problems": [("p", "a")], "prompt": "Solve."}, "a template with"),
    ],
)
def test_bad_mappings_are_refused(monkeypatch, task, message):
    monkeypatch.setitem(TASKS, "bad", task)
    with pytest.raises(ValueError, match=message):
        load_task("bad")


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(ValueError, match=r"there is no task 'mth500'.* Did you mean 'math500'"):
        load_task("mth500")


def test_a_divergence_takes_prompts_without_answers(tmp_path):
    path = write(tmp_path / "held_out.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    task = load_task(f"reverse_kl={path}")
    assert (task.name, task.divergence, len(task.problems)) == ("reverse_kl_held_out", "reverse_kl", 2)
    assert task.prompt_of(task.problems[0]) == "a"
    messages = [{"role": "user", "content": "b"}]
    chat = load_task(f"reverse_kl={write(tmp_path / 'chat.jsonl', [{'prompt': messages}])}")
    assert chat.prompt_of(chat.problems[0]) == messages
    assert load_task(f"forward_kl={path}[1:]").problems == task.problems[1:]
    assert load_task(f"forward_kl={path}").fingerprint() != task.fingerprint()
    with pytest.raises(ValueError, match=r"'forward_kl' needs prompts: forward_kl=FILE\.jsonl takes those of a file"):
        load_task("forward_kl")
    with pytest.raises(ValueError, match=r"divergence must be one of reverse_kl, forward_kl, got 'reverse'"):
        Task("mine", (Problem("p", "-"),), divergence="reverse")
