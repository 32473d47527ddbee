"""One byte per token says what `select` would keep at every retention."""

import dataclasses

import pytest
import torch

from tipdistill import TokenScores, select
from tipdistill.report.budgets import BOTTOM, RETENTIONS, computable_rules, keep_levels, ranking
from tipdistill.select import RULES

FIELDS = ("entropy_norm", "reverse_kl", "forward_kl", "gradient_norm", "top16_forward_kl", "top16_teacher_mass")
LENGTHS = [1, 2, 3, 7, 10, 43, 100, 333]


def ragged(seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    fields = {name: torch.rand(count, generator=generator) ** 4 for name in FIELDS}
    if ties:
        fields = {name: (4 * value).round() / 4 for name, value in fields.items()}
    return TokenScores(**fields), torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("rule", [*computable_rules(ragged(0)[0]), "complement:teachability"])
def test_levels_are_what_select_keeps(rule, scope, ties):
    scores, rollout = ragged(1, ties)
    retentions = sorted({*RETENTIONS, 0.29, 1 / 3})
    _, order = ranking(scores, rule, torch.Generator().manual_seed(3))
    level = torch.from_numpy(keep_levels(order, rollout, retentions, rule, scope)).int()
    for place, retention in enumerate(retentions):
        picked = select(scores, rule, retention, rollout, scope, generator=torch.Generator().manual_seed(3))
        assert torch.equal(level <= place, picked.mask), retention


def test_every_rule_that_spends_a_budget_is_computable_from_the_statistics_it_reads():
    everything = TokenScores(**{field.name: torch.ones(2) for field in dataclasses.fields(TokenScores)})
    budgeted = {name for name, rule in RULES.items() if rule.budget not in ("all", "weight")}
    assert set(computable_rules(everything)) == budgeted | {BOTTOM}
    assert computable_rules(TokenScores(entropy_norm=torch.ones(2))) == ["random", "entropy", "entropy_sampling"]
