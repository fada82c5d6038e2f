"""LFM2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="lfm2",
    architecture="Lfm2ForCausalLM",
    refused="layers of short convolutions, which most of its layers are, are not supported",
)
