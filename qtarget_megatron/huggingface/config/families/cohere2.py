"""Command-R7B and Command A: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="cohere2",
    architecture="Cohere2ForCausalLM",
    refused="attention and MLP read the same norm side by side; Megatron's layers have one behind the other",
)
