"""Mistral 7B and later dense Mistral models."""

from qtarget_megatron.huggingface.config.family import Family, WindowRules

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    window=WindowRules(),
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
