"""GLM-4-0414 (9B, 32B) and GLM-Z1, dense: GLM-4 with further norms behind attention and MLP."""

from qtarget_megatron.huggingface.config.families.glm import FAMILY as GLM
from qtarget_megatron.huggingface.config.family import Family

FAMILY = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    qkv_bias=GLM.qkv_bias,
    partial_rotary=GLM.partial_rotary,
    rotary_interleaved=GLM.rotary_interleaved,
    output_norms=True,
    defaults=GLM.defaults,
    tensors=GLM.tensors,
)
