"""By what a sweep knows that a model is the one of before."""

from tipdistill.sweep.cells import fingerprint


def test_a_model_is_known_by_its_files_and_not_by_what_pruning_measured(tmp_path):
    """Figures of layers differ in their last digits from processor to processor, and the model they chose does not."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    plain = fingerprint(str(tmp_path))
    (tmp_path / "prune.json").write_text('{"influence": [0.992483]}')
    assert fingerprint(str(tmp_path)) == plain
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    assert fingerprint(str(tmp_path)) != plain
    assert fingerprint("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
