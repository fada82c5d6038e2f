"""Megatron's models for a Hugging Face architecture, student and frozen teacher, with weights from safetensors."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.arguments import core_transformer_config_from_args

from qtarget_megatron.huggingface import Architecture, Factors, HFReader, Lora
from qtarget_megatron.megatron.model.attention import LocalAttention
from qtarget_megatron.megatron.model.experts import ExpertOutput
from qtarget_megatron.megatron.model.hybrid import hybrid_config, layer_pattern, stack_spec
from qtarget_megatron.megatron.model.lora import add_adapters
from qtarget_megatron.megatron.model.multi_token_prediction import mtp_block_spec
from qtarget_megatron.megatron.model.norm import RMSNorm
from qtarget_megatron.megatron.model.residual import ResidualAdd
from qtarget_megatron.megatron.model.router import Router
from qtarget_megatron.megatron.model.stacked_teacher import StackedGPTModel, StackedHybridModel
from qtarget_megatron.megatron.model.stages import even_stages
from qtarget_megatron.megatron.model.teacher_cost import TeacherCost
from qtarget_megatron.megatron.runtime.architecture_flags import (
    describe_layers,
    has_qk_norm,
    padded_vocab_size,
    value_channels,
)
from qtarget_megatron.megatron.runtime.model_class import HYBRID
from qtarget_megatron.megatron.weights.adapters import load_adapters
from qtarget_megatron.megatron.weights.hf_weights import check_complete, load_hf_weights
from qtarget_megatron.megatron.weights.saved_model import SavedModel

# Names in checkpoints of Transformer Engine's layers, whose norms are parts of the linear layer behind them.
_LATENT_NAMES = {
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def layer_spec(
    config: TransformerConfig,
    args: argparse.Namespace,
    arch: Architecture,
    vp_stage: int | None,
    pp_rank: int,
    *,
    has_adapters: bool = False,
):
    """This stage's layers: Transformer Engine's where --transformer-impl asks for them, Megatron's local ones
    otherwise.

    has_adapters: norms are apart from the linear layers behind them, whose input an adapter needs.
    """
    is_local = _is_local(args)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=not is_local,
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    layers = [_with_residual_add(_with_router(spec, is_local), config, arch) for spec in block.layer_specs]
    if not is_local:
        if has_adapters:
            layers = [_with_norms_apart(spec) for spec in layers]
        return dataclasses.replace(block, layer_specs=layers)
    layers = [_local_layer(spec, config) for spec in layers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _with_norms_apart(spec: ModuleSpec) -> ModuleSpec:
    """Transformer Engine's layer, no norm of which is a part of a linear layer."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
    )

    def apart(submodules: Any, norms: dict[str, str]) -> tuple[Any, dict[str, type]]:
        fused = [name for name in norms if getattr(submodules, name, None) is TELayerNormColumnParallelLinear]
        found = dataclasses.replace(submodules, **dict.fromkeys(fused, TEColumnParallelLinear))
        return found, {norms[name]: TENorm for name in fused}

    layer, attention = spec.submodules, spec.submodules.self_attention
    latents = {"linear_q_up_proj": "q_layernorm", "linear_kv_up_proj": "kv_layernorm"}
    inner, norms = apart(attention.submodules, latents)
    inner, outer = apart(dataclasses.replace(inner, **norms), {"linear_qkv": "input_layernorm"})
    mlp = layer.mlp
    if not _has_experts(spec):
        linears, of_mlp = apart(mlp.keywords["submodules"], {"linear_fc1": "pre_mlp_layernorm"})
        mlp, outer = functools.partial(mlp, submodules=linears), outer | of_mlp
    attention = dataclasses.replace(attention, submodules=inner)
    layer = dataclasses.replace(layer, self_attention=attention, mlp=mlp, **outer)
    return dataclasses.replace(spec, submodules=layer)


def _is_local(args: argparse.Namespace) -> bool:
    return args.transformer_impl != "transformer_engine"


def _with_router(spec: ModuleSpec, is_local: bool) -> ModuleSpec:
    """Megatron's layer with our router, where it has one, and experts that can have biases."""
    layer = spec.submodules
    if not _has_experts(spec):
        return spec
    experts = dataclasses.replace(layer.mlp.keywords["submodules"], router=Router)
    if is_local:
        linears = dataclasses.replace(experts.experts.keywords["submodules"], linear_fc2=ExpertOutput)
        experts = dataclasses.replace(experts, experts=functools.partial(experts.experts, submodules=linears))
    layer = dataclasses.replace(layer, mlp=functools.partial(layer.mlp, submodules=experts))
    return dataclasses.replace(spec, submodules=layer)


def _with_residual_add(spec: ModuleSpec, config: TransformerConfig, arch: Architecture) -> ModuleSpec:
    """Megatron's layer with our addition to the hidden states, where they are not added as they are."""
    multiplier = 1.0 if arch.multipliers is None else arch.multipliers.residual
    if multiplier == 1 and not arch.output_norms:
        return spec
    add = ModuleSpec(ResidualAdd, params=dict(config=config, multiplier=multiplier, has_norm=arch.output_norms))
    layer = dataclasses.replace(spec.submodules, self_attn_bda=add, mlp_bda=add)
    return dataclasses.replace(spec, submodules=layer)


def _has_experts(spec: ModuleSpec) -> bool:
    return getattr(spec.submodules.mlp, "func", None) is MoELayer


def _local_layer(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Megatron's local layer with norms that know sequence parallelism, and attention without a matrix of scores."""
    layer, attention = spec.submodules, spec.submodules.self_attention
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    parts, names = {"q_layernorm": qk_norm, "k_layernorm": qk_norm}, layer.sharded_state_dict_keys_map
    if config.multi_latent_attention:
        names = _LATENT_NAMES
        parts = {"q_layernorm": RMSNorm, "kv_layernorm": RMSNorm}
    parts["core_attention"] = LocalAttention
    attention = dataclasses.replace(attention, submodules=dataclasses.replace(attention.submodules, **parts))
    if _has_experts(spec):
        # Its name in checkpoints of Transformer Engine's layers, where no linear layer follows it.
        names = {key: value for key, value in names.items() if key != "pre_mlp_layernorm."}
    layer = dataclasses.replace(
        layer,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=attention,
        sharded_state_dict_keys_map=names,
    )
    return dataclasses.replace(spec, submodules=layer)


def transformer_config(args: argparse.Namespace, arch: Architecture, *, own_stages: bool = False) -> TransformerConfig:
    """Megatron's transformer config for this architecture at the layout, precision and recomputation of args.

    own_stages: share the layers evenly over the pipeline stages, whatever args say of those of the first model, and
    leave out the first model's heads of multi-token prediction.
    """
    args = copy.copy(args)
    if own_stages:
        args.mtp_num_layers = None
    if own_stages and args.pipeline_model_parallel_size > 1:
        args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
        args.account_for_embedding_in_pipeline_split = args.account_for_loss_in_pipeline_split = False
        stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
        args.pipeline_model_parallel_layout = even_stages(arch.num_layers, stages)
    args.num_layers = arch.num_layers
    args.hidden_size = arch.hidden_size
    args.ffn_hidden_size = arch.ffn_hidden_size
    args.num_attention_heads = arch.num_attention_heads
    args.num_query_groups = arch.num_query_groups
    args.kv_channels = value_channels(arch)
    args.layernorm_epsilon = arch.norm_epsilon
    args.add_bias_linear = arch.mlp_bias
    args.add_qkv_bias = arch.qkv_bias
    args.qk_layernorm = has_qk_norm(arch)
    describe_layers(args, arch)
    if arch.experts is None:
        # A second model without experts, beside one whose experts are spread.
        args.expert_model_parallel_size = 1
    return core_transformer_config_from_args(args)


def build_model(
    args: argparse.Namespace,
    arch: Architecture,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    pg_collection: ProcessGroupCollection,
    config: TransformerConfig | None = None,
    teacher: LanguageModule | None = None,
    teaches_itself: bool = False,
    teacher_cost: TeacherCost | None = None,
    vocab_size: int | None = None,
    lora: Lora | None = None,
) -> LanguageModule:
    """One pipeline stage of the model, with Megatron's random initial weights.

    config:         default transformer_config(args, arch).
    teaches_itself: the second model is this one without its adapters.
    vocab_size:     of the embedding before padding, where it is not the architecture's.
    lora:           adapters to put into the model, which is frozen then; their factors are 0.
    """
    config, pp_rank = config or transformer_config(args, arch), pg_collection.pp.rank()
    if arch.rotary_scale() != 1:
        # Attention multiplies cosine and sine by 1 + mscale / 10 ln(factor) of these, whatever the frequencies are.
        config.yarn_rotary_scaling_factor, config.yarn_mscale_all_dim = math.e, 0.0
        config.yarn_mscale = 10 * (arch.rotary_scale() - 1)
    block = layer_spec(config, args, arch, vp_stage, pp_rank, has_adapters=lora is not None)
    norm = RMSNorm if _is_local(args) else None
    is_hybrid = args.model_class == HYBRID
    layers: dict[str, Any]
    if is_hybrid:
        layers = dict(
            config=hybrid_config(config),
            hybrid_stack_spec=stack_spec(block.layer_specs, [_has_experts(spec) for spec in block.layer_specs], norm),
            hybrid_layer_pattern=layer_pattern(config, arch),
        )
    else:
        layers = dict(
            config=config,
            transformer_layer_spec=block,
            mtp_block_spec=mtp_block_spec(config, block, norm, vp_stage, pp_rank),
        )
    model = (StackedHybridModel if is_hybrid else StackedGPTModel)(
        **layers,
        vocab_size=padded_vocab_size(vocab_size or arch.vocab_size, args),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_percent=arch.partial_rotary_factor,
        rotary_base=arch.rope_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
        teacher=teacher,
        teaches_itself=teaches_itself,
        teacher_cost=teacher_cost,
    )
    _mark_parameters(model)
    if lora is not None:
        model.adapters = add_adapters(model, arch, lora)
    if is_hybrid:
        # The statistics of experts count a GPTModel's layers, as args do.
        for router in model.routers:
            if not router.is_mtp_layer:
                router.config = copy.copy(router.config)
                router.config.num_layers, router.layer_number = config.num_layers, router.layer_number // 2
    # Megatron hard-wires three of the four parameters of the llama-3 scaling, and its base is an integer.
    if arch.latent is None:
        # HybridModel does not pass it on.
        model.rotary_pos_emb.rotary_interleaved = arch.rotary_interleaved
        rotary = [model.rotary_pos_emb]
    else:
        # Each layer has its own; yarn's is computed in the forward, by the same formula.
        attending = [
            *(layer for layer in model.decoder.layers if not isinstance(layer.self_attention, IdentityOp)),
            *(head.mtp_model_layer for head in (model.mtp.layers if model.mtp_process else ())),
        ]
        rotary = [layer.self_attention.rotary_pos_emb for layer in attending if arch.rope_scaling is None]
    for embedding in rotary:
        embedding.inv_freq = arch.inverse_frequencies().to(embedding.inv_freq.device)
    return model


def _mark_parameters(model: LanguageModule) -> None:
    """Set the attributes that Megatron adds up gradients by, and takes their norm by, where it does not."""
    for name, parameter in model.named_parameters():
        if name.endswith(".core_attention.softmax_offset"):
            # Each tensor-parallel rank has those of its own heads.
            parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1
        elif ".mlp.experts." in name and hasattr(parameter, "sequence_parallel"):
            # Biases: their gradients are added up over the ranks that have the same expert, not over shards of a
            # sequence.
            parameter.sequence_parallel = False


def build_teacher(args: argparse.Namespace, arch: Architecture, *, student_vocab_size: int, **stage) -> LanguageModule:
    """One pipeline stage of the frozen second model: no gradients, evaluation mode, training dtype.

    Its vocabulary is cut, or filled up, to the student's, so that a column means the same token id at every rank. Its
    layers are shared evenly over the stages: it need not have as many as the student, nor a multiple of the stages.
    """
    config = transformer_config(args, arch, own_stages=True)
    teacher = build_model(args, arch, config=config, vocab_size=student_vocab_size, **stage)
    teacher.requires_grad_(False)
    teacher.eval()
    # The student gets its dtype from Megatron's Float16Module; the teacher is outside of it.
    return teacher.to(args.params_dtype)


def build_old_policy(args: argparse.Namespace, arch: Architecture, lora: Lora | None, **stage) -> LanguageModule:
    """One pipeline stage of the trained model as it will be, without its heads of multi-token prediction: frozen."""
    args = copy.copy(args)
    args.mtp_num_layers = None
    model = build_model(args, arch, lora=lora, **stage)
    model.requires_grad_(False)
    model.eval()
    return model.to(args.params_dtype)


class ModelProvider:
    """Megatron's model_provider: builds each model chunk of this rank, with weights and the teacher's stage.

    built: the student's chunks so far, in order.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        student: Architecture,
        teacher: Architecture | None,
        *,
        load_weights: bool,
        teacher_weights: SavedModel | None = None,
        teacher_cost: TeacherCost | None = None,
        lora: Lora | None = None,
        factors: Factors | None = None,
        teaches_itself: bool = False,
        keeps_old_policy: bool = False,
        finish: Callable[[LanguageModule], object] = lambda model: None,
        check: Callable[[list[LanguageModule]], object] = lambda models: None,
    ):
        """
        load_weights:    the student's from args.hf_model.
        lora:            adapters of the student.
        factors:         what they begin with, default 0.
        teaches_itself:  the student without them is the second model.
        keeps_old_policy: the student of an earlier step is the second model, whose weights nobody has given it yet.
        teacher_weights: default those of args.teacher_hf.
        teacher_cost:    measures the teacher's forwards.
        finish:          what is done with each chunk in the end.
        check:           called with all chunks once they are there, on every rank.
        """
        self._args, self._student, self._teacher = args, student, teacher
        self._load_weights, self._teacher_weights, self._teacher_cost = load_weights, teacher_weights, teacher_cost
        self._lora, self._factors, self._teaches_itself = lora, factors, teaches_itself
        self._keeps_old_policy = keeps_old_policy
        self._finish, self._check = finish, check
        self.built: list[LanguageModule] = []

    def __call__(self, pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
        args, student = self._args, self._student
        stage = dict(
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
        )
        teacher = None
        if self._teacher is not None:
            teacher = build_teacher(args, self._teacher, student_vocab_size=student.vocab_size, **stage)
            if self._teacher_weights is None:
                load_hf_weights(teacher, HFReader(args.teacher_hf), self._teacher)
        elif self._keeps_old_policy:
            teacher = build_old_policy(args, student, self._lora, **stage)
        model = build_model(
            args,
            student,
            config=config,
            teacher=teacher,
            teaches_itself=self._teaches_itself,
            teacher_cost=self._teacher_cost,
            lora=self._lora,
            **stage,
        )
        if self._load_weights:
            load_hf_weights(model, HFReader(args.hf_model), student)
        if self._factors is not None:
            load_adapters(model, student, self._lora, self._factors)
        if self._keeps_old_policy:
            model.keeps_teacher, model.teacher_is_known = True, False
        self.built.append(model)
        if len(self.built) == (args.virtual_pipeline_model_parallel_size or 1):
            self._complete()
        self._finish(model)
        return model

    def _complete(self) -> None:
        """All chunks are there: only now can be seen that no layer was left out."""
        check_complete(self.built, self._student)
        self._check(self.built)
        if self._teacher is None:
            return
        teachers = [chunk.teacher for chunk in self.built]
        check_complete(teachers, self._teacher)
        if self._teacher_weights is not None:
            self._teacher_weights.check_fits(teachers, self._teacher, f"the model in {self._args.teacher_hf}")
            self._teacher_weights.load_into(teachers, self._args, self._teacher)
