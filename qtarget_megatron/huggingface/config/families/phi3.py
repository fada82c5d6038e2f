"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini, dense."""

from qtarget_megatron.huggingface.config.family import Family, WindowRules

_LAYER = "model.layers.{layer}."

FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    partial_rotary=True,
    # Older releases say "su" or "yarn".
    rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    window=WindowRules(),
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    tensors=dict.fromkeys(("query", "key", "value"), _LAYER + "self_attn.qkv_proj")
    | dict.fromkeys(("gate", "up"), _LAYER + "mlp.gate_up_proj"),
)
