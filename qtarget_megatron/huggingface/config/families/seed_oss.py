"""Seed-OSS: a Llama whose attention has biases on queries, keys and values."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="seed_oss",
    architecture="SeedOssForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_out_bias",
    mlp_bias="mlp_bias",
    defaults={
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
)
