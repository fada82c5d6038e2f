"""Nemotron-H and Nemotron Nano 2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    refused="layers of Mamba are not supported",
)
