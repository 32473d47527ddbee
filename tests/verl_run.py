"""verl's actor on a CPU: its platform plugin, a mini-batch, and a training step that hands back its gradients.

Imported by tests/integrations/test_verl.py, and run by it under torchrun for several processes:

    torchrun --nproc_per_node 2 tests/verl_run.py MODEL SETTINGS.json RESULT.pt
"""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from contextlib import nullcontext

import torch
from tensordict import TensorDict
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

os.environ["VERL_PLATFORM"] = "cpu"
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the engines are registered for "cuda"
for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
    os.environ.setdefault(name, value)

VOCABULARY = 97


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """What verl asks of a device, answered by the CPU; torch.cuda's memory figures are 0."""

    device_name = vendor_name = "cpu"

    @property
    def device_module(self):
        module = types.ModuleType("torch.cpu")
        vars(module).update(vars(torch.cpu))
        for figure in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
            setattr(module, figure, lambda *_: 0)
        module.mem_get_info = lambda *_: (0, 0)
        module.empty_cache = lambda: None
        module.get_device_name = lambda *_: "CPU"
        return module

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return int(os.environ["WORLD_SIZE"])

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return nullcontext()

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None

    def nothing(self, *_):
        return None

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = nothing
    profiler_start = profiler_stop = nothing


def mini_batch(k: int, seed: int = 0, lengths=((3, 9), (5, 4), (2, 12), (4, 1), (1, 7), (3, 6), (2, 5), (4, 8))):
    """Rollouts of (prompt, response) tokens and a teacher's k likeliest ones (0: the sampled one), padded as verl's."""
    draw = torch.Generator().manual_seed(seed)
    rollouts = len(lengths)
    prompt, response = (max(pair[side] for pair in lengths) for side in (0, 1))
    ids = torch.randint(1, VOCABULARY, (rollouts, prompt + response), generator=draw)
    attention = torch.zeros_like(ids)
    for row, (before, after) in enumerate(lengths):
        attention[row, prompt - before : prompt + after] = 1
    mask = attention[:, prompt:].clone()
    mask[2, 3:5] = 0  # a tool's answer
    teacher = (2 * torch.randn(*ids.shape, VOCABULARY, generator=draw)).log_softmax(-1)
    if k:
        logprobs, tokens = teacher.topk(k, -1)
    else:
        tokens = ids.roll(-1, 1)[..., None]
        logprobs = teacher.gather(-1, tokens)
    # verl pads what a sequence's last token would predict with one token k times, at log-probability 0
    ends = (torch.arange(rollouts), torch.tensor([prompt + after - 1 for _, after in lengths]))
    tokens[ends], logprobs[ends] = 0, 0.0
    return TensorDict(
        {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "prompts": ids[:, :prompt],
            "responses": ids[:, prompt:],
            "response_mask": mask,
            "teacher_ids": tokens.to(torch.int32),
            "teacher_logprobs": logprobs,
            "old_log_probs": torch.full(mask.shape, -3.0),
            "advantages": torch.zeros(mask.shape),
        },
        batch_size=rollouts,
    )


def actor_config(**settings):
    from verl.workers.config import FSDPActorConfig

    return FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)


def step(model: str, loss: dict, micro_batch: int | None = 1, rows=slice(None), k: int = 16, **settings):
    """One `TrainingWorker.train_batch` over the mini-batch: (metrics, gradients by name, TrainingWorker).

    Args:
        model: folder of a checkpoint.
        loss: fields of the loss's configuration, `_target_` among them.
        micro_batch: rollouts per micro-batch; None: verl's dynamic ones, of up to 24 tokens.
        rows: the rollouts of this rank.
        k: likeliest tokens of the teacher; 0: the sampled token's log-probability.
        settings: packed, nested, dtype, agg (loss_agg_mode), batch (else `mini_batch(k)`), mini_batch (of a step).
    """
    from verl.trainer.distillation import distillation_ppo_loss
    from verl.utils import tensordict_utils
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.padding import left_right_2_no_padding

    torch.manual_seed(0)
    dtype = settings.get("dtype", "float32")
    if not torch.distributed.is_initialized():  # verl would name gloo twice
        alone = os.environ["WORLD_SIZE"] == "1"
        store = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        torch.distributed.init_process_group("gloo", **store)
    distillation = {
        "_target_": "verl.workers.config.DistillationConfig",
        "distillation_loss": {"use_task_rewards": False, "use_policy_gradient": False, "topk": k or None}
        | {"loss_max_clamp": None, "log_prob_min_clamp": None}
        | loss,
    }
    actor = actor_config(loss_agg_mode=settings.get("agg", "token-mean"))
    actor.model_config = model_config = HFModelConfig(
        path=model,
        use_remove_padding=settings.get("packed", False),
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": settings.get("attention", "sdpa")},
    )
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                dtype=dtype,
                use_torch_compile=False,
                use_dynamic_bsz=micro_batch is None,
                micro_batch_size_per_gpu=micro_batch,
                infer_micro_batch_size_per_gpu=micro_batch,
                max_token_len_per_gpu=24,
                infer_max_token_len_per_gpu=24,
                mixed_precision={"param_dtype": dtype, "reduce_dtype": "float32", "buffer_dtype": "float32"},
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
            checkpoint_config=None,
        )
    )
    worker.reset()
    distillation_config = omega_conf_to_dataclass(distillation)
    worker.set_loss_fn(functools.partial(distillation_ppo_loss, config=actor, distillation_config=distillation_config))
    gradients = {}
    of_verl = worker.engine.optimizer_step

    def optimizer_step():
        for name, parameter in worker.engine.module.named_parameters():
            assert isinstance(parameter, torch.distributed.tensor.DTensor), f"{name} is not sharded"
            gradients[name] = parameter.grad.full_tensor().clone()
        return of_verl()

    worker.engine.optimizer_step = optimizer_step
    whole = settings["batch"] if "batch" in settings else mini_batch(k)
    data = left_right_2_no_padding(whole[rows].clone())
    if settings.get("nested"):  # as from verl's TransferQueue
        attention = data.pop("attention_mask").bool()
        for name in ("max_response_len", "max_seq_len", "indices"):
            del data[name]
        prompt = data["prompts"].shape[1]
        sides = {"prompts": attention[:, :prompt]} | dict.fromkeys(
            ("responses", "response_mask", "loss_mask", "old_log_probs", "advantages"), attention[:, prompt:]
        )
        for name, side in sides.items():
            rollouts = [values[of] for values, of in zip(data[name], side, strict=True)]
            data[name] = torch.nested.as_nested_tensor(rollouts, layout=torch.jagged)
    use_topk = bool(k)
    tensordict_utils.assign_non_tensor(
        data,
        temperature=settings.get("temperature", 1.0),
        calculate_entropy=not use_topk,
        distillation_use_topk=use_topk,
        distillation_only=use_topk and not distillation_config.distillation_loss.use_task_rewards,
        global_batch_size=len(whole),
    )
    if "mini_batch" in settings:  # several optimiser steps, as from verl's driver
        tensordict_utils.assign_non_tensor(data, mini_batch_size=settings["mini_batch"])
        output = worker.train_mini_batch(data)
    else:
        output = worker.train_batch(data)
    return tensordict_utils.get(output, "metrics"), gradients, worker


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, settings, result = sys.argv[1:]
    with open(settings, encoding="utf-8") as file:
        arguments = json.load(file)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    metrics, gradients, _ = step(model, rows=slice(rank, None, ranks), **arguments)
    if rank == 0:
        torch.save(({name: metrics[name] for name in ("loss", "grad_norm")}, gradients), result)
