"""TIPTrainer against TRL, against itself split differently, and at its edges."""

import copy
import json
import math
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer

import tipdistill.trainer
from tipdistill import TIPConfig, TIPTrainer
from tipdistill.records import open_records
from tipdistill.teachers import ChosenTeacher, local
from tipdistill.training import choosing
from tipdistill.training.scoring import scoring_pieces, trimmed
from tipdistill.training.shared_tokens import share_tokens

PLAIN = {
    **ON_CPU,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    # greedy, so that two ways to run the same step write the same rollouts
    "generation_kwargs": {"do_sample": False},
}
DISTRIBUTED = Path(__file__).parent / "distributed_run.py"


@pytest.fixture
def prompts(word_problems):
    return Dataset.from_json(str(word_problems))


@pytest.fixture
def pair(tiny_model_dir):
    return str(tiny_model_dir("qwen3", "student")), str(tiny_model_dir("qwen3", "teacher"))


@pytest.fixture
def make(pair, prompts, tmp_path):
    def build(model=None, teacher=None, dataset=None, trainer=TIPTrainer, config=TIPConfig, extra=None, **settings):
        settings = {**PLAIN, "per_device_train_batch_size": 8, "max_steps": 2, **settings}
        return trainer(
            model=model or pair[0],
            teacher_model=teacher or pair[1],
            args=config(str(settings.pop("output_dir", tmp_path / "run")), **settings),
            train_dataset=prompts if dataset is None else dataset,
            **(extra or {}),
        )

    return build


def steps(trainer, *names):
    """The logged figures of each step, one list per name."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [[entry[name] for entry in history] for name in names]


def gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_tokens_give_trls_loss_and_gradients(make, prompts, beta):
    ours = make(selection_rule="all", retention=1.0, beta=beta)
    trls = make(trainer=DistillationTrainer, config=DistillationConfig, beta=beta)
    for trainer in (ours, trls):
        trainer.model.train()
    inputs = trls._prepare_inputs([prompts[index] for index in range(8)])
    expected_loss, expected = gradients(trls, inputs)
    loss, found = gradients(ours, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, gradient in expected.items():
        # fp32 sums in another order: relative to the largest entry of each tensor
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, name


def test_training_on_all_tokens_follows_trl_step_by_step(make):
    ours = make(selection_rule="all", max_steps=3)
    trls = make(trainer=DistillationTrainer, config=DistillationConfig, max_steps=3)
    for trainer in (ours, trls):
        trainer.train()
    for found, expected in zip(
        steps(ours, "loss", "grad_norm", "entropy"), steps(trls, "loss", "grad_norm", "entropy"), strict=True
    ):
        assert found == pytest.approx(expected, rel=2e-4)


RULES = [
    {"selection_rule": "soft_or", "retention": 0.3},
    {"selection_rule": "soft_or", "retention": 0.3, "selection_scope": "batch"},
    {"selection_rule": "entropy", "retention": 0.2, "score_logging_steps": 0},
    {"selection_rule": "random", "retention": 0.25, "selection_scope": "batch"},
    {"selection_rule": "soft_or", "retention": 0.3, "teacher_offload": True},
    {"selection_rule": "soft_or", "retention": 0.3, "scoring_tokens": 64},
    # a rule without normalisers across rollouts is exact here too: the denominator is known ahead
    {"selection_rule": "divergence", "retention": 0.3, "normalization": "micro_batch"},
    {"selection_rule": "gradient_norm_sampling", "retention": 0.1, "selection_scope": "batch"},
    *(
        {"selection_rule": rule, "retention": 0.3, "selection_scope": scope, "normalization": "running"}
        for rule, scope in (
            ("soft_or", "rollout"),
            ("soft_or", "batch"),
            ("q3", "rollout"),
            ("random", "rollout"),
            ("random", "batch"),
            ("gradient_norm_sampling", "rollout"),
            ("gradient_norm_sampling", "batch"),
            ("complement:entropy_sampling", "batch"),
            ("teachability", "batch"),
            ("confidence_ratio", "rollout"),
            ("position", "rollout"),
            ("all", "rollout"),
        )
    ),
    {"selection_rule": "entropy", "retention": 0.2, "score_logging_steps": 2, "normalization": "running"},
    *(
        {"selection_rule": rule, "retention": 0.3}
        for rule in (
            "entropy_jsd_sampling",
            "teachability",
            "teachability_soft_or",
            "selectkd",
            "position",
            "prefix_compatibility",
            "confidence_ratio",
            "entropy_gap",
            "cumulative_advantage",
        )
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(str(value) for value in rule.values()))
def test_one_by_eight_equals_eight_by_one(make, rule):
    whole = make(per_device_train_batch_size=8, gradient_accumulation_steps=1, **rule)
    split = make(per_device_train_batch_size=1, gradient_accumulation_steps=8, **rule)
    for trainer in (whole, split):
        trainer.train()
    for found, expected in zip(steps(split, "loss", "grad_norm"), steps(whole, "loss", "grad_norm"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    names = ("selection/kept_fraction", "selection/trained_tokens")
    assert steps(split, *names) == steps(whole, *names)


def count_forwards(trainer, monkeypatch):
    """How often the student's backbone runs with and without gradients, from here on."""
    counted = {"with": 0, "without": 0}
    backbone = trainer.plain_student().base_model
    forward = backbone.forward

    def counting(*arguments, **options):
        if not options.get("use_cache"):  # that is a rollout's
            counted["with" if torch.is_grad_enabled() else "without"] += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(backbone, "forward", counting)
    return counted


@pytest.mark.parametrize(
    ("settings", "scoring"),
    [
        ({}, 1),  # of the first step, which has none before it
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 2),
        ({"normalization": "batch"}, 0),  # one micro-batch is the whole batch
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "normalization": "batch"}, 6),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "normalization": "micro_batch"}, 0),
        ({"teacher_offload": True}, 3),
    ],
    ids=str,
)
def test_the_student_runs_once_where_its_tokens_can_be_chosen_in_the_loss(make, monkeypatch, settings, scoring):
    trainer = make(**{"record_rollouts": 0, "max_steps": 3, **settings})
    trainer._student_check = lambda trainer: None
    counted = count_forwards(trainer, monkeypatch)
    trainer.train()
    assert counted == {"with": 3 * trainer.args.gradient_accumulation_steps, "without": scoring}


def test_dropout_keeps_the_scoring_pass(make, monkeypatch):
    """Tokens are chosen by the student that wrote them, which has no dropout."""
    trainer = make(record_rollouts=0, normalization="batch")
    trainer._student_check = lambda trainer: None
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    counted = count_forwards(trainer, monkeypatch)
    trainer.train()
    assert counted["without"] == 2


def test_the_first_step_of_running_is_that_of_batch_and_the_next_reads_it(make):
    settings = {"retention": 0.3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 3}
    exact, running = (make(**settings, normalization=name) for name in ("batch", "running"))
    for trainer in (exact, running):
        trainer.train()
    names = ("loss", "grad_norm", "quadrants/q1", "selection/kept_fraction")
    for of_running, of_exact in zip(steps(running, *names), steps(exact, *names), strict=True):
        assert of_running[0] == pytest.approx(of_exact[0], rel=1e-6)
        assert of_running[1:] == pytest.approx(of_exact[1:], rel=0.2)  # nearly the same tokens
    (entropy_low, entropy_high), (low, high) = running.monitor.running["scales"]
    assert 0 <= entropy_low < entropy_high <= 1
    assert 0 <= low < high
    assert exact.monitor.running is None


@pytest.mark.parametrize("rule", ["entropy", "soft_or"])
def test_running_logs_what_the_step_computed_and_not_what_the_next_will(make, rule):
    """Which statistics there are changes every score_logging_steps, and the step ends before they are summed up."""
    settings = {"selection_rule": rule, "score_logging_steps": 3, "max_steps": 5, "record_rollouts": 0}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    exact, running = (make(**settings, normalization=name) for name in ("batch", "running"))
    for trainer in (exact, running):
        trainer.train()
    names = ("forward_kl", "reverse_kl", "quadrants/q4", "selection/kept_divergence_share", "entropy")
    for of_exact, of_running in zip(exact.state.log_history, running.state.log_history, strict=True):
        assert [name in of_running for name in names] == [name in of_exact for name in names]
        for name in names:
            if name in of_exact:
                assert of_running[name] == pytest.approx(of_exact[name], rel=0.3), name


def test_running_wants_to_know_whether_a_function_scales(make):
    def surprise(scores):
        return scores.require("entropy")

    for attributes in ({}, {"fields": ("entropy",)}, {"scaled": False}):
        surprise.__dict__.clear()
        surprise.__dict__.update(attributes)
        with pytest.raises(ValueError, match=r"wants to know of .*surprise"):
            make(selection_rule=surprise, normalization="running")
    surprise.fields = ("entropy",)
    make(selection_rule=surprise, normalization="running", record_rollouts=0).train()


@pytest.mark.parametrize("rows", [(64, 80), (80, 64)])
def test_padded_vocabularies(make, tiny_model_dir, tiny_tokenizer, rows):
    used = len(tiny_tokenizer)
    student_rows, teacher_rows = used + rows[0], used + rows[1]
    student = str(tiny_model_dir("qwen2", "student", vocab_rows=student_rows))
    teacher = str(tiny_model_dir("qwen2", "teacher", vocab_rows=teacher_rows))
    with pytest.raises(ValueError, match="vocab"):
        make(student, teacher, trainer=DistillationTrainer, config=DistillationConfig)
    trainer = make(student, teacher, generation_kwargs=None, temperature=1.0)
    shared = min(student_rows, teacher_rows)
    suppressed = trainer.generation_config.suppress_tokens or []
    assert list(suppressed) == list(range(shared, student_rows))
    before = trainer.model.get_output_embeddings().weight.detach().clone()
    trainer.train()
    assert all(math.isfinite(loss) for loss in steps(trainer, "loss")[0])
    after = trainer.model.get_output_embeddings().weight.detach()
    assert (after[:used] != before[:used]).any()


def test_a_loaded_teacher_without_a_tokenizer_is_taken_with_a_warning(make, pair, caplog):
    teacher = AutoModelForCausalLM.from_pretrained(pair[1])
    teacher.config._name_or_path = "nobody/no-such-model"
    with caplog.at_level("WARNING"):
        make(teacher=teacher)
    assert "pass teacher_processing_class" in caplog.text


def test_different_tokenizers_are_refused_before_weights_are_loaded(make, pair, tmp_path, tiny_tokenizer, monkeypatch):
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    saved = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    words["!"], words["#"] = words["#"], words["!"]
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(saved))
    for file in Path(pair[1]).iterdir():
        if not (tmp_path / "teacher" / file.name).exists():
            (tmp_path / "teacher" / file.name).symlink_to(file)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="first at token id 3: the student reads '!' and the teacher reads '#'"):
        make(teacher=str(tmp_path / "teacher"))


@pytest.mark.parametrize("arch", ["qwen3", "llama", "qwen2"])
def test_each_architecture_end_to_end_from_disk(make, tiny_model_dir, arch):
    trainer = make(
        str(tiny_model_dir(arch, "student")),
        str(tiny_model_dir(arch, "teacher")),
        generation_kwargs=None,
        max_steps=8,
    )
    trainer.train()
    (loss,) = steps(trainer, "loss")
    assert all(math.isfinite(value) for value in loss)
    trainer.save_model(trainer.args.output_dir)
    again = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])


def test_training_lowers_the_divergence(make):
    trainer = make(max_steps=30, learning_rate=3e-3, retention=0.5)
    trainer.train()
    (divergence,) = steps(trainer, "reverse_kl")
    assert sum(divergence[-5:]) < 0.8 * sum(divergence[:5])


LOGGED = [
    "selection/kept_fraction",
    "selection/kept_divergence_share",
    "selection/dropped_divergence",
    "selection/trained_tokens",
    "quadrants/q1",
    "quadrants/q2",
    "quadrants/q3",
    "quadrants/q4",
    "entropy",
    "reverse_kl",
    "tokens_per_second",
    "time/rollout",
    "time/loss",
    "time/optimizer",
    "memory/peak_gib",
]


@pytest.mark.parametrize("normalization", ["batch", "running", "micro_batch"])
def test_every_step_logs_what_happened_to_its_tokens(make, normalization):
    trainer = make(
        normalization=normalization,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        selection_rule="divergence",
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    assert ["forward_kl" in entry for entry in history] == [True, False]  # every score_logging_steps
    scored_ahead = ["time/score", "time/select"] if normalization == "batch" else []
    for entry in history:
        assert [name for name in [*LOGGED, *scored_ahead] if entry.get(name) is None] == []
        assert 0 < entry["selection/kept_fraction"] <= 0.5
        assert entry["selection/kept_fraction"] < entry["selection/kept_divergence_share"] <= 1
        assert sum(entry[f"quadrants/q{number}"] for number in (1, 2, 3, 4)) == pytest.approx(1)
        assert all(entry[name] > 0 for name in ("time/rollout", "time/loss", "time/optimizer", "tokens_per_second"))


def test_entropy_rules_project_the_teacher_for_the_kept_rows_only(make, monkeypatch):
    projected = []

    def watched(module, function):
        project = getattr(module, function)

        def projecting(student, teacher=None, *args, **options):
            projected.append((function, 0 if teacher is None else len(teacher.hidden)))
            return project(student, teacher, *args, **options)

        monkeypatch.setattr(module, function, projecting)

    watched(tipdistill.trainer, "token_scores")
    watched(local, "fused_divergence_loss")
    watched(choosing, "fused_selected_loss")
    settings = {"score_logging_steps": 2, "max_steps": 4, "record_rollouts": 0, "normalization": "batch"}
    trainer = make(selection_rule="entropy", retention=0.25, **settings)
    trainer.train()
    kept = steps(trainer, "selection/trained_tokens")[0]
    of_step = [b - a for a, b in zip([0, *kept], kept, strict=False)]
    tokens = [round(k / share) for k, share in zip(of_step, steps(trainer, "selection/kept_fraction")[0], strict=True)]
    # where the log compares all tokens with the teacher, its logits are there for the loss
    assert projected == [
        ("fused_selected_loss", tokens[0]),
        ("token_scores", 0),
        ("fused_divergence_loss", of_step[1]),
        ("fused_selected_loss", tokens[2]),
        ("token_scores", 0),
        ("fused_divergence_loss", of_step[3]),
    ]


def test_num_generations_repeats_each_prompt(make, prompts):
    trainer = make(num_generations=4)
    order = list(trainer._get_train_sampler())
    assert len(set(order[:8])) == 2
    assert all(len(set(order[i : i + 4])) == 1 for i in range(0, len(order), 4))


def test_tool_results_are_never_selected_or_scored(make, monkeypatch):
    trainer = make(retention=1.0, max_steps=1)
    seen = {}
    inner = DistillationTrainer._generate_and_score_completions

    def with_tools(self, inputs):
        batch = inner(self, inputs)
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][:, 2:5] = 0
        batch["num_items_in_batch"] = (batch["tool_mask"] * batch["completion_mask"]).sum()
        seen["tokens"] = int(batch["num_items_in_batch"])
        return batch

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", with_tools)
    select = tipdistill.training.selection.select
    monkeypatch.setattr(
        tipdistill.training.selection,
        "select",
        lambda scores, **k: seen.update(scored=len(scores)) or select(scores, **k),
    )
    trainer.train()
    assert seen["scored"] == seen["tokens"]
    assert steps(trainer, "selection/trained_tokens") == [[seen["tokens"]]]


def test_a_batch_of_tool_results_alone_trains_nothing(make, monkeypatch):
    inner = DistillationTrainer._generate_and_score_completions

    def with_tools(self, inputs):
        batch = inner(self, inputs)
        return {**batch, "tool_mask": torch.zeros_like(batch["completion_mask"])}

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", with_tools)
    trainer = make(max_steps=1, record_rollouts=0)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert steps(trainer, "loss", "selection/trained_tokens") == [[0.0], [0]]
    assert all(torch.equal(*both) for both in zip(before, trainer.model.parameters(), strict=True))


def test_a_micro_batch_of_tool_results_alone_is_passed_over(make, monkeypatch):
    inner = DistillationTrainer._generate_and_score_completions

    def with_tools(self, inputs):
        batch = inner(self, inputs)
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
        batch["tool_mask"][3] = 0
        return batch

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", with_tools)
    whole = make(normalization="micro_batch", selection_rule="divergence", max_steps=1)
    split = make(
        normalization="micro_batch",
        selection_rule="divergence",
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    for trainer in (whole, split):
        trainer.train()
    names = ("loss", "grad_norm", "reverse_kl", "selection/trained_tokens")
    for found, expected in zip(steps(split, *names), steps(whole, *names), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pad_to_multiple_of", [None, 8])
def test_no_forward_of_the_scoring_pass_is_larger_than_scoring_tokens(make, pad_to_multiple_of):
    accelerator = make().accelerator
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 31, (12, 2), generator=draw)
        lengths[0] = torch.tensor([90, 30])  # longer than the limit: alone
        batch = {
            "prompt_mask": (torch.arange(96).flip(0) < lengths[:, :1]).long(),
            "completion_mask": (torch.arange(32) < lengths[:, 1:]).long(),
        }
        pieces = scoring_pieces(batch, accelerator, 8, 100, fixed_width=pad_to_multiple_of is not None)
        assert sorted(torch.cat(pieces).tolist()) == list(range(12))
        for rows in pieces:
            part = {name: mask[rows] for name, mask in batch.items()}
            if pad_to_multiple_of is None:
                part, _ = trimmed(part, batch["completion_mask"][rows].bool())
            assert len(rows) == 1 or sum(mask.numel() for mask in part.values()) <= 100
        if pad_to_multiple_of is None:
            assert len(pieces) < 12


def test_ranks_with_fewer_pieces_score_in_as_many_forwards():
    accelerator = SimpleNamespace(gather=lambda pieces: torch.tensor([*pieces.tolist(), 5]))
    batch = {name: torch.ones(6, 4, dtype=torch.int64) for name in ("prompt_mask", "completion_mask")}
    pieces = scoring_pieces(batch, accelerator, 8, 1000)
    assert len(pieces) == 5
    assert sorted(torch.cat(pieces).tolist()) == list(range(6))
    assert all(len(rows) for rows in pieces)


def test_an_offloaded_teacher_is_not_run_in_the_loss(make, monkeypatch):
    trainer = make(selection_rule="all", teacher_offload=True, max_steps=1, scoring_tokens=10_000, record_rollouts=0)
    calls = []
    trainer.teacher_model.base_model.register_forward_hook(lambda *args: calls.append(1))
    trainer.train()
    assert len(calls) == 1
    reference = make(selection_rule="all", max_steps=1)
    reference.train()
    for found, expected in zip(steps(trainer, "loss", "grad_norm"), steps(reference, "loss", "grad_norm"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"normalization": "micro_batch"}, {"teacher_offload": True}], ids=str)
def test_an_evaluation_gives_the_same_loss_wherever_the_teacher_is(make, prompts, settings):
    plain, other = (make(**given, extra={"eval_dataset": prompts.select(range(8))}) for given in ({}, settings))
    assert other.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_an_offloaded_teacher_leaves_before_the_first_rollout(make, monkeypatch):
    moves = []
    monkeypatch.setattr(local.LocalTeacher, "_leave", lambda self: moves.append("leaves"))
    trainer = make(teacher_offload=True)
    assert moves == ["leaves"]
    assert not trainer.teacher.answers_in_loss


def test_a_student_in_float64_is_scored_in_float64(make, pair):
    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in pair)
    trainer = make(model=student, teacher=teacher, max_steps=1)
    trainer.train()
    assert math.isfinite(steps(trainer, "loss")[0][0])


def test_weights_that_sum_to_less_than_1_give_their_weighted_mean(make, monkeypatch):
    """The denominator is Σ w, however small it is."""
    from tipdistill.select import Rule

    losses = []
    for weight in (1.0, 1e-3):
        rule = Rule(lambda scores, weight=weight: torch.full_like(scores.entropy, weight), ("entropy",), "weight")
        monkeypatch.setattr(sys.modules[__name__], "constant_weights", rule, raising=False)
        monkeypatch.setitem(sys.modules, "rules_of_test_trainer", sys.modules[__name__])
        trainer = make(selection_rule="rules_of_test_trainer.constant_weights", max_steps=1, record_rollouts=0)
        trainer.train()
        losses.append(steps(trainer, "loss")[0][0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_lora_trains_the_adapter_alone(make):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make(extra={"peft_config": config})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_bf16_mixed_precision_reaches_the_backbone(make, monkeypatch):
    """TRL 1.16 bypasses accelerate's autocast on its way to the backbone; here `bf16=True` means what it says."""
    trainer = make(bf16=True, max_steps=1)
    seen = set()
    layer = trainer.model.base_model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: seen.add((output.dtype, torch.is_autocast_enabled("cpu"))))
    score_rows = trainer._score_rows
    monkeypatch.setattr(trainer, "_score_rows", lambda *args: seen.clear() or score_rows(*args))
    trainer.train()
    assert seen == {(torch.bfloat16, True)}
    assert all(math.isfinite(value) for value in steps(trainer, "loss", "grad_norm")[0])


def test_evaluation_measures_all_tokens_whatever_the_rule(make, prompts):
    losses = []
    for rule in ("soft_or", "complement:soft_or", "all"):
        trainer = make(selection_rule=rule, retention=0.2, extra={"eval_dataset": prompts.select(range(8))})
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1] == losses[2] > 0


def test_the_time_of_an_evaluation_is_no_part_of_a_step(make, prompts, monkeypatch):
    generate = DistillationTrainer._generate_and_score_completions

    def slow_in_evaluation(self, inputs):
        if not self.model.training:
            time.sleep(2)
        return generate(self, inputs)

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", slow_in_evaluation)
    trainer = make(eval_strategy="steps", eval_steps=1, extra={"eval_dataset": prompts.select(range(8))})
    trainer.train()
    assert all(seconds < 2 for seconds in steps(trainer, "time/rollout")[0])


def test_tokens_trained_on_are_counted_and_not_averaged(make):
    each, last = make(max_steps=4, logging_steps=1), make(max_steps=4, logging_steps=4)
    for trainer in (each, last):
        trainer.train()
    assert steps(last, "selection/trained_tokens")[0] == steps(each, "selection/trained_tokens")[0][-1:]


def test_nan_logits_name_the_rollout_and_token(make):
    trainer = make(max_steps=1)
    inner = trainer._get_last_hidden_state

    def poisoned(model, input_ids, *args, **kwargs):
        hidden = inner(model, input_ids, *args, **kwargs).clone()
        if model.config.hidden_size == trainer.model.config.hidden_size and len(hidden) == 8:
            hidden[3, 1] = math.nan
        return hidden

    trainer._get_last_hidden_state = poisoned
    with pytest.raises(ValueError, match=r"rollout 3.*token 1"):
        trainer.train()


@pytest.mark.parametrize("normalization", ["batch", "running", "micro_batch"])
def test_a_teacher_that_fails_on_kept_rows_names_their_rollout(make, normalization):
    """An entropy rule projects the teacher after selection alone, for rows that are no longer numbered in sequence."""
    trainer = make(selection_rule="entropy", retention=0.25, score_logging_steps=0, normalization=normalization)
    inner = trainer.teacher.answer

    def poisoned(*arguments):
        answers = inner(*arguments)
        answers[3] = answers[3].map(lambda hidden: hidden * math.nan)
        return answers

    trainer.teacher.answer = poisoned
    with pytest.raises(ValueError, match="rollout 3 of the batch"):
        trainer.train()


@pytest.mark.parametrize("normalization", ["batch", "running", "micro_batch"])
def test_the_advice_for_tokens_that_the_teacher_forbids_trains(make, tiny_model_dir, normalization):
    def phi(side, forbids):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("phi", side))
        if forbids:
            model.lm_head.bias.data[[7, 11]] = -math.inf
        model.name_or_path = str(tiny_model_dir("phi", side))
        return model

    def train(student_forbids, **settings):
        trainer = make(
            phi("student", student_forbids), phi("teacher", True), max_steps=1, normalization=normalization, **settings
        )
        trainer.train()
        assert all(math.isfinite(loss) for loss in steps(trainer, "loss")[0])
        assert all(bool(p.isfinite().all()) for name, p in trainer.model.named_parameters() if name != "lm_head.bias")

    with pytest.raises(ValueError, match=r"'reverse_kl' is inf.*Forbid these tokens to both.*beta=0.5.*'entropy'"):
        train(False, selection_rule="soft_or")
    train(True, selection_rule="soft_or")
    train(False, selection_rule="entropy", beta=0.5, record_rollouts=2, score_logging_steps=1)


def test_a_completion_of_length_0_is_refused(make, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", lambda self, ids, *a: [[1, 2]] * 5 + [[]] * 3)
    with pytest.raises(ValueError, match="rollout 5 of the batch has a completion of length 0"):
        make().train()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": Dataset.from_list([])}, ValueError, "train_dataset is empty"),
        ({"dataset": Dataset.from_list([{"prompts": "a"}] * 9)}, ValueError, "Rename 'prompts'"),
        (
            {"dataset": Dataset.from_list([{"prompt": "a"}] * 3)},
            ValueError,
            "fewer than the 8 of one generation batch",
        ),
        ({"config": DistillationConfig}, TypeError, "must be a TIPConfig"),
    ],
)
def test_bad_arguments_get_one_clear_error(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_settings_for_loading_a_teacher_that_is_loaded_are_refused(make, pair):
    with pytest.raises(ValueError, match="teacher_model is loaded already"):
        make(teacher=AutoModelForCausalLM.from_pretrained(pair[1]), teacher_model_init_kwargs={"dtype": "bfloat16"})


def test_a_stream_cannot_repeat_prompts(make, prompts):
    with pytest.raises(ValueError, match="num_generations = 4 repeats prompts, which a stream does not"):
        make(dataset=prompts.to_iterable_dataset(), num_generations=4)


def test_rows_that_the_teacher_lacks_or_reads_otherwise_are_kept_from_vllm_beside_what_was_biased(
    make, tiny_model_dir, tiny_tokenizer
):
    rows = len(tiny_tokenizer)
    trainer = make(*(str(tiny_model_dir("qwen2", who, vocab_rows=rows + 4)) for who in ("student", "teacher")))
    trainer.use_vllm = True
    trainer.vllm_generation = SimpleNamespace(generation_kwargs={"logit_bias": {3: -1.0}, "seed": 1})
    trainer.teacher.vocabulary = rows + 2
    share_tokens(trainer, ChosenTeacher(lambda _: trainer.teacher, differing={1: ("<|start|>", "<|tool|>")}), None)
    assert trainer.vllm_generation.generation_kwargs == {
        "logit_bias": {3: -1.0, 1: -100.0, rows + 2: -100.0, rows + 3: -100.0},
        "seed": 1,
    }


def test_a_teacher_is_needed(pair, prompts, tmp_path):
    with pytest.raises(ValueError, match="a teacher is needed"):
        TIPTrainer(pair[0], args=TIPConfig(str(tmp_path), **PLAIN), train_dataset=prompts)


RESUME = """
import json, sys
from datasets import Dataset
from tipdistill import TIPConfig, TIPTrainer
student, teacher, data, out, resume, settings = sys.argv[1:]
dataset = Dataset.from_json(data).select(range(16))
trainer = TIPTrainer(student, teacher, TIPConfig(out, **json.loads(settings)), dataset)
trainer.train(resume_from_checkpoint=resume == "yes")
trainer.save_model(out + "/final")
print(json.dumps([e["selection/trained_tokens"] for e in trainer.state.log_history if "loss" in e]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        {"selection_rule": "random", "retention": 0.4},
        # what the step before told comes back too
        {"selection_rule": "soft_or", "retention": 0.4, "selection_scope": "batch", "normalization": "running"},
        {"selection_rule": "gradient_norm_sampling", "retention": 0.2, "backward": "kept"},
    ],
    ids=["batch", "running", "kept"],
)
def test_a_killed_run_resumes_to_the_same_weights_in_any_epoch(pair, word_problems, tmp_path, rule):
    settings = {
        **PLAIN,
        "generation_kwargs": None,  # sampling: the random state must come back too
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 9,  # 16 prompts, 8 a step: epochs of two steps
        "save_strategy": "steps",
        "save_steps": 1,
        **rule,
    }

    def train(out, resume):
        arguments = [*pair, str(word_problems), str(out), resume, json.dumps(settings)]
        return forks.start(forks.script, RESUME, arguments, log=out.with_suffix(f".{resume}"))

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole = train(straight, "no")
    whole.join(300)
    process = train(killed, "no")
    # the fifth step is the first of the third epoch
    deadline = time.monotonic() + 240
    while not (killed / "checkpoint-5" / "trainer_state.json").exists():
        assert process.exitcode is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (killed / "final").exists()
    resumed = train(killed, "yes")
    resumed.join(300)
    assert [whole.exitcode, resumed.exitcode] == [0, 0], (tmp_path / "killed.yes").read_text()
    ends = [AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (straight, killed)]
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name
    counts = [(tmp_path / name).read_text().splitlines()[-1] for name in ("straight.no", "killed.yes")]
    assert json.loads(counts[0]) == json.loads(counts[1])


@pytest.mark.parametrize("restore", [False, True])
def test_the_count_of_tokens_goes_on_after_a_resume(make, tmp_path, restore):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make(output_dir=tmp_path / "run", **settings)
    straight.train()
    resumed = make(output_dir=tmp_path / "run", restore_callback_states_from_checkpoint=restore, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    name = "selection/trained_tokens"
    assert steps(resumed, name) == steps(straight, name)
    assert resumed.monitor.baseline == straight.monitor.baseline


def test_resuming_without_a_checkpoint_says_so(make):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make().train(resume_from_checkpoint=True)


# Records of a run.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalization": "micro_batch", "selection_rule": "random"},
        {"selection_rule": "entropy_sampling", "teacher_offload": True},
        {"selection_rule": "all"},
    ],
    ids=str,
)
def test_records_change_nothing_of_the_training(make, tmp_path, settings):
    """Same losses, same gradient norms, same weights, with sampled rollouts, whether records are written or not."""
    settings = {**settings, "generation_kwargs": None, "gradient_accumulation_steps": 2, "max_steps": 3}
    runs = []
    for count in (0, 5):
        trainer = make(output_dir=tmp_path / str(count), record_rollouts=count, score_logging_steps=2, **settings)
        trainer.train()
        runs.append((steps(trainer, "loss", "grad_norm"), [p.detach().clone() for p in trainer.model.parameters()]))
    (without, weights), (recorded, weights_recorded) = runs
    assert without == recorded
    assert all(torch.equal(*pair) for pair in zip(weights, weights_recorded, strict=True))
    assert not (tmp_path / "0" / "records").exists()
    assert sorted(path.name for path in (tmp_path / "5" / "records").iterdir()) == ["step-0", "step-2"]


def test_a_function_is_a_rule_from_the_records_to_the_checkpoints(make, tmp_path):
    def late(scores):  # no file holds it, so nothing can import or pickle it
        return scores.require("reverse_kl") * torch.arange(len(scores), dtype=torch.float32)

    late.fields = ("reverse_kl",)
    trainer = make(selection_rule=late, retention=0.4, score_logging_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    records = open_records(tmp_path / "run" / "records" / "step-1")
    name = f"{__name__}.test_a_function_is_a_rule_from_the_records_to_the_checkpoints.<locals>.late"
    assert (records.sidecar["rule"], records.sidecar["budgets"]) == (name, {name: "top"})
    score = records.read(["score", "reverse_kl"])
    assert score["score"].to_numpy()[1:].sum() > score["reverse_kl"].to_numpy()[1:].sum()
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.selection_rule == trainer.args.to_dict()["selection_rule"] == name
    assert "late" in repr(trainer.args)


def test_a_gradient_of_exactly_0_stops_the_run(make):
    trainer = make(max_steps=5)
    forward = trainer.compute_loss
    # a loss that hangs on the weights in name alone, as that of a layer packed for inference
    trainer.compute_loss = lambda model, *args, **kwargs: (
        forward(model, *args, **kwargs).detach() + 0 * sum(parameter.sum() for parameter in model.parameters())
    )
    with pytest.raises(ValueError, match=r"the gradient of step 1 is exactly 0 at a loss of 1\.\d+.*requires_grad"):
        trainer.train()


def test_records_are_what_the_step_did(make, tmp_path, pair):
    settings = {"num_generations": 2, "retention": 0.3, "normalization": "batch"}
    trainer = make(record_rollouts=4, score_logging_steps=1, max_steps=1, **settings)
    seen = []
    original = trainer._generate_and_select
    trainer._generate_and_select = lambda inputs: seen.append(original(inputs)) or seen[-1]
    before = copy.deepcopy(trainer.model).eval()
    trainer.train()
    records = open_records(tmp_path / "run" / "records" / "step-0")
    (batch,) = seen
    mask = batch["completion_mask"].bool()
    rows = [0, 2, 4, 6]  # one rollout of each prompt
    assert records.rollouts["prompt_id"].to_pylist() == [0, 1, 2, 3]
    table = records.read().to_pydict()
    assert table["token_id"] == [index for row in rows for index in batch["completion_ids"][row][mask[row]].tolist()]
    assert table["kept"] == [bool(w > 0) for row in rows for w in batch["selection_weight"][row][mask[row]].tolist()]
    entropy = torch.cat([batch["token_entropy"][row][mask[row]] for row in rows])
    torch.testing.assert_close(torch.tensor(table["entropy"]), entropy, rtol=1e-5, atol=1e-6)
    # probabilities of the models themselves
    ids = torch.cat([batch["prompt_ids"][0][batch["prompt_mask"][0].bool()], batch["completion_ids"][0][mask[0]]])
    first = int(batch["prompt_mask"][0].sum()) - 1
    for name, model in (("student", before), ("teacher", AutoModelForCausalLM.from_pretrained(pair[1]).eval())):
        with torch.no_grad():
            likeliest = model(ids[None]).logits[0, first].softmax(-1).topk(5)
        top = table[f"{name}_top5"][0]
        torch.testing.assert_close(torch.tensor([entry["probability"] for entry in top]), likeliest.values)
        assert [entry["token_id"] for entry in top] == likeliest.indices.tolist()
    assert records.sidecar["step"] == 0
    assert records.sidecar["settings"] == {"normalization": "batch", "num_generations": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_rule": "soft_or", "selection_scope": "batch"},
        {"selection_rule": "gradient_norm_sampling", "selection_scope": "batch", "gradient_accumulation_steps": 2},
        {"selection_rule": "soft_or", "retention": 0.2},
    ],
    ids=str,
)
def test_records_hold_the_tokens_that_running_scales_keep(make, tmp_path, settings):
    trainer = make(normalization="running", record_rollouts=3, score_logging_steps=1, max_steps=3, **settings)
    kept = {}  # step, number of the rollout → which of its tokens were trained on
    original = trainer._selection.add

    def add(scores, selection, mask, batch):
        numbers = batch["rollout_number"].tolist()
        of_rollouts = selection.mask.split(mask.sum(1).tolist())
        kept.update({(trainer.state.global_step, n): m.tolist() for n, m in zip(numbers, of_rollouts, strict=True)})
        return original(scores, selection, mask, batch)

    trainer._selection.add = add
    trainer.train()
    assert {step for step, _ in kept} == {1, 2}  # the first step is chosen ahead
    count = 1 + max(number for _, number in kept)
    for step in (1, 2):
        table = open_records(tmp_path / "run" / "records" / f"step-{step}").read(["kept"])
        rows = [row * count // 3 for row in range(3)]
        assert table["kept"].to_pylist() == [token for row in rows for token in kept[step, row]]
        assert any(table["kept"].to_pylist())


def test_records_that_cannot_be_written_do_not_stop_a_run(make, tmp_path, caplog):
    trainer = make(record_rollouts=2, max_steps=1)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "records").write_text("in the way")
    trainer.train()
    assert trainer.state.global_step == 1
    assert "no token records were written" in caplog.text


# Weights, positions and the likeliest tokens


def prepared(trainer, prompts, count=8):
    trainer.model.train()
    return trainer._generate_and_score_completions([prompts[index] for index in range(count)])


def test_weights_follow_the_position_in_the_rollout(make, prompts):
    batch = prepared(make(selection_rule="position", generation_kwargs=None, seed=3), prompts)
    mask = batch["completion_mask"].bool()
    lengths = mask.sum(1, keepdim=True)
    assert len(lengths.unique()) > 1
    fraction = (torch.arange(mask.shape[1]) + 0.5) / lengths
    expected = (0.25 + 0.75 * torch.sigmoid((fraction - 0.3) / 0.1)).masked_fill(~mask, 0.0)
    torch.testing.assert_close(batch["selection_weight"], expected)
    torch.testing.assert_close(batch["num_items_in_batch"], expected.sum())


def test_teachability_spends_over_the_batch_unless_told_otherwise(make, prompts):
    assert make(selection_rule="teachability").args.selection_scope == "batch"
    assert make(selection_rule="soft_or").args.selection_scope == "rollout"
    trainer = make(selection_rule="teachability", retention=0.05, selection_scope="rollout")
    kept = (prepared(trainer, prompts)["selection_weight"] > 0).sum(1)
    assert kept.tolist() == [1] * 8
    trainer = make(selection_rule="teachability", retention=0.3)
    kept = (prepared(trainer, prompts)["selection_weight"] > 0).sum(1)
    assert kept.min() >= 1
    assert len(kept.unique()) > 1


def test_inverse_probabilities_are_divided_by_the_number_of_kept_tokens(make, prompts):
    batch = prepared(make(selection_rule="gradient_norm_sampling", retention=0.2, selection_scope="batch"), prompts)
    weight = batch["selection_weight"]
    kept, tokens = int((weight > 0).sum()), int(batch["completion_mask"].sum())
    assert kept == int(0.2 * tokens)
    assert batch["num_items_in_batch"] == kept
    # (n/m) / π is at least n/m, and more than that where a token was not sure to be kept
    assert weight[weight > 0].min() >= kept / tokens * (1 - 1e-6)
    assert len(weight[weight > 0].unique()) > 2


@pytest.mark.parametrize(
    "rule", ["teachability", "position", "cumulative_advantage", "entropy_jsd_sampling", "gradient_norm_sampling"]
)
def test_every_kind_of_rule_trains_inside_the_micro_batch(make, rule):
    trainer = make(
        selection_rule=rule, normalization="micro_batch", per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer.train()
    weighs = rule in ("position", "cumulative_advantage")
    for loss, norm, kept in zip(*steps(trainer, "loss", "grad_norm", "selection/kept_fraction"), strict=True):
        assert 0 < loss < 20
        assert norm > 0
        assert (kept == 1) == weighs


def test_the_scores_jensen_shannon_divergence_is_the_symmetric_one_whatever_is_trained_on(make, prompts, monkeypatch):
    """At β = 1, TRL's reverse KL, the mixture is the teacher and its divergence from it would be 0 for every token."""
    seen = []

    def watched(scores):
        seen.append(scores.require("jsd"))
        return scores.require("jsd")

    watched.fields = ("jsd",)
    module = types.ModuleType("rules_of_test_trainer")
    module.watched = watched
    monkeypatch.setitem(sys.modules, "rules_of_test_trainer", module)
    prepared(make(selection_rule="rules_of_test_trainer.watched", beta=1.0), prompts)
    assert seen[0].max() > 0.01
    assert seen[0].max() <= math.log(2) + 1e-6


# Tasks during training


def test_tasks_are_measured_and_training_goes_on_as_if_they_were_not(make, tmp_path, monkeypatch):
    from tipdistill.tasks import TASKS

    monkeypatch.setitem(TASKS, "sums", {"problems": [("2 + 3 =", "5"), ("1 + 1 =", "2"), ("4 + 4 =", "8")]})
    monkeypatch.setitem(TASKS, "products", {"problems": [("2 * 3 =", "6")]})
    sampled = {"generation_kwargs": None, "max_steps": 3, "output_dir": tmp_path / "plain"}
    plain = make(**sampled)
    plain.train()
    settings = {"eval_tasks": "sums,products", "eval_steps": 2, "eval_num_samples": 2}
    settings["output_dir"] = tmp_path / "measured"
    measured = make(**{**sampled, **settings, "per_device_eval_batch_size": 4})
    measured.train()
    assert steps(measured, "loss", "grad_norm", "entropy") == steps(plain, "loss", "grad_norm", "entropy")
    logged = [entry for entry in measured.state.log_history if "eval_sums/mean_at_2" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 3]
    for entry in logged:
        root = tmp_path / "measured" / "eval" / f"step-{entry['step']}"
        rows = [json.loads(line) for line in (root / "samples" / "sums.jsonl").read_text().splitlines()]
        assert [(row["problem"], row["sample"]) for row in rows] == [(p, s) for p in range(3) for s in range(2)]
        assert json.loads((root / "metrics.json").read_text())["tasks"].keys() == {"sums", "products"}
        (product,) = {json.loads(line)["prompt"] for line in (root / "samples" / "products.jsonl").open()}
        assert product.startswith("2 * 3 =")
        assert all("put your final answer within" in row["prompt"] for row in rows)
        assert all(0 < row["tokens"] <= 12 for row in rows)
        assert entry["eval_sums/mean_tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 6)
        assert entry["eval_sums/truncated"] == pytest.approx(sum(not row["finished"] for row in rows) / 6)
    assert len({row["response"] for row in rows}) > 2


def test_an_unknown_task_is_refused_before_anything_is_loaded(make):
    with pytest.raises(ValueError, match="there is no task 'mth500'"):
        make(eval_tasks="mth500", eval_steps=1, model="absent/model", teacher="absent/teacher")


@pytest.mark.slow
def test_two_processes_measure_a_task_together(pair, word_problems, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tasks_of_two.py").write_text("six = {'problems': [(f'{a} + 1 =', str(a + 1)) for a in range(5)]}\n")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(f'{{"prompt": "{number} + 1 ="}}\n' for number in range(5)))
    asked = f"tasks_of_two:six,reverse_kl={held_out}"
    settings = {**PLAIN, "per_device_train_batch_size": 4, "max_steps": 1, "eval_tasks": asked}
    settings |= {"eval_steps": 1, "eval_num_samples": 3, "per_device_eval_batch_size": 4}
    argv = [*pair, str(word_problems), str(tmp_path / "run.json"), json.dumps(settings)]
    logs = [tmp_path / "rank-0", tmp_path / "rank-1"]
    assert forks.ranks(forks.script, DISTRIBUTED.read_text(), argv, logs=logs) == [0, 0], logs[0].read_text()
    for step in (0, 1):
        paths = sorted((tmp_path / "run" / "eval" / f"step-{step}" / "samples").glob("*.jsonl"))
        assert len(paths) == 2
        for path in paths:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert [(row["problem"], row["sample"]) for row in rows] == [(p, s) for p in range(5) for s in range(3)]
            assert all(row["prompt"].startswith(f"{row['problem']} + 1 =") for row in rows)
            assert all((row.get("divergence", 0) > 0) == ("reverse_kl" in path.name) for row in rows)
            # greedy, so an answer and its divergence are the same whichever process wrote it
            of_problems = {row["problem"]: row.get("divergence") for row in rows}
            assert all(row.get("divergence") == pytest.approx(of_problems[row["problem"]]) for row in rows)


@pytest.mark.parametrize("normalization", ["batch", "running", "micro_batch"])
def test_a_held_out_divergence_is_that_of_whole_float64_logits(make, tmp_path, normalization):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "2 + 3 ="}\n{"prompt": "one and a half times 1 ="}\n{"prompt": "9 ="}\n')
    trainer = make(
        eval_tasks=f"reverse_kl={held_out}",
        eval_steps=1,
        eval_num_samples=2,
        per_device_eval_batch_size=4,
        normalization=normalization,
        max_steps=1,
        temperature=0.8,
    )
    written, kept = [], trainer._generate_single_turn

    def watched(prompt_ids, *rest):
        completions = kept(prompt_ids, *rest)
        written.extend(zip(prompt_ids, completions, strict=True))
        return completions

    trainer._generate_single_turn = watched
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_reverse_kl_held_out/mean" in entry]
    assert [entry["step"] for entry in logged] == [0, 1]
    last = logged[1]
    student, teacher = trainer.plain_student().double(), trainer.teacher.model.double()
    rollouts = written[-6:]
    expected = []
    for prompt, completion in rollouts:
        ids = torch.tensor([[*prompt, *completion]])
        s, t = (
            torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1, : trainer.vocabulary] / 0.8, -1)
            for model in (student, teacher)
        )
        expected.append([float(value) for value in (s.exp() * (s - t)).sum(-1)])
    rows = [json.loads(line) for line in (tmp_path / "run/eval/step-1/samples/reverse_kl_held_out.jsonl").open()]
    assert [(row["problem"], row["sample"], row["tokens"]) for row in rows] == [
        (place // 2, place % 2, len(values)) for place, values in enumerate(expected)
    ]
    for row, values in zip(rows, expected, strict=True):
        assert row["divergence"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    # the mean over prompts of the mean over the tokens of a prompt
    of_prompts = [[*expected[place], *expected[place + 1]] for place in (0, 2, 4)]
    means = [sum(values) / len(values) for values in of_prompts]
    assert last["eval_reverse_kl_held_out/mean"] == pytest.approx(sum(means) / 3, rel=1e-4)
    assert last["eval_reverse_kl_held_out/standard_error"] > 0
    assert "eval_reverse_kl_held_out/mean_at_2" not in last


def test_a_held_out_divergence_needs_a_teacher_that_tells_everything(make, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "2 + 3 ="}\n')
    with pytest.raises(ValueError, match=r"reverse_kl_held_out needs the teacher's whole distribution"):
        TIPTrainer(  # refused before either model is looked for
            "absent/model",
            args=TIPConfig(
                str(tmp_path / "run"),
                **PLAIN,
                teacher_url="http://127.0.0.1:1/v1",
                record_rollouts=0,
                eval_tasks=f"reverse_kl={held_out}",
                eval_steps=1,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["2 + 3 ="] * 8}),
        )


def test_a_task_may_ask_for_shorter_completions_than_the_run(make, tmp_path, monkeypatch):
    from tipdistill.tasks import TASKS

    monkeypatch.setitem(TASKS, "sums", {"problems": [("2 + 3 =", "5")] * 4, "max_new_tokens": 3})
    trainer = make(eval_tasks="sums", eval_steps=1, max_steps=1)
    longest = trainer.generation_config.max_new_tokens
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run/eval/step-1/samples/sums.jsonl").open()]
    assert max(row["tokens"] for row in rows) == 3
    assert trainer.generation_config.max_new_tokens == longest > 3


@pytest.mark.parametrize("rule", ["gradient_norm_sampling", "soft_or", "entropy"])
def test_what_no_kept_token_depends_on_is_left_out_of_the_loss(make, prompts, monkeypatch, rule):
    """Fewer positions go through both models, and loss and gradients are those of all of them."""
    settings = {"selection_rule": rule, "selection_scope": "batch", "retention": 0.05, "score_logging_steps": 0}
    settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "record_rollouts": 0}
    trainer = make(**settings)
    trainer.model.train()
    inputs = trainer._prepare_inputs([prompts[index] for index in range(16)])
    assert (inputs["selection_weight"] > 0).any()
    positions = []
    forward = trainer._get_last_hidden_state

    def counted(model, input_ids, *rest, **more):
        positions.append(input_ids.numel())
        return forward(model, input_ids, *rest, **more)

    monkeypatch.setattr(trainer, "_get_last_hidden_state", counted)
    loss, found = gradients(trainer, inputs)
    fewer, positions[:] = sum(positions), []
    monkeypatch.setattr("tipdistill.trainer.trimmed", lambda tokens, mask: (tokens, mask))
    expected_loss, expected = gradients(trainer, inputs)
    assert 0 < fewer < 0.7 * sum(positions)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        # float32 sums over other widths, relative to the largest entry of each tensor
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name
