"""Hugging Face checkpoints: read a rank's slices, map them to Megatron parameters, export them."""

from qtarget_megatron.checkpoint.architecture import Architecture
from qtarget_megatron.checkpoint.experts import Experts, Groups
from qtarget_megatron.checkpoint.family import CORRECTION
from qtarget_megatron.checkpoint.hf_reader import HFReader
from qtarget_megatron.checkpoint.hf_tensors import check_tensors, hf_tensor_shapes, tensor_dtype
from qtarget_megatron.checkpoint.hf_writer import HFExport, check_output_directory, plan_shards
from qtarget_megatron.checkpoint.latent import LatentAttention
from qtarget_megatron.checkpoint.layout import (
    hf_names,
    is_expert,
    load_parameter,
    merge_parameter,
    partition_dim,
)
from qtarget_megatron.checkpoint.rope import RopeScaling, yarn_scale
from qtarget_megatron.checkpoint.transformers_model import transformers_logits

__all__ = [
    "CORRECTION",
    "Architecture",
    "Experts",
    "Groups",
    "HFExport",
    "HFReader",
    "LatentAttention",
    "RopeScaling",
    "check_output_directory",
    "check_tensors",
    "hf_names",
    "hf_tensor_shapes",
    "is_expert",
    "load_parameter",
    "merge_parameter",
    "partition_dim",
    "plan_shards",
    "tensor_dtype",
    "transformers_logits",
    "yarn_scale",
]
