"""OLMo 2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    refused="it normalises queries and keys over all heads together, where Megatron normalises each head, and it has "
    "no norms before attention and MLP",
)
