"""tipdistill: on-policy distillation that spends the gradient only on the tokens that carry signal.

The method of *TIP: Token Importance in On-Policy Distillation* (arXiv 2604.14084), in five stages:

    rollout   the student writes a completion for each prompt            TIPTrainer (TRL: transformers or vLLM)
    score     hidden states and lm_heads of both models → TokenScores    token_scores, Head, TokenScores
    select    TokenScores → which tokens, with what weight               select, RULES, Selection
    loss      the divergence of the selected rows, and of no others      selected_loss, fused_divergence_loss
    report    TokenScores → quadrants and the TIP map                    quadrants, tip_map

Data moves forward only, and so do the imports. `tipdistill.evaluate` and `tipdistill.tasks` measure the result.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .loss import fused_divergence_loss, selected_loss
from .score import token_scores
from .select import RULES, quadrants, select
from .types import Head, Selection, TokenScores

if TYPE_CHECKING:
    from . import evaluate as evaluate
    from . import tasks as tasks
    from .config import TIPConfig as TIPConfig
    from .report.tip_map import tip_map as tip_map
    from .trainer import TIPTrainer as TIPTrainer

try:
    __version__ = version("tipdistill")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# The stages above need torch alone; what follows pulls in TRL or matplotlib and is loaded on first use.
_LAZY = {"TIPConfig": ".config", "TIPTrainer": ".trainer", "tip_map": ".report.tip_map"}
_LAZY_MODULES = ("evaluate", "tasks")

__all__ = [
    "RULES",
    "Head",
    "Selection",
    "TIPConfig",
    "TIPTrainer",
    "TokenScores",
    "__version__",
    "evaluate",
    "fused_divergence_loss",
    "quadrants",
    "select",
    "selected_loss",
    "tasks",
    "tip_map",
    "token_scores",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    if name in _LAZY_MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'tipdistill' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
