"""Qwen1.5-MoE and Qwen2-MoE (57B-A14B): experts beside a shared one, whose weight the token decides."""

from qtarget_megatron.huggingface.config.family import ExpertRules, Family, WindowRules

_MLP = "model.layers.{layer}.mlp."

FAMILY = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    qkv_bias="qkv_bias",
    window=WindowRules(switch="use_sliding_window", listed=True, alternate=True, before="max_window_layers"),
    experts=ExpertRules(
        normalized="norm_topk_prob",
        shared_width="shared_expert_intermediate_size",
        shared_weight=True,
        dense_layers="mlp_only_layers",
        sparse_step="decoder_sparse_step",
    ),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    tensors={
        "shared_gate": _MLP + "shared_expert.gate_proj",
        "shared_up": _MLP + "shared_expert.up_proj",
        "shared_down": _MLP + "shared_expert.down_proj",
    },
)
