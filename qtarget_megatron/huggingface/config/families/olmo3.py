"""OLMo 3: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    refused="it normalises queries and keys over all heads together, where Megatron normalises each head, and it has "
    "no norms before attention and MLP",
)
