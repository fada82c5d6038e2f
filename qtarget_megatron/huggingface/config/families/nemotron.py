"""Nemotron-4 and Minitron: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="nemotron",
    architecture="NemotronForCausalLM",
    refused="norms that subtract the mean (LayerNorm), and MLPs without a gate, are not supported",
)
