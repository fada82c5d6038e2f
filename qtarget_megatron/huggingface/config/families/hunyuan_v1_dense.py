"""Hunyuan, dense: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    refused="it normalises queries and keys behind the rotary embedding, Megatron before it",
)
