"""Gemma 3, text only: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    refused="Megatron's layers share one base of the rotary embedding; norms that multiply by 1 + weight, and MLPs "
    "gated by gelu, are not supported",
)
