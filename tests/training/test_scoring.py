"""What the scoring pass does to a model meanwhile."""

from torch import nn

from tipdistill.score.forward import evaluating


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
