import pytest
import torch

from benchmarks.step import PRESETS, StepVariant, run_step, variants_of


@pytest.mark.slow
def test_a_training_step_is_timed_by_its_parts():
    variants = [StepVariant("plain"), StepVariant("trl"), StepVariant("tip"), StepVariant("tip", 0.1, True)]
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
        assert entry["peak_bytes"] > 0
    assert entries["tip soft_or 0.1, teacher_offload"]["split"]["score"] > 0


def test_variants_are_the_peers_and_four_retentions_twice():
    names = [variant.name for variant in variants_of()]
    assert names[:2] == ["plain", "trl"]
    assert len(set(names)) == 10
    assert "tip soft_or 0.2, teacher_offload" in names


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"preset must be one of .*, got 'tinny'. Did you mean 'tiny'"):
        run_step("tinny")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_a_preset_for_a_gpu_says_so(preset):
    with pytest.raises(ValueError, match="needs a GPU"):
        run_step(preset)
