"""One byte per token says what `select` would keep at every retention."""

import pytest
import torch

from tipdistill import TokenScores, select
from tipdistill.report.budgets import BOTTOM, RETENTIONS, computable_rules, keep_levels, ranking
from tipdistill.select import RULES, resolve_rule

LENGTHS = [1, 2, 3, 7, 10, 43, 100, 333]


def ragged(seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    fields = {
        name: torch.rand(count, generator=generator) ** 4 for name in ("entropy_norm", "reverse_kl", "forward_kl")
    }
    if ties:
        fields = {name: (4 * value).round() / 4 for name, value in fields.items()}
    return TokenScores(**fields), torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rule", computable_rules(ragged(0)[0]))
def test_levels_are_what_select_keeps(rule, ties):
    scores, rollout = ragged(1, ties)
    retentions = sorted({*RETENTIONS, 0.29, 1 / 3})
    _, order = ranking(scores, rule, torch.Generator().manual_seed(3))
    level = torch.from_numpy(keep_levels(order, rollout, retentions, complement=resolve_rule(rule).complement)).int()
    for place, retention in enumerate(retentions):
        picked = select(scores, rule, retention, rollout, generator=torch.Generator().manual_seed(3))
        assert torch.equal(level <= place, picked.mask), retention


def test_every_rule_is_computable_from_the_statistics_it_reads():
    everything = TokenScores(
        **{name: torch.ones(2) for name in ("entropy_norm", "reverse_kl", "forward_kl", "hellinger", "gradient_norm")},
        signal_to_curvature=torch.ones(2),
    )
    assert set(computable_rules(everything)) == set(RULES) - {"all"} | {BOTTOM}
    assert computable_rules(TokenScores(entropy_norm=torch.ones(2))) == ["random", "entropy", "entropy_sampling"]
