"""What the scoring pass does to a model meanwhile."""

import torch
from torch import nn

from tipdistill.score.forward import evaluating
from tipdistill.training.scoring import trimmed


class Linear4bit(nn.Linear):
    """By its name bitsandbytes' layer, which is packed for inference by a forward in eval mode."""


class Packed(Linear4bit):
    pass


def test_dropout_is_off_and_quantized_layers_stay_as_they_train():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), Linear4bit(2, 2), nn.Sequential(Packed(2, 2), nn.Dropout()))
    model.train()
    with evaluating(model):
        training = [type(module).__name__ for module in model.modules() if module.training]
    assert training == ["Linear4bit", "Packed"]
    assert all(module.training for module in model.modules())


def test_a_model_in_eval_mode_stays_in_it():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).eval()
    with evaluating(model):
        pass
    assert not any(module.training for module in model.modules())


def batch_of(prompts, completions, width=4):
    """Masks of rollouts with so many tokens, and ids that count them."""
    count = len(prompts)
    ids = torch.arange(count * 2 * width).view(2, count, width)
    return {
        "prompt_ids": ids[0],
        "prompt_mask": (torch.arange(width).flip(0) < torch.tensor(prompts)[:, None]).long(),
        "completion_ids": ids[1],
        "completion_mask": (torch.arange(width) < torch.tensor(completions)[:, None]).long(),
    }


def test_a_forward_is_of_what_the_kept_tokens_depend_on():
    """The first rollout, whose prompt is the longest, keeps nothing; nobody keeps anything in the last two columns."""
    batch = batch_of(prompts=[4, 2, 1], completions=[4, 4, 3])
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    part, cut = trimmed(batch, mask)
    assert cut.tolist() == [[False, True], [True, False]]
    assert part["prompt_ids"].tolist() == [[6, 7], [10, 11]]
    assert part["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert part["completion_ids"].tolist() == [[16, 17], [20, 21]]
    assert part["completion_mask"].tolist() == [[1, 1], [1, 1]]


def test_all_tokens_leave_the_padding_of_all_alone():
    batch = batch_of(prompts=[2, 1], completions=[3, 1])
    part, cut = trimmed(batch, batch["completion_mask"].bool())
    assert {name: list(value.shape) for name, value in part.items()} == {
        "prompt_ids": [2, 2],
        "prompt_mask": [2, 2],
        "completion_ids": [2, 3],
        "completion_mask": [2, 3],
    }
    assert torch.equal(cut, part["completion_mask"].bool())


def test_a_token_is_left_where_none_is_kept():
    batch = batch_of(prompts=[2, 1], completions=[3, 1])
    part, cut = trimmed(batch, torch.zeros(2, 4, dtype=torch.bool))
    assert cut.tolist() == [[False]]
    assert [list(part[name].shape) for name in ("prompt_ids", "completion_ids")] == [[1, 2], [1, 1]]
