"""Model directories that somebody else wrote: whatever config.json, a header or an index says, the answer is one line,
within a second and in no more memory than the files have."""

import json
import math
import shutil
import struct
import time

import pytest
import torch
import transformers
from checkpoint_models import CASES, SIZES
from finetune_runs import vocabulary, write_model

from qtarget_megatron.data import load_tokenizer
from qtarget_megatron.huggingface import Architecture, HFReader, check_tensors, hf_tensor_shapes

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = dict(rope_type="longrope", factor=2.0, attention_factor=1.2, short_factor=[1.0, 2.0], long_factor=[1, 3])
FIELDS = dict(SIZES, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False, dtype="bfloat16", hidden_act="silu")
FIELDS |= dict(eos_token_id=[2], bos_token_id=1, quantization_config=None, partial_rotary_factor=1, sliding_window=16)
FIELDS |= dict(use_sliding_window=True, head_dim=4, attention_bias=False, mlp_bias=False, layer_types=None)
FAMILIES = {
    "Llama": dict(num_key_value_heads=6, rope_scaling=LLAMA3 | dict(original_max_position_embeddings=32)),
    "Mistral": dict(num_key_value_heads=3, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "Qwen2": dict(num_key_value_heads=12, max_window_layers=1),
    "Qwen3": dict(num_key_value_heads=1, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0, truncate=True)),
    "SmolLM3": dict(num_key_value_heads=3, no_rope_layers=[1, 1, 0], no_rope_layer_interval=4),
    "Qwen3Moe": CASES["qwen3_moe"][1] | dict(num_experts=4, decoder_sparse_step=1, norm_topk_prob=True),
    "Qwen2Moe": CASES["qwen2_moe"][1] | dict(decoder_sparse_step=2, norm_topk_prob=True, qkv_bias=True),
    "GptOss": CASES["gpt_oss"][1] | dict(swiglu_limit=7.0, swiglu_alpha=1.702, rope_scaling=YARN),
    "DeepseekV3": CASES["deepseek_v3"][1] | dict(routed_scaling_factor=2.5, rope_interleave=True, norm_topk_prob=True),
    "Mixtral": CASES["mixtral"][1],
    "Phi3": dict(num_key_value_heads=3, original_max_position_embeddings=32, rope_scaling=LONGROPE),
    "Glm4Moe": dict(num_key_value_heads=2, use_qk_norm=True, n_routed_experts=4, num_experts_per_tok=2, n_group=1)
    | dict(topk_group=1, n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=1, norm_topk_prob=True)
    | dict(routed_scaling_factor=1.5),
    "Granite": dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), 0.5)
    | dict(num_key_value_heads=3, logits_scaling=8),
    "SeedOss": dict(num_key_value_heads=3, attention_out_bias=False),
}
VALUES = [None, "x", "a" * 10**5, [], [None], [10**12], {}, {"a": 1}, True, False, -1, 0, 1, 1.5, 10**12, 2**63]
VALUES += [10**400, -(10**400), math.nan, math.inf, 1e308, 1e-308]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_field_is_read_or_refused_in_a_line(tmp_path, family):
    """What is read can be used: frequencies are numbers, and the tensors can be listed."""
    config = dict(FIELDS, architectures=[f"{family}ForCausalLM"], **FAMILIES[family])
    rope = config.get("rope_scaling") or {}
    changed = [{key: value} for key in config for value in VALUES]
    changed += [{"rope_scaling": rope | {key: value}} for key in rope for value in VALUES]
    assert read(tmp_path, config) is None
    refused = 0
    for change in changed:
        begin = time.process_time()
        message = read(tmp_path, config | change)
        what = f"{change}: {message}"[:300]
        assert time.process_time() - begin < 1, what
        if message is not None:
            refused += 1
            assert message.startswith(f"{tmp_path}/config.json: ") or message.startswith(str(tmp_path)), what
            assert "\n" not in message and len(message) < 700, what
    assert refused > len(changed) / 3


def read(folder, config):
    """Why a config is refused, if it is."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        arch = Architecture.from_hf(folder)
    except ValueError as error:
        return str(error)
    assert torch.isfinite(arch.inverse_frequencies()).all() and math.isfinite(arch.softmax_scale() or 1)
    assert len(hf_tensor_shapes.__wrapped__(arch)) < 10**6
    return None


@pytest.fixture
def model(tmp_path):
    sizes = dict(vocab_size=vocabulary(), max_position_embeddings=64, num_attention_heads=4, num_hidden_layers=2)
    write_model(tmp_path / "m", "Llama", sizes | dict(hidden_size=32, intermediate_size=48), torch.Generator())
    return tmp_path / "m"


def change(model, **fields):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_hidden_layers=10**12), "num_hidden_layers of at most 10000, got 1000000000000"),
        (dict(max_position_embeddings=10**15), "max_position_embeddings of at most 2147483647"),
        (dict(num_hidden_layers=9999), "89973 missing: model.layers.2.*weights and config.json do not belong together"),
        (dict(vocab_size=2**30), "model.embed_tokens.weight .expected .1073741824, 32."),
    ],
)
def test_sizes_are_compared_with_what_the_files_hold(model, fields, message):
    change(model, **fields)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        check_tensors(HFReader(model), Architecture.from_hf(model))
    assert time.process_time() - begin < 2


NESTED = "[" * 200_000


def nest_config(model):
    (model / "config.json").write_text('{"architectures": ' + NESTED)


def nest_index(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": ' + NESTED)


def nest_header(model):
    header = ('{"a": ' + NESTED).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def nest_tokenizer(model):
    path = model / "tokenizer.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "x": ' + NESTED)


def nest_tokenizer_config(model):
    (model / "tokenizer_config.json").write_text('{"x": ' + NESTED + "]" * len(NESTED) + "}")


@pytest.mark.parametrize("file", [nest_config, nest_index, nest_header, nest_tokenizer, nest_tokenizer_config])
def test_json_that_is_nested_too_deep_is_one_line(model, file):
    file(model)
    with pytest.raises(ValueError) as refused:
        HFReader(model)
        Architecture.from_hf(model)
        load_tokenizer(model)
    assert str(model) in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_null_that_transformers_refuses_is_one_line(model):
    """tie_word_embeddings null: config.json's reader takes it for absent, transformers' tokenizer loading does not."""
    change(model, tie_word_embeddings=None)
    assert Architecture.from_hf(model).tied is False
    with pytest.raises(ValueError, match="no tokenizer can be loaded.*tie_word_embeddings") as refused:
        load_tokenizer(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_that_were_saved_fused_are_refused_with_the_way_out(tmp_path, case):
    prefix, extra = CASES[case]
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **extra)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(ValueError, match="save_original_format=False.*save it without that"):
        check_tensors(HFReader(tmp_path / "fused"), Architecture.from_hf(tmp_path / "fused"))
    model.save_pretrained(tmp_path / "apart")
    check_tensors(HFReader(tmp_path / "apart"), Architecture.from_hf(tmp_path / "apart"))


def test_a_name_of_the_hub_gets_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B`"):
        Architecture.from_hf("Qwen/Qwen3-8B")
    (tmp_path / "models").mkdir()
    for path in ("models/Qwen3-8B", "/Qwen/Qwen3-8B", "./Qwen3-8B", "Qwen3-8B", "../a/b", "a/b/c"):
        with pytest.raises(ValueError, match="found none; check the path"):
            Architecture.from_hf(path)
    shutil.rmtree(tmp_path / "models")
