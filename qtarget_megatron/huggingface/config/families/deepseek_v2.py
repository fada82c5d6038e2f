"""DeepSeek-V2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    refused="Megatron ranks groups of experts by the sum of their best scores, not by the best one (V2), and adds a "
    "norm to queries that are made without a latent (V2-Lite)",
)
