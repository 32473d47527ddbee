"""Every field set from a recipe and from a flag, and seen where it acts: in the batch, the log, the weights, the files.

A field that is only stored does not pass: each case observes a finished run, once with the default and once with
another value, which a flag gives; from a recipe the run would be given the very same. A field of ours without a case
fails `test_every_field_of_ours_has_a_case`.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from on_cpu import ON_CPU
from trl import DistillationConfig, ScriptArguments

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.cli import main
from tipdistill.recipes.read import TIPScriptArguments, build, read_arguments
from tipdistill.records import open_records

BASE = {
    **ON_CPU,
    "max_steps": 2,
    "max_completion_length": 8,
}


@dataclass
class Run:
    """What a finished run left behind."""

    root: Path
    code: int = 0
    trainer: Any = None
    batches: list = field(default_factory=list)  # of each step: rollouts and selection
    scored_shapes: list = field(default_factory=list)  # of each forward of the scoring pass: rows, padded tokens
    differentiated: list = field(default_factory=list)  # positions of a row, of each forward with gradient
    teacher_moves: list = field(default_factory=list)
    launches: list = field(default_factory=list)
    warnings: list = field(default_factory=list)

    def logged(self, name: str) -> list:
        """A figure of every training step, None where it was not logged."""
        return [entry.get(name) for entry in self.trainer.state.log_history if "loss" in entry]

    def prompts(self) -> set[str]:
        rows = zip(self.batches[0]["prompt_ids"], self.batches[0]["prompt_mask"], strict=True)
        return {self.trainer.processing_class.decode(ids[mask.bool()]) for ids, mask in rows}

    def recorded(self) -> int:
        (directory,) = self.root.glob("run/records/step-*")
        return len(open_records(directory).rollouts)

    def kept(self) -> torch.Tensor:
        return self.batches[0]["selection_weight"] > 0

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("run/checkpoint-*"))


@dataclass(frozen=True)
class Case:
    value: Any
    observe: Callable[[Run], Any]
    before: Any
    after: Any
    given: dict = field(default_factory=dict)
    stale_checkpoint: bool = False


def keeps_the_highest_entropies(run: Run) -> bool:
    batch = run.batches[0]
    for entropy, kept, mask in zip(batch["token_entropy"], run.kept(), batch["completion_mask"].bool(), strict=True):
        if entropy[mask & kept].min() < entropy[mask & ~kept].max():
            return False
    return True


def trains_on_cut(run: Run) -> bool:
    batch = run.batches[0]
    last = batch["completion_ids"].gather(1, batch["completion_mask"].sum(1)[:, None] - 1)[:, 0]
    return bool(run.kept()[last != run.trainer.processing_class.eos_token_id].any())


def divergence_of_the_loss(run: Run) -> str:
    loss = run.logged("loss")[0]
    return min(("reverse_kl", "forward_kl"), key=lambda name: abs(run.logged(name)[0] - loss))


def learning_rates(run: Run) -> list[float]:
    return [round(rate * 1e6, 3) for rate in run.logged("learning_rate")]


def lora_rank(run: Run) -> int | None:
    ranks = {p.shape[0] for name, p in run.trainer.model.named_parameters() if "lora_A" in name}
    return ranks.pop() if len(ranks) == 1 else None


def trained(run: Run) -> list[str]:
    return [name for name, parameter in run.trainer.model.named_parameters() if parameter.requires_grad]


def seed_of_the_order(run: Run) -> int | None:
    rows = run.trainer.train_dataset["prompt"][:]
    for seed in (7, 42):
        first = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:8]
        if {rows[index] for index in first} == run.prompts():
            return seed
    return None


TASK = "tasks_of_test_config_arrives"
ALL = {"selection_rule": "all", "retention": 1.0}
OURS = {
    "selection_rule": Case("entropy", keeps_the_highest_entropies, False, True),
    "retention": Case(0.25, lambda run: round(float(run.kept()[0].float().mean()), 2), 0.5, 0.25),
    "selection_scope": Case("batch", lambda run: len(set(run.kept().sum(1).tolist())) > 1, False, True),
    "normalization": Case("micro_batch", lambda run: "selection_weight" in run.batches[0], True, False),
    "backward": Case(
        "kept", lambda run: max(run.differentiated) <= run.batches[0]["completion_ids"].shape[1], False, True
    ),
    "rollout_ahead": Case(1, lambda run: "writer_logprob" in run.batches[-1], False, True),
    "num_generations": Case(4, lambda run: len(run.prompts()), 8, 2),
    "teacher_offload": Case(True, lambda run: "cpu" in run.teacher_moves, False, True),
    "score_logging_steps": Case(
        1,
        lambda run: [value is not None for value in run.logged("forward_kl")],
        [True, False],
        [True, True],
        {"selection_rule": "entropy"},
    ),
    "record_rollouts": Case(3, lambda run: run.recorded(), 8, 3),
    "scoring_tokens": Case(64, lambda run: max(rows * tokens for rows, tokens in run.scored_shapes) <= 64, False, True),
    # at a learning rate that trains next to nothing the dropped divergence only fluctuates: never threefold, and in
    # fifteen steps above its mean all the same
    "drift_factor": Case(
        1.001, lambda run: any("drifting" in text for text in run.warnings), False, True, {"max_steps": 20}
    ),
    "drift_retention": Case(
        1.0,
        lambda run: [run.logged("selection/kept_fraction")[step] == 1 for step in (0, -1)],
        [False, False],
        [False, True],
        {"max_steps": 20, "drift_factor": 1.001},
    ),
    "mask_truncated_completions": Case(True, lambda run: trains_on_cut(run), True, False),
    "eval_tasks": Case(
        f"{TASK}:six, {TASK}:five",
        lambda run: sorted(path.name for path in run.root.glob("run/eval/step-*/samples/*")),
        [],
        sorted([f"{TASK}_five.jsonl", f"{TASK}_six.jsonl"] * 2),
        {"eval_steps": 2},
    ),
    "eval_num_samples": Case(
        3,
        lambda run: [
            (run.root / f"run/eval/step-{step}/samples/{TASK}_six.jsonl").read_text().count("\n") for step in (0, 2)
        ],
        [1, 1],
        [3, 3],
        {"eval_steps": 2, "eval_tasks": f"{TASK}:six"},
    ),
    "eval_tasks_on_start": Case(
        False,
        lambda run: sorted(path.name for path in run.root.glob("run/eval/step-*")),
        ["step-0", "step-2"],
        ["step-2"],
        {"eval_steps": 2, "eval_tasks": f"{TASK}:six"},
    ),
    "vllm_sync_tolerance": Case(0.5, lambda run: run.trainer.args.vllm_sync_tolerance, None, 0.5),
    "prompt_column": Case("problem", lambda run: "Second column" in min(run.prompts()), False, True),
    "prompt_template": Case(
        "Q: {prompt} {}", lambda run: all(p.startswith("Q: ") and p.endswith(" {}") for p in run.prompts()), False, True
    ),
    "apply_chat": Case(True, lambda run: all("<|start|>user\n" in prompt for prompt in run.prompts()), False, True),
    "max_prompt_length": Case(15, lambda run: len(run.trainer.train_dataset) < 96, False, True),
    "overwrite_output_dir": Case(
        True, lambda run: (run.code, run.checkpoints()), (2, ["checkpoint-7"]), (0, []), stale_checkpoint=True
    ),
    "dry_run": Case(True, lambda run: (run.code, run.trainer is None), (0, False), (0, True)),
    "accelerate_config": Case(
        "multi_gpu", lambda run: [Path(launch[4]).name for launch in run.launches], [], ["multi_gpu.yaml"]
    ),
    "num_processes": Case(
        3, lambda run: [launch[3:6] for launch in run.launches], [], [["--multi_gpu", "--num_processes", "3"]]
    ),
}
# test_train_served.py sees them arrive, where there is a server
OF_A_SERVED_TEACHER = {
    *("teacher_url", "teacher_served_name", "teacher_top_k", "teacher_api_key_env", "teacher_timeout"),
    *("teacher_time_limit", "teacher_concurrency", "teacher_lm_head"),
}
# test_train_teachers.py sees them arrive
OF_OTHER_TEACHERS = {"teachers", "teacher_column", "teacher_prompt_column", "teacher_update"}
# tests/teachers/test_ends.py sees it arrive, where the teacher ends with another token
OF_ANOTHER_END = {"end_as_teacher"}
# tests/cli/test_train_agents.py sees them arrive
OF_TOOLS = {"environment", "max_tool_result_tokens", "tool_timeout"}
# about how a run is started and what it prints: tests/recipes/test_trust.py and test_noise.py see them act
OF_THE_COMMAND_LINE = {"trust_recipe", "verbose"}
TRLS = {
    "output_dir": Case(
        "elsewhere", lambda run: [path.parent.name for path in run.root.glob("*/config.yaml")], ["run"], ["elsewhere"]
    ),
    "learning_rate": Case(5e-4, learning_rates, [1.0, 0.5], [500.0, 250.0]),
    "max_steps": Case(3, lambda run: run.trainer.state.global_step, 2, 3),
    "per_device_train_batch_size": Case(4, lambda run: len(run.batches[0]["prompt_ids"]), 8, 4),
    "gradient_accumulation_steps": Case(2, lambda run: len(run.batches[0]["prompt_ids"]), 8, 16),
    "max_completion_length": Case(5, lambda run: run.batches[0]["completion_ids"].shape[1], 8, 5),
    "temperature": Case(5.0, lambda run: run.logged("entropy")[0] > 5.9, False, True),  # log(400) = 5.99 at infinity
    "beta": Case(0.0, divergence_of_the_loss, "reverse_kl", "forward_kl", ALL),
    "seed": Case(7, seed_of_the_order, 42, 7),
    "lr_scheduler_type": Case("constant", learning_rates, [1.0, 0.5], [1.0, 1.0]),
    "logging_steps": Case(2, lambda run: len(run.logged("loss")), 2, 1),
    "save_steps": Case(
        1, lambda run: run.checkpoints(), ["checkpoint-2"], ["checkpoint-1", "checkpoint-2"], {"save_strategy": "steps"}
    ),
    "use_peft": Case(True, lambda run: all("lora" in name for name in trained(run)), False, True),
    "lora_r": Case(3, lora_rank, 16, 3, {"use_peft": True}),
    "dtype": Case(
        "bfloat16", lambda run: next(run.trainer.teacher_model.parameters()).dtype, torch.float32, torch.bfloat16
    ),
    "teacher_model_init_kwargs": Case(
        {"dtype": "bfloat16"},
        lambda run: [next(model.parameters()).dtype for model in (run.trainer.model, run.trainer.teacher_model)],
        [torch.float32, torch.float32],
        [torch.float32, torch.bfloat16],
    ),
    "shuffle_dataset": Case(
        False, lambda run: run.prompts() == set(run.trainer.train_dataset["prompt"][:8]), False, True
    ),
}


CASES = OURS | TRLS


@pytest.fixture(scope="module")
def run(tiny_model_dir, word_problems, tmp_path_factory):
    """Factory: settings, each given as a flag → the finished Run."""
    data = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [json.loads(line)["prompt"] for line in word_problems.read_text().splitlines()]
    data.write_text("".join(json.dumps({"prompt": row, "problem": f"Second column {row}"}) + "\n" for row in rows))
    base = {
        **BASE,
        "model_name_or_path": str(tiny_model_dir("qwen3", "student")),
        "teacher_model_name_or_path": str(tiny_model_dir("qwen3", "teacher")),
        "dataset_name": str(data),
        "output_dir": "run",
    }

    def start(settings, stale_checkpoint=False):
        root = tmp_path_factory.mktemp("root")
        run = Run(root)
        if stale_checkpoint:
            (root / "run" / "checkpoint-7").mkdir(parents=True)
        tasks = tmp_path_factory.mktemp("tasks")
        (tasks / f"{TASK}.py").write_text("six = five = {'problems': [('2 + 3 =', '5')], 'prompt': 'own'}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.syspath_prepend(tasks)
            watch(patch, run)
            run.code = main(["train", *as_flags(base | settings)])
        return run

    return start


def as_flags(settings: dict[str, Any]) -> list[str]:
    return list(itertools.chain.from_iterable((f"--{name}", as_flag(value)) for name, value in settings.items()))


def as_flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def watch(patch: pytest.MonkeyPatch, run: Run) -> None:
    """Record what the trainer does, and do it."""
    init, generate, score = TIPTrainer.__init__, TIPTrainer._generate_and_score_completions, TIPTrainer._score_rows

    def watched_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        run.trainer = self
        move, backbone = self.teacher_model.to, self.plain_student().base_model
        forward = backbone.forward

        def watched_forward(*given, **options):
            if torch.is_grad_enabled():
                run.differentiated.append(options["input_ids"].shape[1])
            return forward(*given, **options)

        backbone.forward = watched_forward
        self.teacher_model.to = lambda device: (run.teacher_moves.append(str(device)), move(device))[1]

    def watched_generate(self, inputs):
        run.batches.append(generate(self, inputs))
        return run.batches[-1]

    def watched_score(self, student, batch, *rest):
        run.scored_shapes.append(
            (len(batch["prompt_ids"]), batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1])
        )
        return score(self, student, batch, *rest)

    def launched(command, environment):
        run.launches.append(command)
        return 0

    patch.setattr(TIPTrainer, "__init__", watched_init)
    patch.setattr(TIPTrainer, "_generate_and_score_completions", watched_generate)
    patch.setattr(TIPTrainer, "_score_rows", watched_score)
    patch.setattr("tipdistill.recipes.run.supervise", launched)
    patch.setattr("tipdistill.trainer.logger.warning", run.warnings.append)


@pytest.fixture(scope="module")
def run_with_defaults(run):
    """The run without the case's own value; cases that start from the same settings share it."""
    finished: dict[str, Run] = {}

    def get(case):
        key = json.dumps([case.given, case.stale_checkpoint], sort_keys=True)
        if key not in finished:
            finished[key] = run(case.given, stale_checkpoint=case.stale_checkpoint)
        return finished[key]

    return get


@pytest.mark.parametrize("name", CASES)
def test_the_default_is_seen_where_it_acts(name, run_with_defaults):
    case = CASES[name]
    assert case.observe(run_with_defaults(case)) == case.before != case.after


@pytest.mark.parametrize("name", CASES)
def test_a_value_is_seen_where_it_acts(name, run):
    case = CASES[name]
    finished = run({**case.given, name: case.value}, stale_checkpoint=case.stale_checkpoint)
    assert case.observe(finished) == case.after


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_asks_for_what_a_flag_asks_for(name, tmp_path):
    """Which is all that a run is made from."""
    case, recipe = CASES[name], tmp_path / "recipe.yaml"
    named = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "prompts"}
    settings = {**BASE, **named, "output_dir": "run", **case.given}
    settings.pop(name, None)
    recipe.write_text(yaml.safe_dump({name: case.value}))
    plain = read_arguments([*as_flags(settings), "--trust_recipe"])
    from_flag = read_arguments([*as_flags({**settings, name: case.value}), "--trust_recipe"])
    from_recipe = read_arguments(["--config", str(recipe), "--trust_recipe", *as_flags(settings)])
    assert vars(from_recipe.values) == vars(from_flag.values) != vars(plain.values)
    assert build(from_recipe) == build(from_flag)


def test_every_field_of_ours_has_a_case():
    ours = {
        entry.name
        for kind, trls in ((TIPConfig, DistillationConfig), (TIPScriptArguments, ScriptArguments))
        for entry in fields(kind)
        if entry.name not in {inherited.name for inherited in fields(trls)}
    }
    assert (
        ours - OF_A_SERVED_TEACHER - OF_OTHER_TEACHERS - OF_ANOTHER_END - OF_TOOLS - OF_THE_COMMAND_LINE == OURS.keys()
    )
