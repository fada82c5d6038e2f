"""What config.json says, against what transformers makes of the same file."""

import json
import math
import sys

import pytest
import torch
import transformers

from qtarget_megatron.huggingface import Architecture, Experts, Groups, LatentAttention, Multipliers, RopeScaling
from qtarget_megatron.parallel_layout import division_problems

SHAPE = dict(
    vocab_size=131,
    hidden_size=768,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=96,
)
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", **SHAPE)
QWEN2 = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", **SHAPE)
QWEN3_MOE = dict(architectures=["Qwen3MoeForCausalLM"], num_key_value_heads=4)
GPT_OSS = dict(architectures=["GptOssForCausalLM"])
PHI3 = dict(architectures=["Phi3ForCausalLM"])
GRANITE = dict(architectures=["GraniteForCausalLM"])
SMOLLM3 = dict(architectures=["SmolLM3ForCausalLM"], num_key_value_heads=4)
MIXTRAL = dict(architectures=["MixtralForCausalLM"])
FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
LLAMA3_ROPE = dict(factor=8.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_position_embeddings=512)


def write(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def both(tmp_path, config: dict):
    """(ours, transformers' own reading) of one config."""
    write(tmp_path, config)
    return Architecture.from_hf(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)


FAMILIES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "granite": "GraniteForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


@pytest.mark.parametrize(
    "extra",
    [
        {},  # everything optional left out: transformers' defaults
        dict(
            num_key_value_heads=8,
            head_dim=16,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            torch_dtype="float16",
            bos_token_id=5,
            eos_token_id=[7, 8],
            rope_theta=500000,
            attention_bias=True,
            mlp_bias=True,
            sliding_window=None,
        ),
        dict(dtype="float32", torch_dtype="float16", num_key_value_heads=None, eos_token_id=3),
    ],
    ids=["minimal", "explicit", "both-dtypes"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_fields_are_what_transformers_reads(tmp_path, family, extra):
    without_null = ("glm", "glm4", "glm4_moe", "gpt_oss", "mistral", "mixtral", "qwen2_moe", "qwen3_moe")
    if family in without_null and "num_key_value_heads" in extra:
        extra = extra | dict(num_key_value_heads=8)  # their config classes take no null here
    if family == "deepseek_v3":  # its latent attention has as many key/value heads, no biases and one epsilon
        own = dict(num_key_value_heads=96, attention_bias=False, rms_norm_eps=1e-6, first_k_dense_replace=1)
        extra = {key: value for key, value in extra.items() if key != "head_dim"} | own
    ours, theirs = both(tmp_path, dict(architectures=[FAMILIES[family]], model_type=family, **SHAPE, **extra))
    theirs.pad_token_id = None  # SmolLM3's is beyond this vocabulary
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    names = set(model.state_dict())
    layer = "model.layers.0."
    ids = theirs.eos_token_id
    assert ours == Architecture(
        family=family,
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        ffn_hidden_size=theirs.intermediate_size,
        num_attention_heads=theirs.num_attention_heads,
        num_query_groups=theirs.num_key_value_heads,
        head_dim=head_dim_of(theirs),
        vocab_size=theirs.vocab_size,
        max_position_embeddings=theirs.max_position_embeddings,
        norm_epsilon=theirs.rms_norm_eps,
        tied=theirs.tie_word_embeddings,
        qkv_bias=layer + "self_attn.q_proj.bias" in names,
        output_bias=layer + "self_attn.o_proj.bias" in names,
        mlp_bias=not names.isdisjoint({layer + "mlp.up_proj.bias", layer + "mlp.experts.gate_up_proj_bias"}),
        qk_norm=layer + "self_attn.q_norm.weight" in names,
        rope_base=theirs.rope_parameters["rope_theta"],
        rope_scaling=GPT_OSS_ROPE if family == "gpt_oss" else None,
        sliding_window=getattr(theirs, "sliding_window", None) or None,
        window_layers=(True, family != "gpt_oss") if getattr(theirs, "sliding_window", None) else (),
        unrotated_layers=unrotated_of(theirs),
        dtype=theirs.dtype or torch.bfloat16,
        eos_token_ids=() if ids is None else tuple(ids) if isinstance(ids, list) else (ids,),
        bos_token_id=theirs.bos_token_id,
        experts=experts_of(theirs, names),
        latent=latent_of(theirs),
        partial_rotary_factor=theirs.rope_parameters.get("partial_rotary_factor", 1.0),
        # Neither has the function that says so; the logits of both are compared.
        rotary_interleaved=family not in ("deepseek_v3", "gpt_oss") and pairs_neighbours(model),
        # transformers 5.8 knows neither this field nor that of gpt-oss' limit.
        further_layers=getattr(theirs, "num_nextn_predict_layers", int(hasattr(theirs, "n_routed_experts"))),
        output_norms=layer + "post_mlp_layernorm.weight" in names,
        multipliers=multipliers_of(theirs),
        sinks=layer + "self_attn.sinks" in names,
    )


def multipliers_of(theirs):
    if not hasattr(theirs, "logits_scaling"):
        return None
    attention, logits = theirs.attention_multiplier, 1 / theirs.logits_scaling
    return Multipliers(theirs.embedding_multiplier, theirs.residual_multiplier, attention, logits)


# By its config class where the file has none: 1 + ln(32) / 10 scales cosine and sine.
GPT_OSS_ROPE = RopeScaling(
    type="yarn",
    factor=32.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    attention_factor=1 + 0.1 * math.log(32),
)


def pairs_neighbours(model):
    """Whether the model's code turns (1, 2, 3, 4) by a right angle in the planes of 1 and 2 and of 3 and 4."""
    turned = sys.modules[type(model).__module__].rotate_half(torch.tensor([[[[1, 2, 3, 4]]]])).flatten().tolist()
    assert turned in ([-2, 1, -4, 3], [-3, -4, 1, 2])
    return turned == [-2, 1, -4, 3]


def head_dim_of(theirs):
    derived = theirs.hidden_size // theirs.num_attention_heads
    return getattr(theirs, "qk_head_dim", None) or getattr(theirs, "head_dim", None) or derived


def latent_of(theirs):
    if not hasattr(theirs, "kv_lora_rank"):
        return None
    return LatentAttention(
        query_rank=theirs.q_lora_rank,
        key_value_rank=theirs.kv_lora_rank,
        plain_dim=theirs.qk_nope_head_dim,
        rotary_dim=theirs.qk_rope_head_dim,
        value_dim=theirs.v_head_dim,
    )


def unrotated_of(theirs):
    """Layers without rotary embedding; () where there is none."""
    rotated = getattr(theirs, "no_rope_layers", [1] * theirs.num_hidden_layers)
    return () if all(rotated) else tuple(not value for value in rotated)


def experts_of(theirs, names):
    """What transformers built: routers where there are experts."""
    routers = [{f"model.layers.{i}.mlp.{name}.weight" for name in ("gate", "router")} for i in range(10)]
    layers = tuple(not names.isdisjoint(routers[i]) for i in range(theirs.num_hidden_layers))
    if not any(layers):
        return None
    own = {}
    if hasattr(theirs, "n_routed_experts"):
        own = dict(score="sigmoid", has_correction=True, scaling=theirs.routed_scaling_factor, float32_router=True)
        own |= dict(shared_ffn_hidden_size=theirs.n_shared_experts * theirs.moe_intermediate_size)
        limited = theirs.topk_group < theirs.n_group
        own |= dict(groups=Groups(theirs.n_group, theirs.topk_group) if limited else None)
    if hasattr(theirs, "shared_expert_intermediate_size"):
        own = dict(shared_ffn_hidden_size=theirs.shared_expert_intermediate_size, shared_weight=True)
    if theirs.model_type == "gpt_oss":
        own = dict(
            clamp=getattr(theirs, "swiglu_limit", 7.0), fused=True, bias="model.layers.0.mlp.router.bias" in names
        )
    return Experts(
        count=getattr(theirs, "num_local_experts", None) or theirs.num_experts,
        per_token=theirs.num_experts_per_tok,
        ffn_hidden_size=getattr(theirs, "moe_intermediate_size", theirs.intermediate_size),
        normalized=getattr(theirs, "norm_topk_prob", True),
        layers=layers,
        **own,
    )


DEEPSEEK_V3 = dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3")
DEEPSEEK_V3 |= dict(num_attention_heads=4, num_key_value_heads=4)


@pytest.mark.parametrize(
    ("extra", "layers", "groups"),
    [
        (dict(num_hidden_layers=5), (0, 0, 0, 1, 1), Groups(8, 4)),
        (dict(first_k_dense_replace=0, n_group=4, topk_group=2), (1, 1), Groups(4, 2)),
        (dict(first_k_dense_replace=1, n_group=1, topk_group=1), (0, 1), None),
        (dict(first_k_dense_replace=1, n_group=4, topk_group=4), (0, 1), None),
    ],
)
def test_deepseeks_experts_are_those_that_transformers_builds(tmp_path, extra, layers, groups):
    config = SHAPE | dict(hidden_size=64, n_routed_experts=32, moe_intermediate_size=8) | DEEPSEEK_V3 | extra
    ours, theirs = both(tmp_path, config)
    with torch.device("meta"):
        names = set(transformers.AutoModelForCausalLM.from_config(theirs).state_dict())
    assert ours.experts == experts_of(theirs, names)
    assert (ours.experts.layers, ours.experts.groups) == (layers, groups)


@pytest.mark.parametrize(
    ("extra", "layers"),
    [
        ({}, [1, 1, 1, 1, 1]),
        (dict(mlp_only_layers=[0, 3]), [0, 1, 1, 0, 1]),
        (dict(decoder_sparse_step=2), [0, 1, 0, 1, 0]),
        (dict(decoder_sparse_step=2, mlp_only_layers=[1]), [0, 0, 0, 1, 0]),
        (dict(decoder_sparse_step=8), []),
    ],
)
def test_layers_have_experts_where_transformers_builds_them(tmp_path, extra, layers):
    config = SHAPE | dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=5)
    config |= dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=6, moe_intermediate_size=8
    )
    ours, theirs = both(tmp_path, config | dict(num_experts_per_tok=3) | extra)
    with torch.device("meta"):
        names = set(transformers.AutoModelForCausalLM.from_config(theirs).state_dict())
    assert ours.experts == experts_of(theirs, names)
    assert layers == ([] if ours.experts is None else list(ours.experts.layers))


ROPES = {
    "default": {},
    "old-base": dict(rope_theta=500000, rope_scaling=None),
    "new-base": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "inner-base-wins": dict(rope_theta=5e5, rope_parameters=dict(rope_theta=1e6)),
    "outer-base": dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2)),
    "linear-old": dict(rope_scaling=dict(type="linear", factor=4.0)),
    "linear-new": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e6)),
    "llama3-old": dict(rope_theta=500000.0, rope_scaling=dict(rope_type="llama3", **LLAMA3_ROPE)),
    "llama3-new": dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3_ROPE)),
    "both-spellings": dict(
        rope_scaling=dict(rope_type="llama3", **LLAMA3_ROPE),
        rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e6),
    ),
    "llama3-length-from-positions": dict(
        max_position_embeddings=1024,
        rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "yarn": dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=512)),
    "yarn-new": dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=2.5)),
    "yarn-all": dict(
        rope_theta=1e5,
        rope_scaling=dict(rope_type="yarn", factor=40, beta_fast=20, beta_slow=0.7, truncate=False, mscale=0.7)
        | dict(mscale_all_dim=1.3, original_max_position_embeddings=256),
    ),
    "yarn-one-scale": dict(rope_scaling=dict(rope_type="yarn", factor=8, mscale=0.5, beta_fast=None)),
    "yarn-attention-factor": dict(
        rope_scaling=dict(rope_type="yarn", factor=8, mscale=0.5, mscale_all_dim=0.5, attention_factor=1.5)
    ),
    "yarn-factor-from-lengths": dict(
        max_position_embeddings=4096,
        rope_scaling=dict(rope_type="yarn", factor=None, original_max_position_embeddings=512),
    ),
    "llama3-length-outside": dict(
        original_max_position_embeddings=2048,
        rope_scaling=dict(rope_type="llama3", **LLAMA3_ROPE),
    ),
}


LONGROPE = dict(short_factor=[1 + pair / 24 for pair in range(24)], long_factor=[1 + pair / 6 for pair in range(24)])
LENGTHS = dict(max_position_embeddings=192, original_max_position_embeddings=64, partial_rotary_factor=0.75)
LONGROPES = {
    "longrope": LENGTHS | dict(rope_scaling=dict(type="longrope", **LONGROPE)),
    "longrope-old": LENGTHS
    | dict(rope_theta=5e5, rope_scaling=dict(type="su", original_max_position_embeddings=64, **LONGROPE)),
    "longrope-older": LENGTHS | dict(rope_scaling=dict(type="yarn", **LONGROPE)),
    "longrope-factor": LENGTHS | dict(rope_scaling=dict(rope_type="longrope", factor=7.0, **LONGROPE)),
    "longrope-attention-factor": LENGTHS
    | dict(rope_scaling=dict(rope_type="longrope", attention_factor=1.3, **LONGROPE)),
    "longrope-no-longer": LENGTHS
    | dict(max_position_embeddings=48, rope_parameters=dict(rope_type="longrope", **LONGROPE)),
}
PARTIAL = {
    "partial": dict(partial_rotary_factor=0.35),
    "partial-inner-wins": dict(partial_rotary_factor=0.35, rope_parameters=dict(partial_rotary_factor=0.25)),
    "partial-yarn": ROPES["yarn-all"] | dict(partial_rotary_factor=0.7),
    "partial-llama3": ROPES["llama3-new"] | dict(partial_rotary_factor=0.25),
}
# The code is one for all: every form by one family, and by each what its own defaults enter.
ROPE_CASES = [("llama", rope) for rope in ROPES] + [("phi3", rope) for rope in LONGROPES]
ROPE_CASES += [("phi3", "partial"), *(("glm", rope) for rope in PARTIAL)]
ROPE_CASES += [(family, rope) for family in FAMILIES if family != "llama" for rope in ("default", "new-base")]
ROPE_CASES += [
    (family, rope)
    for family in FAMILIES
    if family not in ("llama", "phi3")
    for rope in ("outer-base", "llama3-length-outside", "yarn-new")
]


@pytest.mark.parametrize(("family", "rope"), ROPE_CASES)
def test_inverse_frequencies_are_the_bits_of_transformers(tmp_path, family, rope):
    config = dict(architectures=[FAMILIES[family]], model_type=family, **SHAPE)
    config |= dict(num_attention_heads=12, num_key_value_heads=12) | (ROPES | LONGROPES | PARTIAL)[rope]
    config |= dict(qk_rope_head_dim=64) if family == "deepseek_v3" else dict(head_dim=64)
    ours, theirs = both(tmp_path, config)
    small = dict(
        first_k_dense_replace=9,
        vocab_size=2,
        pad_token_id=None,
        hidden_size=12,
        intermediate_size=2,
        num_hidden_layers=1,
    )
    for key, value in small.items():  # the rotary module depends on none of these
        setattr(theirs, key, value)
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    actual = ours.inverse_frequencies()
    assert actual.dtype == torch.float32 and actual.shape == (ours.rotary_dim // 2,)
    assert torch.equal(actual, model.model.rotary_emb.inv_freq)
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]
    scaling = 1.0 if ours.rope_scaling is None else ours.rope_scaling.attention_factor
    assert scaling == model.model.rotary_emb.attention_scaling


def test_longrope_is_that_of_sequences_up_to_the_original_length(tmp_path):
    config = dict(architectures=["Phi3ForCausalLM"], model_type="phi3", **SHAPE | dict(num_attention_heads=12))
    ours, theirs = both(tmp_path, config | LONGROPES["longrope"])
    rotary = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(theirs)
    for length, same in ((64, True), (65, False)):
        rotary(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(rotary.inv_freq, ours.inverse_frequencies()) == same
        problems = list(division_problems(ours, "model", tensor=1, seq_length=length))
        assert bool(problems) != same
    assert "exceeds the 64 positions of the model (its original_max_position_embeddings: longer" in problems[0]
    # Not of all numbers of a head: the scores cannot be scaled instead.
    assert ours.softmax_scale() is None and ours.rotary_scale() == rotary.attention_scaling > 1
    # Where nothing differs beyond, no length is refused.
    same = dict(type="longrope", short_factor=LONGROPE["short_factor"], long_factor=LONGROPE["short_factor"])
    write(tmp_path, config | LENGTHS | dict(rope_scaling=same))
    assert Architecture.from_hf(tmp_path).max_sequence_length == 192


def test_each_llama3_parameter_changes_the_frequencies(tmp_path):
    seen = []
    for change in ({}, *({k: v * 2} for k, v in LLAMA3_ROPE.items() if k != "low_freq_factor")):
        rope = LLAMA3_ROPE | change
        write(tmp_path, LLAMA | dict(head_dim=64, rope_scaling=dict(type="llama3", **rope)))
        arch = Architecture.from_hf(tmp_path)
        assert arch.rope_scaling == RopeScaling(type="llama3", **rope)
        seen.append(tuple(arch.inverse_frequencies().tolist()))
    assert len(set(seen)) == len(seen)


SWITCHED = dict(use_sliding_window=True)


@pytest.mark.parametrize(
    ("family", "extra", "window", "layers"),
    [
        ("qwen2", dict(use_sliding_window=False, sliding_window=131072, max_window_layers=1), None, ()),
        ("qwen2", SWITCHED | dict(sliding_window=64, max_window_layers=0), 64, (1, 1, 1)),
        ("qwen2", SWITCHED | dict(sliding_window=64, max_window_layers=2), 64, (0, 0, 1)),
        ("qwen2", SWITCHED | dict(sliding_window=64, max_window_layers=28), None, ()),
        ("qwen2", SWITCHED | dict(sliding_window=None), None, ()),
        ("qwen3", SWITCHED | dict(layer_types=["sliding_attention"] * 3), 4096, (1, 1, 1)),
        (
            "qwen3",
            SWITCHED | dict(layer_types=["sliding_attention", "full_attention", "full_attention"]),
            4096,
            (1, 0, 0),
        ),
        ("qwen2_moe", SWITCHED | dict(sliding_window=64), 64, (1, 0, 1)),
        ("qwen2_moe", SWITCHED | dict(max_window_layers=1), 4096, (1, 0, 0)),
        ("qwen2_moe", SWITCHED | dict(max_window_layers=0), None, ()),
        ("qwen2_moe", SWITCHED | dict(layer_types=["full_attention", *["sliding_attention"] * 2]), 4096, (0, 1, 1)),
        ("qwen2_moe", dict(sliding_window=64), None, ()),
        ("gpt_oss", dict(sliding_window=64), 64, (1, 0, 1)),
        ("gpt_oss", dict(layer_types=["full_attention", *["sliding_attention"] * 2]), 128, (0, 1, 1)),
        ("gpt_oss", dict(sliding_window=None), None, ()),
        ("smollm3", SWITCHED | dict(sliding_window=64, no_rope_layer_interval=2), 64, (0, 1, 0)),
        ("smollm3", dict(sliding_window=64, no_rope_layer_interval=2), None, ()),
        ("smollm3", SWITCHED | dict(no_rope_layer_interval=2), None, ()),
    ],
)
def test_a_window_counts_in_the_layers_that_use_it(tmp_path, family, extra, window, layers):
    config = SHAPE | dict(architectures=[FAMILIES[family]], model_type=family, num_hidden_layers=3)
    ours, theirs = both(tmp_path, config | dict(num_key_value_heads=96) | extra)
    assert (ours.sliding_window, ours.window_layers) == (window, layers)
    kinds = zip(theirs.layer_types, range(3), strict=True)
    used = theirs.sliding_window is not None and getattr(theirs, "use_sliding_window", True)
    assert [used and kind == "sliding_attention" for kind, _ in kinds] == list(map(bool, layers or (0, 0, 0)))


def test_a_window_that_transformers_does_not_read_is_not_built(tmp_path):
    write(tmp_path, LLAMA | dict(sliding_window=8))
    assert Architecture.from_hf(tmp_path).sliding_window is None


@pytest.mark.parametrize(
    ("extra", "unrotated"),
    [
        ({}, (0, 0, 0, 1, 0)),
        (dict(no_rope_layer_interval=2), (0, 1, 0, 1, 0)),
        (dict(no_rope_layers=[0, 1, 1, 1, 0]), (1, 0, 0, 0, 1)),
        (dict(no_rope_layers=[1] * 6), ()),
    ],
)
def test_layers_without_rotary_embedding_are_those_of_transformers(tmp_path, extra, unrotated):
    config = SHAPE | dict(architectures=["SmolLM3ForCausalLM"], model_type="smollm3", num_hidden_layers=5)
    ours, theirs = both(tmp_path, config | dict(num_key_value_heads=4) | extra)
    assert ours.unrotated_layers == unrotated == unrotated_of(theirs)


@pytest.mark.parametrize("rope", [name for name in ROPES if name.startswith("yarn")])
def test_yarn_scales_scores_as_transformers_scales_cosine_and_sine(tmp_path, rope):
    config = LLAMA | dict(num_attention_heads=12, head_dim=64) | ROPES[rope]
    ours, theirs = both(tmp_path, config)
    factor = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs).attention_scaling
    expected = None if factor == 1 else factor * factor / 8
    assert ours.softmax_scale() == (expected if expected is None else pytest.approx(expected, rel=1e-15))


def test_remote_code_entries_are_ignored_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    write(tmp_path, LLAMA | dict(auto_map=dict(AutoModelForCausalLM="modeling.Model")))
    assert Architecture.from_hf(tmp_path).family == "llama"
    assert not marker.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (dict(architectures=["GPT2LMHeadModel"]), "LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Phi3"),
        (dict(architectures=["LlamaModel"]), "got \\['LlamaModel'\\]"),
        (dict(architectures=None), "got None"),
        (dict(architectures=[{}]), "expected architectures"),
        (dict(quantization_config=FP8 | dict(weight_block_size=None)), "'fp8' without weight_block_size; .*dequantise"),
        *(
            (dict(quantization_config=dict(quant_method=method, bits=4)), f"quant_method '{method}'; .*dequantise")
            for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8")
        ),
        (dict(compression_config=dict(format="x")), "got a compression_config of quant_method None"),
        (dict(quantization_config=[1]), "quantization_config to be an object, got .1."),
        (dict(quantization_config=FP8 | dict(weight_block_size=[128])), "rows and columns of a block, got .128."),
        (dict(quantization_config=FP8 | dict(weight_block_size=[128, 0])), "rows and columns of a block"),
        (dict(quantization_config=FP8 | dict(fmt="e5m2")), "fmt of quantization_config to be 'e4m3', got 'e5m2'"),
        (dict(quantization_config=FP8 | dict(activation_scheme="static")), "to be 'dynamic', got 'static'"),
        (dict(hidden_act="gelu"), "hidden_act 'silu'.*'gelu'"),
        (dict(hidden_size=None), "hidden_size to be a positive integer, got None"),
        (dict(num_hidden_layers=2.0), "num_hidden_layers to be a positive integer, got 2.0"),
        (dict(vocab_size=True), "vocab_size to be a positive integer"),
        (dict(num_key_value_heads=5), "multiple of num_key_value_heads"),
        (dict(hidden_size=769), "multiple of num_attention_heads"),
        (dict(head_dim=7), "even head_dim"),
        (dict(rms_norm_eps=0), "rms_norm_eps to be a positive number"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings to be true or false"),
        (dict(dtype="int8"), "dtype to be one of"),
        (dict(dtype={}, torch_dtype=["float32"]), "dtype to be one of"),
        (dict(eos_token_id="</s>"), "eos_token_id to be an integer"),
        (dict(rope_scaling=dict(type="su")), "'default', 'linear', 'llama3', 'yarn', 'longrope'.*'su'"),
        (dict(rope_scaling=dict(type="longrope")), "short_factor to be a list of numbers, got None"),
        (dict(rope_scaling=dict(type="longrope", short_factor=[1], long_factor=[0])), "long_factor to be a positive"),
        (dict(rope_scaling=dict(type="longrope", short_factor=[1], long_factor=[1])), "each of 4 rotary pairs, got 1"),
        (PHI3 | dict(rope_scaling=dict(type="linear", factor=2.0)), "'default', 'longrope', 'su', 'yarn'.*'linear'"),
        (PHI3 | dict(partial_rotary_factor=1.5), "at most 1 that gives an even number of a head's 8 numbers, got 1.5"),
        (PHI3 | dict(partial_rotary_factor=0.4), "gives an even number of a head's 8 numbers, got 0.4"),
        (PHI3 | dict(partial_rotary_factor="half"), "partial_rotary_factor to be a positive number, got 'half'"),
        (dict(rope_scaling=dict(type="yarn", factor=-1.0)), "factor to be a positive number, got -1.0"),
        (dict(rope_scaling=dict(type="yarn", factor=2.0, truncate=1)), "truncate to be true or false, got 1"),
        (dict(rope_scaling=dict(type="dynamic", factor=4.0)), "got 'dynamic'"),
        (dict(rope_scaling=dict(type="linear")), "factor to be a positive number, got None"),
        (dict(rope_scaling=dict(type="llama3", factor=8.0)), "low_freq_factor"),
        (
            dict(rope_scaling=dict(type="llama3", **LLAMA3_ROPE) | dict(high_freq_factor=1.0)),
            "high_freq_factor above low_freq_factor",
        ),
        (dict(rope_parameters=dict(full_attention={})), "one flat set"),
        (dict(rope_theta=-1), "rope_theta to be a positive number"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 1"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor 1"),
        (GRANITE | dict(logits_scaling=0), "logits_scaling to be a positive number, got 0"),
        (GRANITE | dict(residual_multiplier="1"), "residual_multiplier to be a positive number, got '1'"),
        (MIXTRAL | dict(num_local_experts=0), "num_experts to be a positive integer, got 0"),
        (MIXTRAL | dict(num_experts_per_tok=9), "num_experts_per_tok of at most num_experts .8., got 9"),
        (MIXTRAL | QWEN3_MOE | dict(mlp_only_layers="0"), "mlp_only_layers to be a list of layers, got '0'"),
        (dict(architectures=["Own"], auto_map=dict(AutoModel="own.Own")), "auto_map.* is never run"),
        (DEEPSEEK_V3 | dict(q_lora_rank=None), "q_lora_rank to be a number, got null: Megatron adds a norm"),
        (GPT_OSS | dict(swiglu_alpha=1.0), "swiglu_alpha to be 1.702, got 1.0: not supported"),
        (GPT_OSS | dict(swiglu_limit=None, num_local_experts=0), "num_local_experts to be a positive integer, got 0"),
        (GPT_OSS | dict(swiglu_limit=0), "swiglu_limit to be a positive number, got 0"),
        (DEEPSEEK_V3 | dict(rope_interleave=False), "rope_interleave true"),
        (DEEPSEEK_V3 | dict(scoring_func="softmax"), "scoring_func to be 'sigmoid', got 'softmax'"),
        (DEEPSEEK_V3 | dict(topk_method="greedy"), "topk_method to be 'noaux_tc', got 'greedy'"),
        (DEEPSEEK_V3 | dict(num_nextn_predict_layers=-1), "num_nextn_predict_layers to be a positive integer, got -1"),
        (DEEPSEEK_V3 | dict(attention_bias=True), "attention_bias false"),
        (DEEPSEEK_V3 | dict(rms_norm_eps=1e-5), "rms_norm_eps 1e-06, which the norms of the latents have"),
        (DEEPSEEK_V3 | dict(num_key_value_heads=2), "num_key_value_heads to be num_attention_heads"),
        (DEEPSEEK_V3 | dict(first_k_dense_replace=0, n_group=3), "n_group groups of 256 experts.*got 3 and 4"),
        (QWEN2 | dict(use_sliding_window=True, layer_types=["chunked_attention"] * 2), "'chunked_attention': not"),
        (SMOLLM3 | dict(no_rope_layers=[1]), "for each of 2 layers, got .1."),
        (SMOLLM3 | dict(no_rope_layers=[1, 2]), "no_rope_layers to be 1 .rotary. or 0"),
        (SMOLLM3 | dict(no_rope_layer_interval=0), "no_rope_layer_interval to be a positive integer, got 0"),
        (QWEN2 | dict(use_sliding_window=True, layer_types=["full_attention"]), "list 2 layers"),
    ],
)
def test_configs_that_cannot_be_reproduced_are_refused_in_one_line(tmp_path, extra, message):
    write(tmp_path, LLAMA | extra)
    with pytest.raises(ValueError, match=message) as error:
        Architecture.from_hf(tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/config.json: expected ")
