"""The former name of `tipdistill.score`; it goes with the next minor version."""

import sys
import warnings

from . import score
from .score import (
    IMPLEMENTATIONS,
    NonFiniteLogitsError,
    chunked,
    fused_rows,
    reference,
    token_scores,
    top,
    top_tokens,
)

__all__ = ["IMPLEMENTATIONS", "NonFiniteLogitsError", "fused_rows", "token_scores", "top_tokens"]

warnings.warn("tipdistill.divergence is now tipdistill.score", DeprecationWarning, stacklevel=2)
for _module in (chunked, reference, top):
    sys.modules[_module.__name__.replace(score.__name__, __name__)] = _module
