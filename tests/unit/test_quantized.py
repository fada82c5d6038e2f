"""Quantised checkpoints are read as the bfloat16 tensors that they stand for, a slice at a time."""

import json
import random
import shutil

import pytest
import torch
import transformers
from checkpoint_models import PADDED, assert_same_bits, edit_json, make_model
from quantized_models import BLOCK, dequantize_blocks, quantize_blocks, write_fp8
from safetensors.torch import load_file, save_file

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
    directory, expected = quantized
    shutil.copy(directory / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=...)
    save_file(expected, tmp_path / "model.safetensors")
    arch = Architecture.from_hf(directory)
    assert arch == Architecture.from_hf(tmp_path)
    names = ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_kv_up_proj.weight"]
    names += ["self_attention.linear_proj.weight", "input_layernorm.weight"]
    names = [f"decoder.layers.0.{name}" for name in names] + ["output_layer.weight"]
    names += [f"decoder.layers.1.mlp.experts.linear_fc{part}.weight3" for part in (1, 2)]
    for rank in range(tp):
        place = dict(layer_offset=0, tp_rank=rank, tp_size=tp, padded_vocab_size=PADDED)
        for name in names:
            ours, theirs = (load_parameter(HFReader(d), arch, name, **place) for d in (directory, tmp_path))
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name


def test_transformers_dequantizes_to_the_same_bits(tmp_path, plain):
    """Where whole blocks make up a matrix; it takes no others."""
    expected = write_fp8(plain, tmp_path / "fp8", block=(4, 4))
    shutil.copytree(plain, tmp_path / "stood-for")
    for file in (tmp_path / "stood-for").glob("*.safetensors"):
        save_file({name: expected[name] for name in load_file(file)}, file, metadata={"format": "pt"})
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = [dict(load(tmp_path / name, dtype=torch.bfloat16).state_dict()) for name in ("fp8", "stood-for")]
    assert_same_bits(*found)


def test_the_comparison_with_transformers_takes_it(tmp_path, plain):
    """Blocks that no matrix divides by, under a model_type that transformers does not know, with a layer that predicts
    further tokens."""
    expected = write_fp8(plain, tmp_path / "fp8", model_type="kimi_k2")
    further = load_file(sorted((tmp_path / "fp8").glob("*.safetensors"))[0])
    spare = {f"model.layers.3.{i}": tensor.clone() for i, tensor in enumerate(further.values())}
    index = tmp_path / "fp8" / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | dict.fromkeys(spare, "spare.safetensors"))
    save_file(spare, tmp_path / "fp8" / "spare.safetensors")
    reader, arch = HFReader(tmp_path / "fp8"), Architecture.from_hf(tmp_path / "fp8")
    check_tensors(reader, arch)
    edit_json(tmp_path / "fp8" / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="unexpected: model.layers.3.0"):
        check_tensors(reader, Architecture.from_hf(tmp_path / "fp8"))
    shutil.copytree(plain, tmp_path / "stood-for")
    for file in (tmp_path / "stood-for").glob("*.safetensors"):
        save_file({name: expected[name] for name in load_file(file)}, file, metadata={"format": "pt"})
    ids = list(range(20))
    assert torch.equal(transformers_logits(tmp_path / "fp8", ids), transformers_logits(tmp_path / "stood-for", ids))


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
