"""The kernels in C++ (CPU tensors) and CUDA (CUDA tensors), through ``qtarget_megatron._C``.

A Backend for float32, bfloat16 and float16, with the numbers of qtarget_megatron.kernels.reference. The extension sees
addresses, sizes and strides only: tensors are checked here, and any other dtype, device, shape or stride is a
ValueError.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the extension: both must share one OpenMP runtime
from torch import Tensor

from qtarget_megatron import _source_tree
from qtarget_megatron.statistics import (
    DIVERGENCES,
    MAX_RESIDUALS,
    Divergence,
    Residuals,
    StatisticsRequest,
    VocabularyShard,
)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_MATRIX = (0, 0, 0)
_NO_DIVERGENCE = (0, 0.0, 0.0, 0.0)
_MAX_GUARDS = 8  # token_math.h


@functools.cache
def extension() -> ModuleType:
    """The compiled module, imported when it is first needed. ValueError where there is none, or none that loads."""
    try:
        return importlib.import_module("qtarget_megatron._C")
    except ImportError as error:
        raise ValueError(f"the native kernels need the compiled module: {_why_missing(error)}") from error


def _why_missing(error: ImportError) -> str:
    folder = Path(__file__).parent.parent
    if _source_tree.is_built(folder):
        return f"the one in {folder} does not load ({error}): build it again, with make or pip install . in a checkout"
    if _source_tree.is_source_tree(folder):
        return (
            f"this is the source tree at {folder.parent} without it, and no installed copy was found: run make, or pip "
            "install . there"
        )
    version = ".".join(map(str, sys.version_info[:2]))
    return f"the copy in {folder} has none for Python {version}: run pip install . in a checkout with this Python"


@functools.cache
def has_cuda() -> bool:
    """Whether the extension was built with the CUDA kernels. ValueError where there is no extension."""
    return bool(extension().build_info()["cuda"])


def cuda_problem() -> str | None:
    """Why the CUDA kernels do not run on the current GPU; None where they do. ValueError without an extension."""
    if not has_cuda():
        return "qtarget_megatron was built without CUDA: no nvcc was found, or it failed"
    return _problem_of(*torch.cuda.get_device_capability())


@functools.cache
def _problem_of(major: int, minor: int) -> str | None:
    built = [int(arch) for arch in extension().build_info()["cuda_archs"].split(";")]
    # Machine code runs on the same major version from its own minor on, the PTX of the newest on all that follow.
    if any(arch // 10 == major and arch % 10 <= minor for arch in built) or max(built) <= 10 * major + minor:
        return None
    names = ", ".join(f"sm_{arch}" for arch in built)
    return f"qtarget_megatron was built for {names}, and this GPU is sm_{major}{minor}"


def partial_statistics(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    request: StatisticsRequest,
    shard: VocabularyShard,
) -> Tensor:
    """As of Backend. The logits of rows that are not supervised are not read (on the GPU: not used, where request.top_k
    is set).

    The largest logits come from the same visit of the row on the CPU, and from torch.topk, a pass of its own, on the
    GPU. NaN is never among them on the CPU, and is on the GPU.
    """
    inputs = _inputs(logits, teacher_logits, labels, request.residuals, shard)
    out = torch.empty(logits.shape[0], request.width, dtype=torch.float32, device=logits.device)
    function = _function("partial_statistics", logits)
    function(*inputs, _layout(request), request.width, out.data_ptr(), *_execution(logits))
    if request.top_k and _kernels_for(logits) == "cuda":
        write_top_k(logits[:, : shard.valid_columns], labels != shard.ignore_index, out[:, request.columns.top])
    return out


def write_top_k(logits: Tensor, supervised: Tensor, out: Tensor) -> None:
    """Fill ``out`` ``[N, k]`` with the k largest logits of each row, descending, then -inf.

    Rows that are not supervised become 0. This is the part of the statistics that the CUDA kernel
    leaves out.
    """
    found = min(out.shape[1], logits.shape[1])
    out[:, :found] = logits.topk(found, dim=-1).values
    out[:, found:] = -torch.inf
    out.masked_fill_(~supervised[:, None], 0.0)


def logit_gradient(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    residuals: Residuals,
    shard: VocabularyShard,
    maxima: Tensor,
    scales: Tensor,
    out: Tensor,
    divergence: Divergence | None = None,
) -> None:
    """As of Backend. The logits of rows that become zeros are not read."""
    inputs = _inputs(logits, teacher_logits, labels, residuals, shard)
    rows, columns = logits.shape
    _check_matrix("out", out, logits)
    if out.dtype != logits.dtype:
        raise ValueError(f"out must have the dtype of logits, {logits.dtype}, got {out.dtype}")
    if rows > 1 and out.stride(0) < columns:
        raise ValueError(f"rows of out overlap: its row stride is {out.stride(0)}, expected at least {columns}")
    if out.data_ptr() == logits.data_ptr() and rows > 1 and out.stride(0) != logits.stride(0):
        raise ValueError(
            f"out shares memory with logits but has row stride {out.stride(0)}, "
            f"not {logits.stride(0)}: pass logits itself or a separate tensor"
        )
    further = (0, 0) if divergence is None else (2, 1)
    _check_per_token("maxima", maxima, torch.float32, (1 + len(residuals) + further[0], rows), logits.device)
    _check_per_token("scales", scales, torch.float32, (2 + len(residuals) + further[1], rows), logits.device)
    if divergence is not None and not residuals:
        raise ValueError("a divergence is taken from the first residual, got no residuals")
    _function("logit_gradient", logits)(
        *(*inputs, columns, maxima.data_ptr(), scales.data_ptr()),
        *(_divergence(divergence), _matrix(out), *_execution(logits)),
    )


def divergence_sums(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    residuals: Residuals,
    divergence: Divergence,
    shard: VocabularyShard,
    maxima: Tensor,
    scales: Tensor,
) -> Tensor:
    """As of Backend. The logits of rows that are not supervised are not read."""
    inputs = _inputs(logits, teacher_logits, labels, residuals, shard)
    rows = len(logits)
    if len(residuals) != 1:
        raise ValueError(f"a divergence is taken from one residual, got {len(residuals)}")
    _check_per_token("maxima", maxima, torch.float32, (3, rows), logits.device)
    _check_per_token("scales", scales, torch.float32, (2, rows), logits.device)
    out = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    _function("divergence_sums", logits)(
        *(*inputs, maxima.data_ptr(), scales.data_ptr()),
        *(_divergence(divergence), out.data_ptr(), *_execution(logits)),
    )
    return out


def supervised(labels: Tensor, *, vocab_size: int, ignore_index: int) -> tuple[Tensor, int]:
    """As of Backend."""
    if _kernels_for(labels) != "cpu":
        return labels != ignore_index, -1
    out = torch.empty(labels.shape, dtype=torch.bool)
    wrong = extension().cpu_supervised(labels.data_ptr(), labels.numel(), vocab_size, ignore_index, out.data_ptr())
    return out, wrong


def merge(
    partials: Tensor,
    supervised: Tensor,
    *,
    request: StatisticsRequest,
    residuals: Sequence[tuple[float, float, float]],
    out: Tensor,
) -> None:
    """As of Backend."""
    ranks, rows, width = partials.shape
    if width != request.width or out.shape[0] < request.merged_rows or out.shape[1] != rows:
        raise ValueError(
            f"partials must be [T, N, {request.width}] and out [{request.merged_rows} or more, N], got "
            f"{list(partials.shape)} and {list(out.shape)}"
        )
    _check_per_token("supervised", supervised, torch.bool, (rows,), partials.device)
    _check_per_token("out", out, torch.float64, out.shape, partials.device)
    # Held by this name while the kernel reads it.
    partials = partials.contiguous()
    _function("merge", partials)(
        *(partials.data_ptr(), supervised.data_ptr(), out.data_ptr()),
        *(_is_wide(partials.dtype), ranks, rows, _layout(request), residuals),
        *_execution(partials),
    )


def weigh(
    rows: Tensor,
    supervised: Tensor,
    *,
    request: StatisticsRequest,
    loss: Tensor | None,
    label_mass: Tensor | float,
    residual_masses: Sequence[Tensor | float],
    guards: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As of Backend."""
    tokens, residuals = rows.shape[1], len(request.residuals)
    further = (0, 0) if request.divergence is None else (2, 1)
    if len(residual_masses) != residuals + further[1]:
        raise ValueError(f"expected {residuals + further[1]} masses besides the label's, got {len(residual_masses)}")
    if len(guards) > _MAX_GUARDS:
        rest = torch.stack(tuple(guards[_MAX_GUARDS - 1 :]))
        guards = [*guards[: _MAX_GUARDS - 1], torch.zeros_like(rest[0]).masked_fill_(rest.isnan().any(0), torch.nan)]
    masses = [label_mass, *residual_masses]
    device, shape = rows.device, (tokens,)
    _check_per_token("rows", rows, torch.float64, (request.evaluated_rows, tokens), device)
    _check_per_token("supervised", supervised, torch.bool, shape, device)
    if loss is not None:
        _check_per_token("loss", loss, torch.float64, shape, device)
    for guard in guards:
        _check_per_token("guards", guard, torch.float64, shape, device)
    for mass in masses:
        if isinstance(mass, Tensor):
            _check_per_token("masses", mass, torch.float64, shape, device)
    out_loss = torch.empty(tokens, dtype=dtype, device=device)
    maxima = torch.empty(1 + residuals + further[0], tokens, dtype=dtype, device=device)
    scales = torch.empty(2 + residuals + further[1], tokens, dtype=torch.float64, device=device)
    _function("weigh", rows)(
        *(rows.data_ptr(), supervised.data_ptr(), 0 if loss is None else loss.data_ptr()),
        *(out_loss.data_ptr(), maxima.data_ptr(), scales.data_ptr()),
        *(_is_wide(dtype), tokens, _layout(request)),
        [(mass.data_ptr(), 0.0) if isinstance(mass, Tensor) else (0, float(mass)) for mass in masses],
        [guard.data_ptr() for guard in guards],
        *_execution(rows),
    )
    return out_loss, maxima, scales


def chain(scales: Tensor, upstream: Tensor) -> Tensor:
    """As of Backend."""
    count, rows = scales.shape
    wide = _is_wide(upstream.dtype)
    if scales.dtype is not torch.float64 or upstream.shape != (rows,) or upstream.device != scales.device:
        raise ValueError(
            f"scales must be float64 [count, N] and upstream [N] on the same device, got {scales.dtype} "
            f"{list(scales.shape)} on {scales.device} and {list(upstream.shape)} on {upstream.device}"
        )
    if rows > 1 and scales.stride(1) != 1:
        raise ValueError(f"scales must have adjacent columns, got strides {scales.stride()}: call .contiguous()")
    out = torch.empty(count, rows, dtype=upstream.dtype, device=scales.device)
    _function("chain", scales)(
        *(scales.data_ptr(), upstream.data_ptr(), out.data_ptr()),
        *(wide, count, scales.stride(0), rows, upstream.stride(0)),
        *_execution(scales),
    )
    return out


def _is_wide(dtype: torch.dtype) -> bool:
    if dtype is torch.float32:
        return False
    if dtype is not torch.float64:
        raise ValueError(f"partials, losses and maxima are float32 or float64, got {dtype}")
    return True


def _layout(request: StatisticsRequest) -> tuple[bool, int, bool, bool, bool, bool]:
    return (
        *(request.collision, request.top_k, request.residual_entropy, request.residual_label),
        *(request.reverse_cross, request.divergence is not None),
    )


def _divergence(divergence: Divergence | None) -> tuple[int, float, float, float]:
    if divergence is None:
        return _NO_DIVERGENCE
    kind = 1 + DIVERGENCES.index(divergence.kind)
    return kind, divergence.share, divergence.of_residual, divergence.of_model


def _check_per_token(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> None:
    if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {device}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: call .contiguous()")


def _inputs(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, residuals: Residuals, shard: VocabularyShard
) -> tuple[Any, ...]:
    """The checked arguments that both kernels share, in their order."""
    if len(residuals) > MAX_RESIDUALS:
        raise ValueError(f"the native kernels take at most {MAX_RESIDUALS} residuals, got {len(residuals)}")
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape [N, V_local], got {tuple(logits.shape)}")
    if not (logits.is_cpu or logits.is_cuda):
        raise ValueError(f"logits must be on cpu or cuda, got {logits.device}")
    _check_matrix("logits", logits, logits)
    rows, columns = logits.shape
    start, valid_columns, ignore_index = shard
    if not 0 <= valid_columns <= columns:
        raise ValueError(f"valid_columns must be in 0..{columns} (the columns of logits), got {valid_columns}")
    _check_per_token("labels", labels, torch.int64, (rows,), logits.device)
    teacher = _NO_MATRIX
    if residuals and any(b != 0 for _, b in residuals):
        if teacher_logits is None:
            raise ValueError(f"residuals {residuals} read teacher_logits: expected a tensor, got None")
        _check_matrix("teacher_logits", teacher_logits, logits)
        teacher = _matrix(teacher_logits)
    return _matrix(logits), teacher, labels.data_ptr(), rows, valid_columns, start, ignore_index, residuals


def _check_matrix(name: str, matrix: Tensor, logits: Tensor) -> None:
    if matrix.dtype not in _DTYPE_CODES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {matrix.dtype}: use backend='reference'")
    if matrix is not logits:
        if matrix.device != logits.device:
            raise ValueError(f"{name} must be on {logits.device}, got {matrix.device}")
        if matrix.shape != logits.shape:
            raise ValueError(f"{name} must have shape {tuple(logits.shape)}, got {tuple(matrix.shape)}")
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(f"{name} must have adjacent columns, got column stride {matrix.stride(1)}: call .contiguous()")


def _matrix(matrix: Tensor) -> tuple[int, int, int]:
    return matrix.data_ptr(), _DTYPE_CODES[matrix.dtype], matrix.stride(0)


def _kernels_for(tensor: Tensor) -> str:
    """Which kernels take the tensors of a device: cpu or cuda."""
    return "cuda" if tensor.is_cuda else "cpu"


def _function(name: str, tensor: Tensor) -> Callable[..., None]:
    return _compiled(extension(), f"{_kernels_for(tensor)}_{name}")


@functools.cache
def _compiled(module: ModuleType, name: str) -> Callable[..., None]:
    function: Callable[..., None] | None = getattr(module, name, None)
    if function is None:
        raise ValueError("qtarget_megatron._C was built without CUDA: rebuild it where nvcc is found")
    return function


def _execution(tensor: Tensor) -> tuple[int, ...]:
    """The last arguments of a kernel: the number of threads; the device and its stream."""
    if tensor.is_cpu:
        return (torch.get_num_threads(),)
    device = tensor.device
    return device.index, torch.cuda.current_stream(device).cuda_stream
