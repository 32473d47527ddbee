"""verl's actor on our loss: metrics and gradients that must come out again as written down (`make test-verl`)."""

import pytest

pytest.importorskip("verl", reason="verl is not installed: `make test-verl` builds an environment with it")

import torch
from golden_file import digest, hold
from transformers import AutoModelForCausalLM, Qwen3Config
from verl_run import VOCABULARY, step

from tipdistill.integrations.verl import TARGET

OURS = {"_target_": TARGET, "loss_mode": "tip_reverse_kl_topk"}
LOSSES = {
    "soft_or": {"retention": 0.5},
    "gradient_norm-batch": {"selection_rule": "gradient_norm", "retention": 0.3, "selection_scope": "batch"},
    "entropy-rollout": {"selection_rule": "entropy", "retention": 0.3, "normalization": "rollout"},
    "all": {"selection_rule": "all", "retention": 1.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
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
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("micro_batch", [2, None])
def test_step(name, micro_batch, model):
    metrics, gradients, _ = step(model, {**OURS, **LOSSES[name]}, micro_batch, temperature=1.0)
    hold(
        f"verl[{name}-{micro_batch}]",
        {
            "gradients": digest(*(gradients[name] for name in sorted(gradients))),
            "norms": {name: gradient.norm().item() for name, gradient in gradients.items()},
            "loss": str(metrics["loss"]),
        },
    )
