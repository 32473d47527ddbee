"""Score: hidden states and lm_heads of both models → TokenScores, never an [N, V] tensor. Read tokens.py."""

from .tokens import IMPLEMENTATIONS, NonFiniteLogitsError, fused_rows, selected_rows, token_scores
from .top import top_tokens

__all__ = ["IMPLEMENTATIONS", "NonFiniteLogitsError", "fused_rows", "selected_rows", "token_scores", "top_tokens"]
