"""Qwen3 with a mixture of experts (30B-A3B, 235B-A22B)."""

from qtarget_megatron.huggingface.config.family import ExpertRules, Family, WindowRules

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=True,
    window=WindowRules(switch="use_sliding_window"),
    experts=ExpertRules(normalized="norm_topk_prob", dense_layers="mlp_only_layers", sparse_step="decoder_sparse_step"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    aliases={"num_local_experts": "num_experts"},
)
