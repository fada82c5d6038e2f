"""What the losses are compared with: torch, Megatron, Liger, and Target-SFT as one would write it.

Megatron's losses are imported here alone. They need nothing but tensors and a group, so they run on the CPU as they
are, without the CPU platform, which would slow every torch call down a little.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [N, V], labels [N]) -> loss per token
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden [N, H], weight [V, H], labels [N]) -> summed loss


def torch_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def torch_cross_entropy_float32(logits: Tensor, labels: Tensor) -> Tensor:
    """With 16-bit logits what transformers does: the loss of a float32 copy."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def eager_dft(logits: Tensor, labels: Tensor) -> Tensor:
    """-sg(p(y)) log p(y)."""
    nll = F.cross_entropy(logits.float(), labels, reduction="none")
    return torch.exp(-nll).detach() * nll


def eager_target_sft(logits: Tensor, teacher: Tensor, labels: Tensor, eta: float) -> Tensor:
    """CE(Q, p), Q = p(y) onehot(y) + (1 - p(y)) softmax((1-eta) z + eta t), from softmax and log_softmax."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    label = labels.unsqueeze(-1)
    with torch.no_grad():
        trust = log_p.gather(-1, label).exp()
        residual = F.softmax((1 - eta) * logits.float() + eta * teacher.float(), dim=-1)
        target = ((1 - trust) * residual).scatter_add_(-1, label, trust)
    return -(target * log_p).sum(dim=-1)


def megatron_cross_entropy(group: dist.ProcessGroup) -> Loss:
    """Megatron's vocab_parallel_cross_entropy: three all-reduces; it overwrites float32 logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    return lambda logits, labels: vocab_parallel_cross_entropy(logits, labels, 0.0, group)


def megatron_fused_cross_entropy(group: dist.ProcessGroup) -> Loss:
    """Megatron's fused_vocab_parallel_cross_entropy: two all-reduces, gradient in bfloat16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    return lambda logits, labels: fused_vocab_parallel_cross_entropy(logits, labels, group)


def optional_cross_entropies(group: dist.ProcessGroup) -> dict[str, Loss]:
    """Losses of logits on a GPU, of packages that are not required: those that are installed."""
    found: dict[str, Loss] = {}
    if _has("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        # Summed is its fast way: the gradient is made in forward, over the logits.
        found["Liger"] = lambda logits, labels: liger_cross_entropy(logits, labels, reduction="sum")
    if _has("liger_kernel.megatron"):
        from liger_kernel.megatron import LigerMegatronCrossEntropy

        vocab_parallel = LigerMegatronCrossEntropy()
        found["Liger for Megatron"] = lambda logits, labels: vocab_parallel(
            logits.unsqueeze(1), labels.unsqueeze(1), group
        ).squeeze(1)
    if _has("transformer_engine"):
        from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

        # Megatron names it None where the release of Transformer Engine has no such loss.
        if te_parallel_cross_entropy is not None:
            found["Transformer Engine"] = lambda logits, labels: te_parallel_cross_entropy(
                logits.unsqueeze(1), labels.unsqueeze(1), group
            ).squeeze(1)
    return found


def linear_cross_entropies(device: torch.device, group: dist.ProcessGroup) -> dict[str, LinearLoss]:
    """Output layer and loss as one, summed: torch's in chunks, and on a GPU Liger's where it is installed."""
    found: dict[str, LinearLoss] = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, linear_cross_entropy"] = lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum", options=options
        )
    if device.type == "cuda" and _has("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger, fused linear"] = lambda hidden, weight, labels: liger_fused_linear_cross_entropy(
            hidden, weight, labels, reduction="sum"
        )
    if device.type == "cuda" and _has("liger_kernel.megatron.fused_linear_cross_entropy"):
        from liger_kernel.megatron.fused_linear_cross_entropy import LigerMegatronFusedLinearCrossEntropy

        vocab_parallel = LigerMegatronFusedLinearCrossEntropy()
        found["Liger, fused linear for Megatron"] = lambda hidden, weight, labels: vocab_parallel(
            hidden, weight, labels, None, group
        ).sum()
    return found


def not_installed() -> list[str]:
    """Packages whose losses a run on a GPU would compare with, if they were installed."""
    packages = {"liger_kernel": "liger-kernel", "transformer_engine": "transformer-engine"}
    return [package for module, package in packages.items() if not _has(module)]


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def local_attentions(heads: int, width: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Core attention of local layers, ours and Megatron's own, of [s, b, heads, width]; in a process of one rank."""
    from qtarget_megatron.megatron.runtime import cpu_platform

    cpu_platform.activate()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from qtarget_megatron.megatron.model.attention import LocalAttention

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    sizes = dict(num_layers=1, hidden_size=heads * width, num_attention_heads=heads, attention_dropout=0.0)
    config = TransformerConfig(**sizes, masked_softmax_fusion=False)
    place = dict(layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ours, megatrons = (kind(config, **place, pg_collection=groups) for kind in (LocalAttention, DotProductAttention))
    return {"ours": lambda q, k, v: ours(q, k, v), "Megatron's": lambda q, k, v: megatrons(q, k, v, None)}
