"""Odd input at every door: only ValueError and its children may come out, and never a NaN without a word.

    python tests/faults/fuzz.py --inputs 5000
    python tests/faults/fuzz.py --only losses --first 1234 --inputs 1      # one input again

Each input is a function of its door and its number, so a run goes on with --first, and a failure can be had again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import yaml

from tipdistill import Head, http, replies, select, token_scores
from tipdistill.data import load_prompts
from tipdistill.documents import read_yaml
from tipdistill.dotted import names_only
from tipdistill.evaluate.run import read_samples
from tipdistill.loss import fused_divergence_loss, selected_loss
from tipdistill.plan.machines import read_machine
from tipdistill.recipes import recipe_path
from tipdistill.recipes.read import read_values
from tipdistill.recipes.trust import check_environment, code_named
from tipdistill.records import STATISTICS, About, RecordsWriter, open_records
from tipdistill.select import RULES
from tipdistill.sweep import read_grid
from tipdistill.tasks import load_task
from tipdistill.tasks.arithmetic import build_tokenizer
from tipdistill.teachers.served import _likeliest, _whole
from tipdistill.types import Rollout, Scored, TokenScores, TopTokens

# what JSON and YAML can say and nobody means
ODD = (
    *(None, True, False, 0, -1, 1, 3, 10**11, -(2**63), 2**64, 10**400, 1e308, -1e-320, 0.5, math.inf, -math.inf),
    *(math.nan, "", " ", "1", "nan", "0.5", "soft_or", "\ud800", "\x1b[31m", "a" * 300, "é\u202e", "{prompt}", "[/]"),
    *([], [[]], {}, {"": {}}, [None], {"a": [1]}, ["x", 1]),
)
# of weights and hidden states: what float16 holds
MODEST = (0.0, -0.0, 1e-45, 1e-30, 1e-7, 0.5, 1.0, -1.0, 30.0, -88.0, 100.0, 1e4, -6e4, 6e4)
NUMBERS = (0.0, -0.0, 1e-45, 1e-30, 1e-7, 0.5, 1.0, -1.0, 88.0, 100.0, 1e4, 65504.0, 1e19, 3e38, -3e38)


class Silence(AssertionError):
    """A figure that is no number, and nothing said so."""


def changed(value: Any, dice: random.Random, rate: float = 0.15) -> Any:
    """A nested value with some of its parts replaced, dropped, doubled or renamed."""
    if dice.random() < rate:
        return dice.choice(ODD)
    if isinstance(value, dict):
        pairs = [(name, changed(inside, dice, rate)) for name, inside in value.items() if dice.random() > rate / 4]
        if dice.random() < rate:
            pairs.append((dice.choice(("", "x", "\ud800", "seed", "rule", "data")), dice.choice(ODD)))
        return dict(pairs)
    if isinstance(value, list):
        inner = [changed(inside, dice, rate) for inside in value if dice.random() > rate / 4]
        return inner + inner[: dice.random() < rate]
    return value


def damaged(raw: bytes, dice: random.Random) -> bytes:
    """Bytes that were cut, flipped, lost or added; now and then in another encoding, or deeply nested."""
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        kind, at = dice.randrange(8), dice.randrange(len(raw) + 1)
        if kind == 0:
            raw = raw[:at]
        elif kind == 1 and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :]
        elif kind == 2:
            raw = raw[:at] + dice.randbytes(dice.randrange(1, 9)) + raw[at:]
        elif kind == 3:
            raw = raw[:at] + raw[at + dice.randrange(1, 9) :]
        elif kind == 4:
            raw = raw[:at] + dice.choice((b"[", b"{", b"- ", b"'", b'"', b"&a ", b"*a", b"!!int ", b"? ")) + raw[at:]
        elif kind == 5 and dice.random() < 0.1:
            raw = raw[:at] + dice.choice((b"[" * 30_000, b"9" * 5000, b'{"a":' * 3000)) + raw[at:]
        elif kind == 6 and dice.random() < 0.1:
            raw = raw.decode("utf-8", "replace").encode(dice.choice(("utf-16", "utf-32", "utf-8-sig")))
        elif kind == 7:
            piece = raw[at : at + dice.randrange(1, 40)]
            raw = raw[:at] + piece + raw[at:]
    return raw


def text_of(value: Any, dice: random.Random) -> bytes:
    """A value as JSON, whole or damaged."""
    raw = json.dumps(value, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    return damaged(raw, dice) if dice.random() < 0.2 else raw


def finite(name: str, *values: torch.Tensor | None) -> None:
    for value in values:
        if value is not None and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise Silence(f"{name} is not finite: {value.flatten()[:8].tolist()}")


# The doors.


def tensor(
    dice: random.Random,
    *shape: int,
    spread: float = 1.0,
    odd: float = 0.02,
    among: Sequence[float] = (*NUMBERS, math.nan, math.inf, -math.inf),
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    value = torch.randn(shape, generator=generator) * spread
    flat = value.view(-1)
    for _ in range(sum(dice.random() < odd for _ in range(min(50, flat.numel())))):
        flat[dice.randrange(flat.numel())] = dice.choice(among)
    return value.to(dice.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)))


def heads(dice: random.Random) -> tuple[Head, Head, int, int]:
    count, vocabulary, width = dice.randrange(0, 7), dice.randrange(1, 40), dice.randrange(1, 9)
    spread = dice.choice((0.0, 0.1, 1.0, 1.0, 5.0, 50.0))
    odd = dice.choice((0.0, 0.0, 0.02))
    pair = []
    for rows in (vocabulary, vocabulary + dice.choice((0, 0, 3))):
        bias = tensor(dice, rows, odd=odd, among=(*MODEST, math.nan)) if dice.random() < 0.3 else None
        weight = tensor(dice, rows, width, odd=odd, among=(*MODEST, math.nan))
        hidden = tensor(dice, count, width, spread=spread, odd=odd, among=(*MODEST, math.nan, math.inf))
        hidden = hidden.to(weight.dtype)
        pair.append(Head(hidden, weight, None if bias is None else bias.to(weight.dtype)))
    return pair[0], pair[1], count, vocabulary


def of_rules(dice: random.Random, _: Path) -> None:
    count = dice.randrange(0, 60)
    values = {}
    for name in (*STATISTICS, "entropy_norm", "gradient_norm", "hellinger", "jsd", "divergence", "signal_to_curvature"):
        if dice.random() < 0.9:
            kind = dice.random()
            value = torch.full((count,), dice.choice(NUMBERS)) if kind < 0.1 else tensor(dice, count, odd=0.01).abs()
            values[name] = value.float() if dice.random() < 0.8 else value
    scores = TokenScores(**values)
    rule = dice.choice(("", "complement:")[: 1 + (dice.random() < 0.2)]) + dice.choice((*RULES, "softor", "", "\ud800"))
    retention = dice.choice((0.5, 0.1, 1.0, 1e-9, 1 - 1e-12, dice.random(), 0, -1, 2, math.nan, math.inf, "0.5", True))
    rollout = torch.tensor([dice.randrange(5) for _ in range(count)]) if dice.random() < 0.7 else None
    scope = dice.choice((None, None, "rollout", "batch", "token"))
    chosen = select(scores, rule, retention, rollout, scope, torch.Generator().manual_seed(dice.randrange(99)))
    finite("score", chosen.score)
    finite("weight", chosen.weight)
    if bool((chosen.weight < 0).any()) or bool((chosen.weight[~chosen.mask] != 0).any()):
        raise Silence("a weight is negative, or of a token that was dropped")


def of_scores(dice: random.Random, _: Path) -> None:
    student, teacher, count, vocabulary = heads(dice)
    ids = torch.randint(max(1, vocabulary + (dice.random() < 0.05)), (count,)) if dice.random() < 0.7 else None
    temperature = dice.choice((1.0, 1.0, 0.7, 0.1, 1e3, 0.0, -1.0, math.nan, math.inf))
    rule = dice.choice((*RULES, None, None, "q4"))
    both = teacher if dice.random() < 0.9 else None
    scores = token_scores(student, both, rule=rule, token_ids=ids, temperature=temperature)
    for name, value in scores.present():
        finite(name, value)


def of_losses(dice: random.Random, _: Path) -> None:
    student, teacher, count, _ = heads(dice)
    hidden, weight = student.hidden.clone().requires_grad_(), student.weight.clone().requires_grad_()
    student = Head(hidden, weight, student.bias)
    weights = torch.rand(count) * dice.choice((0.0, 1.0, 1.0, 1e10)) if dice.random() < 0.5 else None
    loss = fused_divergence_loss(
        student,
        teacher,
        weights,
        dice.choice(("reverse_kl", "forward_kl", "jsd")),
        beta=dice.choice((0.5, 0.5, 0.1, 0.9, 0.0, 1.0, -1, math.nan)),
        temperature=dice.choice((1.0, 1.0, 0.5, 2.0, 0.0, math.inf)),
    )
    finite("loss", loss)
    if loss.requires_grad:
        loss.backward()
        finite("gradient", hidden.grad, weight.grad)


def of_selected_losses(dice: random.Random, _: Path) -> None:
    student, teacher, count, _ = heads(dice)
    hidden = student.hidden.clone().requires_grad_()
    rule = dice.choice(("soft_or", "entropy", "random", "all", "q3", "gradient_norm_sampling", "cumulative_advantage"))
    ids = torch.randint(student.weight.shape[0], (count,))
    scores = token_scores(Head(hidden, student.weight, student.bias), teacher, rule=rule, token_ids=ids)
    loss = selected_loss(scores, select(scores, rule, dice.choice((0.5, 0.1, 1.0))))
    finite("loss", loss)
    loss.backward()
    finite("gradient", hidden.grad)


PROMPTS = [
    {"prompt": "1 + 1 =", "answer": "2", "n": 1},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "meta": {"a": [1, 2]}},
    {"problem": "x", "answer": 3.0, "prompt": "é🙂"},
]


def of_prompts(dice: random.Random, folder: Path) -> None:
    kind, rate = dice.choice(PROMPTS), dice.choice((0.0, 0.0, 0.02, 0.08))
    rows = [changed(kind, dice, rate) for _ in range(dice.randrange(0, 4))]
    path = folder / dice.choice(("p.jsonl", "p.json"))
    joined = b"\n".join(text_of(row, dice) for row in rows) if path.suffix == ".jsonl" else text_of(rows, dice)
    path.write_bytes(joined)
    options = {"template": dice.choice((None, None, "{prompt}!", "x")), "as_chat": dice.random() < 0.2}
    column = dice.choice(("prompt", "prompt", "prompt", "problem", ""))
    for prompt in load_prompts(path, column=column, **options)["prompt"][:]:
        json.dumps(prompt, ensure_ascii=False).encode()


def of_tasks(dice: random.Random, folder: Path) -> None:
    path = folder / "t.jsonl"
    rows = [changed({"problem": "1+1", "answer": "2"}, dice, 0.1) for _ in range(dice.randrange(0, 4))]
    path.write_bytes(b"\n".join(text_of(row, dice) for row in rows))
    pieces = (str(path), "arithmetic", "json.TASK", "math50", "a.b.c", "[:2]", "[1:]", "[2:1]", "[:]", "=", "", "\x1b")
    name = "".join(dice.choice(pieces) for _ in range(dice.choice((1, 2, 2, 3))))
    if name.startswith(str(path)) or dice.random() < 0.3:
        name = str(path) + dice.choice(("", "[:1]", "[5:]"))
    with names_only():
        task = load_task(name, limit=dice.choice((None, None, 1, 0, -1)))
    for problem in task.problems:
        json.dumps(problem.text, ensure_ascii=False).encode()


RECIPE = {
    "model_name_or_path": "s",
    "teacher_model_name_or_path": "t",
    "dataset_name": "d.jsonl",
    "retention": 0.2,
    "selection_rule": "soft_or",
    "learning_rate": 1e-5,
    "max_steps": 3,
    "env": {"NCCL_DEBUG": "INFO"},
    "seed": 1,
    "model_init_kwargs": {"dtype": "auto"},
    "use_cpu": True,
    "eval_tasks": "arithmetic",
}
GRID = {
    "base": "laptop",
    "cells": {"all": 1.0, "own": {"rule": "soft_or", "retentions": [0.5], "overrides": {}}},
    "learning_rates": [1e-3, 1e-4],
    "seeds": [0, 1],
    "validation": {"task": "json.TASK", "seeds": [9]},
    "test": ["email.mime.TASK[:9]"],
    "num_samples": 2,
    "overrides": {"max_steps": 3},
    "keep_models": True,
}


def written(value: Any, dice: random.Random, path: Path) -> Path:
    """A value as YAML, changed, damaged or both."""
    try:
        other = changed(value, dice, dice.choice((0.0, 0.02, 0.06)))
        text = yaml.safe_dump(other, allow_unicode=dice.random() < 0.5, sort_keys=False)
        raw = text.encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError):  # what YAML itself cannot write
        raw = yaml.safe_dump(value).encode()
    path.write_bytes(damaged(raw, dice) if dice.random() < 0.3 else raw)
    return path


def of_recipes(dice: random.Random, folder: Path) -> None:
    path = written(RECIPE, dice, folder / "r.yaml")
    read_values(["--config", str(path), *dice.choice(([], ["--trust_recipe"], ["--retention", "x"]))])


def of_yaml(dice: random.Random, folder: Path) -> None:
    value = read_yaml(written(dice.choice((RECIPE, GRID)), dice, folder / "a.yaml"))
    if isinstance(value, dict):
        code_named(value)
        check_environment("a.yaml", value.get("env"))


def of_grids(dice: random.Random, folder: Path) -> None:
    with names_only():
        grid = read_grid(written(GRID, dice, folder / "g.yaml"))
    assert grid.rows
    assert all(0 < row.retention <= 1 for row in grid.rows)


def of_machines(dice: random.Random, folder: Path) -> None:
    plain = {"base": "h100", "flops": "1e15", "memory_gib": 80, "utilization": 0.4}
    machine = read_machine(str(written(plain, dice, folder / "m.yaml")))
    assert all(math.isfinite(rate) for rate in vars(machine).values())


_recorded: dict[str, bytes] = {}


def recorded() -> dict[str, bytes]:
    """The files of whole records."""
    if not _recorded:
        with tempfile.TemporaryDirectory() as folder:
            about = About("s", "t", vocabulary=18)
            scores = {name: torch.rand(7, generator=torch.Generator().manual_seed(1)) for name in about.fields()}
            top = TopTokens(torch.arange(35).reshape(7, 5) % 18, torch.full((7, 5), 0.2))
            with RecordsWriter(folder, build_tokenizer(), about) as writer:
                rollouts = [Rollout(0, "1+1=", (1,), (2, 16), True), Rollout(1, "é", (3,), (1, 2, 3, 4, 5), False)]
                writer.write(rollouts, Scored(TokenScores(**scores), top, top))
            _recorded.update({path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})
    return _recorded


def of_records(dice: random.Random, folder: Path) -> None:
    spoiled = dice.choice(sorted(recorded()))
    for name, raw in recorded().items():
        (folder / name).write_bytes(damaged(raw, dice) if name == spoiled else raw)
    if spoiled == "records.json" and dice.random() < 0.5:
        (folder / spoiled).write_bytes(text_of(changed(json.loads(recorded()[spoiled]), dice), dice))
    records = open_records(folder)
    records.read().to_pylist()
    finite("entropy_norm", records.scores().entropy_norm)


def of_samples(dice: random.Random, folder: Path) -> None:
    row = {"problem": 0, "sample": 0, "response": "4", "tokens": 1, "finished": True, "correct": True, "decided": True}
    rows = [text_of(changed({**row, "answer": "4"}, dice, 0.05), dice) for _ in range(dice.randrange(0, 4))]
    (folder / "s.jsonl").write_bytes(b"".join(raw + b"\n" for raw in rows))
    for sample in read_samples(folder / "s.jsonl", 2).values():
        assert isinstance(sample["response"], str)


LOGPROBS = [None, *({str(token): {"logprob": math.log(0.2), "rank": 1} for token in range(n, n + 4)} for n in range(3))]
ANSWERS = {
    "models": {"data": [{"id": "m"}, {"id": "n"}]},
    "tokens": {"tokens": [1, 2, 3]},
    "logprobs": {"choices": [{"prompt_logprobs": LOGPROBS}]},
    "whole": {"choices": [{"prompt_logprobs": [None, *[{str(t): {"logprob": math.log(0.25)} for t in range(4)}] * 3]}]},
    "text": {"choices": [{"text": "4", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}},
    "chat": {"choices": [{"message": {"content": "4"}, "finish_reason": "length"}], "usage": {"completion_tokens": 1}},
}


def of_answers(dice: random.Random, _: Path) -> None:
    kind = dice.choice(sorted(ANSWERS))
    raw = text_of(changed(ANSWERS[kind], dice, dice.choice((0.02, 0.1))), dice)
    reply = http._parsed(raw)
    if kind == "models":
        assert all(isinstance(name, str) and name for name in replies.model_names(reply))
    elif kind == "tokens":
        assert all(0 <= token < 50 for token in replies.token_ids(reply, 50))
    elif kind in ("text", "chat"):
        text, tokens, finished = replies.written(reply, kind == "chat")
        assert (type(text), type(tokens), type(finished)) == (str, int, bool)
        assert 0 <= tokens < 2**31
    else:
        entries = replies.prompt_logprobs(reply, 4, [1, 2, 3], 50)
        sampled, where = [1, 2, 3], ["a", "b", "c"]
        found = _whole(entries, sampled, where, 4) if kind == "whole" else _likeliest(entries, sampled, 4, where, 4)
        if bool(torch.isnan(found.logprob).any()) or bool(torch.isnan(found.sampled).any()):
            raise Silence("a log-probability is NaN")


def of_addresses(dice: random.Random, _: Path) -> None:
    pieces = ("http://", "https://", "me:hunter2@", "hunter2@", "host", "[::1]", ":8000", ":99999", "/v1", "?", "#")
    pieces = (*pieces, "\x1b", " ", "/", "é", "\ud800", "%00", "\n", "@", ":", "[", "]", "..")
    url = "".join(dice.choice(pieces) for _ in range(dice.randrange(0, 4)))
    url = dice.choice(("", "http://host", "https://host/v1", "http://[::1]")) + url
    try:
        given = http.server_url("teacher_url", url)
    except ValueError as error:
        if "hunter2" in str(error):
            raise Silence(f"a password is shown: {error}") from error
        raise
    assert "hunter2" not in given
    assert given.isprintable()
    http.key_of("x", None, given)


Door = Callable[[random.Random, Path], None]
# door: its function, and its share of the inputs, by what one of them costs
DOORS: dict[str, tuple[Door, float]] = {
    "rules": (of_rules, 0.2),
    "scores": (of_scores, 0.1),
    "losses": (of_losses, 0.1),
    "selected losses": (of_selected_losses, 0.05),
    "prompts": (of_prompts, 0.04),
    "tasks": (of_tasks, 0.03),
    "recipes": (of_recipes, 0.01),
    "yaml": (of_yaml, 0.05),
    "grids": (of_grids, 0.04),
    "machines": (of_machines, 0.03),
    "records": (of_records, 0.05),
    "samples": (of_samples, 0.1),
    "server answers": (of_answers, 0.15),
    "addresses": (of_addresses, 0.05),
}


def run(name: str, first: int, inputs: int) -> tuple[Counter, dict[int, str]]:
    """What came of the inputs of a door: how many were accepted and refused, and what else came out, by number."""
    door, counts, failed = DOORS[name][0], Counter(), {}
    with tempfile.TemporaryDirectory() as root:
        for number in range(first, first + inputs):
            dice = random.Random(f"{name} {number}")
            torch.manual_seed(number)
            try:
                door(dice, Path(root))
                counts["accepted"] += 1
            except (ValueError, FileNotFoundError):  # what is documented of every door
                counts["refused"] += 1
            except Exception as error:
                counts["failed"] += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                said = " ".join(str(error).split())[:160]
                failed[number] = f"{type(error).__name__}: {said} ({Path(place.filename).name}:{place.lineno})"
    return counts, failed


def doors(only: str | None) -> Iterator[tuple[str, float]]:
    shares = {name: share for name, (_, share) in DOORS.items() if only in (None, name)}
    for name, share in shares.items():
        yield name, share / sum(shares.values())


def main(argv: list[str] | None = None) -> int:
    """Run the doors and print a line each; 1 where anything but a ValueError came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000, help="over all doors (default 5000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each door (default 0)")
    parser.add_argument("--only", choices=list(DOORS), help="one door")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    recipe_path("laptop")
    bad = 0
    for name, share in doors(options.only):
        started, inputs = time.monotonic(), max(1, round(options.inputs * share))
        counts, failed = run(name, options.first, inputs)
        seconds = time.monotonic() - started
        line = f"{name:<16} {inputs:>8,} inputs: {counts['accepted']:>8,} accepted, {counts['refused']:>8,} refused, "
        print(f"{line}{counts['failed']:>4,} failed ({seconds:.0f} s)", flush=True)
        alike = Counter()
        for number, what in failed.items():
            alike[what.rpartition("(")[2]] += 1
            if alike[what.rpartition("(")[2]] <= 2:
                print(f"  --only {name!r} --first {number} --inputs 1: {what}", flush=True)
        bad += counts["failed"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
