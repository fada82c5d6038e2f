"""MiniMax-M2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    refused="it normalises queries and keys over all heads together, where Megatron normalises each head",
)
