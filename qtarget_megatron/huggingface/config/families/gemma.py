"""Gemma 1: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    refused="norms that multiply by 1 + weight, and MLPs gated by gelu, are not supported",
)
