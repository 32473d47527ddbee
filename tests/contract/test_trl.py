"""What moved when TRL moves: every private name that the trainer relies on, against the installed TRL."""

import inspect

import pytest
import torch
from transformers import Trainer
from trl import DistillationTrainer
from trl.generation import vllm_client
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler, shuffle_sequence_dict, split_tensor_dict

from tipdistill.integrations import _trl, weight_sync
from tipdistill.integrations._trl import EpochSampler
from tipdistill.score.models import logit_transform

NAMES = _trl.OVERRIDDEN


@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_their_parameters(name):
    method = getattr(DistillationTrainer, name, None)
    assert method is not None, f"TRL's DistillationTrainer no longer has {name}; see integrations/_trl.py"
    parameters = tuple(inspect.signature(method).parameters)
    expected = NAMES[name]
    assert parameters[: len(expected)] == expected, f"TRL's {name} now takes {parameters}, we rely on {expected}"


@pytest.mark.parametrize("name", _trl.ATTRIBUTES)
def test_attributes_are_set_by_the_constructor(name):
    source = inspect.getsource(DistillationTrainer.__init__)
    assert f"self.{name} =" in source, f"TRL's constructor no longer sets {name}"


def test_vllm_generation_keeps_what_the_weight_sync_check_reads():
    for name, expected in _trl.GENERATION_METHODS.items():
        assert tuple(inspect.signature(getattr(VLLMGeneration, name)).parameters)[: len(expected)] == expected
    source = inspect.getsource(VLLMGeneration)
    for name in _trl.GENERATION_ATTRIBUTES:
        assert f"self.{name} =" in source, f"TRL's VLLMGeneration no longer has {name}; see integrations/weight_sync.py"
    assert set(weight_sync._NEUTRAL) <= set(_trl.GENERATION_ATTRIBUTES)
    assert "return prompt_ids, completion_ids, logprobs, logprob_token_ids" in source


def test_one_call_asks_the_server_for_the_rollouts_of_all_processes():
    """`training/ahead.py` makes it twice, with clients of its own."""
    source = inspect.getsource(VLLMGeneration.generate)
    calls = ("gather_object(prompts)", "self.vllm_client.generate(", "broadcast_object_list(", "process_slice")
    assert [source.count(call) for call in calls[:3]] == [1, 1, 1]
    order = [source.index(call) for call in calls]
    assert order == sorted(order)
    assert source.count("self.vllm_client.") == 2  # the other is for images
    generate = inspect.signature(vllm_client.VLLMClient.generate).parameters
    assert {"prompts", "features", "max_tokens", "logprobs"} <= set(generate)
    assert tuple(inspect.signature(Trainer.get_batch_samples).parameters)[1:3] == ("epoch_iterator", "num_batches")


def test_weights_are_synced_once_per_step_before_vllm_generates():
    source = inspect.getsource(DistillationTrainer._generate_single_turn)
    order = [
        source.index(part)
        for part in ("global_step != self._last_loaded_step", "sync_weights()", "vllm_generation.generate(")
    ]
    assert order == sorted(order)


def test_compute_loss_divides_the_count_by_the_processes():
    source = inspect.getsource(DistillationTrainer.compute_loss)
    assert 'inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes' in source
    assert "loss, entropy_sum, num_valid_tokens = self._forward_redirection(" in source


def test_the_generation_batch_is_shuffled_then_split_and_lists_follow_their_rows():
    """Our per-rollout lists (teacher_hidden) and [B, T] tensors must travel with their rollouts."""
    batch = {
        "ids": torch.arange(6)[:, None],
        "rows": [torch.full((i,), i) for i in range(6)],
        "count": torch.tensor(7),
    }
    pieces = split_tensor_dict(shuffle_sequence_dict(batch), 3)
    assert len(pieces) == 3
    for piece in pieces:
        assert piece["count"] == 7
        for index, row in zip(piece["ids"][:, 0].tolist(), piece["rows"], strict=True):
            assert row.tolist() == [index] * index
    source = inspect.getsource(DistillationTrainer._prepare_inputs)
    order = [source.index(step) for step in ("_generate_and_score", "shuffle_sequence_dict(", "split_tensor_dict(")]
    assert order == sorted(order)


def test_multimodal_keys_are_those_of_trl():
    source = inspect.getsource(DistillationTrainer._compute_loss)
    assert all(f'"{key}"' in source for key in _trl.MULTIMODAL_KEYS)
    signature = inspect.signature(DistillationTrainer._get_last_hidden_state)
    assert tuple(signature.parameters)[5:] == _trl.MULTIMODAL_KEYS
    source = inspect.getsource(DistillationTrainer._generate_and_score_completions)
    assert all(f'output["{key}"]' in source for key in _trl.IMAGE_COUNTS)
    source = inspect.getsource(DistillationTrainer._prepare_inputs)
    order = [source.index(f"= {name}(") for name in ("split_pixel_values_by_grid", "shuffle_sequence_dict")]
    assert order == sorted(order)


def test_trl_still_refuses_padded_vocabularies():
    """The reason why the teacher is prepared here; when this fails, TRL's own teacher set-up may serve."""
    source = inspect.getsource(DistillationTrainer.__init__)
    assert "student_vocab_size != teacher_vocab_size" in source


def test_epoch_sampler_first_epoch_is_trls_and_later_epochs_depend_on_the_epoch_alone():
    def order(sampler, epoch):
        sampler.set_epoch(epoch)
        return list(sampler)

    settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "shuffle": True, "seed": 5}
    ours, again = EpochSampler(range(9), **settings), EpochSampler(range(9), **settings)
    assert order(ours, 0) == list(RepeatSampler(range(9), **settings))
    first = [order(ours, epoch) for epoch in range(3)]
    assert first[0] != first[1] != first[2]
    assert order(again, 2) == first[2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1.0, None)),
        ({"logit_scale": 0.0625}, (0.0625, None)),
        ({"logits_scaling": 8.0}, (0.125, None)),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, (8.0, None)),
        ({"lm_head_multiplier": 0.5, "final_logit_softcapping": 30.0}, (0.5, 30.0)),
    ],
)
def test_logit_transform(settings, expected):
    class Config:
        model_type = "qwen3"

        def get_text_config(self):
            return self

    config = Config()
    for name, value in settings.items():
        setattr(config, name, value)
    assert logit_transform(config) == expected
