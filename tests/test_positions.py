import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    Phi3Config,
    Qwen3Config,
)
from transformers import Gemma3TextConfig as Gemma3

from tipdistill.positions import check_positions, position_limit

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096, "rope_theta": 1e4}
LONGROPE |= {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LIMITS = {
    "none given": (Qwen3Config(max_position_embeddings=128), 128),
    "gpt2's name": (GPT2Config(n_positions=256), 256),
    "mpt's name": (MptConfig(max_seq_len=512), 512),
    "state space": (MambaConfig(), None),
    "alibi": (BloomConfig(), None),
    "falcon's alibi": (FalconConfig(alibi=True), None),
    # as Qwen ships it: the factor beside a limit that it stretches
    "yarn": (Qwen3Config(max_position_embeddings=40960, rope_parameters=YARN), 131072),
    # as Llama 3.1 ships it: the limit holds the factor already
    "llama3": (LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA3), 131072),
    # each token's turn changes with the longest row of the batch beyond these
    "dynamic": (LlamaConfig(max_position_embeddings=2048, rope_parameters=DYNAMIC), 2048),
    "longrope": (Phi3Config(max_position_embeddings=131072, rope_parameters=LONGROPE), 4096),
    "per layer": (
        Gemma3(
            max_position_embeddings=1024,
            rope_parameters={
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        8192,
    ),
}


@pytest.mark.parametrize("case", sorted(LIMITS))
def test_how_far_positions_reach(case):
    config, limit = LIMITS[case]
    assert position_limit(config) == limit


def test_whose_positions_do_not_suffice():
    limits = {"student": None, "teacher": 20}
    check_positions(limits, 12, 8, "--max_new_tokens")
    with pytest.raises(ValueError, match="that is more than the 20 positions of the teacher: lower --max_new"):
        check_positions(limits, 12, 9, "--max_new_tokens", " or x")
    for completion in (20, 21):
        said = f"--max_new_tokens {completion} takes all of the 20 positions of the teacher.*: lower --max_new_tokens."
        with pytest.raises(ValueError, match=said):
            check_positions({"student": None, "teacher": 20}, 1, completion, "--max_new_tokens", " or x")
    with pytest.raises(ValueError, match="the longest prompt has 2 tokens"):
        check_positions({"teacher": 20}, 2, 19, "--max_new_tokens", " or x")
