"""An lm_head alone, out of a model's files: that of a teacher whose backbone runs on a server.

Of the files only what is needed is read, and only safetensors: nothing that could run code when it is loaded. What
becomes of the logits (a scale, a softcap) is in the model's configuration, as for a model that is loaded whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from ..score.forward import BEFORE_LM_HEAD
from ..score.models import head
from ..types import Head

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# how classes call the norm after their last layer
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "embedding_norm")


@dataclass(frozen=True)
class LmHead:
    """An lm_head and what is known of the hidden states that it projects.

    Attributes:
        name: the model that it is of.
        model: that model without weights, but for `layer`.
        layer: the lm_head.
        norm: (weight, bias), float32 [H] each, of the norm that comes before it; None: not at hand.
    """

    name: str
    model: Any
    layer: Any
    norm: tuple[Tensor, Tensor] | None

    @property
    def width(self) -> int:
        """H of the hidden states that it projects."""
        return self.layer.weight.shape[1]

    @property
    def rows(self) -> int:
        """V, its rows."""
        return len(self.of(torch.empty(0, self.width)).weight)

    def of(self, hidden: Tensor) -> Head:
        """The lm_head with hidden states [N, H], and what the model's own forward does to the logits."""
        return head(self.model, self.layer, hidden)

    def to(self, device: Any, dtype: torch.dtype) -> LmHead:
        """This one moved to a device; in half precision where the hidden states are, as it is in their server."""
        self.layer.to(device, dtype if dtype in (torch.float16, torch.bfloat16) else None)
        return self

    def mean_square(self, hidden: Tensor) -> Tensor | None:
        """mean_h ((hidden − bias) / weight)² of the final norm, [N]: 1 where it was applied, whatever went in.

        Args:
            hidden: [N, H].

        Returns:
            float32 [N]; None where the norm is not at hand.
        """
        if self.norm is None:
            return None
        weight, bias = self.norm
        return ((hidden.float() - bias) / weight).square().mean(1)


def read_lm_head(name: str, revision: str | None = None, trust_remote_code: bool = False) -> LmHead:
    """The lm_head of a model; of a hub id the one file that holds it is downloaded.

    Args:
        name: a directory or a hub id.
        revision: on the hub.
        trust_remote_code: run code that comes with the model's configuration.

    Raises:
        ValueError: there is none that can be read, or the model's logits are more than an lm_head of its states.
    """
    model = _without_weights(name, revision, trust_remote_code)
    layer = model.get_output_embeddings()
    kind = f"{type(model).__name__} ({name})"
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2:
        raise ValueError(
            f"teacher_lm_head: {kind} has no lm_head with a weight [V, H]: take a causal language model, or "
            "log-probabilities (leave teacher_lm_head out)."
        )
    path = next(path for path, module in model.named_modules() if module is layer)
    parent = model.get_submodule(path.rpartition(".")[0])
    if model.config.model_type in BEFORE_LM_HEAD or not isinstance(parent, PreTrainedModel):
        between = BEFORE_LM_HEAD.get(model.config.model_type, path.rpartition(".")[0])
        raise ValueError(
            f"teacher_lm_head: {kind} computes more than its lm_head after its backbone ({between}), which a server "
            "of hidden states leaves out: take log-probabilities (leave teacher_lm_head out), or another teacher."
        )
    files = _Files(name, revision, model)
    # where both are saved transformers takes the lm_head, tied or not
    key, embedding = files.key_of(f"{path}.weight"), model.get_input_embeddings()
    tied = weight is embedding.weight
    if key is None and tied:
        inside = next(inside for inside, module in model.named_modules() if module is embedding)
        key = files.key_of(f"{inside}.weight")
    if key is None:
        nor = ", nor the embedding that it is tied to" if tied else ""
        raise ValueError(
            f"teacher_lm_head: the files of {name} hold no {path}.weight{nor}: give the model that the server serves."
        )
    layer.weight = nn.Parameter(_checked(files.read(key), weight.shape, key, name), requires_grad=False)
    if getattr(layer, "bias", None) is not None:
        key = files.key_of(f"{path}.bias")
        if key is None:
            raise ValueError(f"teacher_lm_head: the files of {name} hold no {path}.bias: give a whole model.")
        layer.bias = nn.Parameter(_checked(files.read(key), layer.bias.shape, key, name), requires_grad=False)
    return LmHead(name, model, layer, _final_norm(model, files, layer.weight.shape[1]))


def _without_weights(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **options)
        kinds = [AutoModelForCausalLM, AutoModelForImageTextToText]
        known = [kind for kind in kinds if type(config) in kind._model_mapping] or kinds[:1]
        with torch.device("meta"):
            model = known[0].from_config(config, **options)
    except Exception as error:  # a damaged config.json makes transformers raise anything
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"teacher_lm_head: the configuration of {name} could not be read ({said}): give the directory or the hub "
            "id of the model that the server serves."
        ) from error
    return model


class _Files:
    """The safetensors of a model by the names of their tensors."""

    def __init__(self, name: str, revision: str | None, model: Any) -> None:
        self.name, self._revision = name, revision
        self._file_of = self._files()
        self._key_of = _names_in(model, self._file_of)

    def _files(self) -> dict[str, Any]:
        """Tensor → file."""
        whole = self._fetch(_WHOLE)
        if whole is not None:
            with _opened(whole) as opened:
                return dict.fromkeys(opened.keys(), _WHOLE)
        index = self._fetch(_INDEX)
        if index is None:
            raise ValueError(
                f"teacher_lm_head: {self.name} has no {_WHOLE} and no {_INDEX}, and other files are not read "
                "(pickled ones can run code): save the model with save_pretrained, which writes safetensors."
            )
        try:
            return dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"teacher_lm_head: {index} has no weight_map: download {self.name} again.") from error

    def key_of(self, wanted: str) -> str | None:
        """How the files call the parameter `wanted` of the model; None where they do not hold it."""
        return self._key_of.get(wanted)

    def read(self, key: str, only_if_here: bool = False) -> Tensor | None:
        """A tensor, whose file is downloaded unless `only_if_here`: then None where it is not."""
        file = self._file_of[key]
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"teacher_lm_head: {self.name} names {str(file)!r:.80} for a file of weights.")
        path = self._fetch(file, only_if_here)
        if path is None:
            if only_if_here:
                return None
            raise ValueError(f"teacher_lm_head: {self.name} has no {file}, which holds {key}: download it again.")
        with _opened(path) as opened:
            try:
                return opened.get_tensor(key)
            except SafetensorError as error:
                raise ValueError(f"teacher_lm_head: {path} holds no {key} ({error}): download it again.") from error

    def _fetch(self, file: str, only_if_here: bool = False) -> str | None:
        options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
        if only_if_here:
            options |= {"local_files_only": True, "_raise_exceptions_for_connection_errors": False}
        try:
            return cached_file(self.name, file, revision=self._revision, **options)
        except OSError as error:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"teacher_lm_head: {file} of {self.name} could not be had: {said}") from error


def _names_in(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """The parameters of a model → how its files call them, as transformers renames them when it loads (GPT-NeoX's
    embed_out, the nested models of those that see)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    renamed = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if converted is None:  # a tensor as it is, and not one of several that are joined
            renamed[name] = key
    return renamed


def _opened(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"teacher_lm_head: {path} is damaged ({error}): download it again.") from error


def _checked(tensor: Tensor | None, shape: torch.Size, key: str, name: str) -> Tensor:
    assert tensor is not None, "it is downloaded"
    if tensor.shape != shape or tensor.dtype not in _DTYPES:
        raise ValueError(
            f"teacher_lm_head: {key} of {name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, and "
            f"an lm_head {list(shape)} in float32, bfloat16 or float16 is needed: take a model whose lm_head is not "
            "quantized."
        )
    return tensor


def _final_norm(model: Any, files: _Files, width: int) -> tuple[Tensor, Tensor] | None:
    """(weight, bias) that the backbone's last norm multiplies with and adds; None where it is not in files at hand."""
    decoder = model.get_decoder()
    backbones = (decoder, getattr(decoder, "model", None))  # Llama 4's text model takes itself for its decoder
    norms = (getattr(backbone, name, None) for backbone in backbones for name in _FINAL_NORMS)
    norm = next((module for module in norms if isinstance(module, nn.Module)), None)
    if norm is None or width % 2:
        return None
    path = next(path for path, module in model.named_modules() if module is norm)
    norm = copy.deepcopy(norm).to_empty(device="cpu").float()
    for name, parameter in norm.named_parameters():
        key = files.key_of(f"{path}.{name}")
        tensor = None if key is None else files.read(key, only_if_here=True)
        if tensor is None or tensor.shape != parameter.shape:
            return None
        parameter.data = tensor.float()
    signs = torch.ones(width)
    signs[::2] = -1.0  # of mean 0 and variance 1, so that no norm changes them but by its weights
    with torch.no_grad():
        bias = norm(torch.zeros(1, width))[0]
        weight = (norm(signs[None])[0] - bias) * signs
    if not (weight.isfinite().all() and bias.isfinite().all() and (weight != 0).all()):
        return None
    return weight, bias
