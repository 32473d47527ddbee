"""Layers' influence, and a model that lacks some of them."""

import itertools
import json

import pytest
import torch
from causal_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import prune
from tipdistill.cli import main

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
MASK = torch.ones_like(TOKENS)
# of each way to say which layer does what: none, sliding windows, no rotary embedding, experts, hybrids
KINDS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "gpt_oss",
    "olmo3",
    "phi3",
    "falcon_h1",
    "glm4",
    "granite",
]


def test_influence_is_the_mean_cosine_distance_of_a_layers_input_and_output():
    model = tiny("qwen3", num_hidden_layers=4)
    with torch.no_grad():
        states = model.model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    # the last entry has the final norm behind it
    expected = [
        float((1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)).mean())
        for before, after in itertools.pairwise(states[:4])
    ]
    influence = prune.block_influence(model, [(TOKENS, MASK)])
    assert influence[:3] == pytest.approx(expected, rel=1e-4)
    assert len(influence) == 4


def test_padding_and_the_division_into_batches_do_not_change_the_influence():
    model = tiny("qwen3", num_hidden_layers=4)
    whole = prune.block_influence(model, [(TOKENS, MASK), (TOKENS[:, :3], MASK[:, :3])])
    padded = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    assert prune.block_influence(model, [(padded, mask)]) == pytest.approx(whole, rel=1e-4)
    with pytest.raises(ValueError, match="there is none: give some text"):
        prune.block_influence(model, [])


def test_a_layer_that_does_nothing_has_no_influence_and_goes_without_a_trace():
    model = tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        before = model(input_ids=TOKENS).logits
        influence = prune.block_influence(model, [(TOKENS, MASK)])
        assert influence[2] == pytest.approx(0, abs=1e-6)
        assert prune.least_influential(influence, 1) == [2]
        after = prune.drop_layers(model, [2])(input_ids=TOKENS).logits
    torch.testing.assert_close(after, before)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_the_same_with_a_cache_and_once_it_is_loaded_again(kind, tmp_path):
    model = tiny(kind, num_hidden_layers=4)
    with torch.no_grad():
        before = model(input_ids=TOKENS, use_cache=False).logits
        prune.drop_layers(model, [1])
        pruned = model(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=TOKENS, use_cache=True).logits, pruned)
        assert (pruned - before).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(type(model).from_pretrained(tmp_path)(input_ids=TOKENS).logits, pruned)


def test_as_many_end_tokens_as_layers_are_all_kept():
    model = tiny("llama", num_hidden_layers=4, eos_token_id=[1, 2, 3, 4])
    assert prune.drop_layers(model, [1]).config.eos_token_id == [1, 2, 3, 4]


def test_what_cannot_be_dropped_is_refused():
    model = tiny("llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match="layers are numbered 0 to 3"):
        prune.drop_layers(model, [4])
    with pytest.raises(ValueError, match="one must stay"):
        prune.drop_layers(model, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="between 1 and 2 of 4"):
        prune.least_influential([0.0] * 4, 3)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list of decoder layers"):
        prune.drop_layers(tiny("gpt2"), [0])


# the command line, on a teacher of the small tasks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from tipdistill.tasks.arithmetic import build_tokenizer

    path = tmp_path_factory.mktemp("teacher")
    tokenizer = build_tokenizer()
    tiny("qwen3", num_hidden_layers=4, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(
        path
    )
    tokenizer.save_pretrained(path)
    (path / "asked.jsonl").write_text('{"prompt": "12+34="}\n{"prompt": "1+2="}\n')
    return path


def test_the_command_writes_a_model_that_loads(teacher, tmp_path, capsys):
    argv = ["prune", "--model", str(teacher), "--layers", "1", "--dataset", str(teacher / "asked.jsonl")]
    assert main([*argv, "--output_dir", str(tmp_path / "student"), "--max_new_tokens", "8"]) == 0
    about = json.loads((tmp_path / "student" / "prune.json").read_text())
    (dropped,) = about["dropped"]
    assert dropped in (1, 2)
    assert about["influence"][dropped] == min(about["influence"][1:3])
    assert (about["layers"], about["prompts"]) == (4, 2)
    expected = prune.drop_layers(AutoModelForCausalLM.from_pretrained(teacher), [dropped])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(student(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab()
    assert "local_files_only" not in json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())
    assert "--teacher_model_name_or_path" in capsys.readouterr().out
    assert {path.name[0] for path in (tmp_path / "student").iterdir() if path.is_dir()} == set()
    # and a second time it is refused
    assert main([*argv, "--output_dir", str(tmp_path / "student")]) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_a_model_has_the_same_bytes_whether_its_teacher_was_read_offline_or_not(teacher, tmp_path):
    for offline in (False, True):
        prune.save_tokenizer(AutoTokenizer.from_pretrained(teacher, local_files_only=offline), tmp_path / str(offline))
    names = sorted(path.name for path in (tmp_path / "True").iterdir())
    assert "tokenizer_config.json" in names
    assert [(tmp_path / "True" / name).read_bytes() for name in names] == [
        (tmp_path / "False" / name).read_bytes() for name in names
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--layers", "3"], "has 4 layers, of which 2 can go; got 3"),
        (["--layers", "0"], "must be at least 1"),
        (["--model", "absent"], "the model could not be read (--model absent)"),
        (["--layer", "1"], "there is no flag --layer. Did you mean '--layers'?"),
    ],
)
def test_bad_input_is_refused_in_a_line(teacher, tmp_path, capsys, change, said):
    argv = ["prune", "--model", str(teacher), "--layers", "1", "--output_dir", str(tmp_path / "student"), *change]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "student" / "config.json").exists()


def test_a_model_whose_layers_depend_on_their_depth_is_refused_and_not_left_behind(teacher, tmp_path, monkeypatch):
    kept = prune.drop_layers

    def forgetful(model, numbers):
        kept(model, numbers)
        with torch.no_grad():  # as if the layers were others in the place that they have now
            model.model.layers[-1].mlp.up_proj.weight.data = -model.model.layers[-1].mlp.up_proj.weight
            model.save_pretrained = lambda path: kept(
                AutoModelForCausalLM.from_pretrained(teacher), numbers
            ).save_pretrained(path)
        return model

    monkeypatch.setattr(prune, "drop_layers", forgetful)
    with pytest.raises(ValueError, match="gives other hidden states once it is loaded without these layers"):
        prune.write_pruned(str(teacher), 1, tmp_path / "student", ["1+2="], max_new_tokens=4)
    assert list((tmp_path / "student").iterdir()) == []
