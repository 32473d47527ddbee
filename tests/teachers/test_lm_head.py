"""An lm_head alone out of a model's files: the very logits of the model, or a refusal that names it."""

import json
import shutil

import pytest
import torch
from causal_models import CLASSES, tiny
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.utils import cached_file

from tipdistill.score.forward import last_hidden_states
from tipdistill.score.reference import logits
from tipdistill.teachers.lm_head import read_lm_head

IDS = torch.tensor([[5, 9, 7, 11, 6, 40, 3, 8]])
# what people serve: tied and untied, with a bias, a softcap, a scale, renamed in its files, padded
COMMON = (
    "llama",
    "qwen3",
    "phi",
    "gemma2",
    "cohere",
    "granite",
    "gpt_neox",
    "falcon_h1",
    "inkling_text",
    "llama4_text",
)
# classes that compute more after their backbone
REFUSED = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert")
REFUSED += ("modernbert-decoder", "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta")
REFUSED += ("xlm-roberta-xl",)


def assert_reads_its_own_logits(model, directory):
    model.save_pretrained(directory)
    lm_head = read_lm_head(str(directory))
    with torch.no_grad():
        states = last_hidden_states(model, IDS, torch.ones_like(IDS))[0]
        own = model(input_ids=IDS, use_cache=False).logits[0]
    assert lm_head.width == states.shape[1]
    torch.testing.assert_close(logits(lm_head.of(states), lm_head.rows), own, rtol=1e-4, atol=1e-4)
    return lm_head, states


@pytest.mark.parametrize("kind", COMMON)
def test_logits_are_the_models_own_and_its_states_have_passed_its_final_norm(kind, tmp_path):
    lm_head, states = assert_reads_its_own_logits(tiny(kind), tmp_path)
    torch.testing.assert_close(lm_head.mean_square(states), torch.ones(len(states)), rtol=0, atol=1e-3)
    loaded = [name for name, parameter in lm_head.model.named_parameters() if not parameter.is_meta]
    assert len(loaded) == 1 + (lm_head.layer.bias is not None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(CLASSES) - set(COMMON)))
def test_every_causal_class_is_read_or_refused_by_name(kind, tmp_path):
    model = tiny(kind)
    if model is None:
        pytest.skip("no small configuration")
    if kind in REFUSED:
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"{type(model).__name__} .* computes more than its lm_head"):
            read_lm_head(str(tmp_path))
        return
    lm_head, states = assert_reads_its_own_logits(model, tmp_path)
    if lm_head.norm is not None:
        torch.testing.assert_close(lm_head.mean_square(states), torch.ones(len(states)), rtol=0, atol=1e-3)


def test_of_shards_the_one_that_holds_it_is_read_and_no_other(tmp_path):
    model = tiny("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {index["lm_head.weight"]}
    assert len(set(index.values())) > 2
    for path in tmp_path.glob("*.safetensors"):
        if path.name not in kept:
            path.write_bytes(b"not read")
            path.unlink()
    lm_head = read_lm_head(str(tmp_path))
    assert torch.equal(lm_head.layer.weight, model.lm_head.weight)
    # of the final norm nothing is known where it lies in another file
    assert (lm_head.norm is None) == (index["model.norm.weight"] not in kept)


def test_of_a_hub_id_the_one_file_that_holds_it_is_fetched(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    tiny("llama", tie_word_embeddings=False).save_pretrained(snapshot, max_shard_size="20KB")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    asked = []

    def fetched(name, file, **options):
        asked.append((file, bool(options.get("local_files_only"))))
        return cached_file(name, file, **{**options, "cache_dir": tmp_path})

    monkeypatch.setattr("tipdistill.teachers.lm_head.cached_file", fetched)
    monkeypatch.setattr(
        "tipdistill.teachers.lm_head.AutoConfig.from_pretrained", lambda *_, **__: LlamaConfig.from_pretrained(snapshot)
    )
    lm_head = read_lm_head("some/model")
    index = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    assert torch.equal(lm_head.layer.weight, load_file(snapshot / index["lm_head.weight"])["lm_head.weight"])
    downloaded = [file for file, only_if_here in asked if not only_if_here]
    assert downloaded == ["model.safetensors", "model.safetensors.index.json", index["lm_head.weight"]]
    assert [file for file, only_if_here in asked if only_if_here] == [index["model.norm.weight"]]


def test_a_tied_lm_head_is_the_embedding_and_one_that_was_saved_comes_first(tmp_path):
    model = tiny("qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    assert torch.equal(read_lm_head(str(tmp_path)).layer.weight, tensors["model.embed_tokens.weight"])
    other = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file({**tensors, "lm_head.weight": other}, path, {"format": "pt"})
    assert torch.equal(read_lm_head(str(tmp_path)).layer.weight, other)
    # transformers says the same
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, other)


def test_half_precision_follows_the_states_and_float32_leaves_the_weight(tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    lm_head = read_lm_head(str(tmp_path))
    assert lm_head.layer.weight.dtype == torch.bfloat16
    for states, weight in [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ]:
        assert lm_head.to("cpu", states).layer.weight.dtype == weight


def damaged(directory, what):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if what == "pickled":
        torch.save(tensors, directory / "pytorch_model.bin")
        path.unlink()
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif what == "no lm_head":
        save_file({name: tensor for name, tensor in tensors.items() if "lm_head" not in name}, path)
    elif what == "quantized":
        save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}, path)
    elif what == "other rows":
        save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:-3]}, path)
    elif what == "no configuration":
        (directory / "config.json").write_text("{")
    else:
        shutil.move(path, directory / "elsewhere.safetensors")
        file = {"index": None, "outside": "../secret.safetensors", "no such file": "model-00001.safetensors"}[what]
        text = "[]" if what == "index" else json.dumps({"weight_map": dict.fromkeys(tensors, file)})
        (directory / "model.safetensors.index.json").write_text(text)


DAMAGE = {
    "pickled": r"has no model\.safetensors and no .*pickled",
    "cut": "is damaged",
    "no lm_head": r"hold no lm_head\.weight: give the model",
    "quantized": "is float8_e4m3fn .* not quantized",
    "other rows": r"lm_head\.weight of .* is float32 \[61, 32\], and an lm_head \[64, 32\]",
    "no configuration": "could not be read",
    "index": "has no weight_map",
    "outside": r"names '\.\./secret\.safetensors' for a file",
    "no such file": r"has no model-00001\.safetensors, which holds lm_head\.weight",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_files_that_hold_no_lm_head_are_refused_in_one_line(tmp_path, what):
    tiny("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    damaged(tmp_path, what)
    with pytest.raises(ValueError, match=DAMAGE[what]) as raised:
        read_lm_head(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("teacher_lm_head: ")


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"teacher_lm_head: the configuration of no/such-model could not be read"):
        read_lm_head("no/such-model")
