"""What Megatron is told of a model, and what it cannot be told."""

import argparse
import json
import math

import pytest

from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.runtime.architecture_flags import (
    check_flags,
    describe_layers,
    layer_arguments,
    megatron_flags,
)

SIZES = dict(
    vocab_size=7,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
)
QWEN2 = dict(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=9, max_window_layers=2)
SMOLLM3 = dict(architectures=["SmolLM3ForCausalLM"], no_rope_layer_interval=2)
QWEN3_MOE = dict(architectures=["Qwen3MoeForCausalLM"], num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
DEEPSEEK = dict(architectures=["DeepseekV3ForCausalLM"], first_k_dense_replace=1, n_routed_experts=16, n_group=4)
DEEPSEEK |= dict(topk_group=2, num_experts_per_tok=4, moe_intermediate_size=24)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def architecture(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | config))
    return Architecture.from_hf(tmp_path)


def told(arch):
    """The flags by name, and their values."""
    words = megatron_flags(arch)
    values = dict(zip(words, [*words[1:], ""], strict=True))
    return {flag: "" if value.startswith("--") else value for flag, value in values.items() if flag.startswith("--")}


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (QWEN2, {"--window-size": "(8,0)", "--window-attn-skip-freq": "[0,0,1,1]", "--no-rope-freq": None}),
        (SMOLLM3, {"--no-rope-freq": "[0,1,0,1]", "--window-size": None, "--num-experts": None}),
        (QWEN3_MOE, {"--moe-router-pre-softmax": "", "--moe-layer-freq": None, "--moe-router-dtype": None}),
        (QWEN3_MOE | dict(norm_topk_prob=True), {"--moe-router-pre-softmax": None, "--moe-router-topk": None}),
        (QWEN3_MOE | dict(num_experts_per_tok=3), {"--num-experts": "8", "--moe-router-topk": "3"}),
        (QWEN3_MOE | dict(decoder_sparse_step=2), {"--moe-layer-freq": "[0,1,0,1]", "--moe-ffn-hidden-size": "24"}),
        (DEEPSEEK, {"--moe-router-score-function": "sigmoid", "--moe-router-enable-expert-bias": ""}),
        (DEEPSEEK, {"--moe-router-num-groups": "4", "--moe-router-group-topk": "2", "--qk-layernorm": ""}),
        (DEEPSEEK, {"--moe-router-topk-scaling-factor": "2.5", "--moe-shared-expert-intermediate-size": "24"}),
        (DEEPSEEK, {"--kv-channels": "128", "--multi-latent-attention": "", "--group-query-attention": None}),
        (DEEPSEEK, {"--rope-type": "rope", "--moe-router-pre-softmax": None, "--moe-router-dtype": "fp32"}),
        (DEEPSEEK, {"--moe-router-bias-update-rate": "0"}),
        (DEEPSEEK | dict(n_group=1, topk_group=1, num_experts_per_tok=5), {"--moe-router-num-groups": None}),
    ],
)
def test_flags_follow_from_the_config(tmp_path, config, flags):
    found = told(architecture(tmp_path, **config))
    assert {flag: found.get(flag) for flag in flags} == flags


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QWEN3_MOE | dict(num_experts_per_tok=1, norm_topk_prob=True), "weight of 1 to the only expert"),
        (DEEPSEEK | dict(norm_topk_prob=False), "normalises sigmoid scores"),
        (DEEPSEEK | dict(num_experts_per_tok=6), "by their 3 best scores .* but this family by the best 2"),
        (DEEPSEEK | dict(rope_scaling=YARN | dict(truncate=False)), "yarn with truncate only"),
        (DEEPSEEK | dict(rope_scaling=dict(type="linear", factor=2.0)), "default rotary embedding and yarn"),
        (DEEPSEEK | dict(rope_scaling=YARN | dict(mscale_all_dim=1.0)), "mscale_all_dim alone"),
        (DEEPSEEK | dict(rope_scaling=YARN | dict(attention_factor=1.1)), "or an attention_factor"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused_in_one_line(tmp_path, config, message):
    arch = architecture(tmp_path, **config)
    with pytest.raises(ValueError, match=message) as error:
        megatron_flags(arch)
    assert "\n" not in str(error.value)


def test_a_second_model_is_told_what_it_is_not(tmp_path):
    """Whatever the first model has, the arguments of the second one say its own."""
    args = argparse.Namespace(transformer_impl="local", apply_rope_fusion=False, masked_softmax_fusion=True)
    describe_layers(args, architecture(tmp_path, **DEEPSEEK))
    assert args.multi_latent_attention and args.num_experts == 16 and not args.group_query_attention
    plain = architecture(tmp_path, architectures=["LlamaForCausalLM"])
    describe_layers(args, plain)
    assert {name: getattr(args, name) for name in layer_arguments(plain)} == layer_arguments(plain)
    assert not args.multi_latent_attention and args.num_experts is None and args.group_query_attention
    assert args.softmax_scale is None and args.masked_softmax_fusion


def test_yarns_factor_scales_the_scores_and_windows_need_the_plain_softmax(tmp_path):
    args = argparse.Namespace(transformer_impl="local", apply_rope_fusion=False, masked_softmax_fusion=True)
    describe_layers(args, architecture(tmp_path, **QWEN2 | dict(rope_scaling=YARN)))
    assert args.softmax_scale == pytest.approx((0.1 * math.log(4) + 1) ** 2 / 4)
    assert not args.masked_softmax_fusion


def test_yarns_factor_scales_cosine_and_sine_where_not_all_is_rotated(tmp_path):
    args = argparse.Namespace(transformer_impl="local", apply_rope_fusion=True, masked_softmax_fusion=True)
    arch = architecture(tmp_path, **SMOLLM3 | dict(rope_scaling=YARN))
    describe_layers(args, arch)
    assert args.softmax_scale is None and not args.apply_rope_fusion and not args.fused_single_qkv_rope
    assert arch.rotary_scale() == pytest.approx(0.1 * math.log(4) + 1)


def test_multipliers_are_told_where_megatron_has_them(tmp_path):
    granite = dict(architectures=["GraniteForCausalLM"], attention_multiplier=0.25, residual_multiplier=0.2)
    plain = architecture(tmp_path, **granite)
    assert plain.softmax_scale() == 0.25 and "--use-mup" not in megatron_flags(plain)
    found = told(architecture(tmp_path, **granite, embedding_multiplier=12.0, logits_scaling=16))
    expected = {"--use-mup": "", "--mup-embedding-mult": "12.0", "--mup-output-mult": "0.0625"}
    assert {flag: value for flag, value in found.items() if "mup" in flag} == expected


def test_flags_of_the_shape_cannot_be_given(tmp_path):
    flags = megatron_flags(architecture(tmp_path, **DEEPSEEK))
    # Dropout and precision are the user's.
    check_flags(["--moe-router-dtype", "fp64", "--attention-dropout", "0.1"], flags)
    for flag in ("--window-size", "--no-rope-freq", "--num-experts", "--moe-router-topk=4", "--kv-lora-rank"):
        with pytest.raises(ValueError, match=f"{flag.partition('=')[0]} follow"):
            check_flags([flag], flags)
