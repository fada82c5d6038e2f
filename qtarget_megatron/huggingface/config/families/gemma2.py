"""Gemma 2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    refused="soft caps of attention scores and of logits, norms that multiply by 1 + weight, and MLPs gated by gelu, "
    "are not supported",
)
