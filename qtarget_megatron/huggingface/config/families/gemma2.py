"""Gemma 2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    refused="Megatron's layers have no soft cap on attention scores and logits and no norm behind attention and MLP",
)
