"""Tiny random models of every family of checkpoints, made by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCAB = 131  # odd
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=12,
    max_position_embeddings=64,
)
# No parameter differs from its Hugging Face default by accident: all four of the llama-3 scaling, a
# base of the rotary embedding that is not 10000, and an epsilon that matters.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 3.0,
    "low_freq_factor": 0.7,
    "high_freq_factor": 3.5,
    "original_max_position_embeddings": 24,
}
# An attention factor other than 1, and a ramp between dimensions.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 3.0,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "truncate": False,
    "original_max_position_embeddings": 24,
}
LATENT_YARN = {"truncate": True, "mscale": 0.7, "mscale_all_dim": 1.2}


def longrope(pairs: int) -> dict:
    """Factors of so many rotary pairs."""
    short = [1 + 0.3 * pair for pair in range(pairs)]
    long = [1 + 2.0 * pair for pair in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": short, "long_factor": long}


EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
# With 1 key/value head, two tensor-parallel ranks share one.
FAMILIES = {
    "llama2": ("Llama", dict(num_key_value_heads=12)),
    "llama3": ("Llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", dict(num_key_value_heads=2, head_dim=8, sliding_window=None)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, rms_norm_eps=1e-3)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=1, head_dim=6)),
    "qwen3_moe": (
        "Qwen3Moe",
        # The first and the third layer have one MLP; weights of the chosen experts do not add up to 1.
        dict(num_key_value_heads=2, head_dim=6, mlp_only_layers=[0, 2], moe_intermediate_size=20, norm_topk_prob=False)
        | EXPERTS,
    ),
    "qwen3_moe_normalized": (
        "Qwen3Moe",
        dict(num_key_value_heads=2, head_dim=6, moe_intermediate_size=20, norm_topk_prob=True) | EXPERTS,
    ),
    # Every second layer has experts, and a shared one beside them, which is wider.
    "qwen2_moe": (
        "Qwen2Moe",
        dict(num_key_value_heads=2, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12)
        | dict(shared_expert_intermediate_size=28, decoder_sparse_step=2, use_sliding_window=True, sliding_window=7)
        | dict(max_window_layers=3),
    ),
    # Sinks, biases and clamps everywhere, a window in every second layer, experts of a layer in one tensor.
    "gpt_oss": (
        "GptOss",
        dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6)
        | dict(swiglu_limit=1.5, rope_parameters=YARN, pad_token_id=None),
    ),
    "mixtral": ("Mixtral", dict(num_key_value_heads=2) | EXPERTS),
    # A window in every layer, in some, and layers without rotary embedding.
    "mistral_window": ("Mistral", dict(num_key_value_heads=2, sliding_window=9)),
    "qwen2_windows": (
        "Qwen2",
        dict(num_key_value_heads=2, rope_parameters=YARN, use_sliding_window=True, sliding_window=5)
        | dict(max_window_layers=1),
    ),
    "smollm3": (
        "SmolLM3",
        dict(num_key_value_heads=2, head_dim=8, pad_token_id=None, no_rope_layers=[1, 0, 1, 0], rope_parameters=YARN),
    ),
    # Latent attention, with two scales of yarn, and groups of experts.
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            num_key_value_heads=12,
            q_lora_rank=16,
            kv_lora_rank=12,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=8,
        )
        | dict(n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=16)
        | dict(first_k_dense_replace=1, routed_scaling_factor=1.7, rope_parameters=YARN | LATENT_YARN)
        # transformers has no layers for further tokens.
        | dict(num_nextn_predict_layers=0),
    ),
    # Tensors of queries, keys and values, and of gate and up, in one; rotary embeddings of a part of each head, with an
    # attention factor, in pairs of neighbours.
    "phi3": (
        "Phi3",
        dict(num_attention_heads=4, num_key_value_heads=2, partial_rotary_factor=0.7, sliding_window=9)
        | dict(pad_token_id=None, max_position_embeddings=192, original_max_position_embeddings=64)
        | dict(rope_parameters=longrope(4)),
    ),
    "glm": ("Glm", dict(num_key_value_heads=2, head_dim=8, pad_token_id=None)),
    "glm4": ("Glm4", dict(num_key_value_heads=2, head_dim=8, pad_token_id=None)),
    # Multipliers, none of which is a power of 2.
    "granite": (
        "Granite",
        dict(num_key_value_heads=2, embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.3)
        | dict(logits_scaling=1.3, rope_parameters=YARN),
    ),
    "ernie4_5": ("Ernie4_5", dict(num_key_value_heads=2, head_dim=8)),
    "seed_oss": ("SeedOss", dict(num_key_value_heads=2, head_dim=8)),
    "glm4_moe": (
        "Glm4Moe",
        dict(num_key_value_heads=2, head_dim=8, attention_bias=True, use_qk_norm=True, moe_intermediate_size=16)
        | dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=2, routed_scaling_factor=1.3)
        | dict(num_nextn_predict_layers=0),
    ),
    "biases": ("Llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
}

transformers.utils.logging.disable_progress_bar()


def write_model(folder: Path, family: str, *, tied: bool, dtype=torch.float32, **changes) -> Path:
    """A random model of 4 layers and 131 tokens; norms and biases are random as well."""
    prefix, extra = FAMILIES[family]
    sizes = SIZES | dict(num_hidden_layers=4, tie_word_embeddings=tied) | extra | changes
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**sizes))
    generator = torch.Generator().manual_seed(sum(map(ord, f"{family}{tied}")))
    # Logits of the same size at any width.
    scale = 0.15 * (SIZES["hidden_size"] / sizes["hidden_size"]) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale if parameter.dim() > 1 else 1 + noise * 0.3)
    model.to(dtype)
    for buffer in corrections(model):
        buffer.data = torch.randn(buffer.shape, generator=generator) * 0.1
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def corrections(model) -> list[torch.Tensor]:
    """What DeepSeek's routers add to their scores: float32 in a model of any dtype."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def engine_sizes(family: str) -> dict[str, int]:
    """Arguments of write_model: sizes that divide by what Transformer Engine's kernels ask for."""
    given = FAMILIES[family][1]
    heads = SIZES["num_attention_heads"]
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4)
    sizes["num_key_value_heads"] = 4 if given["num_key_value_heads"] == heads else 2
    larger = dict(head_dim=64, moe_intermediate_size=256, q_lora_rank=64, kv_lora_rank=64, v_head_dim=64)
    larger |= dict(qk_nope_head_dim=64, qk_rope_head_dim=32, shared_expert_intermediate_size=256)
    if given.get("rope_parameters", {}).get("rope_type") == "longrope":
        sizes["rope_parameters"] = longrope(int(64 * given["partial_rotary_factor"]) // 2)
    return sizes | {key: value for key, value in larger.items() if key in given}
