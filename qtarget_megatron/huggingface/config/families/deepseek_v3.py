"""DeepSeek-V3 and R1, Moonlight: latent attention, experts chosen by sigmoid and group. No multi-token prediction."""

from qtarget_megatron.huggingface.config.family import ExpertRules, Family

FAMILY = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    latent=True,
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
    defaults={
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    aliases={"num_local_experts": "n_routed_experts"},
)
