"""Llama 4, Scout and Maverick as they are published: declared to be refused by name."""

from qtarget_megatron.huggingface.config.family import Family

REASON = (
    "it attends in chunks of the sequence, and scales queries by their position in layers without rotary embedding: "
    "Megatron's attention has neither"
)
FAMILY = Family(name="llama4", architecture="Llama4ForConditionalGeneration", refused=REASON)
