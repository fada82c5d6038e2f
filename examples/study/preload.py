"""What a training imports, imported once: the study's processes are forked from one that has this module."""

from __future__ import annotations

import importlib
import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from qtarget_megatron.megatron.runtime import cpu_platform

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# Once for each import, of what is not installed here.
warnings.simplefilter("ignore")
cpu_platform.activate()
for _name in (
    "qtarget_megatron.finetune",
    "qtarget_megatron.huggingface.config.families",
    "qtarget_megatron.megatron.model.build",
    "qtarget_megatron.megatron.model.stacked_teacher",
    "qtarget_megatron.megatron.training.datasets",
    "qtarget_megatron.megatron.training.step",
    "qtarget_megatron.megatron.weights.hf_weights",
    "megatron.training.training",
    "megatron.training.checkpointing",
    "tensorboard",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
):
    importlib.import_module(_name)
warnings.resetwarnings()
