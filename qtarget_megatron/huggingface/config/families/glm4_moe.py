"""GLM-4.5 and GLM-4.5-Air: experts chosen by sigmoid. No multi-token prediction."""

from qtarget_megatron.huggingface.config.family import ExpertRules, Family

FAMILY = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    qkv_bias="attention_bias",
    qk_norm="use_qk_norm",
    partial_rotary=True,
    experts=ExpertRules(
        count="n_routed_experts",
        score="sigmoid",
        normalized="norm_topk_prob",
        correction=True,
        scaling="routed_scaling_factor",
        groups="n_group",
        top_groups="topk_group",
        shared="n_shared_experts",
        float32_router=True,
        first_sparse="first_k_dense_replace",
    ),
    further_layers="num_nextn_predict_layers",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
    },
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)
