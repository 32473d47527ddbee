"""The gradient through kept positions alone, against whole graphs that detach the other keys and values."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RwkvConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.cli import main
from tipdistill.score.forward import last_hidden_states
from tipdistill.training.kept import KeptForward, _Constants, check_forward, check_kept, kept_states, read

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # each key of two heads
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MIXED = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "qwen2, sliding windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, layer_types=MIXED),
    # both softcaps too
    "gemma2": Gemma2Config(**SIZES, sliding_window=3, layer_types=MIXED, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=3, layer_types=MIXED),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
# in float64, but for eager attention, whose softmax is in float32, as Gemma's norms are, and for experts
DOUBLE, SINGLE = {"rtol": 1e-9, "atol": 1e-12}, {"rtol": 1e-4, "atol": 2e-6}


def model_of(name, attention="sdpa"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = "eager" if name in ("gemma2", "mixtral") else attention
        model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation=attention)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.to(torch.float32 if attention == "eager" else torch.float64).train()


def rows(padded=True):
    """Tokens of three rows, their mask, and the kept ones: none in a fourth."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 50, (4, 11), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = mask[2, 8:] = 0
    kept = (torch.rand(4, 11, generator=generator) < 0.35) & mask.bool()
    kept[3] = False
    assert kept[:3].any(1).all()
    assert len(set(kept.sum(1).tolist())) > 2  # so that queries are padded
    return ids, mask, kept


def gradients(model, states):
    """Of a loss that is not linear in the states, so that values count too; name → gradient."""
    model.zero_grad()
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (states * weight.to(states.dtype)).sin().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, kept=None, **_):
    """Softmax attention as it is written down, with the keys and values of dropped positions detached."""
    groups = query.shape[1] // key.shape[1]
    if kept is not None:
        key, value = (torch.where(kept[:, None, :, None], x, x.detach()) for x in (key, value))
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    weights = (logits + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def oracle(model, ids, mask, kept):
    """States of kept positions in one graph of all positions."""
    AttentionInterface.register("oracle", lambda *given, **options: plain_attention(*given, **options, kept=kept))
    AttentionMaskInterface.register("oracle", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    states = last_hidden_states(model, ids, mask)[kept]
    model.set_attn_implementation(before)
    return states


def assert_same(found, expected, precision):
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-12)
        torch.testing.assert_close(found[name] / scale, gradient / scale, **precision, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_graph_with_dropped_keys_and_values_detached(name):
    model, (ids, mask, kept) = model_of(name), rows()
    own = kept_states(model, read(model, ids, mask), kept)
    reference = oracle(model, ids, mask, kept)
    precision = DOUBLE if own.dtype == torch.float64 and name != "gemma3" else SINGLE
    torch.testing.assert_close(own, reference, **precision)
    expected = gradients(model, reference)
    assert_same(gradients(model, own), expected, precision)
    # and is another than the full one, or the oracle would show nothing
    full = gradients(model, last_hidden_states(model, ids, mask)[kept])
    assert (full["model.embed_tokens.weight"] - expected["model.embed_tokens.weight"]).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_with_every_position_kept_it_is_the_full_gradient_bit_for_bit(name, attention):
    model, (ids, mask, _) = model_of(name, attention), rows(padded=False)
    every = mask.bool()

    def both():
        full = gradients(model, last_hidden_states(model, ids, mask)[every])
        return full, gradients(model, kept_states(model, read(model, ids, mask), every))

    # a fused kernel may sum in another order where the mask is written out: on some processors it does
    with sdpa_kernel(SDPBackend.MATH):
        expected, found = both()
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter
    expected, found = both()
    assert_same(found, expected, DOUBLE if model.dtype == torch.float64 and name != "gemma3" else SINGLE)


def test_adapters_have_the_gradient_of_that_graph_too():
    model, (ids, mask, kept) = model_of("qwen3"), rows()
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config).double()
    own = gradients(model, kept_states(model, read(model, ids, mask), kept))
    assert len(own) == 4 * 4 * 2
    assert_same(own, gradients(model, oracle(model, ids, mask, kept)), DOUBLE)


def test_checkpointing_is_left_out_and_stays_on_for_others():
    model, (ids, mask, kept) = model_of("llama"), rows()
    expected = gradients(model, kept_states(model, read(model, ids, mask), kept))
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, kept_states(model, read(model, ids, mask), kept)), expected, DOUBLE)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_masks_of_other_forwards_are_what_they_were():
    model, (ids, mask, kept) = model_of("llama"), rows()
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    states = last_hidden_states(model, ids, mask)
    kept_states(model, read(model, ids, mask), kept)
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before
    assert torch.equal(last_hidden_states(model, ids, mask), states)


def test_where_nothing_is_kept_there_is_a_graph_and_no_gradient():
    model, (ids, mask, kept) = model_of("qwen3"), rows()
    states = kept_states(model, read(model, ids, mask), torch.zeros_like(kept))
    assert states.shape == (0, 32)
    found = gradients(model, states)
    assert len(found) > 10
    assert not any(gradient.any() for gradient in found.values())


def test_a_reading_serves_once():
    model, (ids, mask, kept) = model_of("qwen3"), rows()
    reading = read(model, ids, mask)
    kept_states(model, reading, kept)
    with pytest.raises(ValueError, match="asked for twice"):
        kept_states(model, reading, kept)


def test_dropped_positions_store_nothing_for_the_backward():
    """What autograd saves of each length grows with the kept positions, but for keys and values."""

    def saved(count):
        model = model_of("llama")
        ids = torch.randint(2, 50, (2, 60))
        kept = torch.arange(60).expand(2, 60) % (60 // count) == 0
        reading, elements = read(model, ids, torch.ones_like(ids)), {}

        def pack(tensor):
            elements[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = kept_states(model, reading, kept)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        del states
        return sum(size for pointer, size in elements.items() if pointer not in weights)

    assert saved(6) < 0.35 * saved(60)


# Which students.


@pytest.mark.parametrize("name", MODELS)
def test_students_that_can_pass_the_check(name):
    check_kept(MODELS[name], TIPConfig("run", use_cpu=True, bf16=False, backward="kept"))
    model = model_of(name)
    training = model.training
    check_forward(model, torch.no_grad)
    assert model.training == training


SMALL = {**SIZES, "num_hidden_layers": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
REFUSED = {
    "layers of kind conv": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "layers of kind linear_attention": Qwen3NextConfig(
        **SMALL, **LINEAR, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "a state from position to position": RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2),
    "rope_type longrope": Phi3Config(
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
            "rope_theta": 1e4,
        },
        original_max_position_embeddings=32,
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_students_that_cannot_are_refused_by_name_from_their_configuration(reason):
    config = REFUSED[reason]
    with pytest.raises(ValueError, match=reason) as raised:
        check_kept(config, TIPConfig("run", use_cpu=True, bf16=False, backward="kept"))
    assert config.model_type in str(raised.value)
    assert 'take backward="full"' in str(raised.value)


@pytest.mark.parametrize("reason", ["layers of kind conv", "a state from position to position"])
def test_classes_that_no_list_names_are_refused_by_what_they_compute(reason):
    model = AutoModelForCausalLM.from_config(REFUSED[reason])
    with pytest.raises(ValueError, match=f'cannot train {type(model).__name__}.*backward="full"'):
        check_forward(model, torch.no_grad)


def test_states_that_differ_are_refused():
    model = model_of("llama")
    attention = model.model.layers[1].self_attn.forward
    # a layer that looks at how many queries there are
    model.model.layers[1].self_attn.forward = lambda hidden_states, **options: (
        attention(hidden_states=hidden_states, **options)[0] * hidden_states.shape[1],
        None,
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM: the states of kept positions differ by"):
        check_forward(model, torch.no_grad)


def test_attention_without_such_masks_is_refused(make):
    given = {"attn_implementation": "flash_attention_2"}
    with pytest.raises(ValueError, match="attn_implementation = flash_attention_2 does not: leave it out"):
        make(model_init_kwargs=given)
    model = model_of("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="LlamaForCausalLM has flex_attention"):
        check_forward(model, torch.no_grad)


@pytest.mark.parametrize(
    ("variable", "message"),
    [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("FSDP_ACTIVATION_CHECKPOINTING", "activation_checkpointing")],
)
def test_engines_that_cannot_are_refused(monkeypatch, variable, message):
    args = TIPConfig("run", use_cpu=True, bf16=False, backward="kept")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=message):
        check_kept(None, args)


def test_rules_that_keep_all_and_other_words_are_refused():
    with pytest.raises(ValueError, match="all keeps every token"):
        TIPConfig("run", use_cpu=True, bf16=False, backward="kept", selection_rule="all")
    with pytest.raises(ValueError, match="backward"):
        TIPConfig("run", use_cpu=True, bf16=False, backward="half")


# In a trainer.


@pytest.fixture
def make(tiny_model_dir, word_problems, tmp_path):
    def build(student="qwen3", dataset=None, **settings):
        settings = {
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "max_completion_length": 12,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            "generation_kwargs": {"do_sample": False},
            "per_device_train_batch_size": 8,
            "max_steps": 3,
            "retention": 0.3,
            "record_rollouts": 0,
            "backward": "kept",
            **settings,
        }
        model = tiny_model_dir(student, "student") if isinstance(student, str) else student
        args = TIPConfig(str(tmp_path / "run"), **settings)
        teacher = None if args.teachers else str(tiny_model_dir("llama", "teacher"))
        return TIPTrainer(str(model), teacher, args, dataset or Dataset.from_json(str(word_problems)))

    return build


def figures(trainer):
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "grad_norm", "selection/kept_fraction", "entropy")
    return [[entry[name] for entry in history] for name in names]


RULES = [
    {"selection_rule": "soft_or"},
    {"selection_rule": "soft_or", "selection_scope": "batch", "normalization": "running"},
    {"selection_rule": "divergence", "normalization": "micro_batch"},
    {"selection_rule": "gradient_norm_sampling", "retention": 0.1, "selection_scope": "batch"},
    {"selection_rule": "gradient_norm_sampling", "retention": 0.1, "normalization": "running"},
    {"selection_rule": "entropy", "score_logging_steps": 0},
    {"selection_rule": "random", "teacher_offload": True},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_four_micro_batches_equal_one(make, rule):
    whole = figures(make(**rule))
    split = figures(make(per_device_train_batch_size=2, gradient_accumulation_steps=4, **rule))
    for found, expected in zip(split, whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalization", ["batch", "micro_batch"])
def test_the_first_loss_is_the_full_ones_and_the_gradient_is_not(make, normalization):
    kept, full = (figures(make(normalization=normalization, backward=how)) for how in ("kept", "full"))
    assert kept[0][0] == pytest.approx(full[0][0], rel=1e-5)
    assert kept[1][0] != pytest.approx(full[1][0], rel=1e-3)
    assert kept[0][-1] < kept[0][0]


@pytest.mark.parametrize(
    "settings",
    [{"normalization": "micro_batch"}, {"normalization": "running"}],
    ids=["chosen in the loss", "chosen ahead"],
)
def test_a_kept_position_is_that_before_its_token(make, monkeypatch, settings):
    trainer = make(selection_rule="divergence", retention=0.9, **settings)
    trainer.model.train()
    passed, chosen = [], []
    inside = trainer._selection.inside

    def watched(model, reading, kept):
        passed.append((reading.input_ids, kept))
        return kept_states(model, reading, kept)

    def choosing(mask, numbers):
        choose, lengths = inside(mask, numbers)

        def watched_choice(scores, tokens):
            selection = choose(scores, tokens)
            chosen.append(mask.masked_scatter(mask, selection.mask))
            return selection

        return watched_choice, lengths

    trainer._selection.inside = choosing
    inputs = trainer._prepare_inputs([trainer.train_dataset[row] for row in range(8)])
    monkeypatch.setattr("tipdistill.training.kept.kept_states", watched)
    trainer.compute_loss(trainer.model, inputs)
    ((ids, kept),) = passed
    (mask,) = chosen or [inputs["selection_weight"] > 0]
    assert mask[:, 0].any(), "a completion's first token is kept, which the prompt's last position predicts"
    assert torch.equal(ids.roll(-1, 1)[kept], inputs["completion_ids"][mask])


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"normalization": "batch"}, 3),
        # to score, and for the loss
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "normalization": "batch"}, 12),
        ({}, 4),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 8),
    ],
    ids=str,
)
def test_the_student_reads_once_where_its_tokens_can_be_chosen_in_the_loss(make, monkeypatch, settings, read):
    trainer = make(**settings)
    trainer._student_check = lambda trainer: None
    # the constants have no dropout, nor have the scores then
    trainer.model.model.layers[0].self_attn.attention_dropout = 0.5
    backbone, positions = trainer.plain_student().base_model, {True: [], False: []}
    forward = backbone.forward

    def watched(*given, **options):
        cache = options.get("past_key_values")
        if cache is None or cache.layer_class_to_replicate is _Constants:  # others are a rollout's
            positions[torch.is_grad_enabled()].append(options["input_ids"].shape[1])
        return forward(*given, **options)

    monkeypatch.setattr(backbone, "forward", watched)
    trainer.train()
    assert len(positions[False]) == read
    assert len(positions[True]) == 3 * trainer.args.gradient_accumulation_steps
    assert max(positions[True]) < min(positions[False])


def test_several_teachers_teach_kept_positions(make, tiny_model_dir):
    names = {"default": str(tiny_model_dir("llama", "teacher")), "other": str(tiny_model_dir("qwen3", "teacher"))}
    rows_of = [{"prompt": f"{number} + 3?", "teacher": "other" if number % 2 else None} for number in range(24)]
    given = {"teachers": names, "dataset": Dataset.from_list(rows_of), "normalization": "running"}
    whole = figures(make(**given))
    split = figures(make(per_device_train_batch_size=2, gradient_accumulation_steps=4, **given))
    for found, expected in zip(split, whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_lowered_weights_of_the_first_forward_are_not_reused_by_the_second(make):
    """Autocast remembers a weight that it lowered, without its gradient where there was none."""
    trainer = make(bf16=True)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[row] for row in range(8)])
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_constants_have_no_dropout(make, monkeypatch):
    modes = []
    trainer = make(normalization="micro_batch")
    backbone = trainer.plain_student().base_model
    forward = backbone.forward

    def watched(*given, **options):
        modes.append((torch.is_grad_enabled(), backbone.training))
        return forward(*given, **options)

    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[row] for row in range(8)])
    monkeypatch.setattr(backbone, "forward", watched)
    trainer.compute_loss(trainer.model, inputs)
    assert modes == [(False, False), (True, True)]


def test_a_micro_batch_in_which_nothing_is_the_students_has_a_gradient_of_zero(make):
    trainer = make(normalization="micro_batch", selection_rule="divergence")
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[row] for row in range(8)])
    inputs["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(parameter.grad.any() for parameter in trainer.model.parameters())


def test_images_are_refused():
    trainer = SimpleNamespace(pad_to_multiple_of=None)
    with pytest.raises(ValueError, match="reads text alone, the batch has pixel_values"):
        KeptForward(trainer, None, {"pixel_values": None}, torch.ones(1, 1, dtype=torch.bool))


def test_a_student_that_cannot_is_refused_before_anything_is_loaded(make, tmp_path):
    REFUSED["layers of kind conv"].save_pretrained(tmp_path / "lfm2")  # a configuration and no weights
    with pytest.raises(ValueError, match="cannot train this student, a lfm2"):
        make(tmp_path / "lfm2")


def test_a_dry_run_refuses_such_a_student_too(tiny_model_dir, tiny_tokenizer, word_problems, tmp_path, capsys):
    rows_of = AutoConfig.from_pretrained(tiny_model_dir("llama", "teacher")).vocab_size
    config = REFUSED["layers of kind conv"]
    Lfm2Config(**{**config.to_dict(), "vocab_size": rows_of}).save_pretrained(tmp_path / "lfm2")
    tiny_tokenizer.save_pretrained(tmp_path / "lfm2")
    flags = {"teacher_model_name_or_path": tiny_model_dir("llama", "teacher"), "dataset_name": word_problems}
    flags |= {"output_dir": tmp_path / "run", "max_steps": 1, "max_completion_length": 8, "backward": "kept"}
    flags |= {"use_cpu": True, "bf16": False, "report_to": "none"}

    def dry_run(student):
        given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return main(["train", "--model_name_or_path", str(student), *given, "--dry_run"])

    assert dry_run(tiny_model_dir("llama", "student")) == 0
    capsys.readouterr()
    assert dry_run(tmp_path / "lfm2") != 0
    assert "cannot train this student, a lfm2" in capsys.readouterr().err
