"""The plan of episodes, against a count token by token."""

from dataclasses import replace

import pytest

from tipdistill.plan import MACHINES, memory, plan, read_config, setup_of, step_time
from tipdistill.plan.recipe import setup_of_recipe
from tipdistill.recipes.read import read_values

# whose memory is endlessly fast, so that all time is arithmetic
MACHINE = replace(MACHINES["h100"], bandwidth=1e30, kernel_launch=1e-12)
PROMPT, TURNS, OWN, RESULT = 96, 5, 40, 30


@pytest.fixture(scope="module")
def episodes():
    student, teacher = (read_config(name) for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"))
    student.num_hidden_layers = teacher.num_hidden_layers = 3
    student.layer_types, teacher.layer_types = student.layer_types[:3], teacher.layer_types[:3]
    shape = {"prompt": PROMPT, "completion": TURNS * OWN + (TURNS - 1) * RESULT, "micro_batch": 2, "accumulation": 2}
    return setup_of(student, teacher, turns=TURNS, results=(TURNS - 1) * RESULT, **shape)


def counted(setup, keeps_context):
    """Flops of writing one rollout, and how many of its tokens are the student's."""
    sizes, flops, written = setup.student_sizes, 0.0, 0

    def forward(first, end):
        return sum(2 * sizes.backbone + 4 * sizes.attention * (place + 0.5) for place in range(first, end))

    length, known = setup.prompt, 0
    for turn in range(TURNS):
        flops += forward(known if keeps_context else 0, length)
        for _ in range(OWN):
            flops += forward(length, length + 1) + 2 * sizes.lm_head
            length, written = length + 1, written + 1
        known = length
        if turn < TURNS - 1:
            length += RESULT
    assert length == setup.prompt + setup.completion
    return flops, written


@pytest.mark.parametrize("engine", ["transformers", "colocate"])
def test_rollouts_take_the_time_of_all_their_prefills_and_of_what_is_written(episodes, engine):
    flops, written = counted(episodes, keeps_context=engine == "colocate")
    assert written == episodes.written == 200
    rate = MACHINE.flops * MACHINE.utilization
    seconds = step_time(replace(episodes, engine=engine), MACHINE)["rollout"]
    assert seconds == pytest.approx(episodes.rollouts * flops / rate, rel=1e-3)


def test_transformers_computes_the_context_anew_and_vllm_keeps_it(episodes):
    anew, kept = (
        step_time(replace(episodes, engine=engine), MACHINE)["rollout"] for engine in ("transformers", "colocate")
    )
    assert anew > 1.5 * kept
    at_once = step_time(replace(episodes, engine="transformers", turns=1, results=0), MACHINE)["rollout"]
    assert at_once != pytest.approx(anew, rel=0.05)


def test_scores_and_the_loss_are_of_the_students_tokens_alone(episodes):
    written, rollouts, vocabulary = TURNS * OWN, 4, 151_936
    student, teacher = 1024, 2048
    kept = rollouts * (written // 2)
    heads = 2 * vocabulary * (rollouts * written * (student + teacher) + kept * (3 * student + teacher))
    rate = MACHINE.flops * MACHINE.head_utilization
    assert step_time(episodes, MACHINE)["lm_heads"] == pytest.approx(heads / rate)
    planned = memory(episodes)["loss"]["teacher hidden states"]
    assert planned == kept * teacher * 2


def test_both_models_read_the_results_too(episodes):
    one_text = replace(episodes, turns=1, results=0)  # as long, and all of it the student's
    ours, theirs = step_time(episodes, MACHINE), step_time(one_text, MACHINE)
    for part in ("student scoring", "teacher", "student forward and backward"):
        assert ours[part] == theirs[part] > 0
    assert ours["lm_heads"] < theirs["lm_heads"]
    assert memory(episodes)["loss"]["activations"] == memory(one_text)["loss"]["activations"]


def test_the_last_turn_of_transformers_begins_with_all_that_stands_before_it(episodes):
    def rollout(setup):
        return sum(memory(replace(setup, engine="transformers", rule="all"))["rollout"].values())

    assert rollout(episodes) > rollout(replace(episodes, turns=1, results=0))
    before = replace(episodes, prompt=PROMPT + episodes.completion - OWN, completion=OWN, turns=1, results=0)
    assert rollout(episodes) == rollout(before)


def of_recipe(turns=None, result_tokens=None, **settings):
    flags = {"config": "laptop", "max_completion_length": "640", "per_device_train_batch_size": "2"}
    flags |= dict.fromkeys(("model_name_or_path", "teacher_model_name_or_path"), "Qwen/Qwen3-0.6B")
    values = read_values([part for name, value in flags.items() for part in (f"--{name}", value)])
    own = {"environment": "mine.World", "max_tool_calling_iterations": 7, "max_tool_result_tokens": 50}
    for name, value in (own | settings).items():
        setattr(values, name, value)
    return setup_of_recipe(values, MACHINES["h100"], turns=turns, result_tokens=result_tokens)


def test_a_recipe_with_an_environment_has_as_many_turns_and_results_as_it_may():
    setup = of_recipe()
    assert (setup.turns, setup.results, setup.written) == (8, 350, 290)
    assert of_recipe(max_tool_calling_iterations=None).turns == 51
    assert of_recipe(max_tool_result_tokens=1024).results == 480  # three quarters of the completion
    given = of_recipe(turns=3, result_tokens=100)
    assert (given.turns, given.results) == (3, 100)
    assert of_recipe(turns=3).results == 100
    plain = of_recipe(environment=None)
    assert (plain.turns, plain.results, plain.written) == (1, 0, 640)


def test_the_plan_says_what_it_takes_an_episode_to_be():
    def assumptions(setup):
        student, teacher = (model.with_layers(3) for model in (setup.student, setup.teacher))
        return plan(replace(setup, student=student, teacher=teacher), MACHINES["h100"], [1.0])["assumptions"]

    (line,) = [line for line in assumptions(of_recipe()) if "episode" in line]
    for said in ("8 turns", "--turns", "350 tokens of results", "--result_tokens", "290 of", "640", "anew before each"):
        assert said in line
    assert not any("episode" in line for line in assumptions(of_recipe(environment=None)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": None, "turns": 3}, "of a recipe with an environment, and this one has none"),
        ({"environment": None, "result_tokens": 3}, "of a recipe with an environment"),
        ({"result_tokens": 640}, r"must leave tokens of the 640 \(max_completion_length\)"),
        ({"result_tokens": -1}, "must leave tokens"),
        ({"turns": 1, "result_tokens": 5}, "do not go together"),
        ({"turns": 400, "result_tokens": 300}, "do not go together"),
    ],
)
def test_an_episode_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        of_recipe(**settings)
