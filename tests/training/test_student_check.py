"""What a run trains on is the models' own logits, wherever its rows are padded; or the run is refused by name."""

import copy
import json

import pytest
import torch
from causal_models import tiny
from datasets import Dataset
from on_cpu import ON_CPU

from tipdistill import TIPConfig, TIPTrainer

PROMPTS = ["1", "2+3*4-5*6+7=", "1+1=", "8*8*8*8*8"] * 4


@pytest.fixture
def make(tmp_path):
    from tipdistill.tasks.arithmetic import build_tokenizer

    def build(student, teacher, **settings):
        given = {
            **ON_CPU,
            "max_steps": 1,
            "optim": "sgd",
            "max_completion_length": 6,
            "per_device_train_batch_size": 4,
            "shuffle_dataset": False,
            "record_rollouts": 0,
        }
        return Recording(
            student,
            teacher,
            TIPConfig(str(tmp_path / "run"), **{**given, **settings}),
            Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=build_tokenizer(),
            teacher_processing_class=build_tokenizer(),
        )

    return build


class Recording(TIPTrainer):
    batch = None

    def _generate_and_score_completions(self, inputs):
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch


def loss_of(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@torch.no_grad()
def own_loss(student, teacher, batch):
    """The reverse KL over all tokens, from both models' own logits, rollout by rollout and without padding."""
    divergences = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        tokens = torch.cat([prompt, completion])[None]
        own = [model.eval()(input_ids=tokens).logits[0, len(prompt) - 1 : -1] for model in (student, teacher)]
        of_student, of_teacher = (logits.log_softmax(-1) for logits in own)
        divergences.append((of_student.exp() * (of_student - of_teacher)).sum(-1))
    return torch.cat(divergences).mean().item()


@pytest.mark.parametrize("kind", ["gpt2", "hunyuan_v1_moe", "llama4_text", "modernbert-decoder"])
def test_the_loss_is_that_of_both_models_own_logits_without_padding(make, kind):
    student, teacher = tiny(kind, seed=1, noise=0.2), tiny(kind, seed=2, noise=0.2)
    trainer = make(copy.deepcopy(student), teacher, selection_rule="all", beta=1.0)
    found = loss_of(trainer)
    assert not trainer.batch["prompt_mask"].bool().all()
    assert found == pytest.approx(own_loss(student, teacher, trainer.batch), rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "hunyuan_v1_moe"])
def test_kept_tokens_and_loss_do_not_depend_on_the_micro_batch(make, kind):
    found = {}
    for size in (4, 2, 1):
        student, teacher = tiny(kind, seed=1, noise=0.2), tiny(kind, seed=2, noise=0.2)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make(student, teacher, **sizes, learning_rate=0.0, normalization="batch")
        found[size] = loss_of(trainer), trainer.batch
    (whole, inside), (expected, other), (loss, batch) = found.values()
    assert torch.equal(batch["completion_ids"], other["completion_ids"])
    assert torch.equal(batch["selection_weight"] > 0, other["selection_weight"] > 0)
    assert loss == pytest.approx(expected, rel=1e-4)
    # four at once are the whole batch, and chosen from in the loss
    assert "selection_weight" not in inside
    assert whole == pytest.approx(expected, rel=1e-4)


def with_noise(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_a_teacher_with_an_adapter_on_its_lm_head_teaches_what_it_says(make):
    peft = pytest.importorskip("peft")
    teacher = tiny("llama", seed=2)
    adapted = with_noise(peft.get_peft_model(teacher, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])))
    student = tiny("llama", seed=1)
    trainer = make(copy.deepcopy(student), adapted, selection_rule="all", beta=1.0)
    assert loss_of(trainer) == pytest.approx(own_loss(student, adapted, trainer.batch), rel=1e-4)


def test_a_student_with_an_adapter_on_its_lm_head_trains_it(make):
    peft = pytest.importorskip("peft")
    student, teacher = tiny("llama", seed=1), tiny("llama", seed=2)
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with_noise(student)
    before, adapter = copy.deepcopy(student), student.lm_head.lora_B["default"].weight
    trainer = make(student, teacher, selection_rule="all", beta=1.0, learning_rate=0.1)
    assert loss_of(trainer) == pytest.approx(own_loss(before, teacher, trainer.batch), rel=1e-4)
    assert not torch.equal(adapter, before.lm_head.lora_B["default"].weight)


def test_dropout_on_the_lm_heads_adapter_is_refused(make):
    peft = pytest.importorskip("peft")
    student = tiny("llama", seed=1)
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"adapter default on the lm_head of LlamaForCausalLM has lora_dropout = 0.1"):
        make(student, tiny("llama", seed=2)).train()


def test_a_student_whose_states_padding_moves_is_refused_before_its_first_rollout(make):
    trainer = make(tiny("recurrent_gemma", seed=1), tiny("llama", seed=2))
    with pytest.raises(ValueError, match=r"the student, RecurrentGemmaForCausalLM, .* padded on the left"):
        trainer.train()
    assert trainer.batch is None


def test_a_teacher_whose_states_padding_moves_is_refused_at_construction(make):
    with pytest.raises(ValueError, match=r"the teacher, RwkvForCausalLM, .* padded on the left"):
        make(tiny("llama", seed=1), tiny("rwkv", seed=2))


def test_the_check_runs_once_and_changes_no_draw(make, monkeypatch):
    calls = []
    monkeypatch.setattr("tipdistill.training.student_check.check_model", lambda *a, **k: calls.append(a[1]))
    unchecked = make(tiny("llama", seed=1), tiny("llama", seed=2), max_steps=2, selection_rule="random")
    unchecked.train()
    monkeypatch.undo()
    checked = make(tiny("llama", seed=1), tiny("llama", seed=2), max_steps=2, selection_rule="random")
    checked.train()
    assert calls == ["student"]
    for trainer in (unchecked, checked):
        trainer.figures = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert checked.figures == unchecked.figures
    assert torch.equal(checked.batch["completion_ids"], unchecked.batch["completion_ids"])


def test_one_object_as_both_models_is_refused(make):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"student and teacher are one object.*copy\.deepcopy"):
        make(model, model)


@pytest.mark.parametrize("way", ["embedding", "peft"])
def test_models_that_share_weights_are_refused(make, way):
    student, teacher = tiny("llama", seed=1), tiny("llama", seed=2)
    if way == "embedding":
        teacher.model.embed_tokens.weight = student.model.embed_tokens.weight
    else:
        peft = pytest.importorskip("peft")
        student = peft.get_peft_model(teacher, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"student and teacher share weights \(.*weight\).*copy\.deepcopy"):
        make(student, teacher)


def test_one_path_for_both_is_two_models(make, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    assert loss_of(make(path, path, selection_rule="all", beta=1.0)) == pytest.approx(0.0, abs=1e-5)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("kind", ["dora", "lora_bias", "ia3", "loha", "oft"])
def test_a_fresh_adapter_that_the_loss_would_leave_out_is_refused(make, kind):
    peft = pytest.importorskip("peft")
    names = ["q_proj", "lm_head"]
    config = {
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=names),
        "lora_bias": lambda: peft.LoraConfig(r=2, lora_bias=True, target_modules=["lm_head"]),
        "ia3": lambda: peft.IA3Config(target_modules=names, feedforward_modules=[]),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=names),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["lm_head"]),
    }[kind]()
    student = tiny("llama")
    student.add_adapter(config)
    with pytest.raises(ValueError, match=r"adapter default \(\w+Config\) on the lm_head of LlamaForCausalLM is no sum"):
        make(student, tiny("llama", seed=5)).train()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_adapter_that_acts_after_some_tokens_alone_is_refused(make, who):
    peft = pytest.importorskip("peft")
    models = {"student": tiny("llama"), "teacher": tiny("llama", seed=5)}
    models[who].add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3]))
    with pytest.raises(ValueError, match=rf"adapter default of the {who}, LlamaForCausalLM.*, acts after"):
        make(**models).train()


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_routers_auxiliary_loss_is_left_out_and_said_so(make, kind, caplog):
    """With output_router_logits the first rollout of uneven prompts would crash, and nobody would add the loss."""
    plain, student = tiny(kind, seed=1, noise=0.2), tiny(kind, seed=1, noise=0.2, output_router_logits=True)
    losses = []
    for model in (plain, student):
        caplog.clear()
        with caplog.at_level("WARNING"):
            losses.append(loss_of(make(model, tiny(kind, seed=2, noise=0.2), selection_rule="all", beta=1.0)))
        assert ("auxiliary loss of its router" in caplog.text) == (model is student)
    assert losses[1] == losses[0]
