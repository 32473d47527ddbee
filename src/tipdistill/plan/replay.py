"""What a forward and a backward hold at once, counted by running them on tensors that have sizes and no memory.

Every tensor that the model's own code, autograd, autocast and gradient checkpointing make is counted when it appears
and when it is let go, as an allocator would. Only the head stage, which reads numbers, is acted: `_HeadOnPaper` makes
the tensors that `score.chunked.FusedLoss` makes.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import DynamicCache

from ..score.models import lm_head_dtype
from ..score.tiles import Gradients
from .models import build, config_of, on_paper


class _Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.bytes = self.peak = 0
        self.at_peak: Callable[[], None] = lambda: None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self.bytes += storage.nbytes()
        if self.bytes > self.peak:
            self.peak = self.bytes
            self.at_peak()

    def _free(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Compute:
    """How a model computes.

    Attributes:
        config: its configuration as JSON.
        dtype: of the weights.
        autocast: matmuls in bfloat16 under `torch.autocast`.
        lora: (rank, target modules or None for PEFT's own choice), or None for full fine-tuning.
    """

    config: str
    dtype: torch.dtype
    autocast: bool = False
    lora: tuple[int, tuple[str, ...] | str | None] | None = None

    def model(self) -> Any:
        config = config_of(self.config)
        if self.lora is None:
            return build(config, self.dtype)
        from peft import LoraConfig, get_peft_model

        rank, given = self.lora
        targets = list(given) if isinstance(given, tuple) else given
        with unset_fake_temporarily(), torch.device("meta"):  # PEFT moves its adapters, which a fake tensor refuses
            model = get_peft_model(
                build(config, self.dtype), LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
            )
        return _without_memory(model)

    def layers(self) -> int | None:
        """Decoder layers where they are alike but for the first few, else None."""
        sizes = json.loads(self.config)
        alike = len(set(sizes.get("layer_types") or ["all"])) == 1
        return sizes.get("num_hidden_layers") if alike and "text_config" not in sizes else None

    def with_layers(self, count: int) -> Compute:
        sizes = json.loads(self.config)
        sizes["num_hidden_layers"] = count
        if sizes.get("layer_types"):
            sizes["layer_types"] = sizes["layer_types"][:count]
        return replace(self, config=json.dumps(sizes))

    def casting(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


def _without_memory(model: Any) -> Any:
    """A model on the meta device as one of fake CPU tensors."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            of_kind = module._parameters if name in module._parameters else module._buffers
            of_kind[name] = made[id(tensor)]
    return model


@dataclass(frozen=True)
class Forward:
    """A forward without gradients.

    Attributes:
        peak: bytes held at once beside the weights, the result included.
        width: bytes of a hidden state.
        casts: bytes of the weights' copies in autocast's dtype, which live until it is left.
        cache: bytes of keys and values per token, where they were kept.
    """

    peak: int
    width: int
    casts: int
    cache: int


@dataclass(frozen=True)
class Training:
    """A forward and a backward of one micro-batch, its lm_heads included.

    Attributes:
        saved: bytes held between the backbone's forward and its backward.
        peak: most bytes held at once beside weights and the gradients that were there before.
        gradients: bytes of parameters' gradients among them at that moment.
    """

    saved: int
    peak: int
    gradients: int


@lru_cache(maxsize=64)
def weights(compute: Compute) -> tuple[int, int, int]:
    """Bytes of all weights, and number and bytes of the trained parameters."""
    with on_paper():
        parameters = list(compute.model().parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return (
            sum(parameter.nbytes for parameter in parameters),
            sum(parameter.numel() for parameter in trained),
            sum(parameter.nbytes for parameter in trained),
        )


# Layers of two short copies, from which the bytes of a deep model follow: they grow by as much with each layer.
_FEW, _MORE = 4, 6


def _from_few_layers(count: Callable[[Compute], dict[str, float]], compute: Compute) -> dict[str, int]:
    layers = compute.layers()
    if layers is None or layers <= _MORE:
        return {name: int(value) for name, value in count(compute).items()}
    few, more = (count(compute.with_layers(number)) for number in (_FEW, _MORE))
    steps = (layers - _FEW) / (_MORE - _FEW)
    return {name: int(value + steps * (more[name] - value)) for name, value in few.items()}


@contextmanager
def _backbone(compute: Compute, train: bool) -> Any:
    with on_paper():
        model = compute.model()
        model.train(train)
        plain = model.base_model.model if compute.lora is not None else model
        yield model, plain.base_model


def _inputs(sequences: int, tokens: int, padded: bool) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.zeros(sequences, tokens, dtype=torch.long)}
    if padded:  # a mask that hides nothing is left out by transformers, so it is only made where it hides something
        inputs["attention_mask"] = torch.ones(sequences, tokens, dtype=torch.long)
    return inputs


def forward(compute: Compute, sequences: int, tokens: int, padded: bool = False, cached: bool = False) -> Forward:
    """Count a forward of the backbone over [sequences, tokens].

    Args:
        compute: the model.
        sequences, tokens: shape of the input.
        padded: whether sequences differ in length, so that attention needs a mask.
        cached: keep keys and values.
    """

    def count(compute: Compute) -> dict[str, float]:
        return vars(_forward(compute, sequences, tokens, padded, cached))

    return Forward(**_from_few_layers(count, compute))


@lru_cache(maxsize=256)
def _forward(compute: Compute, sequences: int, tokens: int, padded: bool, cached: bool) -> Forward:
    with _backbone(compute, train=False) as (model, backbone), torch.no_grad():
        weights = list(model.parameters())
        with _Alive([*weights, *model.buffers()]) as alive, compute.casting():
            out = backbone(**_inputs(sequences, tokens, padded), use_cache=cached)
            hidden, cache = out.last_hidden_state, out.past_key_values
            stored = 0
            if cached:
                stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            inside = alive.bytes - hidden.nbytes - stored
            width = hidden.shape[-1] * lm_head_dtype(hidden).itemsize
        # what is left when everything else has gone is autocast's cache; `inside` also holds rope's few columns
        casts = sum(weight.numel() * 2 for weight in weights if weight.ndim > 1) if compute.autocast else 0
        casts = min(casts, inside) if compute.dtype == torch.float32 else 0
    return Forward(alive.peak, width, casts, stored // (sequences * tokens))


def decoding(compute: Compute, sequences: int, tokens: int, padded: bool = False) -> int:
    """Most bytes that the last step of `generate` holds at once: the cache of `tokens`, and what one more adds."""
    return _from_few_layers(lambda compute: {"peak": _decoding(compute, sequences, tokens, padded)}, compute)["peak"]


@lru_cache(maxsize=256)
def _decoding(compute: Compute, sequences: int, tokens: int, padded: bool) -> int:
    with _backbone(compute, train=False) as (model, backbone), torch.no_grad(), compute.casting():
        config = model.config.get_text_config()
        step = backbone(**_inputs(sequences, 1, False), use_cache=True).past_key_values
        cache = DynamicCache(config=config)
        weights = [*model.parameters(), *model.buffers()]
        with _Alive(weights) as alive:
            for index, layer in enumerate(step.layers):
                shape = [*layer.keys.shape]
                shape[2] = tokens - 1
                keys = torch.empty(shape, dtype=layer.keys.dtype)
                values = torch.empty([*shape[:3], layer.values.shape[-1]], dtype=layer.values.dtype)
                cache.update(keys, values, index)
                del keys, values
            # what was made to fill it is no part of a step
            alive.peak = alive.bytes
            inputs = {"input_ids": torch.zeros(sequences, 1, dtype=torch.long)}
            if padded:
                inputs["attention_mask"] = torch.ones(sequences, tokens, dtype=torch.long)
            backbone(**inputs, past_key_values=cache, use_cache=True)
    return alive.peak


class _HeadOnPaper(torch.autograd.Function):
    """The tensors of the fused loss: workspace, gradients formed in the forward and handed out in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace: int) -> Tensor:
        kept = Gradients.zeros(hidden, weight, bias, ctx.needs_input_grad[:3])
        scratch = torch.empty(workspace, dtype=torch.uint8)
        del scratch
        ctx.gradients = [
            None if value is None or like is None else value.to(like.dtype)
            for value, like in ((kept.hidden, hidden), (kept.weight, weight), (kept.bias, bias))
        ]
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients, None)


def training(
    compute: Compute,
    sequences: int,
    prompt: int,
    completion: int,
    rows: int,
    teacher: int,
    teacher_rows: int,
    workspace: int,
    *,
    checkpointing: bool = False,
    accumulated: bool = False,
    sharded: bool = False,
    padded: bool = False,
) -> Training:
    """Count a forward and backward of one micro-batch with the loss of `rows` of its tokens.

    Args:
        compute: the student.
        sequences, prompt, completion: shape of the micro-batch.
        rows: completion tokens that the loss is over.
        teacher: bytes that a forward of the teacher holds, where it runs beside the student's activations.
        teacher_rows: bytes of the teacher's hidden states of these rows.
        workspace: bytes of logits and scratch that the fused loss holds.
        checkpointing: gradient checkpointing, layer by layer.
        accumulated: gradients of an earlier micro-batch are there already.
        sharded: a parameter's gradient leaves for its shard as soon as it is formed.
        padded: sequences differ in length.
    """

    def count(compute: Compute) -> dict[str, float]:
        shape = (sequences, prompt, completion, rows, teacher, teacher_rows, workspace)
        return vars(_training(compute, *shape, checkpointing, accumulated, sharded, padded))

    if accumulated or sharded:
        return Training(**_from_few_layers(count, compute))
    # gradients that appear as activations go: what is the most is no line in the number of layers
    return Training(**{name: int(value) for name, value in count(compute).items()})


@lru_cache(maxsize=256)
def _training(
    compute: Compute,
    sequences: int,
    prompt: int,
    completion: int,
    rows: int,
    teacher: int,
    teacher_rows: int,
    workspace: int,
    checkpointing: bool,
    accumulated: bool,
    sharded: bool,
    padded: bool,
) -> Training:
    with _backbone(compute, train=True) as (model, backbone):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if compute.lora is not None:
                model.enable_input_require_grads()
        head = model.get_output_embeddings()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        alive = {"gradients": 0}
        if accumulated and not sharded:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        before = [parameter.grad for parameter in trained if parameter.grad is not None]

        def formed(parameter: Tensor) -> None:
            if sharded:
                parameter.grad = None
            elif not accumulated:
                assert parameter.grad is not None
                alive["gradients"] += parameter.grad.nbytes

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(formed)
        at_peak = {"gradients": 0}
        with _Alive([*model.parameters(), *model.buffers(), *before]) as tensors:
            tensors.at_peak = lambda: at_peak.update(alive)
            with compute.casting():
                hidden = backbone(**_inputs(sequences, prompt + completion, padded), use_cache=False).last_hidden_state
                hidden = hidden[:, :-1, :][:, -completion:, :]
                if teacher:
                    torch.empty(teacher, dtype=torch.uint8)
                of_teacher = torch.empty(teacher_rows, dtype=torch.uint8)
                saved = tensors.bytes - of_teacher.nbytes
                index = torch.zeros(rows, dtype=torch.long)
                # hidden[mask] holds the indices of the kept rows, one tensor per axis
                kept = hidden[index, index]
                kept = kept.to(lm_head_dtype(kept))
            with torch.autocast("cpu", enabled=False):
                loss = _HeadOnPaper.apply(kept, head.weight, head.bias, workspace)
            del hidden, kept, index, of_teacher
            loss.backward()
    return Training(saved, tensors.peak, at_peak["gradients"])
