"""SmolLM3: a Llama in which every fourth layer has no rotary embedding."""

from qtarget_megatron.huggingface.config.family import Family, WindowRules

FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    unrotated_layers=True,
    window=WindowRules(switch="use_sliding_window", listed=True, unrotated=True),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
)
