"""Adapters without Megatron: targets, how their factors are cut, PEFT's directories."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtarget_megatron.huggingface import Architecture as Arch
from qtarget_megatron.huggingface import (
    HFReader,
    InitialFactors,
    Lora,
    adapted_modules,
    adapter_numbers,
    adapter_shard_numbers,
    check_targets,
    default_targets,
    hf_names,
    hf_tensor_shapes,
    linear_layers,
    load_factor,
    load_parameter,
    merge_factor,
    projections,
)
from qtarget_megatron.huggingface.adapters import peft_directory as peft
from tools.first_hour.families import write_model

DENSE = ("q", "k", "v", "o", "gate", "up", "down")
# Family of first_hour -> targets.
MODELS = {
    "llama3": DENSE,
    "qwen3": ("q", "v", "gate", "down"),  # one key/value head, which ranks share
    "qwen3_moe": (*DENSE, "experts"),
    "qwen2_moe": ("k", "o", "up", "experts"),
    "deepseek_v3": ("q", "k", "v", "o", "down", "experts"),
    "phi3": DENSE,
    "gpt_oss": ("q", "v", "o"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        write_model(folder / name, name, tied=False)
    return folder


def random_factors(arch, lora, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = peft.planned_tensors(arch, lora, torch.float32)
    return {name: torch.randn(planned.shape, generator=generator) for name, planned in names.items()}


class Given:
    def __init__(self, tensors):
        self.tensors = tensors

    def read(self, module, factor):
        return self.tensors[peft.tensor_name(module, factor)]


def write_peft(folder, arch, lora, tensors=None, base=None):
    folder.mkdir()
    tensors = random_factors(arch, lora) if tensors is None else tensors
    peft.write_weights(folder, peft.planned_tensors(arch, lora, torch.float32), tensors.items(), base=base)
    (folder / peft.CONFIG).write_bytes(peft.config_bytes(arch, lora, "the base"))
    return folder


def parameter_names(arch, layer):
    """Megatron's weights that may have adapters: (path, weight, factor A, factor B), as a local layer names them."""
    for path in linear_layers(arch, layer):
        own = path.replace("mlp.experts.", "mlp.experts.local_experts.1.")
        stem = f"decoder.layers.{layer}.{own}"
        yield path, f"{stem}.weight", f"{stem}.lora.A", f"{stem}.lora.B"


def spread(linear, numbers, factor, rank, size):
    """B in the places of the A that its rows read, written out row by row."""
    count = len({number for number in numbers if number is not None})
    runs = [(0, len(factor))] if linear.cut == 1 else linear.rows_of_rank(rank, size)
    owners = [0 if linear.cut == 1 else numbers[source] for source, length in runs for _ in range(length)]
    wide = torch.zeros(len(factor), count * factor.shape[1])
    for row, owner in enumerate(owners):
        if owner is not None:
            wide[row, owner * factor.shape[1] : (owner + 1) * factor.shape[1]] = factor[row]
    return wide


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_has_its_shard_of_the_product_of_the_factors(models, tmp_path, name, tp_size):
    """What the adapters of all ranks add is what their products add to the Hugging Face weights, cut as those are."""
    arch, lora = Arch.from_hf(models / name), Lora(3, 6, targets=MODELS[name])
    factors = random_factors(arch, lora)
    delta = {}
    for tensor, shape in hf_tensor_shapes(arch).items():
        delta[tensor] = torch.zeros(shape)
        module = tensor.removesuffix(".weight")
        if module in adapted_modules(arch, lora):
            first, second = (factors[peft.tensor_name(module, factor)] for factor in "AB")
            delta[tensor] = second @ first
    folder = tmp_path / "delta"
    folder.mkdir()
    (folder / "config.json").write_bytes((models / name / "config.json").read_bytes())
    save_file(delta, folder / "model.safetensors", metadata={"format": "pt"})
    reader, seen = HFReader(folder), 0
    for layer in range(arch.num_layers):
        for path, weight, first, second in parameter_names(arch, layer):
            linear = linear_layers(arch, layer)[path]
            numbers = projections(hf_sources(arch, weight, linear), arch, lora)
            if set(numbers) == {None}:
                continue
            for rank in range(tp_size):
                cut = dict(layer_offset=0, expert_offset=0, tp_rank=rank, tp_size=tp_size)
                a, b = (load_factor(Given(factors), arch, lora, factor, **cut) for factor in (first, second))
                expected = load_parameter(reader, arch, weight, **cut, padded_vocab_size=0)
                found = spread(linear, numbers, b, rank, tp_size) @ a
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                assert a.numel() + b.numel() == adapter_shard_numbers(arch, lora, linear, tp_size)
            seen += 1
    assert seen


def hf_sources(arch, weight, linear):
    """The tensors of this very layer and expert, in the order of linear's."""
    names = iter(hf_names(arch, weight, layer_offset=0))
    own = dict(zip(dict.fromkeys(linear.sources), names, strict=True))
    return tuple(own[source] for source in linear.sources)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_shards_are_merged_to_what_they_were_cut_from(models, name, tp_size):
    arch, lora = Arch.from_hf(models / name), Lora(2, targets=MODELS[name])
    factors, found = random_factors(arch, lora), {}
    experts = 0 if arch.experts is None else arch.experts.count
    offsets = {"layer_offset": 0, "expert_offset": 0}
    for layer in range(arch.num_layers):
        for path, weight, *names in parameter_names(arch, layer):
            is_expert = path.startswith("mlp.experts.")
            for expert in range(experts if is_expert else 1):
                of_expert = [n.replace("local_experts.1.", f"local_experts.{expert}.") for n in (weight, *names)]
                sources = hf_sources(arch, of_expert[0], linear_layers(arch, layer)[path])
                if set(projections(sources, arch, lora)) == {None}:
                    continue
                for factor in of_expert[1:]:
                    shards = [
                        load_factor(Given(factors), arch, lora, factor, **offsets, tp_rank=rank, tp_size=tp_size)
                        for rank in range(tp_size)
                    ]
                    merged = merge_factor(arch, lora, factor, shards, **offsets)
                    found |= {peft.tensor_name(*which): values for which, values in merged.items()}
    assert found.keys() == factors.keys()
    for tensor, values in factors.items():
        assert torch.equal(found[tensor], values), tensor


def test_the_first_factors_are_those_of_peft_at_any_layout(models):
    arch = Arch.from_hf(models / "llama3")
    first = InitialFactors(arch, Lora(64), seed=5)
    module = "model.layers.1.self_attn.q_proj"
    a = first.read(module, "A")
    bound = 1 / math.sqrt(arch.hidden_size)
    assert a.shape == (64, arch.hidden_size) and a.abs().max() <= bound
    # Uniform: its variance is bound^2 / 3.
    assert a.var() == pytest.approx(bound**2 / 3, rel=0.1)
    assert torch.equal(first.read(module, "B"), torch.zeros(arch.hidden_size, 64))
    assert torch.equal(a, InitialFactors(arch, Lora(64), seed=5).read(module, "A"))
    for other in (InitialFactors(arch, Lora(64), seed=6).read(module, "A"), first.read(module.replace("1", "2"), "A")):
        assert not torch.equal(a, other)


def test_scale_numbers_and_defaults(models):
    assert Lora(8, targets=("v", "experts", "q")) == Lora(8, targets=["q", "v", "experts"])
    assert Lora(8, 32).scale == 4 and Lora(16, 32, rslora=True).scale == 8
    arch = Arch.from_hf(models / "llama3")
    lora = Lora(2, targets=("q", "down"))
    h, f = arch.hidden_size, arch.ffn_hidden_size
    assert adapter_numbers(arch, lora) == arch.num_layers * 2 * ((h + h) + (f + h))
    assert default_targets(arch) == DENSE
    assert default_targets(Arch.from_hf(models / "qwen3_moe")) == ("q", "k", "v", "o")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(rank=0), "--lora-rank: expected 1 or more, got 0"),
        (dict(rank=4, alpha=0), "--lora-alpha: expected a number above 0, got 0"),
        (dict(rank=4, alpha=math.nan), "--lora-alpha"),
        (dict(rank=4, dropout=1.0), "--lora-dropout: expected at least 0 and below 1, got 1.0"),
        (dict(rank=4, targets=("q", "query")), "--lora-targets: expected some of q, k, v, .* got query"),
        (dict(rank=4, targets=()), "got none"),
        (dict(rank=4, targets=("q", "q")), "expected each once, got q q"),
    ],
)
def test_numbers_that_are_none_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Lora(**numbers)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama3", ("experts",), "--lora-targets experts: it has no such layer in a llama model"),
        ("gpt_oss", ("q", "gate"), "--lora-targets gate: it has no such layer"),
        ("gpt_oss", ("experts",), "no expert has a tensor of its own in a gpt_oss model"),
        ("phi3", ("q", "v"), "a phi3 model has one projection for q, k, v: give all of them"),
        ("phi3", ("up",), "one projection for gate, up"),
        ("deepseek_v3", ("q", "k"), "one projection for k, v"),
    ],
)
def test_targets_that_a_model_does_not_have_are_refused(models, name, targets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_targets(Arch.from_hf(models / name), Lora(4, targets=targets))


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_is_read_as_it_was_written(models, tmp_path, name):
    arch = Arch.from_hf(models / name)
    lora, tensors = Lora(3, 7.5, 0.25, True, MODELS[name]), {}
    tensors = random_factors(arch, lora)
    written = write_peft(tmp_path / "adapters", arch, lora, tensors, base=("abc", "torch.bfloat16"))
    found = peft.PeftDirectory(written, arch)
    assert (found.lora, found.base) == (lora, ("abc", "torch.bfloat16"))
    for module in adapted_modules(arch, lora):
        for factor in "AB":
            assert torch.equal(found.read(module, factor), tensors[peft.tensor_name(module, factor)])


def test_target_modules_name_adapted_layers_alone(models):
    """PEFT takes a name for every module that ends with it."""
    for name, targets in MODELS.items():
        arch = Arch.from_hf(models / name)
        for some in (targets, targets[:1], targets[1:]):
            try:
                check_targets(arch, lora := Lora(1, targets=some))
            except ValueError:
                continue
            names = peft.target_modules(arch, lora)
            every = {module for t in peft.TARGETS for module in adapted_modules(arch, Lora(1, targets=(t,)))}
            matched = {module for module in every if any(module.endswith(f".{name}") for name in names)}
            assert matched == set(adapted_modules(arch, lora)), (name, some, names)


def changed(key, value):
    return lambda config, tensors: config.update({key: value})


def renamed(config, tensors):
    tensors["base_model.model.model.layers.0.self_attn.w_proj.lora_A.weight"] = tensors.popitem()[1]


def of_another_rank(config, tensors):
    tensors[next(iter(tensors))] = torch.zeros(5, 7)


def without_a_layer(config, tensors):
    for name in [name for name in tensors if ".layers.1.self_attn.q_proj." in name]:
        del tensors[name]


def not_a_number(config, tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].fill_(math.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("peft_type", "IA3"), "expected peft_type LORA, got 'IA3'"),
        (changed("use_dora", True), "use_dora True is not plain LoRA"),
        (changed("bias", "all"), "bias 'all' is not plain LoRA"),
        (changed("modules_to_save", ["lm_head"]), "modules_to_save"),
        (changed("layers_to_transform", [0]), "layers_to_transform"),
        (changed("init_lora_weights", "pissa_niter_16"), "has changed the model's weights as well"),
        (changed("rank_pattern", {"q_proj": 8}), "expected one rank and alpha for all layers"),
        (changed("r", "8"), "expected r to be a number of 1 or more, got '8'"),
        (changed("lora_alpha", -1), "expected lora_alpha to be a number above 0, got -1"),
        (changed("lora_dropout", 2), "expected lora_dropout of at least 0"),
        (renamed, "no such layer: these are the adapters of another model"),
        (of_another_rank, "of shape .* got .*5, 7.*: the adapters are those of another model"),
        (without_a_layer, "expected an adapter for model.layers.1.self_attn.q_proj, as its like have one"),
        (not_a_number, "expected finite numbers, got NaN or infinity in .*q_proj.lora_A"),
    ],
)
def test_a_directory_of_another_kind_is_refused(models, tmp_path, change, message):
    arch, lora = Arch.from_hf(models / "llama3"), Lora(4)
    folder = write_peft(tmp_path / "adapters", arch, lora)
    config, tensors = json.loads((folder / peft.CONFIG).read_text()), load_file(folder / peft.WEIGHTS)
    change(config, tensors)
    (folder / peft.CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / peft.WEIGHTS)
    with pytest.raises(ValueError, match=message):
        found = peft.PeftDirectory(folder, arch)
        for module in adapted_modules(arch, lora):
            found.read(module, "A")


def test_a_directory_that_is_none_is_refused(models, tmp_path):
    arch = Arch.from_hf(models / "llama3")
    with pytest.raises(ValueError, match="expected a PEFT directory with adapter_config.json, found none"):
        peft.PeftDirectory(models / "llama3", arch)
    folder = write_peft(tmp_path / "adapters", arch, Lora(4))
    (folder / peft.WEIGHTS).write_bytes(b"PK\x03\x04 a pickle, not read")
    with pytest.raises(ValueError, match="expected a safetensors file, got"):
        peft.PeftDirectory(folder, arch)
    (folder / peft.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="expected adapter_model.safetensors, found none"):
        peft.PeftDirectory(folder, arch)
    other = write_peft(tmp_path / "other", Arch.from_hf(models / "qwen3"), Lora(4))
    with pytest.raises(ValueError, match="those of another model|adapters of another model"):
        peft.PeftDirectory(other, arch)
