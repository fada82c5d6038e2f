"""Tiny random models of every family, made by transformers, for the checkpoint tests."""

import json
from pathlib import Path

import torch
import transformers

from tools.first_hour.families import SIZES, corrections

PADDED = 144  # of the odd vocabulary; it divides by 1, 2, 3 and 4
# head_dim 6 is not hidden_size / heads = 4. With 1 or 3 groups a rank's share cuts through a group.
CASES = {
    "llama-tied": ("Llama", dict(num_key_value_heads=6, tie_word_embeddings=True)),
    "llama": ("Llama", dict(num_key_value_heads=6)),
    "llama-biases": (
        "Llama",
        dict(num_key_value_heads=12, attention_bias=True, mlp_bias=True),
    ),
    "mistral": ("Mistral", dict(num_key_value_heads=3, sliding_window=None)),
    "mistral-tied": (
        "Mistral",
        dict(num_key_value_heads=3, tie_word_embeddings=True),
    ),
    "qwen2": ("Qwen2", dict(num_key_value_heads=12)),
    "qwen2-tied": ("Qwen2", dict(num_key_value_heads=6, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=1, head_dim=6)),
    "qwen3-tied": (
        "Qwen3",
        dict(num_key_value_heads=3, head_dim=6, attention_bias=True, tie_word_embeddings=True),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(num_key_value_heads=3, head_dim=6, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        | dict(mlp_only_layers=[0]),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        dict(num_key_value_heads=12, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=6, qk_rope_head_dim=4)
        | dict(v_head_dim=8, n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2)
        | dict(moe_intermediate_size=24, n_shared_experts=2, first_k_dense_replace=1, num_nextn_predict_layers=0),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(num_key_value_heads=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        | dict(shared_expert_intermediate_size=36, mlp_only_layers=[0]),
    ),
    "gpt_oss": (
        "GptOss",
        dict(num_key_value_heads=3, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)
        | dict(pad_token_id=None),
    ),
    "mixtral": ("Mixtral", dict(num_key_value_heads=3, num_local_experts=5)),
    # Queries, keys and values in one tensor, gate and up in another.
    "phi3": ("Phi3", dict(num_key_value_heads=3, pad_token_id=None)),
}


def make_model(case: str, dtype=torch.bfloat16, **changes):
    prefix, extra = CASES[case]
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | extra | changes))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, case)))
    with torch.no_grad():  # norms start at one and biases at zero: a mix-up would not show
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for buffer in corrections(model):
            buffer.data = torch.randn(buffer.shape, generator=generator) * 0.1
    return model


def edit_json(path: Path, **changes) -> None:
    """Set entries of a JSON file; None stays null, Ellipsis removes."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
