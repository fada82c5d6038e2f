"""Gemma 3, text only: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    refused="Megatron's layers have no norm behind attention and MLP, and all share one base of the rotary embedding",
)
