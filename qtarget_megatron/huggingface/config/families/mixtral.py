"""Mixtral: Mistral with a mixture of experts in every layer."""

from qtarget_megatron.huggingface.config.family import ExpertRules, Family, WindowRules

_MLP = "model.layers.{layer}.block_sparse_moe."

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    window=WindowRules(),
    experts=ExpertRules(width="intermediate_size"),
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "num_experts": 8,
    },
    aliases={"num_local_experts": "num_experts"},
    tensors={
        "router": _MLP + "gate",
        "expert_gate": _MLP + "experts.{expert}.w1",
        "expert_up": _MLP + "experts.{expert}.w3",
        "expert_down": _MLP + "experts.{expert}.w2",
    },
)
