"""select: which tokens, whatever the order, the numbering and the company of the rollouts."""

import time
from dataclasses import fields as dataclass_fields
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tipdistill import RULES, TokenScores, select
from tipdistill.select import Rule, kept_counts, needs_teacher, resolve_rule, rule_fields

STATISTICS = [field.name for field in dataclass_fields(TokenScores)]
SAMPLED = tuple(name for name, rule in RULES.items() if rule.budget == "sample")
RANKED = [name for name, rule in RULES.items() if rule.budget == "top"]
IMPORTANCE = tuple(name for name, rule in RULES.items() if rule.budget == "importance")
WEIGHED = [name for name, rule in RULES.items() if rule.budget == "weight"]
# Their weights are no function of the batch they are in.
WEIGHED_ALONE = [name for name in WEIGHED if name != "confidence_ratio"]
# Their ĥ and δ̂ run over all the tokens given, so a rollout's choice depends on the company it is in; the other rules'
# does not.
NORMALISED = ("soft_or", "soft_or_log", "q3")
TEACHABILITY = ("teachability", "teachability_soft_or")
COMPLEMENTS = [f"complement:{rule}" for rule in (*RANKED, *SAMPLED)]
# each property runs for every rule, so that few examples of each are many in all
few = settings(deadline=None, max_examples=25)
RETENTIONS = st.one_of(st.sampled_from([0.1, 0.29, 0.5, 0.9, 1.0]), st.floats(0.01, 1))


def random_scores(tokens, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # coarse values, so that ties occur
    return TokenScores(
        **{name: (8 * torch.rand(tokens, generator=generator)).round().to(dtype) / 8 for name in STATISTICS}
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def batches(draw, max_rollouts=6, max_tokens=12):
    """(scores, rollout): tokens of a few rollouts, interleaved, with arbitrary rollout numbers."""
    lengths = draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=max_rollouts))
    numbers = draw(st.lists(st.integers(-5, 10**12), min_size=len(lengths), max_size=len(lengths), unique=True))
    rollout = [number for number, length in zip(numbers, lengths, strict=True) for _ in range(length)]
    if draw(st.booleans()):
        rollout = draw(st.permutations(rollout))
    return random_scores(len(rollout), draw(st.integers(0, 10**6))), torch.tensor(rollout)


def take(scores, rows):
    return scores.map(lambda value: value[rows])


def brute_force(score, rollout, retention, scope):
    """The kept set by a sort of each rollout in plain Python."""
    kept = [False] * len(score)
    rollout = [0] * len(score) if scope == "batch" else rollout
    for number in set(rollout):
        members = [token for token in range(len(score)) if rollout[token] == number]
        budget = max(1, int(retention * len(members) + 1e-9))
        for token in sorted(members, key=lambda token: (-score[token], token))[:budget]:
            kept[token] = True
    return kept


@few
@given(batches(), st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.77, 1.0]), st.sampled_from(["rollout", "batch"]))
@pytest.mark.parametrize("rule", RANKED)
def test_keeps_the_highest_scores_of_every_rollout(rule, batch, retention, scope):
    if rule in TEACHABILITY:
        scope = "rollout"  # over a batch it keeps a token of each rollout first
    scores, rollout = batch
    scores = scores.map(lambda value: value.double())
    picked = select(scores, rule, retention, rollout, scope)
    score = RULES[rule].score(scores).tolist()
    assert picked.mask.tolist() == brute_force(score, rollout.tolist(), retention, scope)


@few
@given(batches(), RETENTIONS)
@pytest.mark.parametrize("rule", [*RULES, *COMPLEMENTS])
def test_counts_are_known_from_the_lengths_alone(rule, batch, retention):
    scores, rollout = batch
    numbers, lengths = rollout.unique(return_counts=True)
    mask = select(scores, rule, retention, rollout, "rollout").mask
    kept = torch.stack([mask[rollout == number].sum() for number in numbers])
    assert torch.equal(kept, kept_counts(lengths, retention, rule))
    assert bool((kept >= 1).all())
    mask = select(scores, rule, retention, rollout, scope="batch").mask
    assert torch.equal(mask.sum().reshape(1), kept_counts(lengths, retention, rule, scope="batch"))


@few
@given(batches(), RETENTIONS, st.data())
@pytest.mark.parametrize(
    "rule", [rule for rule in (*RANKED, "all", *WEIGHED_ALONE) if rule not in NORMALISED + TEACHABILITY]
)
def test_a_subset_of_rollouts_is_selected_as_in_the_whole(rule, batch, retention, data):
    scores, rollout = batch
    chosen = data.draw(st.sets(st.sampled_from(rollout.unique().tolist()), min_size=1))
    rows = torch.isin(rollout, torch.tensor(sorted(chosen)))
    whole = select(scores, rule, retention, rollout).mask[rows]
    assert torch.equal(select(take(scores, rows), rule, retention, rollout[rows]).mask, whole)


@pytest.mark.parametrize("rule", NORMALISED)
def test_normalised_rules_depend_on_the_batch(rule):
    """Eq. 7 normalises over the batch, so what is in rollout 1 changes the choice in rollout 0."""
    scores = TokenScores(
        entropy_norm=torch.tensor([0.0, 0.3, 0.0, 0.6]),
        reverse_kl=torch.tensor([1.0, 0.0, 1e6, 0.0]),
        forward_kl=torch.tensor([1.0, 3.0, 0.0, 0.0]),
    )
    rollout = torch.tensor([0, 0, 1, 1])
    assert select(take(scores, rollout == 0), rule, 0.5).mask.tolist() == [True, False]
    assert select(scores, rule, 0.5, rollout).mask[:2].tolist() == [False, True]


@few
@given(batches(), RETENTIONS, st.data())
@pytest.mark.parametrize("rule", [*RANKED, "complement:soft_or"])
def test_the_order_of_the_rollouts_does_not_matter(rule, batch, retention, data):
    scores, rollout = batch
    numbers = data.draw(st.permutations(rollout.unique().tolist()))
    order = torch.cat([(rollout == number).nonzero()[:, 0] for number in numbers])
    mask = select(scores, rule, retention, rollout, "rollout").mask
    assert torch.equal(select(take(scores, order), rule, retention, rollout[order], "rollout").mask, mask[order])


@few
@given(batches(), RETENTIONS)
@pytest.mark.parametrize("rule", ["soft_or", "random", "complement:entropy_sampling"])
def test_the_numbers_of_the_rollouts_do_not_matter(rule, batch, retention):
    scores, rollout = batch
    renumbered = rollout.unique(return_inverse=True)[1]  # order-preserving, so that draws stay the same
    expected = select(scores, rule, retention, rollout, generator=seeded()).mask
    assert torch.equal(select(scores, rule, retention, renumbered, generator=seeded()).mask, expected)


def test_no_rollout_is_one_rollout():
    scores = random_scores(50)
    expected = select(scores, "soft_or", 0.3, torch.full((50,), 7)).mask
    assert torch.equal(select(scores, "soft_or", 0.3).mask, expected)


@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("rule", [*RULES, *COMPLEMENTS])
def test_retention_1_keeps_all(rule, scope):
    picked = select(random_scores(20), rule, 1, torch.arange(20) % 3, scope)
    assert picked.mask.all()


def test_rule_all_ignores_retention():
    assert select(random_scores(20), "all", 0.1).mask.all()


def test_scope_batch_spends_the_budget_where_the_scores_are():
    scores = TokenScores(reverse_kl=torch.tensor([5.0, 4.0, 3.0, 0.1, 0.2, 0.3]))
    rollout = torch.tensor([0, 0, 0, 1, 1, 1])
    assert select(scores, "divergence", 0.5, rollout, scope="batch").mask.tolist() == [True] * 3 + [False] * 3
    assert select(scores, "divergence", 0.5, rollout).mask.tolist() == [True, False, False, False, False, True]


# Sampling


@pytest.mark.parametrize("rule", SAMPLED)
def test_seeds_reproduce_and_differ(rule):
    scores, rollout = random_scores(200), torch.arange(200) // 50
    masks = [select(scores, rule, 0.3, rollout, generator=seeded(seed)).mask for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_generator_moves_on():
    generator, scores = seeded(), random_scores(200)
    first, second = (select(scores, "random", 0.3, generator=generator).mask for _ in range(2))
    assert not torch.equal(first, second)


def test_without_a_generator_torchs_seed_counts():
    scores, masks = random_scores(200), []
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            torch.manual_seed(3)
            masks.append(select(scores, "random", 0.3).mask)
    assert torch.equal(*masks)


def test_random_keeps_every_token_equally_often():
    """20,000 rollouts of 5 tokens, 2 kept of each: a token's count is binomial(20000, 0.4), σ = 69; 5 σ is one seed in
    300,000 for 5 tokens."""
    rollouts = 20_000
    scores = TokenScores(entropy_norm=torch.rand(5 * rollouts, generator=seeded()))
    mask = select(scores, "random", 0.4, torch.arange(5 * rollouts) // 5, generator=seeded(1)).mask
    kept = mask.view(rollouts, 5).sum(0)
    assert kept.sum() == 2 * rollouts
    assert bool(((kept - 0.4 * rollouts).abs() < 5 * 69).all())


def test_entropy_sampling_draws_in_proportion_to_entropy():
    """1 of 3 tokens per rollout: the counts are multinomial with p = entropy / sum; 5 σ as above."""
    rollouts, p = 20_000, torch.tensor([0.6, 0.3, 0.1])
    scores = TokenScores(entropy_norm=(p / 2).repeat(rollouts))
    mask = select(scores, "entropy_sampling", 0.34, torch.arange(3 * rollouts) // 3, generator=seeded()).mask
    kept = mask.view(rollouts, 3).sum(0)
    assert bool(((kept - p * rollouts).abs() < 5 * (rollouts * p * (1 - p)).sqrt()).all())


def test_entropy_sampling_takes_certain_tokens_only_when_no_other_is_left():
    scores = TokenScores(entropy_norm=torch.tensor([0.0, 0.2, 0.0, 0.0, 1e-6, 0.0]))
    for seed in range(20):
        mask = select(scores, "entropy_sampling", 0.5, generator=seeded(seed)).mask
        assert mask.sum() == 3
        assert mask[[1, 4]].all()


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_inverse_probabilities_make_every_sum_unbiased(kept):
    """20,000 rollouts of 5 tokens: of every token the mean of w · m/n is 1 within 5 of its standard errors, and so is
    that of a sum over a rollout, however unequal the scores are, one of them 0."""
    rollouts, norm = 20_000, torch.tensor([4.0, 1.0, 0.5, 0.02, 0.0])
    scores = TokenScores(gradient_norm=norm.repeat(rollouts))
    picked = select(scores, "gradient_norm_sampling", kept / 5, torch.arange(5 * rollouts) // 5, generator=seeded(kept))
    mask, weight = picked.mask.view(rollouts, 5), picked.weight.view(rollouts, 5).double() * 5 / kept
    assert bool((mask.sum(1) == kept).all())
    assert bool((weight[~mask] == 0).all())
    assert bool((weight[mask] >= 1).all())
    assert picked.total == kept * rollouts
    # a token of norm 0 is drawn only where nothing else is left, and weighs nothing in the gradient
    for values in (weight[:, :4].T, (weight @ norm.double())[None] / norm.sum()):
        error = values.std(1) / rollouts**0.5
        assert bool(((values.mean(1) - 1).abs() < 5 * error + 1e-9).all()), values.mean(1)


def test_inverse_probabilities_over_a_batch_and_inside_rollouts_estimate_the_same_sum():
    """Rollouts of 3 and of 40 tokens: Σ w D / total has the mean of all tokens' D as its mean, with either scope."""
    lengths = torch.tensor([3, 40, 11])
    rollout, scores = torch.arange(3).repeat_interleave(lengths), TokenScores(gradient_norm=torch.rand(54) ** 4)
    divergence = torch.randn(54, generator=seeded(7), dtype=torch.float64) * scores.require("gradient_norm")
    generator = seeded(1)
    for scope in ("rollout", "batch"):
        estimates = torch.stack(
            [
                (picked.weight.double() @ divergence) / picked.total
                for picked in (
                    select(scores, "gradient_norm_sampling", 0.2, rollout, scope, generator) for _ in range(2000)
                )
            ]
        )
        assert abs(estimates.mean() - divergence.mean()) < 5 * estimates.std() / 2000**0.5, scope


def test_a_token_that_is_sure_to_be_kept_weighs_one_of_all():
    scores = TokenScores(gradient_norm=torch.tensor([100.0, 1.0, 1.0, 1.0]))
    for seed in range(20):
        picked = select(scores, "gradient_norm_sampling", 0.5, generator=seeded(seed))
        assert picked.mask[0]
        assert picked.weight[0] == 0.5  # ρ / π with π = 1
        assert picked.weight[1:].max() > 0.5


@pytest.mark.parametrize("rule", IMPORTANCE)
def test_an_importance_sample_has_no_complement_and_no_certain_token(rule):
    with pytest.raises(ValueError, match="is no rule"):
        select(random_scores(4), f"complement:{rule}")
    with pytest.raises(ValueError, match="take 'sample'"):
        replace(RULES[rule], every_rollout=True)


def test_at_retention_1_an_importance_sample_is_all_tokens():
    picked = select(random_scores(6), "gradient_norm_sampling", 1.0)
    assert picked.weight.tolist() == [1.0] * 6
    assert picked.total == 6


# Complements


@few
@given(batches(), st.integers(1, 99), st.integers(0, 1000))
@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("rule", [rule for rule in (*RANKED, *SAMPLED) if rule not in TEACHABILITY])
def test_a_complement_keeps_what_the_rule_would_not(rule, scope, batch, percent, seed):
    scores, rollout = batch
    kept = select(scores, rule, (100 - percent) / 100, rollout, scope, seeded(seed)).mask
    rest = select(scores, f"complement:{rule}", percent / 100, rollout, scope, seeded(seed)).mask
    budget = torch.zeros_like(rollout) if scope == "batch" else rollout
    for number in budget.unique():
        mine = budget == number
        if kept[mine].all():  # nothing is left over, and one token is the least
            assert rest[mine].sum() == 1
        else:
            assert torch.equal(rest[mine], ~kept[mine])


def test_the_bottom_half_is_the_complement_of_the_top_half():
    scores, rollout = random_scores(40), torch.arange(40) // 10
    assert torch.equal(
        select(scores, "complement:soft_or", 0.5, rollout).mask, ~select(scores, "soft_or", 0.5, rollout).mask
    )


@pytest.mark.parametrize("rule", ["complement:all", "complement:complement:soft_or"])
def test_what_has_no_complement_says_so(rule):
    with pytest.raises(ValueError, match="take the complement of a rule that drops something, once"):
        resolve_rule(rule)


# What comes back, and of what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [*RULES, *COMPLEMENTS])
def test_any_float_gives_the_same_selection(rule, dtype):
    scores, rollout = random_scores(60), torch.arange(60) // 20  # eighths are exact in every dtype
    expected = select(scores, rule, 0.3, rollout, generator=seeded())
    picked = select(scores.map(lambda value: value.to(dtype)), rule, 0.3, rollout, generator=seeded())
    assert torch.equal(picked.mask, expected.mask)
    assert (picked.mask.dtype, picked.weight.dtype, picked.score.dtype) == (torch.bool, torch.float32, torch.float32)
    torch.testing.assert_close(picked.score, expected.score)


def test_half_precision_is_ranked_in_single():
    """Normalised in bfloat16, these tokens would tie: 1000 entropies in 256 steps, beside a divergence of about 1."""
    h = torch.linspace(0.5, 1, 128, dtype=torch.bfloat16)
    scores = TokenScores(entropy_norm=h, reverse_kl=torch.linspace(0, 1, 128, dtype=torch.bfloat16))
    wide = scores.map(lambda value: value.float())
    assert torch.equal(select(scores, "soft_or", 0.5).score, select(wide, "soft_or", 0.5).score)


@pytest.mark.parametrize("rule", ["soft_or", "divergence", "random", "all", "complement:q3"])
def test_weight_is_1_for_the_kept_and_nothing_needs_a_gradient(rule):
    scores = random_scores(30).map(lambda value: value.requires_grad_())
    picked = select(scores, rule, 0.4)
    assert torch.equal(picked.weight, picked.mask.float())
    assert not picked.weight.requires_grad
    assert not picked.score.requires_grad


def test_a_function_that_turns_gradients_on_does_not_leak_them():
    def rule(scores):
        with torch.enable_grad():
            return scores.entropy * torch.ones(8, requires_grad=True)

    assert not select(random_scores(8), rule, 0.5).score.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rule", [*RULES, *COMPLEMENTS])
def test_every_device_makes_the_same_choice(rule):
    scores, rollout = random_scores(5000), torch.arange(5000) // 100
    on_cpu = select(scores, rule, 0.3, rollout, generator=seeded()).mask
    on_gpu = select(scores.map(torch.Tensor.cuda), rule, 0.3, rollout.cuda(), generator=seeded()).mask
    assert torch.equal(on_gpu.cpu(), on_cpu)


# Rules of one's own


def surprise(scores):
    """Least likely sampled tokens first."""
    return -scores.require("student_logprob")


surprise.fields = ("student_logprob",)


def test_a_function_is_a_rule():
    scores = TokenScores(student_logprob=torch.tensor([-0.1, -3.0, -0.2, -2.0]), reverse_kl=torch.full((4,), torch.nan))
    assert select(scores, surprise, 0.5).mask.tolist() == [False, True, False, True]
    assert rule_fields(surprise) == ("student_logprob",)
    assert not needs_teacher(surprise)


def test_a_function_that_declares_nothing_may_read_everything():
    assert rule_fields(lambda scores: scores.entropy) is None
    assert needs_teacher(lambda scores: scores.entropy)
    poisoned = TokenScores(entropy=torch.ones(3), reverse_kl=torch.tensor([0.0, torch.nan, 0.0]))
    with pytest.raises(ValueError, match=r"statistic 'reverse_kl' is nan in rollout 0, token 1"):
        select(poisoned, lambda scores: scores.entropy)


@pytest.mark.parametrize("path", ["my_rules.surprise", "my_rules:surprise", "complement:my_rules:surprise"])
def test_a_dotted_path_is_a_rule(path, tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "def surprise(scores):\n    return -scores.student_logprob\n\n\nsurprise.fields = 'student_logprob'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scores = TokenScores(student_logprob=torch.tensor([-0.1, -3.0, -0.2, -2.0]))
    expected = [False, True, False, True]
    mask = select(scores, path, 0.5).mask
    assert mask.tolist() == [not kept for kept in expected] if path.startswith("complement") else expected
    assert rule_fields(path) == ("student_logprob",)


def test_a_path_may_lead_to_a_rule_with_a_budget_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "own_budget.py").write_text(
        "from tipdistill.select import Rule\n\nRULE = Rule(lambda scores: scores.entropy, ('entropy',), 'sample')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_rule("own_budget.RULE").budget == "sample"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda s: s.entropy[:3], r"one float score per token, \[4\]; this one returned torch.float32 \[3\]"),
        (lambda s: s.entropy[:, None], r"returned torch.float32 \[4, 1\]"),
        (lambda s: s.entropy > 0, r"returned torch.bool \[4\]"),
        (lambda s: s.entropy.long(), r"returned torch.int64 \[4\]"),
        (lambda s: 1.0, "returned float"),
        (lambda s: s.entropy.numpy(), "returned ndarray"),
        (lambda s: None, "returned NoneType"),
        (lambda s: (s.entropy - 0.5).log(), r"the rule's score is (nan|-inf) in rollout 3, token 0"),
    ],
)
def test_what_a_function_returns_is_checked(returned, message):
    scores = TokenScores(entropy=torch.tensor([0.2, 0.9, 0.9, 0.9]))
    with pytest.raises(ValueError, match=message):
        select(scores, returned, 0.5, torch.tensor([3, 3, 1, 1]))


def test_nothing_is_drawn_with_a_negative_probability():
    with pytest.raises(ValueError, match="must be ≥ 0"):
        select(TokenScores(entropy=torch.tensor([1.0, -1.0])), Rule(lambda s: s.entropy, ("entropy",), "sample"))


# What is refused


@pytest.mark.parametrize("retention", [0, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "0.5", None])
def test_a_retention_that_is_no_share_is_refused(retention):
    with pytest.raises(ValueError, match=r"a number in \(0, 1\]"):
        select(random_scores(4), "all", retention)
    with pytest.raises(ValueError, match=r"a number in \(0, 1\]"):
        kept_counts(torch.tensor([4]), retention)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("soft-or", "unknown rule 'soft-or'.* Did you mean 'soft_or'"),
        ("Entropy", "Did you mean 'entropy'"),
        ("complement:softor", "unknown rule 'softor'.* Did you mean 'soft_or'"),
        ("complemnt:soft_or", "Did you mean 'complement:soft_or'"),
        ("bottom", "there are all, random, entropy"),
        ("", "there are all, random, entropy"),
        ("..rules", "there are all, random, entropy"),
        ("no_such_module.rule", "No module named 'no_such_module'; its folder must be on PYTHONPATH"),
        ("math:no_such_function", "has no attribute 'no_such_function'"),
        ("math.pi", "is a float, not a function"),
        (None, "a name, a dotted path or a function"),
        (3, "a name, a dotted path or a function"),
    ],
)
def test_an_unknown_rule_names_the_nearest(rule, message):
    with pytest.raises(ValueError, match=message):
        select(random_scores(4), rule)


@pytest.mark.parametrize(("scope", "near"), [("rollouts", "rollout"), ("batches", "batch"), ("Batch", "batch")])
def test_an_unknown_scope_names_the_nearest(scope, near):
    with pytest.raises(ValueError, match=f"scope must be one of rollout, batch, got '{scope}'. Did you mean '{near}'"):
        select(random_scores(4), scope=scope)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"int64 \[4\], the rollout of each token, got torch.int64 \[3\]"),
        (torch.zeros(4, 1, dtype=torch.int64), r"got torch.int64 \[4, 1\]"),
        (torch.zeros(4), "got torch.float32"),
        (torch.zeros(4, dtype=torch.bool), "got torch.bool"),
        ([0, 0, 1, 1], "got list"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "rollout is on meta, the scores on cpu"),
    ],
)
def test_a_rollout_that_does_not_fit_is_refused(rollout, message):
    with pytest.raises(ValueError, match=message):
        select(random_scores(4), rollout=rollout)


@pytest.mark.parametrize("scores", [TokenScores(), random_scores(0)], ids=["no statistic", "no token"])
@pytest.mark.parametrize("rule", ["soft_or", "all", "random"])
def test_no_token_is_an_error(scores, rule):
    with pytest.raises(ValueError, match="at least one completion token"):
        select(scores, rule)


def test_statistics_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"statistic 'reverse_kl' has shape \[3\], for 4 tokens it must be \[4\]"):
        select(TokenScores(entropy_norm=torch.ones(4), reverse_kl=torch.ones(3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_statistic_that_is_not_finite_names_the_rollout_and_token(value):
    scores = random_scores(6)
    scores.reverse_kl[4] = value
    rollout = torch.tensor([70, 20, 20, 70, 20, 70])
    with pytest.raises(ValueError, match=rf"'reverse_kl' is {value} in rollout 20, token 2 .* 1 of 6 tokens"):
        select(scores, "soft_or", 0.5, rollout)


@pytest.mark.parametrize("lengths", [torch.tensor([3.0]), torch.tensor([2, -1])])
def test_lengths_that_are_no_counts_are_refused(lengths):
    with pytest.raises(ValueError, match="int64 counts"):
        kept_counts(lengths, 0.5)


def test_a_rule_with_an_unknown_budget_or_statistic_is_refused():
    with pytest.raises(ValueError, match="one of top, sample, importance, all, weight, got 'bottom'"):
        Rule(surprise, None, "bottom")
    with pytest.raises(ValueError, match=r"must be one of entropy, .*, got 'reverse_kld'. Did you mean 'reverse_kl'"):
        Rule(surprise, ("reverse_kld",))


# Scale


class Looks(TorchDispatchMode):
    """How often a number is taken from a tensor: on a GPU the host waits for the device each time."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["entropy", "soft_or", "divergence", "gradient_norm_sampling"])
@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_numbers_are_looked_at_once(rule, scope):
    names = ("entropy", "entropy_norm", "reverse_kl", "gradient_norm")
    scores = TokenScores(**{name: torch.rand(30, generator=seeded(0)) for name in names})
    with Looks() as looks:
        select(scores, rule, 0.3, torch.arange(30) // 10, scope=scope, generator=seeded(1))
    assert looks.count == 1


def fastest(function, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("rule", ["soft_or", "entropy_sampling"])
def test_a_million_tokens_cost_a_few_sorts(rule):
    """Two sorts, a numbering of the rollouts and elementwise work; a loop over these 100,000 rollouts takes seconds."""
    scores = TokenScores(
        entropy_norm=torch.rand(10**6, generator=seeded(0)), reverse_kl=torch.rand(10**6, generator=seeded(1))
    )
    rollout = torch.arange(10**6) // 10
    sort = fastest(lambda: scores.entropy_norm.sort(stable=True))
    assert fastest(lambda: select(scores, rule, 0.5, rollout)) < 8 * sort


@pytest.mark.slow
def test_ten_million_tokens():
    tokens = 10**7
    scores = TokenScores(entropy_norm=torch.arange(tokens).flip(0) / tokens, reverse_kl=torch.zeros(tokens))
    mask = select(scores, "soft_or", 0.29, torch.arange(tokens) // 1000).mask
    assert mask.sum() == 2_900_000
    assert mask[:1000].tolist() == [True] * 290 + [False] * 710
