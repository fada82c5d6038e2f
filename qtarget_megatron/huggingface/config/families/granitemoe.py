"""Granite 3, mixtures of experts: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    refused="the experts of a layer lie in one tensor (block_sparse_moe.input_linear), which is not read",
)
