import json
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks import measure
from benchmarks.measure import stored_bytes
from benchmarks.step import PRESETS, StepVariant, _held, _RandomRollout, run_step, variants_of
from tipdistill.tasks.arithmetic import build_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_training_step_is_timed_by_its_parts(monkeypatch):
    monkeypatch.setattr(measure, "START_METHOD", forks.context().get_start_method())
    variants = [StepVariant("plain"), StepVariant("trl"), StepVariant("tip"), StepVariant("tip", 0.1, True)]
    variants += [StepVariant("tip", 0.1, normalization="running", backward="kept")]
    entries = run_step(rounds=1, steps=1, say=lambda line: None, variants=variants)["variants"]
    assert not [entry["refused"] for entry in entries.values() if "refused" in entry]
    # the same rollout and the same loss, three ways
    losses = [entries[name]["first_loss"] for name in ("plain", "trl", "tip all")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    for name, entry in entries.items():
        split = entry["split"]
        assert entry["training_seconds"]["median"] < entry["step_seconds"]["median"]
        assert split["rollout"] > 0
        assert split["loss"] > 0
        assert ("score" in split) == name.startswith("tip")
        assert entry["peak_bytes"] > entry["above_bytes"] > 0
        assert entry["stored_bytes"] > 0
        assert name == "plain" or entry["above_ratio"]["plain"] > 0
    assert entries["tip soft_or 0.1, teacher_offload"]["split"]["score"] > 0
    stored = {name: entry["stored_bytes"] for name, entry in entries.items()}
    assert stored["tip soft_or 0.1, running, kept"] < 0.4 * stored["tip all"]


def test_variants_are_the_peers_and_four_retentions_twice():
    names = [variant.name for variant in variants_of()]
    assert names[:2] == ["plain", "trl"]
    assert len(set(names)) == 10
    assert "tip soft_or 0.2, teacher_offload" in names


def test_smollm2_is_stepped_with_the_backward_through_kept_positions_too():
    names = [variant.name for variant in variants_of("smollm2")]
    assert names[-1] == "tip gradient_norm_sampling 0.1, running, kept"
    assert len(set(names)) == len(names)


def test_what_a_forward_stores_is_counted_once_and_without_weights():
    layer = torch.nn.Linear(8, 4)
    given = torch.ones(3, 8)
    with stored_bytes(layer) as count:
        layer(given).square()  # its input for the weight's gradient, its output for the square's
        assert count() == 4 * (3 * 8 + 3 * 4)
        layer(given)
        assert count() == 4 * (3 * 8 + 3 * 4)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"preset must be one of .*, got 'tinny'. Did you mean 'tiny'"):
        run_step("tinny")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("preset", [name for name, settings in PRESETS.items() if settings.device == "cuda"])
def test_a_preset_for_a_gpu_says_so(preset):
    with pytest.raises(ValueError, match="needs a GPU"):
        run_step(preset)


def test_a_preset_of_a_real_pair_says_what_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no runs/smollm2/models/student: run `python -m tipdistill\.tasks"):
        run_step("smollm2")


def test_a_rollout_is_random_of_the_full_length_and_the_same_for_every_variant():
    tokenizer = build_tokenizer()

    def completions(step):
        rollout = _RandomRollout()
        rollout.args, rollout.state = SimpleNamespace(max_completion_length=50), SimpleNamespace(global_step=step)
        rollout._tokenizer = tokenizer
        return rollout._generate_single_turn([[1, 2]] * 3, None, {})

    first = completions(0)
    assert [len(row) for row in first] == [50] * 3
    assert first == completions(0) != completions(1)
    assert not {token for row in first for token in row} & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(("offloaded", "weights"), [(False, 2), (True, 1)], ids=["teacher here", "teacher offloaded"])
def test_what_every_way_of_training_holds_is_weights_gradients_and_optimiser(offloaded, weights):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=32, num_key_value_heads=1, head_dim=4, **sizes)
    student, teacher = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    optimizer = torch.optim.Adam(student.parameters())
    student(torch.tensor([[1, 2]])).logits.sum().backward()
    optimizer.step()
    trainer = SimpleNamespace(model=student, teacher_model=teacher, optimizer=optimizer)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    size = sum(parameter.nbytes for parameter in student.parameters())
    steps = 4 * len(list(student.parameters()))  # Adam counts them in a float32 of its own
    assert _held(trainer, offloaded) == (weights * size, 3 * size + steps)


def test_what_the_documents_say_of_smollm2s_step_is_in_its_file():
    result = json.loads((ROOT / "benchmarks" / "results" / "step-smollm2.json").read_text(encoding="utf-8"))
    seconds = {name: entry["training_seconds"]["median"] for name, entry in result["variants"].items()}
    half, tenth, sampled = (
        seconds[f"tip {name}, running"] / seconds["tip all"]
        for name in ("soft_or 0.5", "soft_or 0.1", "gradient_norm_sampling 0.1")
    )
    page = " ".join((ROOT / "docs" / "smollm2.md").read_text(encoding="utf-8").split())
    assert f"they cost {half:.2f} of all tokens, and a tenth costs {sampled:.2f} to {tenth:.2f}" in page
    assert seconds["tip soft_or 0.5"] > seconds["tip all"]  # "dearer than all of them"
    kept, whole = (result["variants"][f"tip {name}"] for name in ("gradient_norm_sampling 0.1, running, kept", "all"))
    share, stored = (
        kept["training_seconds"]["median"] / seconds["tip all"],
        kept["stored_bytes"] / whole["stored_bytes"],
    )
    assert f"a step takes {share:.2f} of all tokens' time, and the backward stores {stored:.2f} of" in page
    assert result["variants"]["tip all"]["above_ratio"]["plain"] == pytest.approx(2 / 3, abs=0.02)
    verdicts = " ".join((ROOT / "docs" / "replication.md").read_text(encoding="utf-8").split())
    saved = 1 - result["variants"]["tip all"]["above_ratio"]["plain"]
    assert f"SmolLM2's step saves [{saved:.0%}](smollm2.md#what-a-step-costs)".replace("%", " %") in verdicts
