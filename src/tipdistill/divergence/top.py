"""The likeliest tokens of a model, from hidden states and an lm_head, in tiles over the vocabulary."""

from __future__ import annotations

import math

import torch

from ..types import Head, TopTokens
from .chunked import NEGATIVE, Projection, _operand, _spans, _tile_shape, accumulation_dtype


@torch.no_grad()
def top_tokens(head: Head, k: int = 5, temperature: float = 1.0, vocabulary: int | None = None) -> TopTokens:
    """The k likeliest tokens at each of N positions, the likeliest first, without an [N, V] tensor.

    Each tile of logits gives its k largest, which are merged with those kept so far; the log-normaliser runs along.

    Args:
        head: hidden states [N, H] and lm_head [V, H].
        k: how many; at most the vocabulary.
        temperature: divides the logits, > 0.
        vocabulary: the first so many rows of the lm_head, the vocabulary that two models share; None: all.

    Returns:
        TopTokens: token_ids int64 [N, k], probability float32 [N, k] (float64 for float64 hidden states).

    Raises:
        ValueError: k, temperature or vocabulary out of range.

    Example:
        >>> top = top_tokens(Head(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.eye(4)), k=2)
        >>> top.token_ids.tolist()
        [[1, 3]]
    """
    rows = len(head.weight)
    vocabulary = rows if vocabulary is None else vocabulary
    if not 1 <= vocabulary <= rows:
        raise ValueError(f"vocabulary must be between 1 and the {rows} rows of the lm_head, got {vocabulary}.")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary, {vocabulary} tokens, got {k}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}.")
    hidden, dtype = head.hidden.detach(), accumulation_dtype(head.hidden)
    projection = Projection.of(head, vocabulary, temperature)
    tokens, columns = _tile_shape(hidden, vocabulary)
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    probability = torch.empty(len(hidden), k, dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for row, end in _spans(len(hidden), tokens):
            operand = _operand(hidden[row:end], head.hidden)
            best = hidden.new_zeros(end - row, 0, dtype=dtype)
            where = ids.new_zeros(end - row, 0)
            normaliser = hidden.new_full((end - row,), -math.inf, dtype=dtype)
            for start, stop in _spans(vocabulary, columns):
                tile = projection.logits(operand, projection.rows(start, stop, operand), start)
                largest = tile.topk(min(k, stop - start))
                normaliser = torch.logaddexp(normaliser, tile.logsumexp(1))
                best, where = torch.cat([best, largest.values], 1), torch.cat([where, largest.indices + start], 1)
                best, order = best.topk(min(k, best.shape[1]))
                where = where.gather(1, order)
            ids[row:end] = where
            probability[row:end] = (best - normaliser[:, None]).exp_().masked_fill_(best <= NEGATIVE, 0.0)
    return TopTokens(ids, probability)
