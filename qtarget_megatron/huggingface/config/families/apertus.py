"""Apertus: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="apertus",
    architecture="ApertusForCausalLM",
    refused="its MLP has no gate, and an activation with learnt parameters (xIELU) that Megatron does not have",
)
