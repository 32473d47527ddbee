"""tipdistill: on-policy distillation that spends the gradient only on the tokens that carry signal.

The method of *TIP: Token Importance in On-Policy Distillation* (arXiv 2604.14084), in five stages:

    rollout   the student writes a completion for each prompt            TIPTrainer (TRL: transformers or vLLM)
    score     hidden states and lm_heads of both models → TokenScores    token_scores, Head, TokenScores
    select    TokenScores → which tokens, with what weight               select, RULES, Selection
    loss      the divergence of the selected rows, and of no others      selected_loss, fused_divergence_loss
    report    TokenScores → quadrants and the TIP map                    quadrants, tip_map

Data moves forward only, and so do the imports. `tipdistill.evaluate` and `tipdistill.tasks` measure the result.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import evaluate as evaluate
    from . import tasks as tasks
    from .config import TIPConfig as TIPConfig
    from .loss import fused_divergence_loss as fused_divergence_loss
    from .loss import selected_loss as selected_loss
    from .report.tip_map import tip_map as tip_map
    from .score import token_scores as token_scores
    from .select import RULES as RULES
    from .select import quadrants as quadrants
    from .select import select as select
    from .trainer import TIPTrainer as TIPTrainer
    from .types import Head as Head
    from .types import Selection as Selection
    from .types import TokenScores as TokenScores

try:
    __version__ = version("tipdistill")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# Where each public name is. They are loaded on first use: the stages need torch, the trainer TRL, the map matplotlib,
# and `tipdistill --help` none of them.
_PLACES = {
    "Head": ".types",
    "RULES": ".select",
    "Selection": ".types",
    "TIPConfig": ".config",
    "TIPTrainer": ".trainer",
    "TokenScores": ".types",
    "fused_divergence_loss": ".loss",
    "quadrants": ".select",
    "selected_loss": ".loss",
    "tip_map": ".report.tip_map",
    "token_scores": ".score",
}
_MODULES = ("evaluate", "tasks")

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
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'tipdistill' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """This package, whose `select` is the function, although a subpackage has its name.

    Importing `tipdistill.select` sets the attribute to the subpackage, wherever that is imported first.
    """

    @property
    def select(self) -> Any:
        return import_module(".select.choose", __name__).select

    @select.setter
    def select(self, subpackage: ModuleType) -> None:
        pass


if not TYPE_CHECKING:
    sys.modules[__name__].__class__ = _Package
