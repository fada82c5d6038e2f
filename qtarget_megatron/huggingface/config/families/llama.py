"""Llama 2, Llama 3 to 3.3, SmolLM 1 and 2, and the many models that took over their shape."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
