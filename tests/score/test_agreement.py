"""A model is scored by what its own forward says, or refused by name."""

import copy

import pytest
import torch
import transformers
from causal_models import CLASSES, tiny
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tipdistill.score import agreement
from tipdistill.score.agreement import check_model, two_rows, without_dropout
from tipdistill.score.forward import last_hidden_states
from tipdistill.score.models import head_of, hidden_states
from tipdistill.score.reference import logits
from tipdistill.types import Rollout

# Classes that are refused, and what moves in them. docs/models.md explains the list.
PADDING, OTHER_LOGITS, WIDTH = "padded on the left", "computes other logits", "lm_head for hidden states of width"
REFUSED = {
    # learned or sinusoidal positions that count padding and that no argument sets
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"), PADDING),
    **dict.fromkeys(("pegasus", "plbart", "roformer", "trocr", "whisper", "xlm"), PADDING),
    # states that padding runs through
    **dict.fromkeys(("cpmant", "recurrent_gemma", "rwkv", "xlstm"), PADDING),
    # positions that begin after the padding token's
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), OTHER_LOGITS),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), OTHER_LOGITS),
    "rembert": WIDTH,
}
# What people distil has to be built here, whatever becomes of the rest.
BUILT = ("bloom", "cohere", "cohere2", "deepseek_v3", "falcon_h1", "gemma", "gemma2", "gemma3_text", "gemma3n_text")
BUILT += ("gemma4_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "hunyuan_v1_moe", "llama", "llama4_text")
BUILT += ("mamba2", "minicpm3", "mistral", "mixtral", "modernbert-decoder", "nemotron_h", "olmo2", "opt", "phi", "phi3")
BUILT += ("qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "smollm3")
ROLLOUTS = [Rollout(0, "", (5, 9, 7), (11, 6, 40), True), Rollout(1, "", (8, 30, 31, 32, 33), (12, 13), True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_every_causal_class_is_scored_by_its_own_logits_or_refused_by_name(kind):
    model = tiny(kind)
    if model is None:
        assert kind not in BUILT
        pytest.skip("no small configuration")
    if kind in REFUSED:
        with pytest.raises(ValueError, match=rf"the student, {type(model).__name__}, .*{REFUSED[kind]}"):
            check_model(model, "student")
        return
    check_model(model, "student")
    assert_own_logits(model)


@torch.no_grad()
def assert_own_logits(model, **tolerance):
    """What is scored of two rollouts in one forward, against each of them alone in the model's own."""
    head = head_of(model, hidden_states(model, ROLLOUTS))
    own = [
        model(input_ids=torch.tensor([(*rollout.prompt_ids, *rollout.completion_ids)]), use_cache=False).logits[
            0, len(rollout.prompt_ids) - 1 : -1
        ]
        for rollout in ROLLOUTS
    ]
    torch.testing.assert_close(
        logits(head, len(head.weight)), torch.cat(own), **tolerance or {"rtol": 1e-4, "atol": 1e-4}
    )


TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "model_type": "cohere2"}
TEXT |= {"logit_scale": 0.3, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"}


@pytest.mark.parametrize("kind", ["aya_vision", "cohere2_vision"])
def test_a_scale_of_the_text_model_that_the_class_does_not_apply(kind):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](text_config=TEXT, vision_config=VISION)
    model = AutoModelForImageTextToText.from_config(config).eval()
    check_model(model, "student")
    assert_own_logits(model)


def adapted(targets, **options):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, lora_alpha=8, target_modules=targets, **options))
    return with_noise(model).eval()


def with_noise(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "trainable_tokens", "modules_to_save")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def added():
    from peft import LoraConfig

    model = tiny("llama")
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "lm_head"]))
    return with_noise(model).eval()


def disabled():
    model = added()
    model.disable_adapters()
    return model


def merged():
    model = adapted(["lm_head"])
    model.merge_adapter()
    return model


def two_adapters():
    from peft import LoraConfig

    model = adapted(["lm_head"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["lm_head", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return with_noise(model).eval()


def token_rows():
    from peft import LoraConfig, get_peft_model

    model = tiny("llama", tie_word_embeddings=True)
    return with_noise(
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]))
    ).eval()


ADAPTED = {
    "lora": lambda: adapted(["q_proj", "lm_head"]),
    "rslora": lambda: adapted(["lm_head"], use_rslora=True),
    "modules_to_save": lambda: adapted(["q_proj"], modules_to_save=["lm_head"]),
    "add_adapter": added,
    "disabled": disabled,
    "merged": merged,
    "two": two_adapters,
    "token_rows": token_rows,
}


@pytest.mark.parametrize("kind", sorted(ADAPTED))
def test_an_adapter_on_the_lm_head_is_part_of_it(kind):
    pytest.importorskip("peft")
    model = ADAPTED[kind]()
    check_model(model, "teacher")
    assert_own_logits(model)


def test_an_adapter_that_is_no_sum_with_the_weight_is_refused():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"the teacher, LlamaForCausalLM, computes other logits.*merge_and_unload"):
        check_model(adapted(["lm_head"], use_dora=True), "teacher")


def test_virtual_tokens_are_refused():
    pytest.importorskip("peft")
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"the teacher, LlamaForCausalLM, "):
        check_model(model, "teacher")


@pytest.mark.parametrize("kind", ["add_adapter", "lora", "modules_to_save", "token_rows"])
def test_an_adapter_on_the_lm_head_gets_the_gradient_of_the_models_own_logits(kind):
    pytest.importorskip("peft")
    model = ADAPTED[kind]()
    found = {}
    for way in ("own", "head"):
        model.zero_grad()
        (rollout,) = ROLLOUTS[:1]
        if way == "own":
            tokens = torch.tensor([(*rollout.prompt_ids, *rollout.completion_ids)])
            given = model(input_ids=tokens).logits[0, len(rollout.prompt_ids) - 1 : -1]
        else:
            head = head_of(model, hidden_states(model, [rollout]))
            given = logits(head, len(head.weight))
        given.log_softmax(-1)[:, 11].sum().backward()
        found[way] = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
    assert found["own"].keys() == found["head"].keys()
    assert any("lm_head" in name or "tokens" in name for name in found["own"])
    for name, gradient in found["own"].items():
        torch.testing.assert_close(found["head"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "llama", "qwen3_moe"])
def test_rounding_is_no_difference(kind, dtype):
    check_model(tiny(kind).to(dtype), "student")


def test_rounding_of_an_autocast_is_no_difference():
    check_model(tiny("llama"), "student", autocast=lambda: torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_scale_is_found_in_every_dtype(dtype, monkeypatch):
    monkeypatch.setattr("tipdistill.score.models.logit_transform", lambda config: (1.1, None))
    with pytest.raises(
        ValueError, match=r"computes other logits.*differ by up to .* nats .*rounding in (float32|bfloat16)"
    ):
        check_model(tiny("llama").to(dtype), "student")


@pytest.mark.parametrize("value", [-1e38, -torch.inf], ids=str)
def test_tokens_that_only_the_own_forward_forbids_are_found(value):
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor([7]), value))
    with pytest.raises(ValueError, match="computes other logits"):
        check_model(model, "student")


def test_padding_is_asked_about_only_where_rows_are_padded():
    model = tiny("rwkv")
    with pytest.raises(ValueError, match="batch_size of 1"):
        check_model(model, "student")
    check_model(model, "student", padded=False)


@pytest.mark.parametrize("padded", [True, False])
def test_a_model_that_looks_ahead_is_refused(padded):
    with pytest.raises(ValueError, match=r"the student, BertLMHeadModel, gives tokens other states .*goes on"):
        check_model(tiny("bert", is_decoder=False), "student", padded=padded)


def test_the_check_leaves_no_trace():
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    check_model(model, "student")
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert [module.training for module in model.modules()] == before[1]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_of_bitsandbytes_stay_in_their_mode(monkeypatch):
    """They pack their weights anew in a forward in eval mode, and their gradients are gone."""
    model = tiny("llama").train()
    monkeypatch.setattr(torch.nn.Linear, "__module__", "bitsandbytes.nn.modules")
    with without_dropout(model):
        assert model.lm_head.training
        assert not model.model.training
    assert model.model.training


def test_broken_weights_are_left_to_the_scores():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    check_model(model, "student")


def test_the_rows_keep_within_vocabulary_and_positions():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=6, eos_token_id=3)
    ).eval()
    tokens, mask = two_rows(model, torch.device("cpu"))
    assert tokens.shape == (2, 6)
    assert tokens[0].tolist() != [tokens[0, 0]] * 6
    assert int(tokens.max()) < 3  # the end token is none of them
    assert mask.tolist() == [[1] * 6, [0] * 5 + [1]]
    check_model(model, "student")


@pytest.mark.parametrize("kind", ["gpt2", "hunyuan_v1_moe", "llama", "llama4_text", "modernbert-decoder"])
@torch.no_grad()
def test_states_do_not_depend_on_padding(kind):
    model = tiny(kind)
    alone = last_hidden_states(model, torch.tensor([[5, 9, 7, 11]]), torch.ones(1, 4, dtype=torch.long))
    padded = last_hidden_states(
        model,
        torch.tensor([[0, 0, 0, 5, 9, 7, 11], [8, 9, 10, 11, 12, 13, 14], [5, 9, 7, 11, 0, 0, 0]]),
        torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 0, 0, 0]]),
    )
    torch.testing.assert_close(padded[0, 3:], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded[2, :4], alone[0], rtol=1e-4, atol=1e-4)


def test_the_tolerance_has_room_on_both_sides(monkeypatch):
    """In bfloat16: 32 layers whose states padding moves by rounding alone, and positions that padding moves."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=32,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    check_model(transformers.LlamaForCausalLM(config).to(torch.bfloat16), "student")
    monkeypatch.setattr("tipdistill.score.forward.positions_of", lambda mask: torch.arange(mask.shape[1])[None])
    with pytest.raises(ValueError, match="padded on the left"):
        check_model(tiny("gpt2").to(torch.bfloat16), "student")


assert agreement.LENGTH > agreement.PADDING
