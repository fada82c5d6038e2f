"""Command-R: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="cohere",
    architecture="CohereForCausalLM",
    refused="attention and MLP read the same norm side by side; Megatron's layers have one behind the other",
)
