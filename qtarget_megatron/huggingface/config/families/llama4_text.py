"""The text model of Llama 4: declared to be refused by name."""

from qtarget_megatron.huggingface.config.families.llama4 import REASON
from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(name="llama4_text", architecture="Llama4ForCausalLM", refused=REASON)
