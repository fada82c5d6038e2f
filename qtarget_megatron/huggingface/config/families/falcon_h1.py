"""Falcon-H1: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="falcon_h1",
    architecture="FalconH1ForCausalLM",
    refused="layers of Mamba are not supported",
)
