from . import distributed, fp8, router
from .attention import DotProductAttention
from .module.grouped_linear import GroupedLinear
from .module.linear import LayerNormLinear, Linear
from .module.norm import LayerNorm, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "router",
]
