"""The export: bit for bit, complete or absent."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_models import CASES, VOCAB, assert_same_bits, edit_json, make_model
from safetensors import safe_open
from safetensors.torch import load_file

from qtarget_megatron.checkpoint import (
    Architecture,
    HFExport,
    HFReader,
    check_output_directory,
    hf_tensor_shapes,
    plan_shards,
)

TOKENIZER = {
    "tokenizer.json": '{"model": 1}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "vocab.txt": "a\n",
    "merges.txt": "a b\n",
    "tokenizer.model": "\0binary",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
NOT_COPIED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "modeling.py", "optimizer.pt")


def make_source(directory: Path, case: str, dtype=torch.bfloat16, max_shard_size="5GB") -> Path:
    make_model(case, dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    config = directory / "config.json"
    config.write_text(config.read_text() + "\n\n")  # bytes that no JSON writer would reproduce
    for name, content in TOKENIZER.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)
    for name in NOT_COPIED:
        (directory / name).write_text("{}")
    return directory


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def two_stages(arch: Architecture) -> list[list[str]]:
    names = list(hf_tensor_shapes(arch))
    middle = next(i for i, name in enumerate(names) if name.startswith("model.layers.1."))
    return [names[:middle], names[middle:]]


def start_export(source: Path, out: Path, *, stages=None, dtype=None, max_shard_bytes=5e9):
    arch = Architecture.from_hf(source)
    plan = plan_shards(
        arch,
        dtype or arch.dtype,
        stages=stages or [list(hf_tensor_shapes(arch))],
        max_shard_bytes=max_shard_bytes,
    )
    export = HFExport(out, source, arch, plan, temporary_name=".export-7", dtype=dtype)
    return export, plan


def run_export(source: Path, out: Path, *, dtype=None, **keywords):
    """Begin, write every shard from the source's tensors, finish; returns the plan."""
    export, plan = start_export(source, out, dtype=dtype, **keywords)
    export.begin()
    with HFReader(source) as reader:
        for file, names in plan:
            export.write_shard(file, {n: reader.read(n).to(dtype or reader.dtype(n)) for n in names})
    assert not out.exists() or not list(out.iterdir())
    export.finish()
    assert not export.temporary_dir.exists()
    return plan


@pytest.fixture
def llama(tmp_path):
    return make_source(tmp_path / "source", "llama", torch.float32)


@pytest.mark.parametrize("layout", ["one-file", "stages", "many"])
@pytest.mark.parametrize("case", CASES)
def test_export_is_the_source_bit_for_bit_and_transformers_loads_it(tmp_path, case, layout):
    source = make_source(tmp_path / "source", case, max_shard_size="20KB")
    arch, out = Architecture.from_hf(source), tmp_path / "out"
    stages = None if layout == "one-file" else two_stages(arch)
    plan = run_export(source, out, stages=stages, max_shard_bytes=20_000 if layout == "many" else 5e9)

    weights = {file for file, _ in plan}
    index = set() if layout == "one-file" else {"model.safetensors.index.json"}
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == weights | index | {"config.json", "generation_config.json"} | TOKENIZER.keys()
    assert len(weights) == {"one-file": 1, "stages": 2}.get(layout, len(weights))
    assert_same_bits(read_tensors(out), read_tensors(source))
    for name in ["config.json", "generation_config.json", *TOKENIZER]:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    for file in weights:
        with safe_open(out / file, framework="pt") as stream:
            assert stream.metadata() == {"format": "pt"}

    tokens = torch.arange(2 * 9).reshape(2, 9) * 7 % VOCAB
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        assert torch.equal(load(out)(tokens).logits, load(source)(tokens).logits)


def test_index_lists_every_tensor_and_the_total_size(llama, tmp_path):
    out = tmp_path / "out"
    plan = run_export(llama, out, max_shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = read_tensors(out)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {name: file for file, names in plan for name in names}
    assert index["weight_map"].keys() == tensors.keys()
    HFReader(out)


def test_plan_fills_shards_up_to_the_limit_within_a_stage(llama):
    arch = Architecture.from_hf(llama)
    shapes = hf_tensor_shapes(arch)
    stages = two_stages(arch)
    plan = plan_shards(arch, torch.float32, stages=stages, max_shard_bytes=20_000)
    assert [file for file, _ in plan] == [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    assert [name for _, names in plan for name in names] == stages[0] + stages[1]
    sizes = [[4 * torch.Size(shapes[n]).numel() for n in names] for _, names in plan]
    for (_, names), size, following in zip(plan, sizes, sizes[1:] + [[]], strict=True):
        assert set(names) <= set(stages[0]) or set(names) <= set(stages[1])
        assert sum(size) <= 20_000 or len(size) == 1  # the embedding alone is larger
        last_of_stage = names[-1] in (stages[0][-1], stages[1][-1])
        assert last_of_stage or sum(size) + following[0] > 20_000
    # half the bytes per value, fewer files
    assert len(plan_shards(arch, torch.bfloat16, stages=stages, max_shard_bytes=20_000)) < len(plan)
    assert plan_shards(arch, torch.float32, stages=[list(shapes), []]) == [("model.safetensors", list(shapes))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [names[1:]], "without model.embed_tokens.weight"),
        (lambda names: [names, ["extra"]], "with the unknown extra"),
        (lambda names: [names, names[-1:]], "with a repeated lm_head.weight"),
    ],
)
def test_plan_refuses_stages_that_do_not_cover_the_model_once(llama, change, message):
    arch = Architecture.from_hf(llama)
    with pytest.raises(ValueError, match=message):
        plan_shards(arch, arch.dtype, stages=change(list(hf_tensor_shapes(arch))))


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_another_dtype_changes_the_weights_and_only_that_entry_of_the_config(llama, tmp_path, keys):
    spelling = {key: "float32" if key in keys else ... for key in ("dtype", "torch_dtype")}
    edit_json(llama / "config.json", **spelling)
    before = json.loads((llama / "config.json").read_text())
    run_export(llama, tmp_path / "out", dtype=torch.float16)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = before | dict.fromkeys(keys or ("torch_dtype",), "float16")
    assert list(after.items()) == list(expected.items())
    truth = {name: t.half() for name, t in read_tensors(llama).items()}
    assert_same_bits(read_tensors(tmp_path / "out"), truth)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16


def test_links_in_the_source_become_files(llama, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for path in [p for p in llama.iterdir() if p.is_file()]:
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    run_export(llama, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a\n"


def test_weight_files_have_the_mode_of_any_new_file(llama, tmp_path):
    (tmp_path / "ordinary").touch()
    run_export(llama, tmp_path / "out")
    modes = {p.stat().st_mode for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


def test_shards_that_differ_from_the_plan_are_refused(llama, tmp_path):
    export, [(file, names)] = start_export(llama, tmp_path / "out")
    export.begin()
    tensors = read_tensors(llama)
    norm = "model.norm.weight"
    for wrong, message in (
        ({n: t for n, t in tensors.items() if n != norm}, "differs in model.norm.weight"),
        (tensors | {"extra": torch.ones(1)}, "differs in extra"),
        (tensors | {norm: torch.ones(47)}, r"torch.float32 \[48\], got torch.float32 \[47\]"),
        (tensors | {norm: tensors[norm].half()}, r"got torch.float16 \[48\]"),
    ):
        with pytest.raises(ValueError, match=message):
            export.write_shard(file, wrong)
    with pytest.raises(ValueError, match="planned files, got 'other.safetensors'"):
        export.write_shard("other.safetensors", tensors)
    assert not list(export.temporary_dir.iterdir())


def test_interrupted_exports_leave_no_final_directory(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export, plan = start_export(llama, out, max_shard_bytes=20_000)
    export.begin()
    tensors = read_tensors(llama)
    for file, names in plan[:-1]:
        export.write_shard(file, {n: tensors[n] for n in names})
    with pytest.raises(ValueError, match=f"expected the shard {plan[-1][0]}, found none"):
        export.finish()
    file, names = plan[-1]
    export.write_shard(file, {n: tensors[n] for n in names})
    whole = (export.temporary_dir / file).read_bytes()
    (export.temporary_dir / file).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated"):
        export.finish()
    assert not out.exists()
    (export.temporary_dir / file).write_bytes(whole)

    again, _ = start_export(llama, out)
    with pytest.raises(ValueError, match="interrupted export; delete it"):
        again.begin()

    def power_cut(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power_cut)
        with pytest.raises(OSError, match="power cut"):
            export.finish()
    assert not out.exists()
    export.finish()
    assert_same_bits(read_tensors(out), tensors)


def test_output_directory_must_be_new_or_empty(llama, tmp_path):
    for good in (tmp_path / "new", tmp_path / "empty"):
        check_output_directory(good)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    run_export(llama, tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for bad, message in (
        (tmp_path / "empty", "new or empty directory, got one with files"),
        (llama, "new or empty directory, got one with files"),
        (llama / "config.json", "got a file or link"),
        (tmp_path / "link", "got a file or link"),
        (tmp_path / "a" / "b", "expected its parent"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output_directory(bad)
        with pytest.raises(ValueError, match=message):
            start_export(llama, bad)


@pytest.mark.parametrize("name", ["out", "a/b", "..", ""])
def test_temporary_name_must_be_a_plain_other_name(llama, tmp_path, name):
    arch = Architecture.from_hf(llama)
    with pytest.raises(ValueError, match="expected a plain folder name"):
        HFExport(tmp_path / "out", llama, arch, [], temporary_name=name)
