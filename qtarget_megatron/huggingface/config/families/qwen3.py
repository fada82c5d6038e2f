"""Qwen3, dense."""

from qtarget_megatron.huggingface.config.family import Family, WindowRules

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=True,
    window=WindowRules(switch="use_sliding_window", listed=True, first="max_window_layers"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
