"""The shape of a model in Megatron's terms: flags and arguments that follow from a Hugging Face config.json."""

from __future__ import annotations

import argparse
import importlib.util
import math

from qtarget_megatron.huggingface import Architecture, yarn_scale

# Megatron's arguments for what not every model has, with the values that mean it has not.
_ABSENT = {
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_mup": False,
    "mup_embedding_mult": 1.0,
    "mup_output_mult": 1.0,
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": None,
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}


def megatron_flags(arch: Architecture) -> list[str]:
    """Megatron command-line flags that describe this architecture.

    Raises ValueError where Megatron's GPT model cannot express it.
    """
    linear_biases = {arch.qkv_bias, arch.output_bias, arch.mlp_bias}
    if arch.output_bias != arch.mlp_bias or (arch.mlp_bias and not arch.qkv_bias):
        raise ValueError(
            f"Megatron has biases on all linear layers, on query/key/value only, or on none; config.json asks for "
            f"query/key/value={arch.qkv_bias}, attention output={arch.output_bias}, MLP={arch.mlp_bias}"
        )
    values = {
        "--num-layers": arch.num_layers,
        "--hidden-size": arch.hidden_size,
        "--ffn-hidden-size": arch.ffn_hidden_size,
        "--num-attention-heads": arch.num_attention_heads,
        "--num-query-groups": arch.num_query_groups,
        "--kv-channels": value_channels(arch),
        "--max-position-embeddings": arch.max_position_embeddings,
        "--norm-epsilon": arch.norm_epsilon,
        "--vocab-size": arch.vocab_size,
        "--position-embedding-type": "rope",
        "--normalization": "RMSNorm",
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--tokenizer-type": "NullTokenizer",
    }
    flags = [str(word) for pair in values.items() for word in pair]
    flags += ["--swiglu"] if has_swiglu(arch) else ["--quick-geglu"]
    flags += [] if arch.latent else ["--group-query-attention"]
    if linear_biases != {True}:
        flags.append("--disable-bias-linear")
        flags += ["--add-qkv-bias"] if arch.qkv_bias else []
    flags += ["--qk-layernorm"] if has_qk_norm(arch) else []
    flags += [] if arch.tied else ["--untie-embeddings-and-output-weights"]
    if arch.experts is not None and arch.experts.float32_router:
        flags += ["--moe-router-dtype", "fp32"]
    if arch.experts is not None and arch.experts.has_correction:
        # Fine-tuning leaves the balance of the experts as it is.
        flags += ["--moe-router-bias-update-rate", "0"]
    return flags + _flags_of(layer_arguments(arch))


def layer_arguments(arch: Architecture) -> dict[str, object]:
    """Megatron's arguments for windows, rotary embeddings of a part, and experts, by their name in args; Megatron's own
    values for a model without them.

    Raises ValueError where Megatron cannot express them.
    """
    found: dict[str, object] = _ABSENT | {"softmax_type": "learnable" if arch.sinks else "vanilla"}
    found |= {"rotary_percent": arch.partial_rotary_factor, "rotary_interleaved": arch.rotary_interleaved}
    if arch.window_layers:
        # Tokens before and behind the one that attends.
        found["window_size"] = (arch.sliding_window - 1, 0)
        found["window_attn_skip_freq"] = _pattern(arch.window_layers)
    if arch.unrotated_layers:
        found["no_rope_freq"] = _pattern(arch.unrotated_layers)
    return found | _multiplier_arguments(arch) | _expert_arguments(arch) | _latent_arguments(arch)


def _multiplier_arguments(arch: Architecture) -> dict[str, object]:
    """MuP's multipliers at the width that MuP's rules for initialisation and learning rates start from: they change
    nothing there. softmax_scale() and ResidualAdd have the others."""
    given = arch.multipliers
    if given is None or given.embedding == given.logits == 1:
        return {}
    return {"use_mup": True, "mup_embedding_mult": given.embedding, "mup_output_mult": given.logits}


def value_channels(arch: Architecture) -> int:
    """What Megatron's local attention takes a head's output to be wide."""
    return arch.head_dim if arch.latent is None else arch.latent.value_dim


def has_swiglu(arch: Architecture) -> bool:
    """MLPs gated by SiLU, not by a clamped function."""
    return arch.experts is None or arch.experts.clamp is None


def has_qk_norm(arch: Architecture) -> bool:
    """Norms of queries and keys, or of the latents they are made from."""
    return arch.qk_norm or arch.latent is not None


def _expert_arguments(arch: Architecture) -> dict[str, object]:
    experts = arch.experts
    if experts is None:
        return {}
    by_sigmoid, groups = experts.score == "sigmoid", experts.groups
    if experts.per_token == 1 and experts.normalized:
        raise ValueError(
            "Megatron's router cannot give a weight of 1 to the only expert of a token, which config.json asks for "
            "(one expert per token, normalised)"
        )
    if by_sigmoid and experts.per_token > 1 and not experts.normalized:
        raise ValueError("Megatron's router normalises sigmoid scores, but config.json says norm_topk_prob false")
    if groups is not None and experts.per_token // groups.top != 2:
        raise ValueError(
            f"Megatron's router ranks groups of experts by their {experts.per_token // groups.top} best scores "
            f"(experts per token / groups per token), but this family by the best 2"
        )
    return {
        "num_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # Normalising the chosen of all softmax weights is a softmax over the chosen logits.
        "moe_router_pre_softmax": not experts.normalized and not by_sigmoid,
        # Megatron's checkpoints name layers one by one where this is a list.
        "moe_layer_freq": 1 if all(experts.layers) else _pattern(experts.layers),
        "moe_router_score_function": experts.score,
        "moe_router_topk_scaling_factor": None if experts.scaling == 1 else experts.scaling,
        "moe_router_enable_expert_bias": experts.has_correction,
        "moe_router_num_groups": None if groups is None else groups.count,
        "moe_router_group_topk": None if groups is None else groups.top,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_weight,
        "glu_linear_offset": 0.0 if experts.clamp is None else 1.0,
        "activation_func_clamp_value": experts.clamp,
    }


def _latent_arguments(arch: Architecture) -> dict[str, object]:
    latent, scaling = arch.latent, arch.rope_scaling
    if latent is None:
        return {}
    found: dict[str, object] = {
        "multi_latent_attention": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope" if scaling is None else "yarn",
    }
    if scaling is None:
        return found
    if scaling.type != "yarn" or not scaling.truncate:
        raise ValueError("Megatron's latent attention knows the default rotary embedding and yarn with truncate only")
    # The attention factor is a quotient of two scales, the second of which scales the scores as well.
    scales = (scaling.scale, scaling.score_scale) if scaling.scale and scaling.score_scale else (1.0, 0.0)
    quotient = yarn_scale(scaling.factor, scales[0]) / yarn_scale(scaling.factor, scales[1])
    if scales[1] != scaling.score_scale or quotient != scaling.attention_factor:
        raise ValueError(
            "Megatron's latent attention takes yarn's attention factor from mscale and mscale_all_dim together, but "
            "config.json gives mscale_all_dim alone or an attention_factor"
        )
    return found | {"rotary_scaling_factor": scaling.factor, "mscale": scales[0], "mscale_all_dim": scales[1]}


def layer_flags() -> set[str]:
    """The flags of layer_arguments."""
    return set(map(_flag, _ABSENT))


def _pattern(layers: tuple[bool, ...]) -> list[int]:
    return [int(layer) for layer in layers]


def _flags_of(arguments: dict[str, object]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        if value != _ABSENT[name]:
            flags += [_flag(name)] if value is True else [_flag(name), str(value).replace(" ", "")]
    return flags


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def padded_vocab_size(vocab_size: int, args: argparse.Namespace) -> int:
    """Rows of the embedding matrix: vocab_size rounded up to make-vocab-size-divisible-by * tensor-parallel size."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def describe_layers(args: argparse.Namespace, arch: Architecture) -> None:
    """Set layer_arguments, and what has no flag."""
    vars(args).update(layer_arguments(arch))
    args.swiglu, args.quick_geglu = has_swiglu(arch), not has_swiglu(arch)
    if args.quick_geglu:
        # Megatron's fused one clamps before it adds the bias.
        args.bias_gelu_fusion = False
    if arch.mlp_bias and arch.experts is not None:
        # Transformer Engine's grouped experts refuse it.
        args.bias_dropout_fusion = False
    args.group_query_attention = arch.latent is None
    args.softmax_scale = arch.softmax_scale()
    if arch.rotary_scale() != 1:
        # Megatron's fused rotary embedding of packed rows ignores it.
        args.apply_rope_fusion = False
    if arch.rotary_scale() != 1 or arch.rotary_interleaved or arch.partial_rotary_factor != 1:
        # That of queries, keys and values at once is told of none of these.
        args.fused_single_qkv_rope = False
    if arch.latent is not None:
        args.rotary_base, scaling = arch.rope_base, arch.rope_scaling
        # Megatron's fused rotary embedding of latent attention is yarn's.
        args.apply_rope_fusion = args.apply_rope_fusion and scaling is not None
        if scaling is not None:
            args.original_max_position_embeddings = scaling.original_max_position_embeddings
            args.beta_fast, args.beta_slow = scaling.beta_fast, scaling.beta_slow
    if arch.window_layers and args.transformer_impl == "local":
        # Megatron's fused softmax knows no window.
        args.masked_softmax_fusion = False


def record_architecture(args: argparse.Namespace, arch: Architecture) -> None:
    """Set the arguments that no flag can carry exactly; they are saved with Megatron's checkpoints."""
    args.padded_vocab_size = padded_vocab_size(arch.vocab_size, args)
    describe_layers(args, arch)
    # The model gets its frequencies directly; plain Megatron reads the base under --use-checkpoint-args.
    args.rotary_base = int(arch.rope_base) if float(arch.rope_base).is_integer() else arch.rope_base


def implementation_flags(*, on_cpu: bool, elsewhere: bool = False) -> list[str]:
    """Megatron flags that keep it to components this machine has; the user's own flags come later and win.

    elsewhere: those of a machine that has all of them, unless it runs on the CPU.

    Without Transformer Engine: Megatron's local layers. Megatron's fused kernels are extension modules of Apex's, which
    Transformer Engine does not bring and Apex may be built without: each flag goes by the modules that it needs.
    """

    def has(*modules: str) -> bool:
        return not on_cpu and (elsewhere or all(importlib.util.find_spec(name) is not None for name in modules))

    # 0 stands for the whole of --sft-valid; Megatron's own default is 100 batches.
    flags = ["--no-one-logger", "--eval-iters", "0"]
    if on_cpu:
        flags += ["--distributed-backend", "gloo", "--num-workers", "0"]
    if has("transformer_engine"):
        # Its layers ask for a state of their own, which a checkpoint of local layers does not hold.
        flags += ["--dist-ckpt-strictness", "log_unexpected"]
    else:
        flags += ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
    if not has("fused_weight_gradient_mlp_cuda"):
        # Megatron's output layer refuses to be built, whoever's the other layers are.
        flags.append("--no-gradient-accumulation-fusion")
    if not has("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda", "scaled_softmax_cuda"):
        flags.append("--no-masked-softmax-fusion")
    return flags


def check_flags(argv: list[str], arch_flags: list[str]) -> None:
    """Refuse flags that contradict the model's config.json or this package's way of counting tokens (ValueError)."""
    fixed = {word for word in arch_flags if word.startswith("--")} - {
        "--attention-dropout",
        "--hidden-dropout",
        "--moe-router-dtype",
        "--moe-router-bias-update-rate",
    }
    # No Hugging Face model has another width to scale learning rates by.
    fixed |= layer_flags() | {"--swiglu", "--quick-geglu", "--mup-base-hidden-size"}
    # --model-class takes them from config.json as well.
    fixed |= {"--hybrid-layer-pattern", "--hybrid-override-pattern", "--mtp-hybrid-override-pattern"}
    given = sorted(fixed.intersection(word.partition("=")[0] for word in argv))
    if given:
        raise ValueError(f"{', '.join(given)} follow(s) from the model's config.json and cannot be given: drop it")
    for flag, instead in (
        ("--sft", "--sft-train"),
        ("--data-path", "--sft-train"),
        ("--mock-data", "--sft-train"),
    ):
        if flag in argv:
            raise ValueError(f"{flag} is Megatron's own data path, this program reads {instead}: drop {flag}")
