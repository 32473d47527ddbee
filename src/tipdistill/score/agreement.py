"""Does a model compute what is read from it? Its own logits against those of its hidden states and its lm_head.

The loss never calls a whole model: it projects the rows it needs with the lm_head (`models.head`). What a class does
beside (another scale, a mask, an adapter) and whether padding moves its states is therefore tried, once per model, on
a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Head
from .forward import called, last_hidden_states
from .models import head_of
from .tiles import NEGATIVE, Projection, _operand

LENGTH, PADDING = 12, 5  # tokens of the longer of two rows, and how many the other has less
# Root mean square that two ways to the same log-probabilities may differ by, relative to the logits': so many roundings
# of the dtype. In bfloat16 tiny and 32-layer models of all classes differ by 0.5 for the lm_head alone, by up
# to 4.4 for padding, which moves every sum of every layer. float32 sums in another order as well.
_ROUNDINGS = {"lm_head": 4, "padding": 16}
_FLOAT32 = {"lm_head": 1e-4, "padding": 1e-3}


@torch.no_grad()
def check_model(
    model: Any,
    who: str,
    project: Callable[[Tensor], AbstractContextManager[Head]] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    calling: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
    padded: bool = True,
) -> None:
    """Refuse a model whose own logits are not those that are scored and trained on.

    One forward of the backbone and one of the whole model, of two rows of a few tokens; random state, gradients and
    modes stay as they are.

    Args:
        model: a transformers model, with PEFT or without, whose weights are at hand.
        who: "student" or "teacher".
        project: hidden states [N, H] → the lm_head with them; None: `head_of`.
        autocast: of the forwards.
        calling: lm_head → what has to hold while it is called.
        padded: rows are padded on the left when it is sampled from or scored; on the right they always may be.

    Raises:
        ValueError: which model, what differs and by how much, and what to do.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "alora_invocation_tokens", None) is not None:
            raise ValueError(
                f"the adapter {name} of the {who}, {called(model)}, acts after its alora_invocation_tokens alone, "
                "which is decided outside the backbone that is scored here: merge it, or use plain LoRA."
            )
    device = model.get_input_embeddings().weight.device
    tokens, mask = two_rows(model, device, padded)
    with without_dropout(model), autocast():
        dtypes = [torch.get_autocast_dtype(device.type)] if torch.is_autocast_enabled(device.type) else []
        try:
            # not through __call__: sharded engines are inside that of this model already
            with calling(model.get_output_embeddings()):
                own = model.forward(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
            states = last_hidden_states(model, tokens, mask)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a class does with two rows of tokens, its name has to be said
            raise ValueError(
                f"the {who}, {called(model)}, cannot be run on tokens alone ({type(error).__name__}: "
                f"{_first_line(error)}): choose a causal language model."
            ) from error
    dtypes.append(own.dtype)
    own, length, shorter = own.float(), tokens.shape[1], int(mask[1].sum())
    rows = torch.cat([states[0], states[1, mask[1].bool()]])
    with project(rows) if project else nullcontext(head_of(model, rows)) as head:
        if head.hidden.shape[1] != head.weight.shape[1]:
            raise ValueError(
                f"the {who}, {called(model)}, has an lm_head for hidden states of width {head.weight.shape[1]} behind "
                f"a backbone of width {head.hidden.shape[1]}: choose a model with nothing between the two."
            )
        logits = _logits(head)
        dtypes += [head.hidden.dtype, head.weight.dtype]
    if own.shape != logits[:length].shape:
        raise ValueError(
            f"the {who}, {called(model)}, gives logits {list(own.shape)} for {length} tokens where its lm_head gives "
            f"{list(logits[:length].shape)}: choose a model that is no more than a backbone and an lm_head."
        )
    if own.isnan().any() or not logits.isfinite().all():
        return  # broken weights: the scores say at which token
    own = own.to(logits.device).clamp(min=NEGATIVE)  # −∞ where the class forbids a token
    precision = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    _compare(
        own,
        logits[:length],
        precision,
        "lm_head",
        f"the {who}, {called(model)}, computes other logits than its hidden states and its lm_head give",
        "its class does more than an lm_head with a bias, a scale and a softcap, or has an adapter that is no sum "
        "with the weight: merge its adapters (merge_and_unload), or choose another model",
    )
    moves = "is padded on the left, or goes on" if padded else "goes on"
    remedy = (
        "rows of a batch are padded, so what is kept would depend on the batch: choose a causal model whose states "
    )
    remedy += "padding does not move" + (", or score with a batch_size of 1" if padded and project is None else "")
    _compare(
        logits[:shorter],
        logits[length:],
        precision,
        "padding",
        f"the {who}, {called(model)}, gives tokens other states where their row {moves}",
        remedy if padded else "choose a causal model",
    )


def two_rows(model: Any, device: torch.device, left: bool = True) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64 [2, L]: a row of tokens, and its beginning, padded.

    Args:
        model: whose vocabulary, special tokens and positions are heeded.
        device: of the tensors.
        left: pad on the left, else on the right.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    length = min(LENGTH, limit) if isinstance(limit, int) and limit > 0 else LENGTH
    special = {
        index
        for settings in (model.config, config)
        for name, value in settings.to_dict().items()
        if name.endswith(("_token_id", "_token_index"))
        for index in (value if isinstance(value, list) else [value])
    }
    vocabulary = config.vocab_size
    usable = [index for index in range(min(vocabulary, 64 + len(special))) if index not in special] or [0]
    ids = [usable[(place * (place + 3) + 1) % len(usable)] for place in range(length)]
    padding = min(PADDING, length - 1)
    pad = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    pad = pad if 0 <= pad < vocabulary else 0
    begun, absent = ids[: length - padding], [pad] * padding
    there, gone = [1] * len(begun), [0] * padding
    rows = [ids, absent + begun if left else begun + absent]
    masks = [[1] * length, gone + there if left else there + gone]
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile, but for bitsandbytes' layers, which would pack their weights anew."""
    training = [module for module in model.modules() if module.training]
    training = [module for module in training if not type(module).__module__.startswith("bitsandbytes")]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _logits(head: Head) -> Tensor:
    projection = Projection.of(head, len(head.weight), 1.0)
    hidden = _operand(head.hidden, head.hidden)
    return projection.logits(hidden, projection.rows(0, len(head.weight), hidden), 0)


def _compare(expected: Tensor, given: Tensor, precision: torch.dtype, of: str, what: str, remedy: str) -> None:
    difference = (expected.log_softmax(-1) - given.log_softmax(-1)).double()
    scale = expected.double().square().mean(-1).sqrt().clamp(min=torch.finfo(precision).eps)
    # of the middle token: where experts are chosen, rounding alone may choose others at one of them
    error = float((difference.square().mean(-1).sqrt() / scale).median())
    single = precision in (torch.float32, torch.float64)
    # matrix products in TF32 keep 10 bits
    tensor_float = single and expected.is_cuda and torch.backends.cuda.matmul.allow_tf32
    tolerance = _FLOAT32[of] if single else _ROUNDINGS[of] * torch.finfo(precision).eps
    tolerance = max(tolerance, _ROUNDINGS[of] * 2.0**-10) if tensor_float else tolerance
    if not error <= tolerance:
        raise ValueError(
            f"{what}: log-probabilities differ by up to {float(difference.abs().max()):.3g} nats (root mean square "
            f"{error:.2g} of the logits', {tolerance:.2g} may be rounding in {str(precision).removeprefix('torch.')}); "
            f"{remedy}."
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
