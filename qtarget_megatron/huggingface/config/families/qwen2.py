"""Qwen2 and Qwen2.5, dense."""

from qtarget_megatron.huggingface.config.family import Family, WindowRules

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    window=WindowRules(switch="use_sliding_window", listed=True, first="max_window_layers"),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
