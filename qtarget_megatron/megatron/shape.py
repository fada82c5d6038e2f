"""The shape of a model in Megatron's terms: flags and arguments that follow from a Hugging Face config.json."""

from __future__ import annotations

import argparse
import math

from qtarget_megatron.checkpoint import Architecture

# Megatron's arguments for what not every model has, with the values that mean it has not.
_ABSENT = {
    "window_size": None,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_layer_freq": 1,
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
        "--kv-channels": arch.head_dim,
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
    flags += ["--swiglu", "--group-query-attention"]
    if linear_biases != {True}:
        flags.append("--disable-bias-linear")
        flags += ["--add-qkv-bias"] if arch.qkv_bias else []
    flags += ["--qk-layernorm"] if arch.qk_norm else []
    flags += [] if arch.tied else ["--untie-embeddings-and-output-weights"]
    return flags + _flags_of(layer_arguments(arch))


def layer_arguments(arch: Architecture) -> dict[str, object]:
    """Megatron's arguments for windows, layers without rotary embedding and experts, by their name in args; Megatron's
    own values for a model without them.

    Raises ValueError where Megatron cannot express them.
    """
    found = dict(_ABSENT)
    if arch.window_layers:
        # Tokens before and behind the one that attends.
        found["window_size"] = (arch.sliding_window - 1, 0)
        found["window_attn_skip_freq"] = _pattern(arch.window_layers)
    if arch.unrotated_layers:
        found["no_rope_freq"] = _pattern(arch.unrotated_layers)
        if arch.softmax_scale() is not None:
            raise ValueError(
                "Megatron scales the scores of all layers alike, but config.json has layers without rotary embedding, "
                "to which yarn's attention factor does not apply: set attention_factor to 1 if that is meant"
            )
    return found | _expert_arguments(arch)


def _expert_arguments(arch: Architecture) -> dict[str, object]:
    experts = arch.experts
    if experts is None:
        return {}
    if experts.per_token == 1 and experts.normalized:
        raise ValueError(
            "Megatron's router cannot give a weight of 1 to the only expert of a token, which config.json asks for "
            "(one expert per token, normalised)"
        )
    return {
        "num_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # Normalising the chosen of all softmax weights is a softmax over the chosen logits.
        "moe_router_pre_softmax": not experts.normalized,
        # Megatron's checkpoints name layers one by one where this is a list.
        "moe_layer_freq": 1 if all(experts.layers) else _pattern(experts.layers),
    }


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
    args.softmax_scale = arch.softmax_scale()
    if arch.window_layers and args.transformer_impl == "local":
        # Megatron's fused softmax knows no window.
        args.masked_softmax_fusion = False


def record_architecture(args: argparse.Namespace, arch: Architecture) -> None:
    """Set the arguments that no flag can carry exactly; they are saved with Megatron's checkpoints."""
    args.padded_vocab_size = padded_vocab_size(arch.vocab_size, args)
    describe_layers(args, arch)
    # The model gets its frequencies directly; plain Megatron reads the base under --use-checkpoint-args.
    args.rotary_base = int(arch.rope_base) if float(arch.rope_base).is_integer() else arch.rope_base
