"""Conversion of models that fit no single process: what is read, what is held, and what an interruption leaves."""

import hashlib
import re

import pytest
import transformers
from checkpoint_models import assert_same_bits
from conversion_runs import read_tensors, run_all
from launching import run_ranks
from safetensors.torch import load_file, save_file

from qtarget_megatron.huggingface import Architecture, HFReader
from qtarget_megatron.resumable import ResumableDirectory
from tools.first_hour.families import write_model

# The first test of a launch waits for all of its jobs.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

TP2, TP4 = ["--tensor-model-parallel-size", 2], ["--tensor-model-parallel-size", 4]
PP2 = ["--pipeline-model-parallel-size", 2]
EP2, ETP1 = ["--expert-model-parallel-size", 2], ["--expert-tensor-parallel-size", 1]
LAYOUTS = {
    1: {"tp1": []},
    2: {"tp2": TP2, "pp2": PP2, "ep2": EP2, "tp2-ep2": [*TP2, *EP2, *ETP1]},
    4: {"tp4": TP4, "tp2-pp2": [*TP2, *PP2]},
}
LAYERS, HIDDEN, FFN, VOCABULARY = 4, 512, 2048, 12_288
# Its largest parameter, as a whole: the embedding, 25 of 112 MB. No vocabulary is padded.
LARGEST = VOCABULARY * HIDDEN * 4


def large(layout: str) -> str:
    """The model of a layout."""
    return "experts" if "ep2" in layout else "large"


def launch(world_size, jobs, timeout=240):
    """Results of every rank, by job."""
    jobs = {name: tuple(map(str, job)) for name, job in jobs.items()}
    results = run_ranks(world_size, run_all, (jobs,), timeout, megatron=True)
    return {name: [result[name] for result in results] for name in jobs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """large, experts: tensors that stand out from what a process allocates otherwise. small: of 16 files."""
    folder = tmp_path_factory.mktemp("scale")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "large", max_shard_size="40MB")
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY // 4,
        hidden_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts", max_shard_size="40MB")
    write_model(folder / "small", "qwen2", tied=False)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """By number of ranks; a launch each."""
    found = {}
    for world, layouts in LAYOUTS.items():
        jobs = {}
        for layout, words in layouts.items():
            jobs[f"reading {layout}"] = ("reading", folder / large(layout), *words)
            name = large(layout)
            paths = [folder / part for part in (name, f"ckpt-{name}-{layout}", f"out-{name}-{layout}")]
            jobs[f"memory {name} {layout}"] = ("memory", *paths, *words)
        if world == 1:
            source = ["--hf-model", folder / "small"]
            jobs["import"] = ("convert", "import", *source, "--save", folder / "ckpt")
        if world == 2:
            words = ["--hf-model", folder / "small", "--load", folder / "ckpt", "--save-hf", folder / "replicas"]
            jobs["replicas"] = ("written_files", *words, "--checksums", folder / "sums")
        found |= launch(world, jobs)
    return found


def share(name: str, tp: int) -> float:
    return 1 if "norm" in name or ".gate." in name else 1 / tp


def of_stage(name: str, stage: int, stages: int) -> bool:
    if layer := re.match(r"model\.layers\.(\d+)\.", name):
        return int(layer[1]) * stages // LAYERS == stage
    return stage == (0 if "embed_tokens" in name else stages - 1)


@pytest.mark.parametrize(
    ("layout", "tp", "pp"), [("tp1", 1, 1), ("tp2", 2, 1), ("tp4", 4, 1), ("pp2", 1, 2), ("tp2-pp2", 2, 2)]
)
def test_a_rank_reads_its_slices_and_not_a_byte_more(folder, runs, layout, tp, pp):
    sizes = {name: tensor.nbytes for name, tensor in read_tensors(folder / "large").items()}
    for rank, (counted, by_system) in enumerate(runs[f"reading {layout}"]):
        stage = rank // tp
        expected = sum(size * share(name, tp) for name, size in sizes.items() if of_stage(name, stage, pp))
        assert counted == expected
        # The headers of the files are read as well, and little else.
        assert counted < by_system < counted + 100_000


@pytest.mark.parametrize(("layout", "tp"), [("ep2", 1), ("tp2-ep2", 2)])
def test_a_rank_reads_its_own_experts_only(folder, runs, layout, tp):
    sizes = {name: tensor.nbytes for name, tensor in read_tensors(folder / "experts").items()}
    for rank, (counted, by_system) in enumerate(runs[f"reading {layout}"]):
        expected = 0.0
        for name, size in sizes.items():
            expert = re.search(r"experts\.(\d+)\.", name)
            expected += size * (share(name, tp) if expert is None else int(expert[1]) // 4 == rank)
        # The files' headers name more tensors.
        assert counted == expected and counted < by_system < counted + 200_000


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "tp4", "tp2-pp2", "ep2", "tp2-ep2"])
@pytest.mark.parametrize("way", ["import", "export"])
def test_a_rank_holds_its_shard_and_one_parameter(runs, way, layout):
    """torch's allocator, with 8 MB of buffers; resident memory, with what the libraries take for themselves as well."""
    ranks = [result[way] for result in runs[f"memory {large(layout)} {layout}"]]
    assert sum(shard for *_, shard in ranks) >= 110e6
    for peak, resident, shard in ranks:
        assert peak <= shard + LARGEST + 8e6
        assert resident <= shard + LARGEST + 20e6
        # Otherwise nothing was measured.
        assert peak >= 0.95 * shard and resident >= 0.8 * shard


def test_what_was_measured_was_converted(folder, runs):
    expected = {name: read_tensors(folder / name) for name in ("large", "experts")}
    for layouts in LAYOUTS.values():
        for layout in layouts:
            name = large(layout)
            assert_same_bits(read_tensors(folder / f"out-{name}-{layout}"), expected[name])


def test_replicas_share_the_files(folder, runs):
    first, second = (set(files) for files in runs["replicas"])
    assert not first & second
    files = {path.name for path in (folder / "replicas").glob("*.safetensors")}
    assert first | second == files and len(files) >= 8
    assert abs(len(first) - len(second)) <= 1
    assert_same_bits(read_tensors(folder / "replicas"), read_tensors(folder / "small"))


def test_checksums_are_of_every_file_and_as_sha256sum_reads_them(folder, runs):
    lines = (folder / "sums").read_text().splitlines()
    found = dict(reversed(line.split("  ")) for line in lines)
    files = [path for path in (folder / "replicas").rglob("*") if path.is_file()]
    assert found == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def looks_like_no_model(path):
    hidden = ResumableDirectory(path).folder
    assert hidden.is_dir() and not path.exists()
    for look in (HFReader, Architecture.from_hf):
        with pytest.raises(ValueError, match="expected a config.json, found none"):
            look(hidden)
    return hidden


@pytest.mark.parametrize("world", [1, 4])
def test_an_export_that_was_killed_goes_on_with_the_files_that_were_complete(folder, runs, world):
    out = folder / f"killed-{world}"
    words = ["--hf-model", folder / "small", "--load", folder / "ckpt", "--save-hf", out]
    words += [*TP2, *PP2] if world == 4 else []
    with pytest.raises(RuntimeError, match="ended without a result"):
        launch(world, {"killed": ("killed_export", 5, *words)})
    hidden = looks_like_no_model(out)
    complete = [path.name.removesuffix(".sha256") for path in (hidden / ".complete").glob("*.sha256")]
    assert len(complete) >= 5
    before = {file: (hidden / file).stat().st_mtime_ns for file in complete}

    refused = ["export", *words, "--bf16"]
    jobs = {"refused": ("convert", *refused), "again": ("written_files", *words)}
    found = launch(world, jobs)
    assert {code for code, _ in found["refused"]} == {2}
    line = found["refused"][0][1]
    assert "begun with a different dtype" in line and "\n" not in line
    written = [file for files in found["again"] for file in files]
    assert written and not set(written) & set(complete)
    assert {file: (out / file).stat().st_mtime_ns for file in complete} == before
    assert_same_bits(read_tensors(out), read_tensors(folder / "small"))
    assert not list(folder.glob(f".{out.name}*")) and not list(out.glob(".*"))


def test_an_import_that_was_killed_leaves_nothing_to_load_and_starts_anew(folder, runs):
    ckpt, out = folder / "killed-ckpt", folder / "killed-back"
    source = ["--hf-model", folder / "small"]
    with pytest.raises(RuntimeError, match="ended without a result"):
        launch(1, {"killed": ("killed_import", *source, "--save", ckpt)})
    assert not ckpt.exists()
    assert (ResumableDirectory(ckpt).folder / "latest_checkpointed_iteration.txt").exists()
    jobs = {
        "nothing": ("convert", "export", *source, "--load", ckpt, "--save-hf", out),
        "import": ("convert", "import", *source, "--save", ckpt),
        "export": ("convert", "export", *source, "--load", ckpt, "--save-hf", out),
    }
    found = launch(1, jobs)
    code, line = found["nothing"][0]
    assert code == 2 and "expected a Megatron checkpoint" in line
    assert [found[name][0][0] for name in ("import", "export")] == [0, 0]
    assert not list(folder.glob(".killed*"))
    assert sorted(path.name for path in ckpt.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    assert_same_bits(read_tensors(out), read_tensors(folder / "small"))


def test_a_large_file_is_what_the_library_writes(folder, runs, tmp_path):
    files = sorted((folder / "out-large-tp2-pp2").glob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        save_file(load_file(path), tmp_path / "theirs", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
