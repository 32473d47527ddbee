import pytest

from tipdistill import TIPConfig

CPU = {"use_cpu": True, "bf16": False}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"retention": 0}, r"retention must be in \(0, 1\], got 0"),
        ({"retention": 1.5}, r"retention must be in \(0, 1\]"),
        ({"retention": float("nan")}, r"retention must be in \(0, 1\]"),
        ({"retention": "0.5"}, r"retention must be in \(0, 1\], got '0.5'"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"retention": True}, r"retention must be in \(0, 1\]"),
        ({"selection_rule": "softor"}, "soft_or"),
        ({"selection_scope": "rolout"}, "Did you mean 'rollout'"),
        ({"normalization": "microbatch"}, "Did you mean 'micro_batch'"),
        ({"num_generations": 0}, "num_generations must be an integer ≥ 1"),
        ({"num_generations": 3, "per_device_train_batch_size": 8}, "must divide the generation batch"),
        ({"score_logging_steps": -1}, "score_logging_steps must be an integer ≥ 0"),
        ({"record_rollouts": -1}, "record_rollouts must be an integer ≥ 0"),
        ({"scoring_tokens": -1}, "scoring_tokens must be an integer ≥ 0"),
        ({"drift_factor": 0.5}, "drift_factor must be 0"),
        ({"drift_retention": 0}, r"drift_retention must be in \(0, 1\], got 0"),
        ({"drift_retention": 0.8, "drift_factor": 0}, "drift_factor = 0 turns that off"),
        ({"eval_tasks": "math500"}, "every eval_steps steps: set eval_steps"),
        ({"eval_num_samples": 0}, "eval_num_samples must be an integer ≥ 1"),
        ({"teacher_offload": True, "normalization": "micro_batch"}, 'needs normalization="batch"'),
    ],
)
def test_bad_fields_are_refused(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        TIPConfig(str(tmp_path), **CPU, **setting)


def test_defaults_are_the_papers(tmp_path):
    config = TIPConfig(str(tmp_path), **CPU)
    assert (config.selection_rule, config.retention, config.selection_scope) == ("soft_or", 0.5, "rollout")
    assert (config.beta, config.temperature) == (1.0, 1.0)


def surprise(scores):
    return -scores.token_logprob


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_offload": True},
        {"teacher_url": "http://localhost:8000/v1"},
        {"teacher_model_name_or_path": "self"},
        {"teachers": {"maths": "m", "code": "http://localhost:8000/v1"}},
        {"teachers": {"maths": "m", "own": "self"}},
        {"selection_rule": surprise},
    ],
    ids=["offloaded", "served", "self", "one of two served", "one of two self", "a rule that says nothing of itself"],
)
def test_what_must_be_scored_before_the_loss_has_its_own_scales(tmp_path, settings):
    assert TIPConfig(str(tmp_path), **CPU, **settings).normalization == "batch"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"teachers": {"maths": "m", "code": "c"}},
        {"selection_rule": "all"},
        {"selection_rule": "complement:soft_or"},
    ],
    ids=str,
)
def test_all_else_takes_the_scales_of_the_step_before(tmp_path, settings):
    assert TIPConfig(str(tmp_path), **CPU, **settings).normalization == "running"
