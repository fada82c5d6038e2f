"""AFM: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="arcee",
    architecture="ArceeForCausalLM",
    refused="MLPs without a gate are not supported",
)
