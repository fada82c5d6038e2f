"""The export: bit for bit, complete or absent."""

import errno
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_models import CASES, assert_same_bits, edit_json, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtarget_megatron.huggingface import Architecture, HFExport, HFReader, hf_tensor_shapes, plan_shards
from qtarget_megatron.huggingface.weights.safetensors_file import PlannedTensor, SafetensorsFile
from qtarget_megatron.resumable import check_output_directory
from tools.first_hour.families import VOCAB

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


def start_export(source: Path, out: Path, *, stages=None, dtype=None, max_shard_bytes=5e9, made_from=None):
    arch = Architecture.from_hf(source)
    plan = plan_shards(
        arch,
        dtype or arch.dtype,
        stages=stages or [list(hf_tensor_shapes(arch))],
        max_shard_bytes=max_shard_bytes,
    )
    export = HFExport(out, source, arch, plan, made_from=made_from, dtype=dtype)
    return export, plan


def in_pieces(tensors: dict, rows: int = 7):
    """What write_shard takes: every tensor some rows at a time."""
    return ((name, iter(tensor.split(rows))) for name, tensor in tensors.items())


def run_export(source: Path, out: Path, *, dtype=None, **keywords):
    """Begin, write every shard from the source's tensors, finish; returns the plan."""
    export, plan = start_export(source, out, dtype=dtype, **keywords)
    export.begin()
    with HFReader(source) as reader:
        for file, names in plan:
            export.write_shard(file, in_pieces({n: reader.read(n).to(dtype or reader.dtype(n)) for n in names}))
    assert not out.exists() or not list(out.iterdir())
    digests = export.finish()
    assert not export.directory.folder.exists()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert digests == {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return plan


@pytest.fixture
def llama(tmp_path):
    return make_source(tmp_path / "source", "llama", torch.float32)


# What a family adds are names and dtypes, which every way of sharing tensors out to files has.
EXPORTED = [*((case, "many") for case in CASES), *((case, "stages") for case in ("llama", "deepseek_v3"))]
EXPORTED += [(case, "one-file") for case in ("llama", "llama-tied", "mixtral")]


@pytest.mark.parametrize(("case", "layout"), EXPORTED)
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


def as_hub_cache(source: Path, cache: Path) -> Path:
    """The directory as the hub's cache lays it out: links of a snapshot to files named by their digest."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "0f1e", cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(source.rglob("*")) if p.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(os.path.relpath(blobs, link.parent)) / str(number))
    return snapshot


def test_links_of_the_hub_cache_become_files(llama, tmp_path):
    snapshot = as_hub_cache(llama, tmp_path / "cache")
    (tmp_path / "alias").symlink_to(snapshot)
    for number, source in enumerate((snapshot, tmp_path / "alias")):
        out = tmp_path / f"out{number}"
        run_export(source, out)
        assert not [path for path in out.rglob("*") if path.is_symlink()]
        assert (out / "vocab.txt").read_text() == "a\n"
        assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
        assert_same_bits(read_tensors(out), read_tensors(llama))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja", "config.json"])
def test_nothing_from_outside_of_the_source_is_exported(llama, tmp_path, name):
    """A link in a downloaded model must not publish a file of the machine."""
    secret = tmp_path / "secret"
    secret.write_text((llama / name).read_text())
    (llama / name).unlink()
    (llama / name).symlink_to(secret)
    with pytest.raises(
        ValueError, match=rf"{Path(name).name}: expected a file of that directory, got a link to .*secret"
    ) as error:
        run_export(llama, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


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
        ({n: t for n, t in tensors.items() if n != norm}, "all but model.norm.weight"),
        (tensors | {"extra": torch.ones(1)}, "got extra as well"),
        (tensors | {norm: torch.ones(47)}, r"torch.float32 \[48\], got torch.float32 \[47\]"),
        (tensors | {norm: torch.ones(49)}, r"torch.float32 \[48\], got torch.float32 \[49\]"),
        (tensors | {norm: tensors[norm].half()}, r"got torch.float16 \[7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            export.write_shard(file, in_pieces(wrong))
        assert not export.holds_shard(file)
        with pytest.raises(ValueError, match=f"expected the shard {file}, found none"):
            export.finish()
    with pytest.raises(ValueError, match="planned files, got 'other.safetensors'"):
        export.write_shard("other.safetensors", in_pieces(tensors))


@pytest.mark.parametrize("dtypes", [["float32"], ["bfloat16"], ["float16"], ["bfloat16", "float32"]])
def test_a_file_is_byte_for_byte_what_the_library_writes(tmp_path, dtypes):
    """Written in another order, in pieces, for 1 to 9 tensors, so that every padding of the header occurs."""
    shapes = {"b.10.weight": (5, 3), "b.9.weight": (2, 2, 2), "a": (7,), "ü.weight": (0, 4), "b.9.bias": (1,)}
    shapes |= {f"c{'c' * i}": (i + 1,) for i in range(4)}
    for count in range(1, len(shapes) + 1):
        tensors = {
            name: torch.randn(shape).to(getattr(torch, dtype))
            for (name, shape), dtype in zip(list(shapes.items())[:count], itertools.cycle(dtypes), strict=False)
        }
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        planned = {name: PlannedTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        with SafetensorsFile(tmp_path / "ours", planned) as file:
            for name, pieces in in_pieces(tensors, rows=2):
                assert file.write(name, pieces) == tensors[name].nbytes
            file.check_complete()
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def begun(llama, out, count, made_from, **keywords):
    """An export that ended after so many files."""
    export, plan = start_export(llama, out, max_shard_bytes=20_000, made_from=made_from, **keywords)
    export.begin()
    tensors = read_tensors(llama)
    for file, names in plan[:count]:
        export.write_shard(file, in_pieces({n: tensors[n].to(keywords.get("dtype", torch.float32)) for n in names}))
    return export, plan


def test_an_interrupted_export_looks_like_no_model_and_goes_on(llama, tmp_path):
    out, tensors = tmp_path / "out", read_tensors(llama)
    export, plan = begun(llama, out, 3, {"--load": "x"})
    torn = export.directory.folder / plan[3][0]
    torn.write_bytes((export.directory.folder / plan[2][0]).read_bytes()[:-1])
    assert not out.exists()
    for look in (HFReader, Architecture.from_hf):
        with pytest.raises(ValueError, match="expected a config.json, found none"):
            look(export.directory.folder)

    again, _ = begun(llama, out, 0, {"--load": "x"})
    damaged = again.directory.folder / plan[1][0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert [again.holds_shard(file) for file, _ in plan[:5]] == [True, False, True, False, False]
    kept = (again.directory.folder / plan[0][0]).stat().st_mtime_ns
    for file, names in plan:
        if not again.holds_shard(file):
            again.write_shard(file, in_pieces({n: tensors[n] for n in names}))
    again.finish()
    assert (out / plan[0][0]).stat().st_mtime_ns == kept
    assert_same_bits(read_tensors(out), tensors)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_files_of_another_export_are_refused_or_replaced_and_never_taken(llama, tmp_path):
    out = tmp_path / "out"
    export, plan = begun(llama, out, 2, {"--load": "x", "--hf-model": "m"})
    for made_from, keywords, message in (
        ({"--load": "y", "--hf-model": "m"}, {}, "begun with a different --load: go on with the same, or delete it"),
        ({"--load": "x", "--hf-model": "m"}, {"dtype": torch.float16}, "a different dtype, number of pipeline stages"),
        (
            {"--load": "x", "--hf-model": "m"},
            {"stages": two_stages(Architecture.from_hf(llama))},
            "a different number of pipeline stages",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            begun(llama, out, 0, made_from, **keywords)
        assert "\n" not in str(error.value)
    assert export.holds_shard(plan[0][0])
    # Weights of unknown origin, as after training: nothing of an earlier export is of use.
    trained, _ = begun(llama, out, 0, None)
    assert not trained.holds_shard(plan[0][0])
    begun(llama, out, 1, None)
    once_more, _ = begun(llama, out, 0, None)
    assert not once_more.holds_shard(plan[0][0])


def test_an_export_appears_only_with_all_shards_whole(llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export, plan = begun(llama, out, -1, None)
    tensors = read_tensors(llama)
    file, names = plan[-1]
    with pytest.raises(ValueError, match=f"expected the shard {file}, found none"):
        export.finish()
    export.write_shard(file, in_pieces({n: tensors[n] for n in names}))
    whole = (export.directory.folder / file).read_bytes()
    (export.directory.folder / file).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated"):
        export.finish()
    assert not out.exists()
    (export.directory.folder / file).write_bytes(whole)

    def power_cut(*_):
        raise OSError("power cut")

    for part in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, part, power_cut)
            with pytest.raises(OSError, match="power cut"):
                export.finish()
        assert not out.exists()
    export.finish()
    assert_same_bits(read_tensors(out), tensors)


def test_a_disk_that_is_too_small_is_one_line_before_anything_is_written(llama, tmp_path, monkeypatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    export, _ = start_export(llama, tmp_path / "out")
    with pytest.raises(ValueError, match="GB of free disk space for what is to be written, found 0.0 GB") as error:
        export.begin()
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line(llama, tmp_path, monkeypatch):
    export, [(file, _)] = start_export(llama, tmp_path / "out")
    export.begin()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ValueError, match=f"{file}: No space left on device; run again to go on"):
        export.write_shard(file, in_pieces(read_tensors(llama)))


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
