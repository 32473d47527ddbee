"""Tiny models, a tiny tokenizer and prompts, made once per session and loaded from disk like any checkpoint."""

import importlib.util
import json
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import that reads it: a test that reaches for the hub must fail

import once
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it in its decorators
    if importlib.util.find_spec("triton") is not None:
        from benchmarks.interpreter import patch_once, round_to_bfloat16

        round_to_bfloat16()
        patch_once()

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

torch.set_num_threads(1)  # the machine's cores belong to pytest-xdist's workers

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Tied embeddings as in Qwen3-4B and Qwen2.5-1.5B, untied as in Llama 3.1, an lm_head with a bias as in Phi-2.
ARCHITECTURES = {
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "phi": (PhiConfig, {"tie_word_embeddings": False}),
}
HIDDEN = {"student": 32, "teacher": 48}
HEADS = 4


def _problems() -> list[str]:
    draw = random.Random(0)
    names, things = ("Ada", "Emmy", "Kurt", "Alan", "Grace"), ("apples", "marbles", "stamps", "coins")
    templates = (
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?",
        "{name} shares {a} {thing} among {b} friends. How many {thing} are left over?",
        "A box holds {a} {thing}. How many {thing} do {b} boxes hold?",
    )
    return [
        draw.choice(templates).format(
            name=draw.choice(names), thing=draw.choice(things), a=draw.randint(10, 99), b=draw.randint(2, 9)
        )
        for _ in range(96)
    ]


def pytest_collection_finish():
    once.prepare()


@pytest.fixture(scope="session")
def word_problems(tmp_path_factory):
    """Path of a JSONL file of 96 word problems with a plain `prompt`."""
    path = tmp_path_factory.mktemp("data") / "word_problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": problem}) + "\n" for problem in _problems()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE with a chat template; the padding token is Qwen2's, whose tokenizer class adds it otherwise."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _problems(),
        trainers.BpeTrainer(
            vocab_size=396,
            special_tokens=["<|endoftext|>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer):
    """Factory (arch, role, vocab_rows=None) → directory of a randomly initialised model and its tokenizer.

    `arch` is a key of ARCHITECTURES, `role` "student" (hidden 32) or "teacher" (hidden 48). The lm_head has
    `vocab_rows` rows: by default the tokenizer's, padded to a multiple of 16.
    """
    root = tmp_path_factory.mktemp("models")

    def build(arch, role, vocab_rows=None):
        rows = -(-len(tiny_tokenizer) // 16) * 16 if vocab_rows is None else vocab_rows
        path = root / f"{arch}-{role}-{rows}"
        if not path.exists():
            config_class, settings = ARCHITECTURES[arch]
            config = config_class(
                vocab_size=rows,
                hidden_size=HIDDEN[role],
                intermediate_size=2 * HIDDEN[role],
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS // 2,
                head_dim=HIDDEN[role] // HEADS,
                max_position_embeddings=512,
                # wide enough that distributions are neither uniform nor equal, so that scores differ between tokens
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=tiny_tokenizer.eos_token_id,
                pad_token_id=tiny_tokenizer.pad_token_id,
                **settings,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed({"student": 0, "teacher": 1}[role])
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                if model.get_output_embeddings().bias is not None:
                    torch.nn.init.normal_(model.get_output_embeddings().bias)
            model.save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
        return path

    return build
