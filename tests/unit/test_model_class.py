"""Which class a model gets where --model-class does not say."""

from types import SimpleNamespace

import pytest

from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.runtime.model_class import GPT, HYBRID, choose_model_class

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
SPARSE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
MODELS = {
    "dense": dict(architectures=["LlamaForCausalLM"], model_type="llama"),
    "experts": dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe") | SPARSE,
    "mixed": dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", mlp_only_layers=[0]) | SPARSE,
    "latent": dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", first_k_dense_replace=0),
}


def chosen(model="dense", given=None, ckpt_format="torch_dist", **flags):
    args = SimpleNamespace(model_class=given, ckpt_format=ckpt_format, **flags)
    choose_model_class(args, Architecture.from_config(SIZES | MODELS[model]))
    return args.model_class


@pytest.mark.parametrize(
    ("model", "expected"), [("dense", HYBRID), ("experts", HYBRID), ("mixed", GPT), ("latent", GPT)]
)
def test_a_model_gets_what_megatron_recommends(model, expected):
    assert chosen(model) == expected
    assert {given: chosen(model, given) for given in (GPT, HYBRID)} == {GPT: GPT, HYBRID: HYBRID}


@pytest.mark.parametrize(
    "flags", [dict(mtp_num_layers=1), dict(overlap_moe_expert_parallel_comm=True), dict(cpu_offloading_num_layers=2)]
)
def test_what_only_a_gpt_model_has_chooses_it(flags):
    assert chosen(**flags) == chosen(given=GPT, **flags) == GPT
    with pytest.raises(ValueError, match=f"--{next(iter(flags)).replace('_', '-')} needs --model-class gpt"):
        chosen(given=HYBRID, **flags)


def test_other_formats_name_tensors_by_the_class():
    assert chosen(ckpt_format="torch") == chosen(ckpt_format="fsdp_dtensor") == GPT
