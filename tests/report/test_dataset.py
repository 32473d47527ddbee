"""What was recorded is what the report shows: every rule by its name, and of each what it kept."""

import numpy as np
import pytest
import torch

from tipdistill import RULES, TokenScores
from tipdistill.records import About, RecordsWriter, open_records
from tipdistill.report.budgets import BUDGETED
from tipdistill.report.dataset import load_dataset
from tipdistill.report.page import write_report
from tipdistill.select import Rule, resolve_rule, rule_name
from tipdistill.tasks.arithmetic import build_tokenizer
from tipdistill.types import Rollout, Scored, TopTokens

LENGTHS = (17, 1, 30, 12)
RETENTION = 0.3


def by_divergence(scores: TokenScores) -> torch.Tensor:
    return scores.require("reverse_kl")


by_divergence.fields = ("reverse_kl",)
OWN = [by_divergence, *(Rule(by_divergence, ("reverse_kl",), budget) for budget in ("sample", "importance", "weight"))]


def record(directory, rules, scope=None):
    about = About("student", "teacher", vocabulary=18, rules=rules, retention=RETENTION, scope=scope)
    count = sum(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(count, generator=generator) + 0.01 for name in about.fields()}
    values["entropy_norm"] = values["entropy"] / np.log(about.vocabulary)
    top = TopTokens(torch.zeros(count, 5, dtype=torch.int64), torch.full((count, 5), 0.2))
    rollouts = [
        Rollout(number, "1+1=", (1, 10, 1, 11), (2,) * length, finished=True) for number, length in enumerate(LENGTHS)
    ]
    with RecordsWriter(directory, build_tokenizer(), about) as writer:
        writer.write(rollouts, Scored(TokenScores(**values), top, top))
    return open_records(directory)


@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("rule", [*RULES, "complement:soft_or", "complement:random", *OWN], ids=rule_name)
def test_a_recorded_rule_comes_first_and_keeps_what_it_kept(tmp_path, rule, scope):
    records = record(tmp_path, [rule], scope)
    dataset = load_dataset(records, seed=7)  # another than that of the records: a draw anew would be another
    choice = dataset.rules[0]
    assert choice.name == rule_name(rule)
    assert choice.budget == resolve_rule(rule).budget
    shown = dataset.selection(choice.name, RETENTION).mask.numpy()
    kept = records.read(["kept"])["kept"].to_numpy()
    if choice.budget not in BUDGETED:
        assert shown.all()
    else:
        assert 0 < kept.sum() < len(kept)
        np.testing.assert_array_equal(shown, kept)
        less, more = (dataset.selection(choice.name, share).mask.numpy() for share in (0.1, 0.6))
        assert less.sum() < kept.sum() < more.sum()
        assert (less <= kept).all()
        assert (kept <= more).all()


def test_every_recorded_rule_is_offered(tmp_path):
    names = [*RULES, "complement:soft_or"]
    records = record(tmp_path, names)
    dataset = load_dataset(records, rule="gradient_norm_sampling", seed=7)
    assert {choice.name for choice in dataset.rules} == set(names)
    assert dataset.rules[0].name == "gradient_norm_sampling"
    np.testing.assert_array_equal(
        dataset.selection("gradient_norm_sampling", RETENTION).mask,
        records.read(["kept_gradient_norm_sampling"])["kept_gradient_norm_sampling"].to_numpy(),
    )


@pytest.mark.parametrize("budget", ["importance", "nonsense", ["a", "list"], None])
def test_an_own_rule_is_shown_without_its_code(tmp_path, budget):
    records = record(tmp_path, [by_divergence])
    name = "not.here.anywhere"
    records.sidecar.update(rule=name, rules=[name], budgets={name: budget} if budget else budget)
    choice = load_dataset(records).rules[0]
    assert (choice.name, choice.budget) == (name, "importance" if budget == "importance" else "top")


def test_a_function_is_recorded_by_its_name(tmp_path):
    records = record(tmp_path, [by_divergence, "q3", lambda scores: scores.require("entropy")])
    names = [
        by_divergence.__module__ + ".by_divergence",
        "q3",
        f"{__name__}.test_a_function_is_recorded_by_its_name.<locals>.<lambda>",
    ]
    assert records.sidecar["rules"] == names
    assert records.sidecar["budgets"] == dict.fromkeys(names, "top")
    assert f"kept_{names[2]}" in records.tokens.schema_arrow.names
    assert write_report([tmp_path], rule=names[2]).is_file()
