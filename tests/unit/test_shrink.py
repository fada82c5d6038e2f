"""A config.json made small keeps the structure of its model, whatever the family, and divides as the model does."""

import dataclasses
import itertools
import json

import pytest
import torch

from qtarget_megatron.huggingface import Architecture, hf_tensor_shapes
from qtarget_megatron.huggingface.config import families
from qtarget_megatron.megatron.verify.shrink import Cuts, shrunk_config
from qtarget_megatron.megatron.verify.small_model import reordered, write_samples, write_small_model
from qtarget_megatron.parallel_layout import division_problems, expert_problems, stage_problems

SHAPE = dict(
    vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=40_960, rms_norm_eps=1e-6, moe_intermediate_size=1024,
    head_dim=128, eos_token_id=[7, 8], torch_dtype="float32",
)  # fmt: skip
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# Family, and what its config.json says besides.
STRUCTURES = {
    "llama with biases, tied": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama3": ("llama", dict(rope_scaling=dict(rope_type="llama3", **LLAMA3), rope_theta=5e5)),
    "one key/value head": ("llama", dict(num_key_value_heads=1)),
    "as many key/value heads": ("llama", dict(num_key_value_heads=32)),
    "2 layers": ("llama", dict(num_hidden_layers=2)),
    "windows from a layer on": ("qwen2", dict(use_sliding_window=True, max_window_layers=28)),
    "windows by a list": (
        "qwen3",
        dict(use_sliding_window=True, layer_types=[["sliding_attention"] * 5, ["full_attention"]] * 6),
    ),
    "every second layer": ("qwen3_moe", dict(decoder_sparse_step=2, norm_topk_prob=True)),
    "two dense layers": ("qwen3_moe", dict(mlp_only_layers=[0, 35], norm_topk_prob=False)),
    "unrotated by a list": ("smollm3", dict(no_rope_layers=[1, 1, 1, 0] * 9)),
    "windows of unrotated layers": ("smollm3", dict(use_sliding_window=True, sliding_window=512)),
    "other groups": ("deepseek_v3", dict(n_group=1, topk_group=1)),
    "yarn": ("qwen2", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768))),
}
CUTS = [
    Cuts(),
    Cuts(tensor=2, stages=8, expert=4, expert_tensor=1),
    Cuts(tensor=8, stages=3, expert=16, expert_tensor=4),
]


def config_of(name: str) -> dict:
    """A large one: a structure's, or a family's with its defaults."""
    family, more = STRUCTURES.get(name, (name, {}))
    config = SHAPE | {"architectures": [families.by_name(family).architecture], "model_type": family}
    if families.by_name(family).latent:
        config |= dict(num_key_value_heads=32)
    if isinstance((kinds := more.get("layer_types")), list):
        more = more | {"layer_types": [*itertools.chain.from_iterable(kinds)]}
    return config | more


NAMES = [*(family.name for family in families.all_families() if family.refused is None), *STRUCTURES]


def kinds(arch: Architecture) -> set:
    nothing = (False,) * arch.num_layers
    experts = nothing if arch.experts is None else arch.experts.layers
    return set(zip(arch.window_layers or nothing, arch.unrotated_layers or nothing, experts, strict=True))


def structure(arch: Architecture) -> dict:
    """What is no size."""
    same = (
        "family",
        "norm_epsilon",
        "tied",
        "qkv_bias",
        "output_bias",
        "mlp_bias",
        "qk_norm",
        "rope_base",
        "rope_scaling",
    )
    found = {name: getattr(arch, name) for name in same}
    found |= {"latent": arch.latent is None, "window": arch.sliding_window is None, "kinds": kinds(arch)}
    groups = arch.num_query_groups
    found |= {"heads share": arch.num_attention_heads > groups, "one group": groups == 1}
    if (experts := arch.experts) is not None:
        same = ("normalized", "score", "has_correction", "scaling", "float32_router")
        found |= {name: getattr(experts, name) for name in same}
        found |= {"shared": experts.shared_ffn_hidden_size is None, "groups": experts.groups is None}
        found |= {"several": experts.per_token > 1, "choice": experts.per_token < experts.count}
    return found


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_structure_stays_and_the_layout_divides(name, cuts):
    large = Architecture.from_config(config_of(name))
    if large.experts is not None and large.experts.bias:
        # A layout that Megatron has for them.
        cuts = dataclasses.replace(cuts, expert_tensor=1)
    config = shrunk_config(config_of(name), cuts, vocab_size=307, positions=128)
    small = Architecture.from_config(config)
    assert structure(small) == structure(large)
    assert (small.vocab_size, small.dtype) == (307, torch.bfloat16)
    problems = [
        *division_problems(small, "small one", tensor=cuts.tensor, seq_length=128),
        *stage_problems(small, "small one", pipeline=cuts.stages),
        *expert_problems(
            small,
            "small one",
            world_size=cuts.expert_tensor * cuts.expert * cuts.stages,
            tensor=cuts.tensor,
            pipeline=cuts.stages,
            expert_parallel=cuts.expert,
            expert_tensor=cuts.expert_tensor,
        ),
    ]
    assert problems == []
    assert sum(torch.Size(shape).numel() for shape in hf_tensor_shapes(small).values()) < 2e7
    # Key/value heads are cut, or shared by ranks, as those of the model.
    if small.latent is None:
        assert (small.num_query_groups % cuts.tensor == 0) == (large.num_query_groups % cuts.tensor == 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_hidden_dimension_is_known_by_its_size(name):
    """So that a permutation of it can be applied to every tensor, whatever its role."""
    small = Architecture.from_config(shrunk_config(config_of(name), CUTS[1], vocab_size=307, positions=128))
    hidden = small.hidden_size
    other = hf_tensor_shapes(dataclasses.replace(small, hidden_size=hidden + 1))
    for tensor, shape in hf_tensor_shapes(small).items():
        assert [size + (size == hidden) for size in shape] == list(other[tensor]), tensor


def test_a_model_that_does_not_keep_its_structure_is_refused(monkeypatch):
    monkeypatch.setattr("qtarget_megatron.megatron.verify.shrink._dense_layers", lambda rules, dense: {})
    with pytest.raises(ValueError, match="small model of family qwen3_moe does not keep its structure"):
        shrunk_config(config_of("two dense layers"), Cuts(), vocab_size=307, positions=64)


# ---- what is made of it


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_the_choice_of_experts_is_clear_in_every_layer(tmp_path, name):
    """By the weights alone, with hidden states as an embedding and layers' noise make them."""
    config = shrunk_config(config_of(name), Cuts(), vocab_size=307, positions=64)
    arch = Architecture.from_config(config)
    tensors = {key: value.double() for key, value in write_small_model(tmp_path, config, seed=3).items()}
    experts, family = arch.experts, families.by_name(arch.family)
    embedding = tensors[family.tensor("embedding")]
    for layer in [layer for layer, sparse in enumerate(experts.layers) if sparse]:
        noise = torch.randn(embedding.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(layer)) * 0.3
        noise[:, : experts.count] = 0
        hidden = embedding + noise
        hidden = hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt() * tensors[family.tensor("mlp_norm", layer=layer)]
        logits = hidden @ tensors[family.tensor("router", layer=layer)].t()
        scores = logits.sigmoid() if experts.score == "sigmoid" else logits
        if experts.groups is not None:
            best = scores.view(len(scores), experts.groups.count, -1).topk(2, dim=-1).values.sum(-1)
            ranked = best.sort(descending=True).values
            assert (ranked[:, experts.groups.top - 1] - ranked[:, experts.groups.top]).min() > 0.01
            chosen = best.topk(experts.groups.top).indices
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)
            scores = scores.masked_fill(~kept.repeat_interleave(experts.count // experts.groups.count, 1), -torch.inf)
        ranked = scores.sort(descending=True).values
        assert (ranked[:, experts.per_token - 1] - ranked[:, experts.per_token]).min() > 0.03


def test_layers_add_nothing_to_the_scores_of_experts(tmp_path):
    config = shrunk_config(config_of("two dense layers"), Cuts(), vocab_size=307, positions=64)
    count, hidden = Architecture.from_config(config).experts.count, config["hidden_size"]
    for name, tensor in write_small_model(tmp_path, config, seed=3).items():
        if tensor.shape[0] == hidden:
            assert torch.equal(tensor[:count], torch.full_like(tensor[:count], float(tensor.dim() == 1))), name
        elif len(tensor.shape) > 1:
            assert tensor.count_nonzero() > 0.9 * tensor.numel(), name


def test_reordering_is_undone_by_the_inverse():
    order = torch.randperm(96)
    tensors = {"a": torch.randn(96, 32), "b": torch.randn(32, 96), "c": torch.randn(96), "d": torch.randn(32)}
    moved = reordered(tensors, order)
    assert torch.equal(moved["a"] @ moved["d"], (tensors["a"] @ tensors["d"])[order])
    assert torch.allclose(moved["b"] @ moved["c"], tensors["b"] @ tensors["c"], atol=1e-4)
    back = reordered(moved, order.argsort())
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_samples_have_very_different_numbers_of_targets(tmp_path):
    path = tmp_path / "data.jsonl"
    write_samples(path, 90, row_length=64, unit=24, inputs=("weight", "critical"), seed=1)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    counts = [sum(label != -100 for label in record["labels"]) for record in records]
    assert counts.count(0) == 10 and min(count for count in counts if count) < 4 and max(counts) > 18
    for record, count in zip(records, counts, strict=True):
        assert (len(record["input_ids"]) - 1) % 24 == 0 and record["labels"][0] == -100
        assert len(record["weight"]) == len(record["critical"]) == count
