"""Check a launch of verl before a GPU is taken: `python -m tipdistill.integrations.verl_check OVERRIDES…`.

The overrides are those of `python -m verl.trainer.main_ppo`. Exits with 0 and says what would be selected, and what of
the rule's statistics is exact; or with 2 and one line that says what cannot work and what to set instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .partial_teacher import GIVEN


def main(overrides: Sequence[str] | None = None) -> int:
    """Compose verl's `ppo_trainer` configuration from overrides and check it; returns the exit status."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    from .verl import check_launch

    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=list(sys.argv[1:] if overrides is None else overrides))
        loss = check_launch(config)
    except (ValueError, HydraException) as error:
        print(f"tipdistill: {error}", file=sys.stderr)
        return 2
    print(
        f"tipdistill: {loss.loss_mode}, {loss.selection_rule} keeps {loss.retention:g} of the response tokens "
        f"(scope {loss.selection_scope}, normalised over the {loss.normalization})."
    )
    for name in loss.statistics:
        if name in GIVEN[loss.given]:
            print(f"  {name}: {GIVEN[loss.given][name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
