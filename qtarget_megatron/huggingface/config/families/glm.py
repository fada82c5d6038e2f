"""GLM-4-9B of 2024, dense."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="glm",
    architecture="GlmForCausalLM",
    qkv_bias="attention_bias",
    partial_rotary=True,
    rotary_interleaved=True,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-7,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    tensors=dict.fromkeys(("gate", "up"), "model.layers.{layer}.mlp.gate_up_proj"),
)
