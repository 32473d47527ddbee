"""Selection inside verl's actor, on the CPU: our reference's loss and gradient, however verl splits the batch."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: `make test-verl` builds an environment with it")

import verl_run
from outcomes import oracle
from transformers import AutoModelForCausalLM, Qwen3Config
from verl.trainer.distillation import losses as verl_losses
from verl.utils import tensordict_utils
from verl.utils.metric import Metric
from verl.workers.utils.padding import left_right_2_no_padding
from verl_run import VOCABULARY, mini_batch, step

from tipdistill import select
from tipdistill.integrations import verl as ours
from tipdistill.integrations import verl_check, verl_refusals
from tipdistill.integrations.verl import TARGET, SelectedLossConfig

TESTS = Path(__file__).parents[1]
OURS = {"_target_": TARGET, "loss_mode": "tip_reverse_kl_topk"}
OF_VERL = {"_target_": "verl.workers.config.DistillationLossConfig"}
FIELDS = ["entropy", "entropy_norm", "reverse_kl", "forward_kl", "divergence"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    """A checkpoint whose predictions are far from uniform, so that tokens differ."""
    path = tmp_path_factory.mktemp("verl") / "student"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


def trained(batch):
    """Of each rollout: which of its columns are no padding, and the rows of those that predict a trained token."""
    prompt = batch["prompts"].shape[1]
    for number in range(len(batch)):
        kept = batch["attention_mask"][number].bool()
        before = int(kept[:prompt].sum())
        positions = batch["response_mask"][number].nonzero()[:, 0] + before - 1
        yield kept, positions


def reference(model, batch, rule, retention, scope="rollout", normalization="batch"):
    """The loss, its gradients and the kept share by plain transformers, autograd and `select`, rollout by rollout."""
    student = AutoModelForCausalLM.from_pretrained(model).double()
    logits, ids, teacher, rollout = [], [], [], []
    for number, (kept, positions) in enumerate(trained(batch)):
        logits.append(student(batch["input_ids"][number][kept][None]).logits[0, positions])
        ids.append(batch["teacher_ids"][number][kept][positions].long())
        # any distribution with these top-k probabilities: the tail is spread evenly
        logprobs = batch["teacher_logprobs"][number][kept][positions].double()
        tail = (1 - logprobs.exp().sum(1, keepdim=True)) / (VOCABULARY - logprobs.shape[1])
        teacher.append(tail.log().repeat(1, VOCABULARY).scatter(1, ids[-1], logprobs))
        rollout.append(torch.full((len(positions),), number))
    rollout = torch.cat(rollout)
    scores = oracle(
        torch.cat(logits), torch.cat(teacher), torch.cat(ids), [name for name in FIELDS if "ent" not in name]
    )
    log_p = torch.cat(logits).detach().log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    scores = scores.__class__(
        **dict(scores.present()) | {"entropy": entropy, "entropy_norm": entropy / math.log(VOCABULARY)}
    )
    read = scores.map(lambda value: value.detach())
    if normalization == "batch":
        picked = select(read, rule, retention, rollout, scope)
        weight, mask = picked.weight.double(), picked.mask
        loss = (weight * scores.divergence).sum() / weight.sum()
    else:
        loss, mask = 0.0, torch.zeros_like(rollout, dtype=torch.bool)
        for number in rollout.unique():
            own = rollout == number
            picked = select(read.map(lambda value, own=own: value[own]), rule, retention)
            weight, mask[own] = picked.weight.double(), picked.mask
            loss = loss + own.sum() * (weight * scores.divergence[own]).sum() / weight.sum() / len(rollout)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    return loss.item(), gradients, mask.double().mean().item()


def figures(metrics):
    """Figures of a run as plain numbers, summed over micro-batches as verl does."""
    plain = {}
    for name, value in metrics.items():
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, list) and isinstance(value[0], Metric):
            value = Metric.aggregate_dp(value)
        plain[name] = value.aggregate() if isinstance(value, Metric) else value
    return plain


def assert_same_gradients(gradients, expected, rtol=2e-4):
    assert gradients.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert (gradients[name] - expected[name]).abs().max() <= rtol * scale, name


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, None])
@pytest.mark.parametrize("normalization", ["batch", "rollout"])
def test_loss_and_gradient_are_those_of_the_reference_for_every_micro_batch_size(
    model, normalization, micro_batch, packed
):
    settings = {"retention": 0.4, "selection_rule": "soft_or", "normalization": normalization}
    metrics, gradients, _ = step(model, OURS | settings, micro_batch, packed=packed)
    loss, expected, kept = reference(model, mini_batch(16), "soft_or", 0.4, normalization=normalization)
    assert metrics["loss"] == pytest.approx(loss, rel=2e-5)
    assert figures(metrics)["selection/kept_fraction"] == pytest.approx(kept, rel=1e-6)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("normalization", ["batch", "rollout"])
def test_nested_batches_as_from_verls_queue(model, normalization):
    for k, mode in ((16, "tip_reverse_kl_topk"), (0, "tip_k3")):
        settings = OURS | {"loss_mode": mode, "retention": 0.4, "normalization": normalization}
        padded = step(model, settings, 2, k=k)
        nested = step(model, settings, 2, k=k, packed=True, nested=True)
        assert nested[0]["loss"] == pytest.approx(padded[0]["loss"], rel=1e-5)
        assert_same_gradients(nested[1], padded[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_rule": "q3", "selection_scope": "batch", "retention": 0.2},
        {"selection_rule": "entropy", "normalization": "rollout", "retention": 0.2},
        {"selection_rule": "complement:soft_or", "retention": 0.5},
        {"selection_rule": "all", "normalization": "rollout"},
    ],
    ids=lambda settings: settings["selection_rule"],
)
def test_other_rules_and_scopes_against_the_reference(model, settings):
    metrics, gradients, _ = step(model, OURS | settings, 2)
    rule, retention = settings["selection_rule"], settings.get("retention", 0.5)
    scope, normalization = settings.get("selection_scope", "rollout"), settings.get("normalization", "batch")
    loss, expected, kept = reference(model, mini_batch(16), rule, retention, scope, normalization)
    assert metrics["loss"] == pytest.approx(loss, rel=2e-5)
    assert figures(metrics)["selection/kept_fraction"] == pytest.approx(kept, rel=1e-6)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("normalization", ["batch", "rollout"])
@pytest.mark.parametrize(
    "rule", ["random", "entropy_sampling", "gradient_norm", "gradient_norm_sampling", "confidence_ratio", "selectkd"]
)
def test_draws_and_weights_do_not_depend_on_the_micro_batch_size(model, rule, normalization):
    settings = {"selection_rule": rule, "retention": 0.3, "normalization": normalization}
    runs = [step(model, OURS | settings, micro_batch) for micro_batch in (1, 4, None)]
    for metrics, gradients, _ in runs[1:]:
        assert metrics["loss"] == pytest.approx(runs[0][0]["loss"], rel=1e-5)
        assert_same_gradients(gradients, runs[0][1])


@pytest.mark.parametrize("agg", ["token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_every_aggregation_of_verl_does_not_depend_on_the_micro_batch_size(model, agg):
    runs = [
        step(model, OURS | {"retention": 0.3, "normalization": normalization}, micro_batch, agg=agg)
        for normalization in ("batch", "rollout")
        for micro_batch in (1, 4)
    ]
    for by_one, by_four in (runs[:2], runs[2:]):
        assert by_four[0]["loss"] == pytest.approx(by_one[0]["loss"], rel=1e-5)
        assert_same_gradients(by_four[1], by_one[1])


@pytest.mark.parametrize(
    ("mode", "k", "more"),
    [
        ("forward_kl_topk", 16, {}),
        ("k3", 0, {}),
        ("k2", 0, {}),
        ("k1", 0, {"use_policy_gradient": True}),
        ("forward_kl_topk", 16, {"loss_max_clamp": 0.5, "log_prob_min_clamp": -4.0}),
    ],
)
def test_retention_1_is_verls_own_loss(model, mode, k, more):
    expected, of_verl, _ = step(model, OF_VERL | {"loss_mode": mode} | more, 2, k=k)
    settings = OURS | {"loss_mode": f"tip_{mode}", "retention": 1.0} | more
    for normalization in ("batch", "rollout"):
        metrics, gradients, _ = step(model, settings | {"normalization": normalization}, 2, k=k)
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert_same_gradients(gradients, of_verl, 1e-5)


def test_the_reverse_kl_has_its_own_gradient_and_verls_forward_kl_is_left_alone(model):
    settings = {"retention": 1.0}
    reverse = step(model, OURS | settings, 2)
    forward = step(model, OURS | settings | {"loss_mode": "tip_forward_kl_topk"}, 2)
    assert reverse[0]["loss"] != pytest.approx(forward[0]["loss"], rel=0.01)


def test_the_clamp_is_of_a_tokens_loss_and_not_of_what_it_weighs(model):
    """At retention 0.1 a kept token weighs ten times its loss; verl's own clamp would cut it to a tenth."""
    settings = {"retention": 0.1, "loss_max_clamp": 5.0}
    clamped = step(model, OURS | settings, 2)[0]["loss"]
    free = step(model, OURS | settings | {"loss_max_clamp": None}, 2)[0]["loss"]
    assert clamped == pytest.approx(free, rel=1e-6)
    assert step(model, OURS | settings | {"loss_max_clamp": 0.5}, 2)[0]["loss"] == pytest.approx(0.5, rel=1e-5)


def test_bf16_as_verl_trains(model):
    """Half precision moves tokens across the budget's edge, so the loss agrees to its own rounding only."""
    full = step(model, OURS | {"retention": 0.4}, 2)[0]
    half = step(model, OURS | {"retention": 0.4}, 2, dtype="bfloat16")[0]
    assert half["loss"] == pytest.approx(full["loss"], rel=0.03)
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)


def test_task_rewards_beside_it_leave_the_distillation_loss_alone(model):
    """verl then computes the sampled tokens' log-probabilities from the same logits; the advantages here are 0."""
    alone = step(model, OURS | {"retention": 0.4}, 2)
    both = step(model, OURS | {"retention": 0.4, "use_task_rewards": True, "distillation_loss_coef": 0.5}, 2)
    assert both[0]["loss"] == pytest.approx(alone[0]["loss"] / 2, rel=1e-6)
    assert_same_gradients({name: 2 * gradient for name, gradient in both[1].items()}, alone[1], 1e-5)


@pytest.mark.parametrize("normalization", ["batch", "rollout"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_an_empty_response_adds_nothing(model, normalization, micro_batch):
    """verl fills batches up with such rollouts; alone in a micro-batch they stop verl's own loss."""
    batch = mini_batch(16)
    batch["response_mask"][1] = 0
    settings = {"retention": 0.4, "normalization": normalization}
    metrics, gradients, _ = step(model, OURS | settings, micro_batch, batch=batch)
    loss, expected, _ = reference(model, batch, "soft_or", 0.4, normalization=normalization)
    assert metrics["loss"] == pytest.approx(loss, rel=2e-5)
    assert_same_gradients(gradients, expected)
    assert figures(metrics)["distillation/loss_min"] >= 0
    assert 0 < figures(metrics)["distillation/student_mass_min"] < 1


def test_an_empty_response_beside_the_sampled_tokens(model):
    batch = mini_batch(0)
    batch["response_mask"][1] = 0
    runs = [step(model, OURS | {"loss_mode": "tip_k3"}, micro_batch, k=0, batch=batch) for micro_batch in (1, 2)]
    assert runs[0][0]["loss"] == pytest.approx(runs[1][0]["loss"], rel=1e-5)
    assert_same_gradients(runs[0][1], runs[1][1])


def nothing_of_the_first(scores, order):
    """A weight rule that keeps no token of short rollouts."""
    return (order.length > 5).float()


nothing_of_the_first.fields, nothing_of_the_first.ordered = ("entropy",), True


def test_a_rollout_of_which_nothing_is_kept_adds_nothing(monkeypatch, model):
    from tipdistill.select import RULES, Rule

    monkeypatch.setitem(RULES, "long", Rule(nothing_of_the_first, ("entropy",), "weight", ordered=True))
    for normalization in ("batch", "rollout"):
        settings = {"selection_rule": "long", "normalization": normalization}
        metrics, gradients, _ = step(model, OURS | settings, 1)
        assert math.isfinite(metrics["loss"])
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        long = sum(len(positions) for _, positions in trained(mini_batch(16)) if len(positions) > 5)
        total = sum(len(positions) for _, positions in trained(mini_batch(16)))
        assert figures(metrics)["selection/kept_fraction"] == pytest.approx(long / total)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization": "batch"},
        {"normalization": "batch", "selection_scope": "batch", "selection_rule": "random"},
        {"normalization": "rollout"},
    ],
    ids=["batch", "batch-scope", "rollout"],
)
def test_two_ranks_are_one(model, tmp_path, settings):
    loss = OURS | {"retention": 0.4} | settings
    of_one_rank, alone, _ = step(model, loss, 2)
    (tmp_path / "settings.json").write_text(json.dumps({"loss": loss, "micro_batch": 2}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*command, TESTS / "verl_run.py", model, tmp_path / "settings.json", tmp_path / "result.pt"],
        check=True,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")},
        timeout=300,
    )
    metrics, gradients = torch.load(tmp_path / "result.pt")
    assert metrics["loss"] == pytest.approx(of_one_rank["loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(of_one_rank["grad_norm"], rel=1e-4)
    assert_same_gradients(gradients, alone)


@pytest.mark.parametrize("normalization", ["batch", "rollout"])
def test_a_batch_of_several_steps_logs_plain_figures(model, normalization):
    """What verl's driver calls: each mini-batch is scored with the weights that the one before has left."""
    from verl.utils.metric import reduce_metrics

    metrics, _, _ = step(model, OURS | {"normalization": normalization}, 2, mini_batch=4)
    figures = reduce_metrics(metrics)
    assert figures["selection/kept_fraction"] == pytest.approx(0.47, abs=0.05)
    assert 0 < figures["selection/kept_reverse_kl"] < figures["selection/reverse_kl"]
    assert 0 < figures["selection/entropy"] < math.log(VOCABULARY)


def loss_of(data, logits, config, **settings):
    """`topk_loss` of packed logits in one micro-batch."""
    outputs = ours.topk_loss(verl_run.actor_config(), config, data, logits[None], "thd")
    return {name: value[0] for name, value in outputs.items()}


def packed(config, **non_tensors):
    data = left_right_2_no_padding(mini_batch(16))
    tensordict_utils.assign_non_tensor(data, temperature=1.0, **non_tensors)
    tokens = len(data["input_ids"].values())
    logits = torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(3)).requires_grad_()
    return data, logits


class Distillation:
    def __init__(self, **settings):
        self.distillation_loss = SelectedLossConfig(use_policy_gradient=False, log_prob_min_clamp=None, **settings)


def test_logits_that_a_cross_entropy_overwrites_are_copied():
    config = Distillation(topk=16)
    gradients = []
    for only in (True, False):
        data, logits = packed(config, distillation_only=only)
        total = loss_of(data, logits, config)["distillation_losses"].sum()
        if not only:
            logits.data.zero_()
        gradients.append(torch.autograd.grad(total, logits)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_rows_outside_of_the_responses_are_not_computed():
    config = Distillation(topk=16)
    data, logits = packed(config, distillation_only=True)
    losses = loss_of(data, logits, config)["distillation_losses"]
    rows = ours._response_rows(data)[0]
    assert len(rows) == int(data["response_mask"].sum())
    outside = torch.ones(len(losses), dtype=torch.bool).index_fill(0, rows, False)
    assert losses[outside].abs().max() == 0
    assert (losses[rows] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_mode": "k3"}, "would train on all tokens"),
        ({"loss_mode": "tip_reverse_kl_topc"}, "Did you mean 'tip_reverse_kl_topk'"),
        ({"selection_rule": "soft_ro"}, "Did you mean 'soft_or'"),
        ({"selection_rule": "teachability"}, "whichever they are"),
        ({"selection_rule": "prefix_compatibility", "topk": 8}, "topk=8"),
        ({"selection_scope": "bach"}, "Did you mean 'batch'"),
        ({"selection_scope": "batch", "normalization": "rollout"}, "set normalization=batch"),
        ({"retention": 0}, r"in \(0, 1\], got 0"),
        ({"retention": True}, r"in \(0, 1\], got True"),
        ({"selection_seed": 1.5}, "selection_seed must be an integer"),
        ({"log_prob_min_clamp": -10.0}, "set log_prob_min_clamp=null"),
        ({"use_policy_gradient": True}, "set use_policy_gradient=False"),
        ({"loss_mode": "tip_k1"}, "does not depend on the teacher"),
        ({"loss_mode": "tip_k3", "selection_rule": "q3"}, "'forward_kl', which the teacher's sampled token"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectedLossConfig(**{"use_policy_gradient": False, "log_prob_min_clamp": None, "topk": 32} | settings)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        ({"strategy": "megatron"}, {}, "strategy=megatron is not supported"),
        ({}, {"temperature": 0.7}, r"temperature must be 1.0, got \[0.69"),
        ({}, {"temperature": torch.tensor([1.0, 0.5])}, r"temperature must be 1.0, got \[0.5, 1.0\]"),
        ({}, {"use_fused_kernels": True}, "use_fused_kernels=False"),
        ({}, {"sp_size": 2}, "ulysses_sequence_parallel_size=2"),
    ],
)
def test_a_run_that_would_be_wrong_stops_at_its_first_step(config, data, message):
    class Actor:
        strategy = config.get("strategy", "fsdp2")

    loss_config = Distillation().distillation_loss
    with pytest.raises(ValueError, match=message):
        ours._check_run(Actor, data, loss_config)


def test_a_loss_that_is_not_in_force_stops_the_run(monkeypatch, model):
    with pytest.raises(ValueError, match="selects tokens and has no retention"):
        step(model, OF_VERL | {"loss_mode": "tip_reverse_kl_topk"}, 2)
    with monkeypatch.context() as patched:
        patched.setattr(verl_losses, "compute_topk_loss", lambda *args: ours.topk_loss(*args))
        patched.setattr(ours, "_bind", lambda: None)
        with pytest.raises(RuntimeError, match="was bound to another function"):
            step(model, OURS, 2)
    from verl.workers.engine_workers import TrainingWorker

    monkeypatch.setattr(TrainingWorker, "set_loss_fn", functools.partialmethod(setattr, "loss_fn"))
    monkeypatch.setattr(ours, "_bind", lambda: None)
    with pytest.raises(RuntimeError, match="Set normalization=rollout"):
        step(model, OURS, 2)


def test_an_entropy_that_verl_did_not_compute_is_asked_for():
    config = SelectedLossConfig(loss_mode="tip_k3", use_policy_gradient=False, topk=None)
    with pytest.raises(ValueError, match="calculate_entropy=True"):
        verl_refusals.check_entropy(False, config)
    verl_refusals.check_entropy(True, config)


def test_scores_of_sampled_tokens_are_of_them():
    data = left_right_2_no_padding(mini_batch(0))
    rows, _ = ours._response_rows(data)
    tokens = len(data["input_ids"].values())
    student = -5 * torch.rand(tokens, generator=torch.Generator().manual_seed(1))
    student[rows[0]] = -300.0  # a token that the student would hardly ever write
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(student, data["input_ids"].offsets())}
    config = SelectedLossConfig(
        loss_mode="tip_k3", selection_rule="cumulative_advantage", use_policy_gradient=False, topk=None
    )
    scores = ours._scores(None, config, output, data, rows)
    teacher = data["teacher_logprobs"].values()[rows, 0]
    assert torch.equal(scores.student_logprob, student[rows])
    assert torch.equal(scores.teacher_logprob, teacher)
    log_ratio = (teacher - student[rows])[1:]
    torch.testing.assert_close(scores.reverse_kl[1:], log_ratio.exp() - 1 - log_ratio, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(scores.reverse_kl).all()


LAUNCH = [
    "distillation.enabled=True",
    "distillation.nnodes=1",
    "distillation.teacher_models.teacher_model.model_path=a/teacher",
    "actor_rollout_ref.rollout.name=vllm",
    f"distillation.distillation_loss._target_={TARGET}",
    "distillation.distillation_loss.loss_mode=tip_reverse_kl_topk",
    "+distillation.distillation_loss.retention=0.5",
]


def test_a_launch_is_checked_before_it_takes_a_gpu(capsys):
    assert verl_check.main(LAUNCH) == 0
    printed = capsys.readouterr().out
    assert "soft_or keeps 0.5" in printed
    assert "entropy_norm: exact" in printed
    assert "reverse_kl: lower bound" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["distillation.enabled=False"], "Set distillation.enabled=True"),
        (
            ["distillation.distillation_loss._target_=verl.workers.config.DistillationLossConfig"],
            "set it to tipdistill.",
        ),
        (["+distillation.distillation_loss.retenton=0.5"], "no field 'retenton'. Did you mean 'retention'?"),
        (["distillation.distillation_loss.retention=1.5"], "in (0, 1], got 1.5"),
        (["+distillation.distillation_loss.selection_rule=q33"], "Did you mean 'q3'"),
        (["actor_rollout_ref.rollout.temperature=0.7"], "temperature must be 1.0"),
        (["actor_rollout_ref.model.use_fused_kernels=True"], "use_fused_kernels=False"),
        (["model_engine=megatron"], "strategy=megatron is not supported"),
        (["actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"], "sequence_parallel_size=2"),
        (["distillation.distillation_loss.loss_mode=tip_k3"], "calculate_entropy=True"),
        (["distillation.distillation_loss.nothing=1"], "nothing"),
        (["distillation.teacher_models.teacher_model.model_path=null"], "model_path must be specified"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_in_one_line(capsys, more, message):
    assert verl_check.main(LAUNCH + more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "status"), [({}, 0), ({"RULE": "q33"}, 2), ({"TOPK": "4", "RULE": "selectkd"}, 2)]
)
def test_the_example_launches_what_it_checks(environment, status):
    script = TESTS.parent / "examples" / "verl" / "run.sh"
    run = subprocess.run(
        ["bash", script],
        env=os.environ | {"DRY_RUN": "1", "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == status, run.stderr
    assert (
        "soft_or keeps 0.5" in run.stdout
        if status == 0
        else "tipdistill: selection_rule" in run.stderr or "unknown rule" in run.stderr
    )


def test_a_trl_that_breaks_verls_workers_is_named(monkeypatch, capsys):
    monkeypatch.setattr(verl_refusals, "version", lambda _: "1.16.0")
    assert verl_check.main(LAUNCH) == 2
    assert "pip uninstall trl" in capsys.readouterr().err


def test_verl_finds_our_losses_by_itself():
    """The entry point: a launch that forgets _target_ then meets our error, and not verl's unknown loss."""
    code = "import verl, sys; assert 'tipdistill.integrations.verl' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
