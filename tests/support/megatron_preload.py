"""What every rank of a Megatron test imports, imported once: ranks are forked from the process that did (see
launching.run_ranks). Each rank would spend some twelve seconds of processor time on it."""

# ruff: noqa: F401

import argparse
import functools
import gc

from qtarget_megatron.megatron.runtime import cpu_platform

# Before Megatron, as in every command. A process that has touched CUDA cannot be forked: there, nothing is preloaded.
if cpu_platform.activate():
    import megatron.training.training
    import tensorboard.backend.event_processing.event_accumulator
    import torch._inductor.compile_fx
    import torch.distributed.checkpoint
    import torch.utils.tensorboard
    from megatron.training.argument_utils import ArgumentGroupFactory
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, modeling_utils

    from qtarget_megatron import finetune
    from qtarget_megatron.megatron.jobs import cache_teacher, convert, score
    from qtarget_megatron.megatron.model import build
    from qtarget_megatron.megatron.planning import plan
    from qtarget_megatron.megatron.training import datasets, step
    from qtarget_megatron.megatron.verify import layout
    from qtarget_megatron.megatron.weights import saved_model

    # Megatron parses its own sources for the help of its flags, twice at every start, and writes a text of each of 850
    # arguments into TensorBoard's file: a quarter of a small run.
    read = functools.partial(ArgumentGroupFactory._get_field_docstrings, ArgumentGroupFactory)
    ArgumentGroupFactory._get_field_docstrings = staticmethod(functools.cache(read))
    megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser())
    torch.utils.tensorboard.SummaryWriter.add_text = lambda *text, **keywords: None

    # Half a million objects that no rank lets go of: each collection would go through them, and copy their pages.
    gc.collect()
    gc.freeze()
