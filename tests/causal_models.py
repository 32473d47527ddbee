"""Every causal class of the installed transformers, as small as its configuration lets it be."""

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

# Whatever of these a configuration knows is set.
SIZES = {
    "vocab_size": 64,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "is_decoder": True,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("residual_dropout", "activation_dropout"), 0.0),
}
MLA = {"head_dim": None, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MLA |= {"v_head_dim": 8, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
# What else a class needs. None: leave out.
SETTINGS = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu"), MLA),
    "minicpm3": MLA,
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "dots1": {"n_group": 1, "topk_group": 1},
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling2_text": {"unpadded_vocab_size": 60},
    "inkling_text": {"unpadded_vocab_size": 60, "logits_mup_width_multiplier": 4.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1},
    "zaya": {"num_experts_per_tok": 1},
}
LARGEST = 4_000_000  # parameters


def _has(config, name):
    try:
        return hasattr(config, name)
    except Exception:  # an attribute that differs between layers
        return False


def tiny(kind, seed=0, noise=0.1, **settings):
    """A model of the causal class of `kind` with random weights; None where no small one can be built from SIZES."""
    config_class = CONFIG_MAPPING[kind]
    try:
        known = config_class()
        if known.get_text_config() is not known:
            return None  # a text model inside another
        given = {**{name: size for name, size in SIZES.items() if _has(known, name)}, **SETTINGS.get(kind, {})}
        given = {name: value for name, value in given.items() if not isinstance(value, type(None))}
        config = config_class(**{**given, **settings})
        model_class = getattr(transformers, CLASSES[kind])
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in model_class(config).parameters()) > LARGEST:
                return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config)
            with torch.no_grad():  # far from its initialization, where differences would be small
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * noise)
            model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    except Exception:  # classes refuse sizes in every way there is
        return None
    return model
