"""Trips: what their databases hold, which plans are right, and what is taught of a solver's episode."""

import json
import random
import re
from dataclasses import replace

import pytest
from transformers import Qwen3ForCausalLM

from tipdistill import rollout
from tipdistill.environments import Limits
from tipdistill.environments.play import play, read_dialect
from tipdistill.environments.world import World, read_environment, tools_of
from tipdistill.evaluate.engines import Local, Sampling
from tipdistill.evaluate.run import run
from tipdistill.tasks import load_task
from tipdistill.tasks import trip as module
from tipdistill.tasks.trip import FAILURE_SHARE, MARKS, Trip, build_tokenizer, prepare, row_of, solve, transcript
from tipdistill.tasks.trip_world import (
    MOST_SLACK,
    ROWS_THERE,
    Hotel,
    Meal,
    Place,
    Problem,
    Train,
    check,
    plan_of,
    plan_text,
    problem_of,
)
from tipdistill.tasks.written import Training

# a problem small enough to see every plan of it: two days for two people, each table a few rows
PROBLEM = Problem(
    "rome",
    "oslo",
    2,
    2,
    (
        Train("t1", "rome", "oslo", "slow", 4, 1),
        Train("t2", "rome", "oslo", "fast", 1, 1),
        Train("t3", "rome", "oslo", "fast", 2, 3),
        Train("t1", "rome", "paris", "fast", 5, 1),
    ),
    (Hotel("h1", "oslo", "lively", 4, 1), Hotel("h2", "oslo", "quiet", 1, 2), Hotel("h3", "oslo", "quiet", 2, 2)),
    (Place("p1", "oslo", "lively", 0, 1), Place("p2", "oslo", "modern", 1, 1), Place("p3", "oslo", "modern", 2, 2)),
    (Meal("m1", "oslo", "lively", 1), Meal("m2", "oslo", "classic", 1), Meal("m3", "oslo", "classic", 6)),
    fast=True,
    sleep="quiet",
    see="modern",
    eat="classic",
    budget=10,
)
# 3 + 2 + 2 + 1 + 1 + 1 = 10
PLAN = "train t3 sleep h3 see-1 p3 see-2 p1 eat-1 m2 eat-2 m1 total 10"


def lost(text, problem=PROBLEM):
    verdict = check(text, problem)
    assert verdict.correct == all(verdict.parts.values())
    assert verdict.figures == {"constraints": sum(verdict.parts.values()) / len(verdict.parts)}
    return {name for name, holds in verdict.parts.items() if not holds}


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        "train t3 sleep h3 see-1 p1 see-2 p2 eat-1 m2 eat-2 m1 total 9",  # another modern place, on the other day
        "train t3 sleep h3 see-1 p3 see-2 p2 eat-1 m1 eat-2 m2 total 10",  # the other meal first
        "eat-2 m1 eat-1 m2 sleep h3 train t3 see-2 p1 see-1 p3 total 10",  # in another order
        f"<think> train t1 total 99 </think> {PLAN}",
    ],
)
def test_any_plan_that_satisfies_everything_is_right(plan):
    assert lost(plan) == set()


@pytest.mark.parametrize(
    ("old", "new", "constraints"),
    [
        ("t3", "t2", {"seats", "total"}),
        ("t3", "t1", {"fast", "total"}),
        ("h3", "h2", {"beds"}),
        ("h3", "h1", {"sleep", "total"}),
        ("see-1 p3", "see-1 p2", {"open", "total"}),
        ("see-1 p3", "see-1 p1", {"nothing twice", "see", "total"}),
        ("eat-1 m2", "eat-1 m1", {"nothing twice", "eat"}),
        ("eat-1 m2", "eat-1 m3", {"budget", "total"}),
        ("total 10", "total 11", {"total"}),
    ],
)
def test_a_change_loses_the_constraints_that_it_breaks_and_no_others(old, new, constraints):
    assert lost(PLAN.replace(old, new)) == constraints


def test_a_plan_that_is_right_but_dear_loses_the_budget_alone():
    assert lost(PLAN, replace(PROBLEM, budget=9)) == {"budget"}


def test_codes_of_another_city_and_of_none_are_not_in_the_database():
    away = replace(PROBLEM, trains=(*PROBLEM.trains, Train("t9", "rome", "paris", "fast", 5, 1)))
    for code in ("t9", "t7", "h3", "none"):
        assert "in the database" in lost(PLAN.replace("t3", code), away)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "total 10",
        PLAN.removesuffix(" 10"),
        PLAN.removesuffix(" total 10"),
        PLAN.replace(" eat-2 m1", ""),
        PLAN.replace("eat-2", "eat-3"),
        PLAN.replace("eat-2", "eat-1"),
        PLAN.replace("total 10", "total ten"),
        PLAN.replace("total 10", "total ١٠"),
        PLAN + " total 10",
        PLAN.replace("total 10", f"total {'9' * 5000}"),
        f"<think> {PLAN} </think>",
        f"{PLAN} </think> again",
    ],
)
def test_a_text_that_is_no_whole_plan_satisfies_nothing(text):
    verdict = check(text, PROBLEM)
    assert not any(verdict.parts.values())
    assert verdict.figures == {"constraints": 0.0}


@pytest.mark.parametrize("seed", range(40))
def test_every_problem_can_be_solved_within_its_budget_but_not_for_much_less(seed):
    problem = problem_of(seed)
    assert problem == problem_of(seed)
    assert lost(plan_text(plan_of(problem)), problem) == set()
    assert problem.budget - sum(row.price for row in plan_of(problem).values()) in range(MOST_SLACK + 1)
    assert len(problem.trains) == len(problem.hotels) == len(problem.places) == len(problem.meals) == 10
    assert sum(map(bool, (problem.fast, problem.sleep, problem.see, problem.eat))) in (2, 3)


def test_tools_tell_what_the_database_holds_of_the_city_that_is_asked_for():
    environment = read_environment("tipdistill.tasks.trip.Trip")()
    environment.reset(**row_of(7))
    problem = problem_of(7)
    there = [row for row in problem.meals if row.city == problem.destination]
    listed = environment.meals(problem.destination).split()
    assert listed == [word for row in there for word in (row.code, str(row.price), row.style)]
    assert listed[1::3] == sorted(listed[1::3])
    assert environment.trains(problem.destination, problem.origin) == environment.hotels("atlantis") == "none"
    for tool, rows in (("hotels", problem.hotels), ("places", problem.places)):
        codes = re.findall(r"\b[hp]\d+", getattr(environment, tool)(problem.destination))
        assert codes == [row.code for row in rows if row.city == problem.destination]
    assert environment.hotels("oslo' OR '1' = '1") == "none"


def test_an_environment_is_reset_to_another_problem():
    environment = Trip()
    for seed in (1, 2, 1):
        environment.reset(**row_of(seed))
        assert environment._verdict(plan_text(plan_of(problem_of(seed)))).correct
    assert not environment._verdict(plan_text(plan_of(problem_of(2)))).correct


def test_every_word_of_a_task_is_a_token_and_its_template_is_one_that_calls_can_be_played_with():
    tokenizer = build_tokenizer()
    read_dialect(tokenizer)  # raises
    world, tools = World((), Trip), tools_of(Trip())
    for seed in range(60):
        ids, taught = transcript((seed, ROWS_THERE), random.Random(seed), world, tokenizer, tools)
        written = [token for token, is_taught in zip(ids, taught, strict=True) if is_taught]
        assert tokenizer.unk_token_id not in written
        assert tokenizer.unk_token_id not in tokenizer(problem_of(seed).request)["input_ids"]
    world.close()


def episodes(count):
    world = World((), Trip)
    for seed in range(count):
        world.reset({"seed": seed}, 60)
        yield seed, solve(problem_of(seed), random.Random(seed), world)
    world.close()


def test_a_fifth_of_the_solver_s_episodes_has_one_failing_call_and_all_end_right():
    failed, kinds = 0, set()
    for seed, messages in episodes(400):
        assert lost(messages[-1]["content"], problem_of(seed)) == set()
        mistaken = [index for index, message in enumerate(messages) if message.get("mistaken")]
        failed += bool(mistaken)
        assert len(mistaken) <= 1
        for index in mistaken:
            result = messages[index + 1]["content"]
            kinds.add(result if result == "none" else re.search("no tool|missing", json.loads(result)["error"])[0])
            assert messages[index + 2]["reasoning_content"] == "again"
    assert abs(failed / 400 - FAILURE_SHARE) < 0.06  # three standard errors
    assert kinds == {"none", "no tool", "missing"}


def test_what_is_taught_is_what_the_student_writes_but_for_calls_that_fail():
    tokenizer, world, tools = build_tokenizer(), World((), Trip), tools_of(Trip())
    failing = 0
    for seed in range(40):
        ids, taught = transcript((seed, ROWS_THERE), random.Random(seed), world, tokenizer, tools)
        world.reset({"seed": seed}, 60)
        expected = []
        for message in solve(problem_of(seed), random.Random(seed), world):
            if message["role"] != "assistant":
                continue
            thought = message["reasoning_content"]
            words = f"<think> {thought} </think> ".split() if thought else []
            words += message["content"].split()
            if message.get("mistaken"):
                failing += 1
                expected += words
                continue
            for call in message.get("tool_calls", []):
                arguments = " ".join(f"{key} {value}" for key, value in call["function"]["arguments"].items())
                words += f"<call> {call['function']['name']} {arguments} </call>".split()
            expected += [*words, "<end>"]
        written = [token for token, is_taught in zip(ids, taught, strict=True) if is_taught]
        assert tokenizer.convert_ids_to_tokens(written) == expected
    assert failing > 0
    world.close()


def solver_s_turn(tokenizer, ids):
    """What the solver writes next in an episode, as ids; the plans of odd seeds state a total that is 1 too high."""
    text = tokenizer.decode(ids)
    request = text.partition("<user> ")[2].partition(" <end>")[0]
    seed = next(seed for seed in SEEDS if problem_of(seed).request == request)
    world = World((), Trip)
    world.reset({"seed": seed}, 60)
    messages = solve(problem_of(seed), random.Random(seed), world)
    world.close()
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    place = turns[text.count("<tool>")]
    before, after = (
        tokenizer.apply_chat_template(messages[:end], add_generation_prompt=end == place, tokenize=False)
        for end in (place, place + 1)
    )
    turn = after.removeprefix(before)
    if place == turns[-1] and seed % 2:
        total = int(turn.split()[-2])
        turn = turn.replace(f"total {total} ", f"total {total + 1} ")
    return tokenizer(turn, add_special_tokens=False)["input_ids"]


SEEDS = range(24)


def test_the_loop_plays_token_by_token_what_is_taught():
    tokenizer, tools, kept = build_tokenizer(), tools_of(Trip()), World((), Trip)
    dialect, failing = read_dialect(tokenizer), 0
    for seed in SEEDS[::2]:
        ids, taught = transcript((seed, ROWS_THERE), random.Random(seed), kept, tokenizer, tools)
        prompt, world = ids[: taught.index(True)], World((), Trip)
        world.reset({"seed": seed}, 60)
        limits = Limits(tokens=module.EPISODE_TOKENS, rounds=module.MOST_ROUNDS, result_tokens=module.RESULT_TOKENS)

        def write(contexts, most):
            return [(solver_s_turn(tokenizer, context), True) for context in contexts]

        (episode,) = play(write, dialect, [prompt], [world], limits)
        world.close()
        assert [*prompt, *episode.completion_ids] == ids
        assert episode.verdict.correct
        failing += "<unk>" in tokenizer.convert_ids_to_tokens(ids)
    kept.close()
    assert failing > 0, "an episode with an error's words in it is among them"


def test_the_hard_score_of_an_evaluation_is_the_checker_s_own(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    engine = Local(Qwen3ForCausalLM(module.model_config(1, 32)), tokenizer, batch_size=8)

    def sample(model, tokenizer, prompts, most, seed, **options):
        return [(solver_s_turn(tokenizer, ids), True) for ids in prompts]

    monkeypatch.setattr(rollout, "_sample", sample)
    task = load_task("trip", limit=len(SEEDS))
    metrics = run([task], lambda: engine, tmp_path, sampling=Sampling(max_new_tokens=512))
    rows = [json.loads(line) for line in (tmp_path / "samples" / "trip.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [seed % 2 == 0 for seed in SEEDS]
    for seed, row in zip(SEEDS, rows, strict=True):
        plan = row["transcript"][-1]["text"].removesuffix(" <end>")
        verdict = check(plan, problem_of(seed))
        assert (row["correct"], row["parts"], row["figures"]) == (verdict.correct, verdict.parts, verdict.figures)
        assert lost(plan, problem_of(seed)) == ({"total"} if seed % 2 else set())
    assert metrics["tasks"]["trip"]["mean_at_k"] == 0.5


def test_the_task_is_measured_on_problems_that_are_neither_trained_on_nor_taught():
    task = load_task("trip")
    assert len(task.problems) == 256
    assert {problem.row["seed"] for problem in task.problems} == set(module.HELD_OUT)
    assert max(module.HELD_OUT) < min(module.TRAINED_ON)
    assert max(module.TRAINED_ON) < module.TAUGHT[0]
    assert task.problems[3].text[0]["content"] == problem_of(3).request


def test_marks_are_told_in_a_text_without_special_tokens():
    tokenizer = build_tokenizer()
    text = "<assistant> <think> again </think> total 1 <end>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.split()[1:-1]
    assert set(MARKS).isdisjoint(tokenizer.all_special_tokens)


def test_models_are_taught_once_and_found_again(tmp_path, monkeypatch):
    brief = Training(layers=1, width=32, steps=2, learning_rate=1e-3, batch=2)
    monkeypatch.setattr(module, "TEACHER", brief)
    monkeypatch.setattr(module, "STUDENT", replace(brief, seed=1, stop=1))
    steps = []
    prepare(tmp_path, 3, lambda *step: steps.append(step[:2]))
    assert steps == [("teacher", 1), ("teacher", 2), ("student", 1)]
    prepare(tmp_path, 3, lambda *step: steps.append(step[:2]))
    assert len(steps) == 3
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["seed"] for row in rows] == [1024, 1025, 1026]
    assert (tmp_path / "models" / "student" / "config.json").is_file()
    with pytest.raises(ValueError, match="prompts must be in 1"):
        prepare(tmp_path, 0)
