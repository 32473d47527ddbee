"""The probe against plain autograd, and its advice on cases where the answer is known."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tipdistill import probe as module
from tipdistill import quadrants, select
from tipdistill.probe import Settings, probe
from tipdistill.rollout import generate
from tipdistill.score.models import score_rollouts

TOLERANCE = 1e-6
PROMPTS = [f"{name} has {number}" for number, name in enumerate(("Ada", "Emmy", "Kurt", "Alan", "Grace", "Ada"), 10)]
QUICK = Settings(rules=("soft_or", "q3", "entropy_sampling"), retentions=(0.5, 0.2), random_seeds=2, bootstrap=50)


@pytest.fixture(scope="module")
def pair(tiny_model_dir):
    """In float64, but for the RMSNorms, which compute in float32 whatever the weights are: hence TOLERANCE."""
    return [
        AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama", role)).double().eval()
        for role in ("student", "teacher")
    ]


@pytest.fixture(scope="module")
def rollouts(pair, tiny_tokenizer):
    return [
        rollout
        for batch in generate(pair[0], tiny_tokenizer, PROMPTS, samples=2, max_new_tokens=9, seed=5)
        for rollout in batch
    ]


@pytest.fixture(scope="module")
def scores(pair, rollouts):
    return score_rollouts(*pair, rollouts, QUICK.fields()).scores


def losses(student, teacher, rollout):
    """KL(P_S ‖ P_T) of each completion token, as the equation has it."""
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    rows = slice(len(rollout.prompt_ids) - 1, tokens.shape[1] - 1)
    log_s = student(tokens).logits[0, rows].log_softmax(-1)
    with torch.no_grad():
        log_t = teacher(tokens).logits[0, rows].log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1)


def gradient(student, teacher, rollouts, mask=None, parameters=None):
    """∇ of the mean over the mask's tokens by plain autograd."""
    parameters = list(student.parameters()) if parameters is None else parameters
    every = torch.cat([losses(student, teacher, rollout) for rollout in rollouts])
    loss = every.mean() if mask is None else every[mask].mean()
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, parameters)])


def halves(rollouts, scores):
    """(rollouts to train on, their scores, the rollout of each token, rollouts held out), both ways round."""
    for even in (True, False):
        training = [rollout for rollout in rollouts if (rollout.prompt_id % 2 == 0) == even]
        held_out = [rollout for rollout in rollouts if (rollout.prompt_id % 2 == 0) != even]
        inside = torch.cat([torch.full((len(one.completion_ids),), one in training) for one in rollouts])
        owner = torch.cat([torch.full((len(one.completion_ids),), place) for place, one in enumerate(training)])
        yield training, scores.map(lambda value, inside=inside: value[inside]), owner, held_out


def size(rollouts):
    return sum(len(rollout.completion_ids) for rollout in rollouts)


def test_figures_are_those_of_plain_autograd(pair, rollouts, scores):
    result = probe(*pair, rollouts, scores, QUICK)
    for row in result["rows"]:
        if row["rule"] in ("random", "entropy_sampling"):
            continue
        cosine, descent, masks, batches, q3 = [], 0.0, [], [], []
        for training, batch, owner, held_out in halves(rollouts, scores):
            mask = torch.ones_like(owner, dtype=torch.bool)
            if row["rule"] != "all":
                mask = select(batch, row["rule"], row["retention"], owner).mask
            kept, whole = gradient(*pair, training, mask), gradient(*pair, training)
            cosine.append(float(torch.cosine_similarity(kept, whole, dim=0)))
            # the held-out loss is a mean over the tokens of both halves together
            descent += float(gradient(*pair, held_out) @ kept / kept.norm()) * size(held_out) / size(rollouts)
            masks.append(mask), batches.append(batch.reverse_kl), q3.append(quadrants(batch) == 3)
        mask, delta, q3 = torch.cat(masks), torch.cat(batches), torch.cat(q3)
        assert row["cosine"] == pytest.approx(sum(cosine) / 2, abs=TOLERANCE)
        assert row["descent"] == pytest.approx(descent, rel=TOLERANCE, abs=TOLERANCE)
        assert row["kept"] == pytest.approx(float(mask.double().mean()))
        assert row["divergence_share"] == pytest.approx(float(delta[mask].sum() / delta.sum()), rel=TOLERANCE)
        expected = float((q3 & mask).sum() / q3.sum()) if q3.any() else None
        assert row["q3_share"] == (None if expected is None else pytest.approx(expected))
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(result, allow_nan=False))


def test_descent_is_how_fast_the_held_out_loss_falls(pair, rollouts, scores):
    """A small step along −g_K / ‖g_K‖ of each half, taken."""
    row = next(row for row in probe(*pair, rollouts, scores, QUICK)["rows"] if row["rule"] == "q3")
    fell = 0.0
    for training, batch, owner, held_out in halves(rollouts, scores):
        step = gradient(*pair, training, select(batch, "q3", row["retention"], owner).mask)
        step = step / step.norm()

        def loss_after(length, step=step, held_out=held_out):
            moved = copy.deepcopy(pair[0])
            pieces = step.split([parameter.numel() for parameter in moved.parameters()])
            with torch.no_grad():
                for parameter, piece in zip(moved.parameters(), pieces, strict=True):
                    parameter -= length * piece.view_as(parameter)
                return torch.cat([losses(moved, pair[1], rollout) for rollout in held_out]).mean().item()

        # large enough a step for float32 noise in the norms, small enough for what is left of the curvature
        fell += (loss_after(-1e-2) - loss_after(1e-2)) / 2e-2 * size(held_out) / size(rollouts)
    assert fell == pytest.approx(row["descent"], rel=1e-2)


@pytest.mark.parametrize(
    "change", [{"gradient_bytes": 1}, {"tokens_per_forward": 1}, {"tokens_per_forward": 60}], ids=str
)
def test_memory_and_micro_batches_change_no_figure(pair, rollouts, scores, change):
    expected = probe(*pair, rollouts, scores, QUICK)["rows"]
    for mine, theirs in zip(probe(*pair, rollouts, scores, replace(QUICK, **change))["rows"], expected, strict=True):
        for name in ("cosine", "descent", "descent_share", "over_random"):
            assert mine[name] == (None if theirs[name] is None else pytest.approx(theirs[name], rel=1e-9, abs=1e-12))


def test_a_rule_that_weighs_every_token_is_probed_once_with_its_weights(pair, rollouts):
    settings = replace(QUICK, rules=("position", "soft_or"))
    scores = score_rollouts(*pair, rollouts, settings.fields()).scores
    rows = probe(*pair, rollouts, scores, settings)["rows"]
    (row,) = [row for row in rows if row["rule"] == "position"]
    descent = 0.0
    for training, batch, owner, held_out in halves(rollouts, scores):
        weight = select(batch, "position", 1.0, owner).weight
        every = torch.cat([losses(*pair, rollout) for rollout in training])
        grads = torch.autograd.grad((every * weight).sum() / weight.sum(), list(pair[0].parameters()))
        weighed = torch.cat([one.flatten() for one in grads])
        descent += float(gradient(*pair, held_out) @ weighed / weighed.norm()) * size(held_out) / size(rollouts)
    assert row["retention"] == 1
    assert row["descent"] == pytest.approx(descent, rel=TOLERANCE)
    assert row["over_random"] is None


def test_the_last_blocks_alone(pair, rollouts, scores):
    result = probe(*pair, rollouts, scores, replace(QUICK, parameters="last_blocks", last_blocks=1))
    block = list(pair[0].model.layers[-1].parameters())
    assert result["parameters"] == {"kind": "the last 1 blocks", "count": sum(one.numel() for one in block)}
    descent = 0.0
    for training, _, _, held_out in halves(rollouts, scores):
        whole, downhill = (gradient(*pair, some, parameters=block) for some in (training, held_out))
        descent += float(downhill @ whole / whole.norm()) * size(held_out) / size(rollouts)
    assert result["rows"][0]["descent"] == pytest.approx(descent, rel=TOLERANCE)


def test_lora_is_a_projection_of_the_whole_gradient(pair, rollouts, scores):
    """∂L/∂B = s · ∂L/∂W · Aᵀ with B = 0, of every linear layer, and nothing of the adapters stays."""
    student, teacher = pair
    names = set(student.state_dict())
    settings = replace(QUICK, parameters="lora")
    training, *_ = next(halves(rollouts, scores))
    with module._differentiated(student, settings) as (model, parameters, _):
        everything = torch.ones(1, sum(len(one.completion_ids) for one in training))
        (found,) = module._gradients(model, teacher, training, everything, parameters, settings)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        project, scale = layer.lora_A["default"].weight.detach().double(), layer.scaling["default"]
        place = next(n for n, one in enumerate(parameters) if one is layer.lora_B["default"].weight)
        sizes = [one.numel() for one in parameters]
    assert set(student.state_dict()) == names
    weight = student.model.layers[0].mlp.up_proj.weight
    expected = scale * gradient(student, teacher, training, parameters=[weight]).view_as(weight) @ project.T
    torch.testing.assert_close(found.split(sizes)[place].view_as(expected).double(), expected, rtol=1e-5, atol=1e-9)
    result = probe(*pair, rollouts, scores, settings)
    assert result["parameters"]["kind"] == "lora"


def test_the_student_is_left_as_it_was(tiny_model_dir, rollouts, scores):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama", role)) for role in ("student", "teacher")
    )
    student.train().requires_grad_(False)
    student.lm_head.weight.requires_grad_(True)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    for parameters in ("all", "lora"):
        probe(student, teacher, rollouts, scores, replace(QUICK, parameters=parameters))
    assert student.training
    assert [name for name, one in student.named_parameters() if one.requires_grad] == ["lm_head.weight"]
    assert all(one.grad is None for one in student.parameters())
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


def test_random_is_the_control_and_overlaps_are_symmetric(pair, rollouts, scores):
    rows = {(row["rule"], row["retention"]): row for row in probe(*pair, rollouts, scores, QUICK)["rows"]}
    assert set(rows) == {
        ("all", 1.0),
        *((rule, at) for at in (0.5, 0.2) for rule in ("soft_or", "q3", "entropy_sampling", "random")),
    }
    for (rule, at), row in rows.items():
        for other, overlap in row["jaccard"].items():
            assert overlap == pytest.approx(rows[other, at]["jaccard"][rule])
        if rule not in ("all", "random"):
            assert row["over_random"] == pytest.approx(row["descent"] - rows["random", at]["descent"])
            low, high = row["descent_interval"]
            assert low <= row["descent"] <= high


def test_intervals_narrow_as_prompts_are_added():
    generator = torch.Generator().manual_seed(0)
    width = []
    for prompts in (10, 1000):
        slope = torch.randn(prompts, 1, generator=generator, dtype=torch.float64) + 2
        found = module._bootstrap(slope, torch.ones(prompts, dtype=torch.float64), Settings(bootstrap=400))
        low, high = module._interval(found[1:, 0])
        assert low < 2 < high
        width.append(high - low)
    # the standard error of a mean is 1 / √n
    assert 5 < width[0] / width[1] < 20


def test_every_rule_that_draws_is_drawn_as_often_as_the_control(scores, rollouts):
    owner = torch.cat([torch.full((len(rollout.completion_ids),), number) for number, rollout in enumerate(rollouts)])
    settings = Settings(rules=("q3", "gradient_norm_sampling"), retentions=(0.5,), random_seeds=3)
    gradient = replace(scores, gradient_norm=scores.require("reverse_kl").abs() + 0.01)
    chosen = list(module._choices(gradient, owner, settings))
    assert [choice.rule for choice in chosen] == ["q3", *["gradient_norm_sampling"] * 3, *["random"] * 3]
    weights = torch.stack([choice.weight for choice in chosen[1:4]])
    assert not torch.equal(weights[0], weights[1])
    assert weights.max() > 1  # inverse of the probability


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ("all",)}, "keeps everything"),
        ({"rules": ()}, "no rule to probe"),
        ({"rules": ("softor",)}, "unknown rule"),
        ({"retentions": (0.5, 1.0)}, r"retentions must lie in \(0, 1\)"),
        ({"retentions": ()}, r"retentions must lie in \(0, 1\)"),
        ({"parameters": "some"}, "parameters must be one of auto, all, last_blocks, lora"),
        ({"bootstrap": 0}, "bootstrap must be at least 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_too_few_prompts(pair, rollouts, scores):
    few = [rollout for rollout in rollouts if rollout.prompt_id < 3]
    with pytest.raises(ValueError, match="rollouts of at least 4 prompts"):
        probe(*pair, few, scores, QUICK)
