"""Sample, keep, check, count: what `tipdistill eval` does with a task and an engine.

A directory D holds `eval.json` (what was asked for), `samples/<task>.jsonl` (one completion a line, appended as it is
sampled, with its verdict once it is checked) and `metrics.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..documents import read_json
from ..files import alone, write_text
from ..provenance import versions
from .answers import Verifiers
from .engines import Engine, Sampling
from .episodes import acting_of, is_episode, kept_of, summary
from .metrics import deviation_over_samples, majority, mean_at_k, pass_at_k
from .task import Task

OnProgress = Callable[[str, int, int], None]
_LONGEST_NAME = 180  # bytes of a file's name, of the 255 that a disk takes
PACKAGES = ("tipdistill", "math-verify", "torch", "transformers")


def run(
    tasks: Sequence[Task],
    open_engine: Callable[[], Engine],
    output_dir: str | Path,
    num_samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    pass_k: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    regrade: bool = False,
    verifiers: Verifiers | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Sample every problem of every task `num_samples` times, check the answers and write `metrics.json`.

    Each completion has a seed that is a function of (seed, task, problem, sample) alone.

    Args:
        tasks: with different names.
        open_engine: called once, and only where completions are missing.
        output_dir: D, see above.
        num_samples: k, completions per problem.
        sampling: how they are drawn; a task's own `max_new_tokens` comes first.
        seed: of the sampling.
        pass_k: which pass@k to report; None: the powers of two up to `num_samples`, and `num_samples`.
        settings: further facts to write down (the model's name); resuming needs the same.
        resume: go on with the evaluation that D holds.
        regrade: check the kept samples again.
        verifiers: who checks; None: as many processes as there are cores, at most 4.
        on_progress: called with what is done ("sample" or "check" and the task), how much of it and how much in all.

    Returns:
        What `metrics.json` holds: {"tasks": {name: numbers}, "settings": ...}.

    Raises:
        ValueError: k larger than the samples, tasks of one name, a directory in use, samples of other settings, or a
            samples file that is damaged (with the line).
    """
    sampling = sampling or Sampling()
    ks = _ks(num_samples, pass_k)
    check_names([task.name for task in tasks])
    root = Path(output_dir)
    with alone(root, "evaluation"):
        return _run(
            tasks, open_engine, root, num_samples, sampling, seed, ks, settings, resume, regrade, verifiers, on_progress
        )


def _run(
    tasks: Sequence[Task],
    open_engine: Callable[[], Engine],
    root: Path,
    num_samples: int,
    sampling: Sampling,
    seed: int,
    ks: Sequence[int],
    settings: dict[str, Any] | None,
    resume: bool,
    regrade: bool,
    verifiers: Verifiers | None,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    asked = {
        **(settings or {}),
        "sampling": sampling.described(),
        "seed": seed,
        "tasks": {task.name: task.fingerprint() for task in tasks},
    }
    _claim(root, asked, resume or regrade)
    engine: Engine | None = None
    own = verifiers is None
    verifiers = verifiers or Verifiers()
    figures: dict[str, Any] = {}
    try:
        for task in tasks:
            path = samples_path(root, task.name)
            rows = read_samples(path, len(task.problems))
            missing = [
                (problem, sample)
                for problem in range(len(task.problems))
                for sample in range(num_samples)
                if (problem, sample) not in rows
            ]
            if missing:
                engine = engine or open_engine()
                for row in _sample(task, engine, missing, path, sampling, seed, num_samples, on_progress):
                    rows[row["problem"], row["sample"]] = row
            graded = _grade(task, rows, verifiers, regrade, on_progress)
            if graded:
                write_text(path, "".join(json.dumps(rows[key], ensure_ascii=False) + "\n" for key in sorted(rows)))
            figures[task.name] = summarise(task, rows, num_samples, ks, verifiers)
    finally:
        if own:
            verifiers.close()
    metrics = {"tasks": figures, "num_samples": num_samples, "settings": asked, "versions": versions(PACKAGES)}
    write_metrics(root, metrics)
    return metrics


def write_metrics(root: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics.json`; what could not be measured is null there."""
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "metrics.json", json.dumps(_without_nan(metrics), indent=2, ensure_ascii=False) + "\n")


def samples_path(root: Path, task: str) -> Path:
    """Where an evaluation in `root` keeps the samples of a task.

    Example:
        >>> samples_path(Path("runs/eval"), "math500[:50]").as_posix()
        'runs/eval/samples/math500__50_.jsonl'
    """
    name = "".join(character if character.isalnum() or character in "-_." else "_" for character in task)
    if len(name.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(task.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return root / "samples" / f"{name}.jsonl"


def check_names(names: Sequence[str], kept: Iterable[str] = ()) -> None:
    """Refuse tasks whose samples would be kept in one file.

    Args:
        names: of the tasks of an evaluation.
        kept: of tasks that its directory holds already.

    Raises:
        ValueError: which names.

    Example:
        >>> check_names(["my sums", "my_sums"])
        Traceback (most recent call last):
        ValueError: the samples of 'my sums' and 'my_sums' would be kept in one file, my_sums.jsonl: rename one of them.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be at least one, each of another name; got {', '.join(names) or 'none'}.")
    files: dict[str, str] = {}
    for name in (*kept, *names):
        if not name.strip():
            raise ValueError(f"a task needs a name, by which its samples are kept; got {name!r}.")
        file = samples_path(Path(), name).name
        # a disk may tell neither upper from lower case nor one way to write an accent from another
        other = files.setdefault(unicodedata.normalize("NFKC", file).casefold(), name)
        if other != name:
            raise ValueError(
                f"the samples of {other!r} and {name!r} would be kept in one file, {file}: rename one of them."
            )


def read_samples(path: Path, problems: int) -> dict[tuple[int, int], dict[str, Any]]:
    """The samples that a file holds, by (problem, sample).

    A last line that a killed run left unfinished is cut off the file, and sampled again.

    Args:
        path: JSONL; it need not exist.
        problems: how many the task has.

    Raises:
        ValueError: any other line is no sample of the task; it is named.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            key = row["problem"], row["sample"]
            if not _is_sample(row, problems):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: no sample of this task. Remove the line, and it is sampled again."
            ) from error
        rows.setdefault(key, row)
    return rows


def _is_sample(row: dict[str, Any], problems: int) -> bool:
    """Whether a row has what `summarise` reads, of its types."""
    counts = [row["problem"], row["sample"], row.get("tokens", 0)]
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
        return False
    divergence = row.get("divergence", 0.0)
    if isinstance(divergence, bool) or not isinstance(divergence, (int, float)) or not math.isfinite(divergence):
        return False
    graded = "correct" not in row or (
        isinstance(row["correct"], bool)
        and isinstance(row.get("decided"), bool)
        and isinstance(row.get("answer"), str | None)
    )
    whole = isinstance(row["response"], str) and isinstance(row.get("finished", True), bool)
    return row["problem"] < problems and whole and graded and is_episode(row)


def summarise(
    task: Task,
    rows: dict[tuple[int, int], dict[str, Any]],
    num_samples: int,
    ks: Sequence[int],
    verifiers: Verifiers,
) -> dict[str, Any]:
    """The numbers of one task, from its checked samples.

    Args:
        task: the task.
        rows: samples with verdicts, by (problem, sample).
        num_samples: k; samples beyond are left out.
        ks: of pass@k.
        verifiers: say which answers are equivalent.
    """
    table = [[rows[problem, sample] for sample in range(num_samples)] for problem in range(len(task.problems))]
    if task.divergence is not None:
        return _divergence(table)
    correct = [[row["correct"] for row in samples] for samples in table]
    every = [row for samples in table for row in samples]
    mean, error = mean_at_k(correct)
    elected = []
    for samples in table if task.environment is None else ():
        answers = [row["answer"] if row["decided"] else None for row in samples]
        votes: list[Any] = answers if task.check is not None else verifiers.groups(answers)
        winner = majority(votes)
        elected.append(winner is not None and samples[winner]["correct"])
    return {
        "problems": len(table),
        "num_samples": num_samples,
        "mean_at_k": mean,
        "standard_error": error,
        "deviation_over_samples": deviation_over_samples(correct),
        "pass_at_k": {str(k): fmean(pass_at_k(num_samples, sum(row), k) for row in correct) for k in ks},
        "maj_at_k": fmean(elected) if elected else math.nan,  # conversations do not vote
        "mean_tokens": fmean(row["tokens"] for row in every),
        "truncated": fmean(not row["finished"] for row in every),
        "unanswered": fmean(row["answer"] is None for row in every),
        "undecided": sum(not row["decided"] for row in every),
        **({} if task.environment is None else summary(every)),
    }


def _divergence(table: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The mean over problems, each the mean over the tokens of its samples, and its standard error over problems."""
    means = [divergence_of(samples) for samples in table]
    every = [row for samples in table for row in samples]
    return {
        "problems": len(table),
        "num_samples": len(table[0]),
        "mean": fmean(means),
        "standard_error": stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan,
        "mean_tokens": fmean(row["tokens"] for row in every),
        "truncated": fmean(not row["finished"] for row in every),
    }


def divergence_of(samples: Sequence[dict[str, Any]]) -> float:
    """The mean divergence over all tokens of some samples, nats.

    Example:
        >>> divergence_of([{"divergence": 1.0, "tokens": 1}, {"divergence": 0.0, "tokens": 3}])
        0.25
    """
    return sum(row["divergence"] * row["tokens"] for row in samples) / max(1, sum(row["tokens"] for row in samples))


def _ks(num_samples: int, pass_k: Sequence[int] | None) -> list[int]:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be an integer ≥ 1, got {num_samples!r}.")
    if pass_k is None:
        return sorted({*(2**power for power in range(num_samples.bit_length())), num_samples})
    for k in pass_k:
        if not 1 <= k <= num_samples:
            raise ValueError(f"pass@{k} needs {k} samples of each problem, and num_samples is {num_samples}.")
    return sorted(set(pass_k))


def _claim(root: Path, asked: dict[str, Any], go_on: bool) -> None:
    path = root / "eval.json"
    if not path.exists():
        if (root / "samples").exists() and any((root / "samples").iterdir()):
            raise ValueError(
                f"{root} holds samples and no eval.json, which says what they are: name another directory."
            )
        root.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asked, indent=2) + "\n")
        return
    if not go_on:
        raise ValueError(
            f"{root} holds an evaluation already: resume continues it (--resume), or name another directory."
        )
    try:
        kept = read_json(path)
        if not isinstance(kept, dict) or not isinstance(kept.get("tasks", {}), dict):
            raise ValueError(f"it holds a {type(kept).__name__}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: use another directory.") from error
    for name in {**kept, **asked}:
        if name != "tasks" and kept.get(name) != asked.get(name):
            raise ValueError(
                f"{root} was sampled with {name} = {kept.get(name)!r}, and {asked.get(name)!r} is asked for: the "
                "samples of both would not compare. Name another directory."
            )
    check_names(list(asked["tasks"]), kept.get("tasks", {}))
    for name, fingerprint in asked["tasks"].items():
        if kept.get("tasks", {}).get(name, fingerprint) != fingerprint:
            raise ValueError(
                f"{root} was sampled with other problems, prompts or lengths of {name!r}: name another directory."
            )
    write_text(path, json.dumps({**asked, "tasks": {**kept.get("tasks", {}), **asked["tasks"]}}, indent=2) + "\n")


def _sample(
    task: Task,
    engine: Engine,
    missing: list[tuple[int, int]],
    path: Path,
    sampling: Sampling,
    seed: int,
    num_samples: int,
    on_progress: OnProgress | None,
) -> Iterator[dict[str, Any]]:
    """Yield the missing samples as rows, each of them on the disk by then.

    An engine that samples some prompts together is given whole batches of the task's prompts, so that each is sampled
    with the same others, from the same seed, whatever was sampled before a kill.
    """
    if task.max_new_tokens is not None:
        sampling = replace(sampling, max_new_tokens=task.max_new_tokens)
    every = [(problem, sample) for problem in range(len(task.problems)) for sample in range(num_samples)]
    total, size, needed = len(every), getattr(engine, "batch_size", 1), set(missing)
    done = total - len(missing)
    batches = [every[start : start + size] for start in range(0, total, size)]
    asked = [key for batch in batches if not needed.isdisjoint(batch) for key in batch]
    prompts = [task.prompt_of(task.problems[problem]) for problem, _ in asked]
    seeds = [_seed(seed, task.name, problem, sample) for problem, sample in asked]
    path.parent.mkdir(parents=True, exist_ok=True)
    acting = acting_of(task, [task.problems[problem].row for problem, _ in asked])
    tools = {} if acting is None else {"acting": acting}  # an engine of the user's may know no tools
    with path.open("ab") as file:
        for completions in engine.generate(prompts, seeds, sampling, task.chat, task.special_tokens, **tools):
            rows = [
                {
                    "problem": asked[completion.index][0],
                    "sample": asked[completion.index][1],
                    "prompt": prompts[completion.index],
                    "reference": task.problems[asked[completion.index][0]].answer,
                    "response": completion.text,
                    "tokens": completion.tokens,
                    "finished": completion.finished,
                    **({} if completion.divergence is None else {"divergence": completion.divergence}),
                    **(kept_of(completion) if completion.turns else {}),
                }
                for completion in completions
                if asked[completion.index] in needed
            ]
            # lone surrogates that a server may send are no UTF-8
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.write(text.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
            done += len(rows)
            if on_progress is not None:
                on_progress(f"sample {task.name}", done, total)
            yield from rows


def _grade(
    task: Task,
    rows: dict[tuple[int, int], dict[str, Any]],
    verifiers: Verifiers,
    regrade: bool,
    on_progress: OnProgress | None,
) -> int:
    """Put a verdict into every row that has none; returns how many."""
    if task.divergence is not None or task.environment is not None:  # which judged it when it was over
        return 0
    ungraded = [row for _, row in sorted(rows.items()) if regrade or "correct" not in row]
    done = 0
    for start in range(0, len(ungraded), 64):
        some = ungraded[start : start + 64]
        if task.check is not None:
            for row in some:
                answer = task.extract(row["response"]) if task.extract is not None else row["response"]
                correct = bool(task.check(row["response"], row["reference"]))
                row.update(answer=answer, correct=correct, decided=True)
        else:
            verdicts = verifiers.judge([(row["response"], row["reference"]) for row in some])
            for row, verdict in zip(some, verdicts, strict=True):
                row.update(answer=verdict.answer, correct=verdict.correct, decided=verdict.decided)
        done += len(some)
        if on_progress is not None:
            on_progress(f"check {task.name}", done, len(ungraded))
    return done


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null, where a number does not exist (a deviation of one)."""
    if isinstance(value, dict):
        return {key: _without_nan(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_without_nan(inside) for inside in value]
    return None if isinstance(value, float) and math.isnan(value) else value
