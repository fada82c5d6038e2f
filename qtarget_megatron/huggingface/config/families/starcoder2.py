"""StarCoder2: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    refused="norms that subtract the mean (LayerNorm), and MLPs without a gate, are not supported",
)
