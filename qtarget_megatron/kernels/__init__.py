"""Backends of the two kernels: statistics of a vocabulary shard, and the logit gradient.

A kernel knows no objective: it sees residual coefficients (a, b) and per-row scales only.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from qtarget_megatron.kernels import native, reference
from qtarget_megatron.kernels.backend import Backend

BACKENDS = ("auto", "reference", "cpp", "cuda")
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*_NATIVE_DTYPES, torch.float64)
# The native backend by the type of its device.
_NATIVE = {"cpu": "cpp", "cuda": "cuda"}


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """ValueError unless some backend computes in a dtype."""
    if dtype not in DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 (float64 with the reference backend), got {dtype}: convert it"
        )


def select(backend: str, logits: Tensor) -> Backend:
    """The backend that serves these logits; see choose()."""
    return choose(backend, logits.device.type, logits.dtype)


def choose(backend: str, device: str, dtype: torch.dtype) -> Backend:
    """The backend that serves logits of a device type and dtype.

    auto takes cpp for CPU tensors, cuda for CUDA tensors and reference for float64. Where the native module has no
    CUDA half, or none for this GPU, auto takes reference for CUDA tensors and says so once. ValueError where backend
    cannot serve them, or where there is no native module.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    check_dtype("logits and hidden states", dtype)
    if backend == "auto":
        if dtype not in _NATIVE_DTYPES:
            return reference
        if device == "cuda" and (problem := native.cuda_problem()) is not None:
            warnings.warn(
                f"{problem}: backend='auto' uses the PyTorch reference on the GPU, which stores softmax-sized "
                "temporaries. Rebuild where nvcc is found.",
                stacklevel=4,
            )
            return reference
        if device not in _NATIVE:
            return reference
        native.extension()
        return native
    if backend == "reference":
        return reference
    if _NATIVE.get(device) != backend:
        wanted = next(served for served, name in _NATIVE.items() if name == backend)
        raise ValueError(f"backend={backend!r} needs {wanted} tensors, got {device} logits: move them or use 'auto'")
    if dtype not in _NATIVE_DTYPES:
        raise ValueError(f"backend={backend!r} takes float32, bfloat16 or float16 logits, got {dtype}: use 'reference'")
    if backend == "cuda" and (problem := native.cuda_problem()) is not None:
        raise ValueError(f"backend='cuda': {problem}: rebuild where nvcc is found, or use 'reference'")
    native.extension()
    return native


def name(backend: Backend, device: str) -> str:
    """What choose() calls a backend that serves a type of device."""
    return "reference" if backend is reference else _NATIVE[device]
