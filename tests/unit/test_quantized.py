"""Quantised checkpoints are read as the bfloat16 tensors that they stand for, a slice at a time."""

import json
import random
import shutil

import pytest
import torch
import transformers
from checkpoint_models import PADDED, assert_same_bits, edit_json, make_model
from quantized_models import BLOCK, dequantize_blocks, quantize_blocks, stands_for, write_fp8, write_mxfp4
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qtarget_megatron.huggingface import (
    Architecture,
    HFExport,
    HFReader,
    check_tensors,
    hf_tensor_shapes,
    load_parameter,
    plan_shards,
    transformers_logits,
)
from tools.first_hour.families import VOCAB

MATRIX = "model.layers.1.mlp.experts.3.down_proj.weight"  # [48, 24], in blocks of 10 x 7


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    make_model("deepseek_v3").save_pretrained(directory, max_shard_size="60KB")
    return directory


@pytest.fixture(scope="module")
def quantized(plain):
    """(directory, the tensors that it stands for)."""
    directory = plain.parent / "quantized"
    return directory, write_fp8(plain, directory)


def test_a_quantized_checkpoint_has_the_tensors_that_it_stands_for(quantized):
    directory, expected = quantized
    reader, arch = HFReader(directory), Architecture.from_hf(directory)
    check_tensors(reader, arch)
    assert {name: reader.shape(name) for name in reader.names} == dict(hf_tensor_shapes(arch))
    assert {name: reader.dtype(name) for name in reader.names} == {name: t.dtype for name, t in expected.items()}
    assert_same_bits({name: reader.read(name) for name in reader.names}, expected)
    with HFReader(directory) as fresh:
        fresh.read(MATRIX)
        assert fresh.bytes_read == 48 * 24 + 5 * 4 * 4


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(1, 1), (3, 50), BLOCK, (128, 128)])
def test_any_slice_is_that_of_the_whole_and_reads_its_own_bytes_only(tmp_path, block, scales):
    values, factors = quantize_blocks(torch.randn(48, 24, generator=torch.Generator().manual_seed(1)), block)
    factors = factors.to(scales)
    save_file({MATRIX: values, f"{MATRIX}_scale_inv": factors}, tmp_path / "model.safetensors")
    how = dict(quant_method="fp8", weight_block_size=list(block))
    (tmp_path / "config.json").write_text(json.dumps(dict(quantization_config=how)))
    expected = dequantize_blocks(values, factors, block)
    draw = random.Random(1)
    with HFReader(tmp_path) as reader:
        for _ in range(60):
            ranges = [tuple(sorted(draw.randint(0, size) for _ in range(2))) for size in expected.shape]
            rows, cols = (draw.choice([span, None]) for span in ranges)
            (a, b), (c, d) = rows or (0, 48), cols or (0, 24)
            before = reader.bytes_read
            assert torch.equal(reader.read(MATRIX, rows=rows, cols=cols), expected[a:b, c:d])
            touched = len({i // block[0] for i in range(a, b)}) * len({j // block[1] for j in range(c, d)})
            assert reader.bytes_read - before == (b - a) * (d - c) + scales.itemsize * touched


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_ranks_get_the_shards_of_the_tensors_that_it_stands_for(tmp_path, quantized, tp):
    directory = tmp_path / "fp8"
    shutil.copytree(quantized[0], directory)
    plain, arch = stands_for(directory, quantized[1]), Architecture.from_hf(directory)
    assert arch == Architecture.from_hf(plain)
    names = ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_kv_up_proj.weight"]
    names += ["self_attention.linear_proj.weight", "input_layernorm.weight"]
    names = [f"decoder.layers.0.{name}" for name in names] + ["output_layer.weight"]
    names += [f"decoder.layers.1.mlp.experts.linear_fc{part}.weight3" for part in (1, 2)]
    for rank in range(tp):
        place = dict(layer_offset=0, tp_rank=rank, tp_size=tp, padded_vocab_size=PADDED)
        for name in names:
            ours, theirs = (load_parameter(HFReader(d), arch, name, **place) for d in (directory, plain))
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name


def test_transformers_dequantizes_to_the_same_bits(tmp_path, plain):
    """Where whole blocks make up a matrix; it takes no others."""
    other = stands_for(tmp_path / "fp8", write_fp8(plain, tmp_path / "fp8", block=(4, 4)))
    load = transformers.AutoModelForCausalLM.from_pretrained
    found, expected = (dict(load(path, dtype=torch.bfloat16).state_dict()) for path in (tmp_path / "fp8", other))
    # Some versions leave it to their user to round what they have dequantised.
    assert_same_bits({name: tensor.to(expected[name].dtype) for name, tensor in found.items()}, expected)


def test_the_comparison_with_transformers_takes_it(tmp_path, plain):
    """Blocks that no matrix divides by, under a model_type that transformers does not know, with a layer that predicts
    further tokens."""
    other = stands_for(tmp_path / "fp8", write_fp8(plain, tmp_path / "fp8", model_type="kimi_k2"))
    further = load_file(sorted((tmp_path / "fp8").glob("*.safetensors"))[0])
    spare = {f"model.layers.3.{i}": tensor.clone() for i, tensor in enumerate(further.values())}
    index = tmp_path / "fp8" / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | dict.fromkeys(spare, "spare.safetensors"))
    save_file(spare, tmp_path / "fp8" / "spare.safetensors")
    edit_json(tmp_path / "fp8" / "config.json", num_nextn_predict_layers=1)
    reader, arch = HFReader(tmp_path / "fp8"), Architecture.from_hf(tmp_path / "fp8")
    assert check_tensors(reader, arch) == sorted(spare)
    edit_json(tmp_path / "fp8" / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="unexpected: model.layers.3.0"):
        check_tensors(reader, Architecture.from_hf(tmp_path / "fp8"))
    ids = list(range(20))
    edit_json(other / "config.json", model_type="deepseek_v3")
    assert torch.equal(transformers_logits(tmp_path / "fp8", ids), transformers_logits(other, ids))


def test_the_export_is_not_quantized(tmp_path, quantized):
    directory, expected = quantized
    before = json.loads((directory / "config.json").read_text())
    arch = Architecture.from_hf(directory)
    plan = plan_shards(arch, arch.dtype, stages=[list(hf_tensor_shapes(arch))])
    export = HFExport(tmp_path / "out", directory, arch, plan)
    export.begin()
    with HFReader(directory) as reader:
        for file, names in plan:
            export.write_shard(file, ((name, [reader.read(name)]) for name in names))
    export.finish()
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == {key: value for key, value in before.items() if key != "quantization_config"}
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(torch.arange(VOCAB)[None, :40]).logits[0]
    assert torch.equal(logits, transformers_logits(directory, list(range(40))))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """(directory of mxfp4, the tensors that it stands for)."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=6, num_hidden_layers=1)
    make_model("gpt_oss", **sizes).save_pretrained(folder / "plain")
    return folder / "mxfp4", write_mxfp4(folder / "plain", folder / "mxfp4")


def test_four_bits_are_read_slice_by_slice_as_transformers_unpacks_them(gpt_oss):
    directory, expected = gpt_oss
    draw = random.Random(2)
    stored = load_file(directory / "model.safetensors")
    with HFReader(directory) as reader:
        arch = Architecture.from_hf(directory)
        check_tensors(reader, arch)
        assert_same_bits({name: reader.read(name) for name in reader.names}, expected)
        for name in ("gate_up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{name}"
            theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            assert torch.equal(reader.read(name), theirs)
            for _ in range(40):
                ranges = [tuple(sorted(draw.randint(0, size) for _ in range(2))) for size in theirs.shape]
                given = [draw.choice([span, None]) for span in ranges]
                slices = [slice(*(span or (None,))) for span in given]
                before = reader.bytes_read
                part = reader.read(name, **dict(zip(("rows", "cols", "last"), given, strict=True)))
                assert torch.equal(part, theirs[tuple(slices)])
                experts, (low, high), rows = (span or (0, n) for span, n in zip(given, theirs.shape, strict=True))
                scales = (experts[1] - experts[0]) * (rows[1] - rows[0]) * (-(-high // 32) - low // 32)
                assert reader.bytes_read - before == 17 * scales
    ids, plain = list(range(30)), stands_for(directory, expected)
    assert torch.equal(transformers_logits(directory, ids), transformers_logits(plain, ids))


@pytest.mark.parametrize("part", [1, 2])
def test_an_experts_shards_are_those_of_the_tensor_of_all(gpt_oss, part):
    """Of a rank whose first expert is the third one."""
    directory, expected = gpt_oss
    arch, reader = Architecture.from_hf(directory), HFReader(directory)
    name = f"decoder.layers.0.mlp.experts.linear_fc{part}."
    place = dict(layer_offset=0, expert_offset=2, tp_rank=1, tp_size=3, padded_vocab_size=PADDED)
    weight, bias = (load_parameter(reader, arch, name + kind, **place) for kind in ("weight1", "bias1"))
    source = "model.layers.0.mlp.experts." + ("gate_up_proj" if part == 1 else "down_proj")
    whole, added = expected[source][3], expected[f"{source}_bias"][3]
    if part == 1:
        # The second third of 96 rows each of gate and up, which take turns.
        rows = [2 * row for row in range(32, 64)] + [2 * row + 1 for row in range(32, 64)]
        assert torch.equal(weight, torch.stack([whole[:, row] for row in rows]))
        assert torch.equal(bias, torch.stack([added[row] for row in rows]))
    else:
        assert torch.equal(weight, whole[32:64].T) and torch.equal(bias, added)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}_scales"), "1 missing: {name}; 1 unexpected: {name}_blocks"),
        (lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"][:, :-1]}), "{name}_scales with one for each block"),
        (lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"].short()}), "got torch.uint8 .* and torch.int16"),
        (lambda t, n: t.update({n: torch.ones(1)}), "expected either {name} or {name}_blocks, got both"),
        (lambda t, n: t[f"{n}_scales"].fill_(255), "got NaN or infinity in {name}"),
    ],
)
def test_blocks_of_four_bits_that_do_not_fit_are_one_line(tmp_path, gpt_oss, change, message):
    source, name = gpt_oss[0], "model.layers.0.mlp.experts.down_proj"
    shutil.copytree(source, tmp_path / "mxfp4")
    tensors = load_file(source / "model.safetensors")
    change(tensors, name)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "mxfp4" / "model.safetensors")
    with pytest.raises(ValueError, match=message.format(name=name)) as error:
        reader = HFReader(tmp_path / "mxfp4")
        check_tensors(reader, Architecture.from_hf(tmp_path / "mxfp4"))
        reader.read(name)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def poison(tensors):
    tensors[MATRIX].view(torch.uint8)[5, 5] = 0x7F


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{MATRIX}_scale_inv"), "float, got torch.float8_e4m3fn"),
        (lambda t: t.update({f"{MATRIX}_scale_inv": torch.ones(5, 3)}), r"float32 or bfloat16 \[5, 4\].*\[5, 3\]"),
        (lambda t: t.update({f"{MATRIX}_scale_inv": torch.ones(5, 4).half()}), r"got torch.float16 \[5, 4\]"),
        (lambda t: t.update({MATRIX: torch.ones(48, 24)}), f"unexpected: {MATRIX}_scale_inv"),
        (lambda t: t.update({MATRIX: t[MATRIX].view(torch.float8_e5m2)}), f"unexpected: {MATRIX}_scale_inv"),
        (poison, f"got NaN or infinity in {MATRIX}"),
        (lambda t: t[f"{MATRIX}_scale_inv"].fill_(torch.inf), f"got NaN or infinity in {MATRIX}"),
    ],
)
def test_scales_and_values_that_do_not_fit_are_one_line(tmp_path, quantized, change, message):
    source, _ = quantized
    directory = tmp_path / "fp8"
    directory.mkdir()
    shutil.copy(source / "config.json", directory)
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        reader = HFReader(directory)
        check_tensors(reader, Architecture.from_hf(directory))
        reader.read(MATRIX)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def test_values_without_a_word_in_config_json_are_no_weights(tmp_path, quantized):
    shutil.copytree(quantized[0], tmp_path / "silent")
    edit_json(tmp_path / "silent" / "config.json", quantization_config=...)
    with pytest.raises(ValueError, match="unexpected.*scale_inv.*float, got torch.float8_e4m3fn"):
        check_tensors(HFReader(tmp_path / "silent"), Architecture.from_hf(tmp_path / "silent"))
