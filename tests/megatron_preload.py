"""What every rank of a Megatron test imports, imported once: ranks are forked from the process that did (see
launching.run_ranks). Each rank would spend some twelve seconds of processor time on it."""

# ruff: noqa: F401

import argparse
import functools
import gc
import inspect

from qtarget_megatron.megatron import cpu_platform

# Before Megatron, as in every command. A process that has touched CUDA cannot be forked: there, nothing is preloaded.
if cpu_platform.activate():
    # Megatron reads its own sources for the help of its flags, twice at every start: a fifth of a small run.
    inspect.getsource = functools.cache(inspect.getsource)

    import megatron.training.training
    import tensorboard.backend.event_processing.event_accumulator
    import torch._inductor.compile_fx
    import torch.distributed.checkpoint
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, modeling_utils

    from qtarget_megatron import finetune
    from qtarget_megatron.megatron import (
        cache_teacher,
        convert,
        datasets,
        model,
        plan,
        saved_model,
        score,
        step,
        verify,
    )

    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())

    # Half a million objects that no rank lets go of: each collection would go through them, and copy their pages.
    gc.collect()
    gc.freeze()
