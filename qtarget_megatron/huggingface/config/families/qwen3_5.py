"""Qwen3.5, dense: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="qwen3_5",
    architecture="Qwen3_5ForCausalLM",
    refused="linear attention (gated delta rule), which most of its layers have, is not supported",
)
