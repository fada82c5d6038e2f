"""Qwen3-Next: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    refused="linear attention (gated delta rule), which most of its layers have, is not supported",
)
