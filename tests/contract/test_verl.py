"""What moved when verl moves: the names that tipdistill.integrations.verl relies on, against the installed verl."""

import importlib
import inspect

import pytest

pytest.importorskip("verl", reason="verl is not installed: `make test-verl` builds an environment with it")

import verl_run  # noqa: F401  sets up verl for a CPU
from verl.trainer.distillation import losses

from tipdistill.integrations import verl as ours


@pytest.mark.parametrize("path", ours.TOUCHED)
def test_functions_keep_their_parameters(path):
    module, _, name = path.partition(":")
    touched = importlib.import_module(module)
    for part in name.split("."):
        touched = getattr(touched, part, None)
        assert touched is not None, f"verl no longer has {path}"
    expected = ours.TOUCHED[path]
    parameters = tuple(inspect.signature(inspect.unwrap(touched)).parameters)
    assert parameters[: len(expected)] == expected, f"verl's {path} now takes {parameters}, we rely on {expected}"


def test_the_name_that_we_bind_is_the_one_that_verl_calls():
    source = inspect.getsource(losses.distillation_ppo_loss)
    assert "return compute_topk_loss(config, distillation_config, data, student_logits, data_format)" in source
    assert losses.compute_topk_loss is ours.topk_loss
    assert ours._verl_topk_loss.__module__ == losses.__name__


def test_the_loss_is_clamped_and_averaged_after_our_function():
    """Why loss_max_clamp is taken out of verl's hands, and what loss_weights is multiplied into."""
    source = inspect.getsource(losses.distillation_loss)
    steps = ["= distillation_loss_fn(", "distillation_losses.clamp(", 'data["batch_num_tokens"]', "= agg_loss("]
    order = [source.index(step) for step in steps]
    assert order == sorted(order)
    averaged = inspect.getsource(losses.agg_loss)
    assert "verl_F.masked_sum(loss_mat, loss_mask) / batch_num_tokens * dp_size" in averaged


def test_the_cross_entropy_may_still_overwrite_the_logits():
    """Why the logits are copied unless nothing but the distillation loss reads them; if this fails, look again."""
    from verl.utils.torch_functional import logprobs_from_logits

    assert inspect.signature(logprobs_from_logits).parameters["inplace_backward"].default is True


def test_a_scoring_pass_gets_its_statistics_back_in_the_order_of_the_batch():
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
    from verl.workers.engine.utils import postprocess_batch_func

    assert "if not forward_only:" in inspect.getsource(FSDPEngine.forward_backward_batch)
    assert "restore_dynamic_batch(model_output[key], indices)" in inspect.getsource(postprocess_batch_func)
