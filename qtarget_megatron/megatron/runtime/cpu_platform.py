"""Megatron on a machine without a GPU, over gloo, for tests, demonstrations and checking a layout before renting it.

Megatron-Core and megatron.training address CUDA throughout, all through ``torch.cuda.*`` and ``device="cuda"``. This
module answers those calls on the CPU, so that both run unmodified; beside it only ``wheel_repairs`` replaces anything
in torch or Megatron. It must be activated before the first import of megatron, never activates where CUDA is present,
and says in one line that it is on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
import types
import warnings

import torch
from torch.overrides import TorchFunctionMode

from qtarget_megatron.megatron.runtime import logs

_active = False


def is_active() -> bool:
    """True once the CPU platform answers for CUDA in this process."""
    return _active


def activate(*, requested: bool = False) -> bool:
    """Turn the CPU platform on where there is no GPU; idempotent. Returns whether it is on.

    requested: the user asked for it by flag. With CUDA present that is refused (ValueError): a run that was meant for
    the GPU must not end on the CPU, and the other way round a flag must not be ignored.
    """
    global _active
    if _active:
        return True
    if torch.cuda.is_available():
        if requested:
            raise ValueError("the CPU platform is only for machines without CUDA, and this one has it: drop --cpu")
        return False
    if "megatron.core" in sys.modules:
        raise RuntimeError("activate the CPU platform before importing megatron: it has bound torch.cuda already")
    _replace_torch_cuda()
    _CudaOnCpu().__enter__()
    _active = True
    if logs.is_first_rank():
        _tell("no CUDA device, running Megatron on the CPU over gloo")
    return True


def _tell(line: str) -> None:
    """A line of the log where such lines are shown, as in every command; otherwise Python's warning. A script must not
    go on in silence on another device than it was written for, and it is the script that can change that: a warning
    names its line, and can be ignored or made an error."""
    log = logging.getLogger("qtarget_megatron")
    if log.isEnabledFor(logging.INFO):
        log.info(line)
    else:
        warnings.warn(line, stacklevel=3)


class _CudaOnCpu(TorchFunctionMode):
    """Redirects every torch call that names a CUDA device to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Most calls are none of these, and each costs what is done before it is known.
        if not kwargs and func not in _REDIRECTED:
            return func(*args)
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers sort parameters by the name of their CUDA type.
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if func in (torch.autograd.backward, torch.Tensor.backward):
            return self._backward(*args, **kwargs)
        if func is torch.Tensor.to:
            args = (args[0], *(_CPU if _names_cuda(a) else a for a in args[1:]))
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)

    def _backward(
        self,
        tensors,
        grad_tensors=None,
        retain_graph=None,
        create_graph=False,
        inputs=None,
        *,
        gradient=None,
    ):
        """torch.autograd.backward with this mode on: torch takes a mode off while it handles a call, and Megatron's
        backward functions name CUDA devices (they run inside this call under activation recomputation).

        gradient: what Tensor.backward calls grad_tensors.
        """
        grad_tensors = gradient if grad_tensors is None else grad_tensors
        tensors, grads = (
            (value,) if value is None or isinstance(value, torch.Tensor) else tuple(value)
            for value in (tensors, grad_tensors)
        )
        grads = grads if grad_tensors is not None else (None,) * len(tensors)
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                tensors,
                tuple(
                    torch.ones_like(tensor) if grad is None and tensor.numel() == 1 else grad
                    for tensor, grad in zip(tensors, grads, strict=True)
                ),
                bool(create_graph if retain_graph is None else retain_graph),
                create_graph,
                tuple(inputs or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )


_CPU = torch.device("cpu")
# Calls that are changed whatever their keywords.
_REDIRECTED = {
    *(torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.record_stream, torch.Tensor.type, torch.Tensor.to),
    *(torch.autograd.backward, torch.Tensor.backward),
}


def _names_cuda(value) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, int) and not isinstance(value, bool)


class _Stream:
    """A stream on which everything has happened already."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        pass

    def query(self):
        return True


class _Event:
    def __init__(self, *args, **kwargs):
        self._seconds = 0.0

    def record(self, stream=None):
        self._seconds = time.perf_counter()

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1000 * (other._seconds - self._seconds)


def _memory_bytes() -> int:
    """Resident memory of this process: what a GPU run would read from the allocator."""
    import psutil

    return psutil.Process().memory_info().rss


def _peak_memory_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_stats() -> dict[str, int]:
    now, peak = _memory_bytes(), _peak_memory_bytes()
    return {
        "reserved_bytes.all.current": now,
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "allocation.all.current": 0,
    }


def _replace_torch_cuda() -> None:
    stream = _Stream()
    properties = types.SimpleNamespace(
        name="CPU",
        major=0,
        minor=0,
        multi_processor_count=os.cpu_count() or 1,
        total_memory=_physical_memory(),
    )

    def always(value):
        # A function of its own for every name: torch's compiler refuses one object under two names.
        return lambda *args, **kwargs: value

    def measured(measure):
        return lambda *args, **kwargs: measure()

    replacements = {
        "is_available": always(True),
        "is_initialized": always(True),
        "init": always(None),
        "_lazy_init": always(None),
        "_lazy_call": lambda callback, **kwargs: callback(),
        "device_count": always(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        # An int, not "cpu": torch's barrier checks the type.
        "current_device": always(0),
        "set_device": always(None),
        "synchronize": always(None),
        "empty_cache": always(None),
        "ipc_collect": always(None),
        "get_device_name": always("CPU"),
        "get_device_capability": always((0, 0)),
        "get_device_properties": always(properties),
        "memory_allocated": measured(_memory_bytes),
        "memory_reserved": measured(_memory_bytes),
        "max_memory_allocated": measured(_peak_memory_bytes),
        "max_memory_reserved": measured(_peak_memory_bytes),
        "device_memory_used": measured(_memory_bytes),
        "memory_stats": measured(_memory_stats),
        "reset_peak_memory_stats": always(None),
        "mem_get_info": lambda *args, **kwargs: (
            _physical_memory() - _memory_bytes(),
            _physical_memory(),
        ),
        "is_current_stream_capturing": always(False),
        "is_bf16_supported": always(True),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": always(None),
        "current_stream": always(stream),
        "default_stream": always(stream),
        "device": lambda device: contextlib.nullcontext(),
        "manual_seed": torch.default_generator.manual_seed,
        # torch.manual_seed calls this one after seeding the generator itself.
        "manual_seed_all": always(None),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "default_generators": (torch.default_generator,) * 64,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = replacements["get_rng_state"]
    torch.cuda.random.set_rng_state = replacements["set_rng_state"]
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, always(None))
    # Megatron's tracker would otherwise call the CUDA runtime directly.
    if hasattr(torch._C, "_cuda_setRNGState"):
        del torch._C._cuda_setRNGState
    torch.accelerator.current_accelerator = always(None)
    # One generator stands for both: each of Megatron's own changes of one changes the other.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_no_change_of_generator)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    # Compiling Megatron's fused elementwise functions costs every process seconds and gains nothing here.
    torch.compile = _compile_nothing
    torch.distributed.all_to_all_single = _with_split_lists(torch.distributed.all_to_all_single)


def _is_no_change_of_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _with_split_lists(all_to_all_single):
    """Megatron counts the tokens that go to each expert-parallel rank in tensors, which it makes numbers of where they
    lie on a GPU."""

    @functools.wraps(all_to_all_single)
    def replacement(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        sizes = (
            value.tolist() if isinstance(value, torch.Tensor) else value
            for value in (output_split_sizes, input_split_sizes)
        )
        return all_to_all_single(output, input, *sizes, **kwargs)

    return replacement


def _compile_nothing(model=None, **kwargs):
    return model if model is not None else functools.partial(_compile_nothing, **kwargs)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
