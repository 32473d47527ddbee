"""The pitfalls that others fell into, one test each."""

import pytest
import torch

from tipdistill import TokenScores, select
from tipdistill.select import kept_counts


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_padded_rows_or_prompt_tokens_polluting_min_max():
    """One padded row of divergence 10⁴ among the tokens scales every δ̂ to nothing: Soft-OR then ranks by entropy alone.

    select takes real tokens only: what padding holds cannot enter, and a padded [B, T] tensor is refused.
    """
    entropy, divergence = torch.rand(4, 50, generator=seeded(0)), torch.rand(4, 50, generator=seeded(1))
    real = torch.arange(50) < torch.tensor([50, 40, 30, 20])[:, None]
    rollout = torch.arange(4)[:, None].expand_as(real)[real]

    def choice(padding):
        flat = [torch.where(real, value, padding)[real] for value in (entropy, divergence)]
        return select(TokenScores(entropy_norm=flat[0], reverse_kl=flat[1]), "soft_or", 0.3, rollout).mask

    def by_entropy():
        return select(TokenScores(entropy_norm=entropy[real]), "entropy", 0.3, rollout).mask

    assert torch.equal(choice(0.0), choice(1e4))
    assert torch.equal(choice(0.0), choice(torch.nan))
    assert not torch.equal(choice(0.0), by_entropy())
    # what the pitfall does, so that the above is seen to matter
    padded = TokenScores(
        entropy_norm=torch.where(real, entropy, 0.0).flatten(), reverse_kl=torch.where(real, divergence, 1e4).flatten()
    )
    polluted = select(padded, "soft_or", 0.5).score[real.flatten()]
    assert torch.equal(polluted.argsort()[:70], entropy[real].argsort()[:70])
    with pytest.raises(ValueError, match=r"statistic 'entropy_norm' has shape \[4, 50\].*flattened"):
        select(TokenScores(entropy_norm=entropy, reverse_kl=divergence))


def test_kept_count_normalisation_per_micro_batch():
    """The number of kept tokens of a batch is the sum over its micro-batches, however it is split, and known ahead."""
    lengths = torch.tensor([1, 2, 3, 9, 10, 11, 250, 77])
    rollout = torch.arange(8).repeat_interleave(lengths)
    scores = TokenScores(
        entropy_norm=torch.rand(len(rollout), generator=seeded(0)),
        reverse_kl=torch.rand(len(rollout), generator=seeded(1)),
    )
    whole = int(select(scores, "soft_or", 0.3, rollout).mask.sum())
    for size in (1, 2, 4, 8):
        kept = 0
        for first in range(0, 8, size):
            mine = (rollout >= first) & (rollout < first + size)
            part = TokenScores(entropy_norm=scores.entropy_norm[mine], reverse_kl=scores.reverse_kl[mine])
            kept += int(select(part, "soft_or", 0.3, rollout[mine]).mask.sum())
        assert kept == whole == int(kept_counts(lengths, 0.3).sum())


@pytest.mark.parametrize("rule", ["soft_or", "random", "entropy_sampling", "complement:soft_or"])
def test_a_rollout_whose_floor_is_0(rule):
    """⌊0.1 · 4⌋ = 0: the rollout keeps one token all the same, and its loss is not 0 / 0."""
    scores = TokenScores(
        entropy_norm=torch.rand(14, generator=seeded(0)), reverse_kl=torch.rand(14, generator=seeded(1))
    )
    mask = select(scores, rule, 0.1, torch.tensor([0] * 4 + [1] * 10)).mask
    assert mask[:4].sum() == 1
    assert mask[4:].sum() == 1


def divergence_of(teacher_logits):
    """KL(P_S ‖ P_T) in nats, without any care for what the teacher's logits hold."""
    log_s = torch.log_softmax(torch.randn(teacher_logits.shape, generator=seeded(1)), dim=-1)
    return (log_s.exp() * (log_s - torch.log_softmax(teacher_logits, dim=-1))).sum(-1)


@pytest.mark.parametrize(("column", "printed"), [(torch.nan, "nan"), (-torch.inf, "inf")])
def test_nan_or_minus_infinite_teacher_logits(column, printed):
    logits = torch.randn(6, 7, generator=seeded(0))
    logits[4:, 3] = column
    scores = TokenScores(entropy_norm=torch.linspace(0, 1, 6), reverse_kl=divergence_of(logits))
    rollout = torch.tensor([50, 50, 50, 80, 80, 80])
    with pytest.raises(ValueError, match=rf"'reverse_kl' is {printed} in rollout 80, token 1 .* 2 of 6 tokens"):
        select(scores, "soft_or", 0.5, rollout)
    assert select(scores, "entropy", 0.5, rollout).mask.sum() == 2  # reads no divergence, so it is not troubled


def test_ties():
    """Equal scores must not keep more than the budget (as a threshold would), nor depend on the sort's whims."""
    scores = TokenScores(entropy_norm=torch.zeros(3000), reverse_kl=torch.ones(3000))
    mask = select(scores, "soft_or", 0.5, torch.arange(3000) // 1000).mask.view(3, 1000)
    assert mask[:, :500].all()
    assert not mask[:, 500:].any()


@pytest.mark.parametrize("rule", ["soft_or", "soft_or_log", "q3"])
def test_clipping_that_maps_every_value_to_the_same_number(rule):
    """More than 98 % of the tokens are perfectly certain: the 98th percentile is 0 and a clip to it erases the rest."""
    entropy = torch.zeros(1000)
    entropy[500:510] = torch.linspace(0.1, 0.9, 10)
    scores = TokenScores(entropy_norm=entropy, reverse_kl=torch.zeros(1000), forward_kl=torch.ones(1000))
    score = select(scores, rule, 0.01).score
    assert len(score.unique()) == 11
    mask = select(scores, rule, 0.01).mask
    assert mask[500:510].all() if rule != "q3" else not mask[500:510].any()
