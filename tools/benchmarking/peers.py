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


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def liger_cross_entropy() -> Loss:
    """Liger's cross-entropy, summed (its fast way: the gradient is made in forward, over the logits)."""
    from liger_kernel.transformers.functional import liger_cross_entropy as loss

    return lambda logits, labels: loss(logits, labels, reduction="sum")
