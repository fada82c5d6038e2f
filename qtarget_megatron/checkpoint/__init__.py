"""Hugging Face checkpoints: read a rank's slices, map them to Megatron parameters, export them."""

from qtarget_megatron.checkpoint.agreement import Agreement, StateAgreement, TokenAgreement
from qtarget_megatron.checkpoint.agreement_report import report_lines
from qtarget_megatron.checkpoint.architecture import Architecture
from qtarget_megatron.checkpoint.config_file import read_config
from qtarget_megatron.checkpoint.experts import Experts, Groups
from qtarget_megatron.checkpoint.family import CORRECTION
from qtarget_megatron.checkpoint.hf_reader import HFReader, is_finite
from qtarget_megatron.checkpoint.hf_tensors import check_tensors, hf_tensor_shapes, tensor_dtype
from qtarget_megatron.checkpoint.hf_writer import (
    HFExport,
    ShardPlan,
    copied_files,
    export_bytes,
    plan_shards,
)
from qtarget_megatron.checkpoint.hidden_states import Place, recorded
from qtarget_megatron.checkpoint.latent import LatentAttention
from qtarget_megatron.checkpoint.layout import (
    hf_names,
    is_expert,
    load_parameter,
    merge_parameter,
    merge_rows,
    parameter_pieces,
    partition_dim,
    shard_numbers,
)
from qtarget_megatron.checkpoint.rope import RopeScaling, yarn_scale
from qtarget_megatron.checkpoint.transformers_model import transformers_logits

__all__ = [
    "CORRECTION",
    "Agreement",
    "Architecture",
    "Experts",
    "Groups",
    "HFExport",
    "HFReader",
    "LatentAttention",
    "Place",
    "RopeScaling",
    "ShardPlan",
    "StateAgreement",
    "TokenAgreement",
    "check_tensors",
    "copied_files",
    "export_bytes",
    "hf_names",
    "hf_tensor_shapes",
    "is_expert",
    "is_finite",
    "load_parameter",
    "merge_parameter",
    "merge_rows",
    "parameter_pieces",
    "partition_dim",
    "plan_shards",
    "read_config",
    "recorded",
    "report_lines",
    "shard_numbers",
    "tensor_dtype",
    "transformers_logits",
    "yarn_scale",
]
