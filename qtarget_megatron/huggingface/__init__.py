"""Hugging Face checkpoints: read a rank's slices, map them to Megatron parameters, export them."""

from qtarget_megatron.huggingface.adapters.factors import Factors, InitialFactors, load_factor, merge_factor
from qtarget_megatron.huggingface.adapters.lora import (
    EXPERTS,
    TARGETS,
    Lora,
    adapted_modules,
    adapter_numbers,
    adapter_shard_numbers,
    check_targets,
    default_targets,
    projections,
)
from qtarget_megatron.huggingface.compare.agreement import Agreement, StateAgreement, TokenAgreement
from qtarget_megatron.huggingface.compare.agreement_report import report_lines
from qtarget_megatron.huggingface.compare.hidden_states import Place, recorded
from qtarget_megatron.huggingface.compare.transformers_model import load_transformers_model, transformers_logits
from qtarget_megatron.huggingface.config.architecture import Architecture
from qtarget_megatron.huggingface.config.config_file import read_config
from qtarget_megatron.huggingface.config.experts import Experts, Groups
from qtarget_megatron.huggingface.config.family import CORRECTION
from qtarget_megatron.huggingface.config.latent import LatentAttention
from qtarget_megatron.huggingface.config.multipliers import Multipliers
from qtarget_megatron.huggingface.config.rope import RopeScaling, yarn_scale
from qtarget_megatron.huggingface.generation import GeneratedAnswer, Generator, Sampling
from qtarget_megatron.huggingface.weights.parameter_map import (
    LinearLayer,
    adapter_factor,
    copy_names,
    hf_names,
    holds_all_experts,
    is_expert,
    linear_layers,
    linear_layers_of_model,
    load_parameter,
    merge_parameter,
    merge_rows,
    parameter_pieces,
    partition_dim,
    shard_numbers,
)
from qtarget_megatron.huggingface.weights.reader import HFReader, is_finite
from qtarget_megatron.huggingface.weights.tensors import (
    check_tensors,
    further_names,
    further_reader,
    hf_tensor_shapes,
    tensor_dtype,
)
from qtarget_megatron.huggingface.weights.writer import HFExport, ShardPlan, copied_files, export_bytes, plan_shards

__all__ = [
    "CORRECTION",
    "EXPERTS",
    "TARGETS",
    "Agreement",
    "Architecture",
    "Experts",
    "Factors",
    "GeneratedAnswer",
    "Generator",
    "Groups",
    "HFExport",
    "HFReader",
    "InitialFactors",
    "LatentAttention",
    "LinearLayer",
    "Lora",
    "Multipliers",
    "Place",
    "RopeScaling",
    "Sampling",
    "ShardPlan",
    "StateAgreement",
    "TokenAgreement",
    "adapted_modules",
    "adapter_factor",
    "adapter_numbers",
    "adapter_shard_numbers",
    "check_targets",
    "check_tensors",
    "default_targets",
    "copy_names",
    "further_names",
    "further_reader",
    "copied_files",
    "export_bytes",
    "hf_names",
    "hf_tensor_shapes",
    "holds_all_experts",
    "is_expert",
    "is_finite",
    "linear_layers",
    "linear_layers_of_model",
    "load_factor",
    "load_parameter",
    "load_transformers_model",
    "merge_factor",
    "merge_parameter",
    "merge_rows",
    "parameter_pieces",
    "partition_dim",
    "plan_shards",
    "projections",
    "read_config",
    "recorded",
    "report_lines",
    "shard_numbers",
    "tensor_dtype",
    "transformers_logits",
    "yarn_scale",
]
