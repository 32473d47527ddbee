"""A tiny model in the place of SmolLM2, with its tokenizer and chat template."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tipdistill.tasks import smollm2


def write_tiny_teacher(gguf, directory):
    """What `smollm2._write_teacher` does, with a model of half a million weights beside the embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 9, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_tiny_pair(root):
    """What `smollm2.prepare` writes, of the tiny teacher; returns `root`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "_write_teacher", write_tiny_teacher)
        smollm2.prepare(root, say=lambda line: None)
    return root
