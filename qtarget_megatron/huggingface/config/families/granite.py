"""Granite 3.0 to 3.3, dense: a Llama with fixed multipliers."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    multipliers=True,
    defaults={
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
)
