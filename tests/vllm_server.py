"""A vLLM server without vLLM: what TRL's client tells it, weights of its own, and rollouts that it writes greedily."""

import threading

import torch
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration


@torch.no_grad()
def greedy(model, prompt, length=8):
    """By the model alone, token by token."""
    ids, ends = list(prompt), {model.generation_config.eos_token_id}
    for _ in range(length):
        ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def logprobs(model, prompt, completion, temperature=1.0):
    logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


class Server:
    """TRL's client and the server behind it: holds weights of its own, writes greedily, and notes what it is told."""

    def __init__(self, path):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.told, self.is_writing = [], False
        self.may_write = threading.Event()
        self.may_write.set()
        self.dies_at = None

    def update_named_params(self, metadata, parameters):
        assert not self.is_writing, "weights were sent while it writes"
        self.told.append("weights")
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            for name, value in parameters:
                own[name].copy_(value)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, features, **sampling):
        self.is_writing = True
        try:
            self.told.append(len(prompts))
            assert self.may_write.wait(60)
            if self.told.count(4) == self.dies_at:
                raise ConnectionError("connection refused")
            completions = [greedy(self.model, prompt, sampling["max_tokens"]) for prompt in prompts]
            values = [logprobs(self.model, *rollout) for rollout in zip(prompts, completions, strict=True)]
            return {
                "prompt_ids": prompts,
                "completion_ids": completions,
                "logprobs": [[[value] for value in row.tolist()] for row in values],
            }
        finally:
            self.is_writing = False


def use(trainer, path, most):
    """Let a trainer's rollouts be written by a server, as its constructor would have left it; the package is not there.

    Args:
        trainer: a `TIPTrainer`.
        path: of the student's first weights.
        most: tokens of a completion.
    """
    init, VLLMGeneration._init_vllm = VLLMGeneration._init_vllm, lambda self: None
    try:
        engine = VLLMGeneration(
            trainer.model, trainer.accelerator, trainer.processing_class, mode="server", max_completion_length=most
        )
    finally:
        VLLMGeneration._init_vllm = init
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
    trainer.vllm_generation, trainer.server = engine, None
    if trainer.accelerator.is_main_process:
        trainer.server = engine.vllm_client = Server(path)
