"""EXAONE 4: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    refused="it has no norms before attention and MLP, which Megatron's layers begin with",
)
