"""gpt-oss: sinks in attention, experts with biases and clamped activations, windows in every second layer."""

from qtarget_megatron.huggingface.config.family import ExpertRules, Family, WindowRules

FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=True,
    sinks=True,
    window=WindowRules(listed=True, alternate=True),
    experts=ExpertRules(
        count="num_local_experts", width="intermediate_size", bias=True, fused=True, clamp="swiglu_limit"
    ),
    # Megatron has no other factor in the sigmoid.
    fixed={"swiglu_alpha": 1.702},
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
    },
    aliases={"num_experts": "num_local_experts"},
    tensors={"router": "model.layers.{layer}.mlp.router"},
)
