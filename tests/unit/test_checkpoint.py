"""Hugging Face checkpoints: slices, and the mapping to Megatron parameters and back.

The truth is transformers (tiny random models that it saves) and loops written out here.
"""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_models import CASES, PADDED, assert_same_bits, edit_json, make_model
from safetensors.torch import load_file, save_file

from qtarget_megatron.huggingface import (
    Architecture,
    HFReader,
    check_tensors,
    hf_names,
    hf_tensor_shapes,
    holds_all_experts,
    is_expert,
    load_parameter,
    merge_parameter,
    partition_dim,
)
from tools.first_hour.families import VOCAB

TP_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(directory in several shards, reader, architecture, {tensor name: tensor}) of one family."""
    directory = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param)
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    arch = Architecture.from_hf(directory)
    if arch.experts is not None:  # stacked in memory, one by one on disk
        files = sorted(directory.glob("*.safetensors"))
        return directory, HFReader(directory), arch, {n: t for file in files for n, t in load_file(file).items()}
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return directory, HFReader(directory), arch, tensors


@pytest.fixture
def llama(tmp_path):
    """A single-file fp32 Llama checkpoint that a test may damage."""
    directory = tmp_path / "source"
    make_model("llama", torch.float32).save_pretrained(directory)
    return directory


# The gate and up matrices of the first layer: Megatron's name, and those of both halves.
_MLP = ("decoder.layers.0.mlp.linear_fc1.weight", "mlp.gate_proj", "mlp.up_proj")
GATE_UP = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v3"), _MLP) | {
    "mixtral": (
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight",
        "block_sparse_moe.experts.3.w1",
        "block_sparse_moe.experts.3.w3",
    ),
    "phi3": (_MLP[0], "mlp.gate_up_proj"),
    "gpt_oss": ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight",),
}


def megatron_names(arch: Architecture, engine: str) -> list[str]:
    """What named_parameters() of a GPTModel lists, for the local or Transformer Engine layers."""
    names = ["embedding.word_embeddings.weight"]
    for i in range(arch.num_layers):
        layer, attention = f"decoder.layers.{i}", f"decoder.layers.{i}.self_attention"
        local = engine == "local"
        has_experts = arch.experts is not None and arch.experts.layers[i]
        mlp_norm = "pre_mlp_layernorm.weight" if local or has_experts else "mlp.linear_fc1.layer_norm_weight"
        in_linear = not local and arch.latent is None
        names.append(f"{attention}.linear_qkv.layer_norm_weight" if in_linear else f"{layer}.input_layernorm.weight")
        names += [f"{attention}.linear_proj.weight", f"{layer}.{mlp_norm}"]
        if arch.latent is None:
            names.append(f"{attention}.linear_qkv.weight")
        else:
            norms = ("q_layernorm.weight", "kv_layernorm.weight")
            norms = norms if local else ("linear_q_up_proj.layer_norm_weight", "linear_kv_up_proj.layer_norm_weight")
            linears = (f"linear_{part}_{way}_proj.weight" for part in ("q", "kv") for way in ("down", "up"))
            names += [f"{attention}.{part}" for part in (*norms, *linears)]
        if has_experts:
            names.append(f"{layer}.mlp.router.weight")
            names += [f"{layer}.mlp.router.expert_bias"] if arch.experts.has_correction else []
            if arch.experts.shared_ffn_hidden_size is not None:
                names += [f"{layer}.mlp.shared_experts.linear_fc{part}.weight" for part in (1, 2)]
            names += [f"{layer}.mlp.shared_experts.gate_weight"] if arch.experts.shared_weight else []
            names += [f"{layer}.mlp.router.bias"] if arch.experts.bias else []
            parts = ("weight", "bias") if arch.experts.bias else ("weight",)
            linears = itertools.product(("linear_fc1", "linear_fc2"), parts, range(arch.experts.count))
            for linear, part, expert in linears:
                inner = f"local_experts.{expert}.{linear}.{part}" if local else f"{linear}.{part}{expert}"
                names.append(f"{layer}.mlp.experts.{inner}")
        else:
            names += [f"{layer}.mlp.linear_fc1.weight", f"{layer}.mlp.linear_fc2.weight"]
        if arch.qkv_bias:
            names.append(f"{attention}.linear_qkv.bias")
        if arch.output_bias:
            names.append(f"{attention}.linear_proj.bias")
        if arch.sinks:
            names.append(f"{attention}.core_attention.softmax_offset")
        if arch.mlp_bias and not has_experts:
            names += [f"{layer}.mlp.linear_fc1.bias", f"{layer}.mlp.linear_fc2.bias"]
        if arch.qk_norm:
            names += [f"{attention}.q_layernorm.weight", f"{attention}.k_layernorm.weight"]
    return [*names, "decoder.final_layernorm.weight", "output_layer.weight"]


def load_all_ranks(reader, arch, name, tp, *, layer_offset=0, padded=PADDED):
    return [
        load_parameter(
            reader,
            arch,
            name,
            layer_offset=layer_offset,
            tp_rank=rank,
            tp_size=tp,
            padded_vocab_size=padded,
        )
        for rank in range(tp)
    ]


# --- layout ---


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("engine", ["local", "te"])
def test_load_then_merge_returns_every_tensor_bit_for_bit(checkpoint, engine, tp):
    _, reader, arch, tensors = checkpoint
    merged = {}
    for name in megatron_names(arch, engine):
        shards = load_all_ranks(reader, arch, name, tp)
        part = merge_parameter(arch, name, layer_offset=0, shards=shards)
        assert tuple(part) == hf_names(arch, name, layer_offset=0)
        if holds_all_experts(arch, name):
            # One expert's after another's.
            part = {key: torch.cat([merged.pop(key, tensor[:0]), tensor]) for key, tensor in part.items()}
        assert not merged.keys() & part.keys()
        merged |= part
    assert_same_bits(merged, tensors)


def test_tensor_shapes_are_those_of_transformers_in_its_order(checkpoint):
    _, reader, arch, tensors = checkpoint
    expected, actual = [(n, tuple(t.shape)) for n, t in tensors.items()], list(hf_tensor_shapes(arch).items())
    # Transformers makes Phi-3's output projection first, and stacks experts.
    in_order = arch.experts is None and arch.family != "phi3"
    assert actual == expected if in_order else sorted(actual) == sorted(expected)
    check_tensors(reader, arch)


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_qkv_shards_are_the_grouped_rows_in_order(checkpoint, part, tp):
    _, reader, arch, tensors = checkpoint
    if arch.latent is not None or (part == "bias" and not arch.qkv_bias):
        name = f"decoder.layers.0.self_attention.linear_qkv.{part}"
        with pytest.raises(ValueError, match="no such tensor"):
            load_all_ranks(reader, arch, name, tp)
        return
    prefix, d = "model.layers.2.self_attn", arch.head_dim
    if arch.family == "phi3":
        q, k, v = tensors[f"{prefix}.qkv_proj.{part}"].split([12 * d, 3 * d, 3 * d])
    else:
        q, k, v = (tensors[f"{prefix}.{which}_proj.{part}"] for which in "qkv")
    expected = []
    for group in range(arch.num_query_groups):
        for head in range(arch.num_attention_heads):
            if head * arch.num_query_groups // arch.num_attention_heads == group:
                expected += [q[head * d + j] for j in range(d)]
        expected += [k[group * d + j] for j in range(d)]
        expected += [v[group * d + j] for j in range(d)]
    name = f"decoder.layers.1.self_attention.linear_qkv.{part}"
    shards = load_all_ranks(reader, arch, name, tp, layer_offset=1)
    assert {len(shard) for shard in shards} == {len(expected) // tp}
    assert torch.equal(torch.cat(shards), torch.stack(expected))


@pytest.mark.parametrize("tp", TP_SIZES)
def test_fc1_shards_hold_their_gate_rows_then_their_up_rows(checkpoint, tp):
    _, reader, arch, tensors = checkpoint
    name, *halves = GATE_UP[arch.family]
    found = [tensors[f"model.layers.0.{half}.weight"] for half in halves]
    if not found:  # of all experts, transposed, in turns
        whole = tensors["model.layers.0.mlp.experts.gate_up_proj"][3].T
        found = [whole[::2], whole[1::2]]
    gate, up = found if len(found) == 2 else found[0].chunk(2)
    rows = len(gate) // tp
    shards = load_all_ranks(reader, arch, name, tp)
    for rank, shard in enumerate(shards):
        expected = [gate[rank * rows + j] for j in range(rows)]
        expected += [up[rank * rows + j] for j in range(rows)]
        assert torch.equal(shard, torch.stack(expected))


@pytest.mark.parametrize(("tp", "padded"), [(1, 131), (2, 132), (3, 144), (4, 264)])
def test_vocabulary_padding_is_zero_and_is_cut_again(checkpoint, tp, padded):
    _, reader, arch, tensors = checkpoint  # (4, 264): ranks 2 and 3 hold padding only
    for name, source in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        truth = tensors[source] if source in tensors else tensors["model.embed_tokens.weight"]
        shards = load_all_ranks(reader, arch, name, tp, padded=padded)
        assert {tuple(s.shape) for s in shards} == {(padded // tp, arch.hidden_size)}
        whole = torch.cat(shards)
        assert torch.equal(whole[:VOCAB], truth)
        assert whole[VOCAB:].count_nonzero() == 0 and whole.dtype == truth.dtype
        merged = merge_parameter(arch, name, layer_offset=0, shards=shards)
        assert_same_bits(merged, {source: truth} if source in tensors else {})


@pytest.mark.parametrize("tp", TP_SIZES)
def test_ranks_read_their_share_and_nothing_twice(checkpoint, tp):
    directory, _, arch, tensors = checkpoint
    if arch.tied:  # the head reads the embedding a second time, by design
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    whole = (
        "shared_expert_gate.weight",
        "norm.weight",
        "o_proj.bias",
        "down_proj.bias",
        "gate.weight",
        "router.weight",
        "router.bias",
        "experts.down_proj_bias",
        "e_score_correction_bias",
    )
    replicated = sum(t.nbytes for n, t in tensors.items() if n.endswith(whole))
    sharded = sum(t.nbytes for t in tensors.values()) - replicated
    total = 0
    for rank in range(tp):
        with HFReader(directory) as reader:
            for name in megatron_names(arch, "te"):
                tensor = load_parameter(
                    reader,
                    arch,
                    name,
                    layer_offset=0,
                    tp_rank=rank,
                    tp_size=tp,
                    padded_vocab_size=PADDED,
                )
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
                assert tensor.is_contiguous()
            padding = 2 * (PADDED - VOCAB) * arch.hidden_size * arch.dtype.itemsize
            assert reader.bytes_read <= (sharded + padding) / tp + replicated
            total += reader.bytes_read
    assert total == sharded + tp * replicated


def test_partition_dim_tells_which_parameters_to_gather(checkpoint):
    _, reader, arch, _ = checkpoint
    for name in megatron_names(arch, "local") + megatron_names(arch, "te"):
        one, two = (load_all_ranks(reader, arch, name, tp)[0].shape for tp in (1, 2))
        cut = [dim for dim in range(len(one)) if one[dim] != two[dim]]
        assert partition_dim(name) == (cut[0] if cut else None), name


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv._extra_state",
        "rotary_pos_emb.inv_freq",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc3.weight",
        "decoder.layers.0.mlp.experts.linear_fc1.weight",
        "module.output_layer.weight",
    ],
)
def test_unknown_megatron_names_are_refused_by_name(llama, name):
    arch = Architecture.from_hf(llama)
    for call in (
        lambda: partition_dim(name),
        lambda: hf_names(arch, name, layer_offset=0),
        lambda: load_all_ranks(HFReader(llama), arch, name, 1),
        lambda: merge_parameter(arch, name, layer_offset=0, shards=[torch.zeros(1)]),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_the_heads_of_latent_attention_are_shared_in_order(tmp_path):
    make_model("deepseek_v3").save_pretrained(tmp_path)
    reader, arch = HFReader(tmp_path), Architecture.from_hf(tmp_path)
    source = reader.read("model.layers.1.self_attn.kv_b_proj.weight")
    name = "decoder.layers.0.self_attention.linear_kv_up_proj.weight"
    shards = load_all_ranks(reader, arch, name, 3, layer_offset=1)
    # 12 heads of 6 plain numbers of the key and 8 of the value.
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, source[rank * 4 * 14 : (rank + 1) * 4 * 14])


@pytest.mark.parametrize("engine", ["local", "te"])
def test_experts_are_counted_from_the_first_of_their_rank(tmp_path, engine):
    make_model("mixtral").save_pretrained(tmp_path)
    reader, arch = HFReader(tmp_path), Architecture.from_hf(tmp_path)
    inner = "local_experts.1.linear_fc2.weight" if engine == "local" else "linear_fc2.weight1"
    name = f"decoder.layers.0.mlp.experts.{inner}"
    place = dict(layer_offset=2, expert_offset=3)
    expected = "model.layers.2.block_sparse_moe.experts.4.w2.weight"
    assert is_expert(name) and hf_names(arch, name, **place) == (expected,)
    loaded = load_parameter(reader, arch, name, **place, tp_rank=0, tp_size=1, padded_vocab_size=PADDED)
    assert torch.equal(loaded, reader.read(expected))
    assert_same_bits(merge_parameter(arch, name, **place, shards=[loaded]), {expected: loaded})
    with pytest.raises(ValueError, match="expert offset 4.*no such tensor"):
        hf_names(arch, name, layer_offset=2, expert_offset=4)
    for shared in ("decoder.layers.0.mlp.router.weight", "decoder.layers.0.mlp.linear_fc2.weight"):
        assert not is_expert(shared)


def test_wrong_layers_sizes_and_shards_are_refused(llama):
    reader, arch = HFReader(llama), Architecture.from_hf(llama)
    proj = "decoder.layers.1.self_attention.linear_proj.weight"
    qkv = "decoder.layers.1.self_attention.linear_qkv.weight"
    with pytest.raises(ValueError, match=r"layers\.3\..*no such tensor"):
        load_all_ranks(reader, arch, proj, 1, layer_offset=2)
    with pytest.raises(ValueError, match="divides 48, got 5"):
        load_all_ranks(reader, arch, proj, 5)
    with pytest.raises(ValueError, match="rank in"):
        load_parameter(reader, arch, qkv, layer_offset=0, tp_rank=2, tp_size=2, padded_vocab_size=PADDED)
    for name in (proj, qkv):
        shards = load_all_ranks(reader, arch, name, 2)
        for wrong in ([], shards[:1], [*shards, shards[0]]):
            with pytest.raises(ValueError, match="every|all"):
                merge_parameter(arch, name, layer_offset=0, shards=wrong)


def test_rows_beyond_a_smaller_vocabulary_are_left_out(llama):
    """A teacher's, whose embedding has more rows than the student's."""
    reader, arch = HFReader(llama), Architecture.from_hf(llama)
    cut = load_all_ranks(reader, arch, "output_layer.weight", 2, padded=128)
    whole = load_all_ranks(reader, arch, "output_layer.weight", 1, padded=131)
    assert torch.equal(torch.cat(list(cut)), torch.cat(list(whole))[:128])


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), r"\[48\], got \[47\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48).to(torch.int8)}), "torch.int8"),
    ],
)
def test_tensors_that_do_not_match_the_config_are_named(llama, change, message):
    rewrite(llama, change)
    with pytest.raises(ValueError, match=message) as error:
        check_tensors(HFReader(llama), Architecture.from_hf(llama))
    assert "\n" not in str(error.value)


def test_rotary_leftovers_and_an_equal_head_of_a_tied_model_are_tolerated(llama):
    leftover = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(llama, lambda t: t.update({leftover: torch.ones(2)}))
    check_tensors(HFReader(llama), Architecture.from_hf(llama))
    edit_json(llama / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="expected lm_head.weight equal to"):
        check_tensors(HFReader(llama), Architecture.from_hf(llama))
    rewrite(llama, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    check_tensors(HFReader(llama), Architecture.from_hf(llama))


# --- reader ---


def test_reader_slices_equal_the_tensor_and_refuse_ranges_outside(checkpoint):
    _, reader, _, tensors = checkpoint
    assert set(reader.names) == tensors.keys()
    name = "model.layers.0.self_attn.o_proj.weight"
    truth = tensors[name]
    rows, cols = truth.shape
    assert (reader.shape(name), reader.dtype(name)) == (tuple(truth.shape), truth.dtype)
    before = reader.bytes_read
    assert torch.equal(reader.read(name, rows=(3, 10), cols=(5, 6)), truth[3:10, 5:6])
    assert reader.bytes_read - before == 7 * truth.itemsize
    assert reader.read(name, rows=(4, 4)).shape == (0, cols)
    for bad in (dict(rows=(0, rows + 1)), dict(rows=(-1, 2)), dict(cols=(5, 4))):
        with pytest.raises(ValueError, match="expected a range within"):
            reader.read(name, **bad)
    with pytest.raises(ValueError, match="expected a range within"):
        reader.read("model.norm.weight", cols=(0, 1))
    with pytest.raises(ValueError, match="named nothing"):
        reader.read("nothing")


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def edit_header(path: Path, change) -> None:
    """change(text of the header) -> text; the data stay as they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def shift(name: str, by: int):
    """A change of a header that moves a tensor."""

    def change(text: str) -> str:
        header = json.loads(text)
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]
        return json.dumps(header)

    return change


def link_out(d: Path, name: str) -> None:
    """A file of the directory becomes a link to one beside the directory."""
    (d / name).rename(d.parent / name)
    (d / name).symlink_to(d.parent / name)


def only_pickle(d: Path) -> None:
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "expected a checkpoint directory"),
        (lambda d: (d / "config.json").unlink(), "expected a config.json"),
        (lambda d: (d / "config.json").write_text("{"), "expected JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), "found neither"),
        (only_pickle, "found only pytorch_model.bin; pickle files are never loaded"),
        (lambda d: truncate(d / "model.safetensors", 5), "hold none"),
        (lambda d: truncate(d / "model.safetensors", 900), "hold none"),
        (lambda d: truncate(d / "model.safetensors", 40_000), "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\3" + b"\0" * 7 + b"[1]"), "header"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}" * 9), "hold none"),
        (lambda d: edit_header(d / "model.safetensors", lambda h: h.replace('"F32"', '"F4"', 1)), "unknown dtype 'F4'"),
        (
            lambda d: edit_header(d / "model.safetensors", lambda h: h.replace("lm_head.weight", "model.norm.weight")),
            "model.norm.weight twice",
        ),
        (lambda d: edit_header(d / "model.safetensors", shift("model.norm.weight", 4)), "the one before it ends at"),
        (lambda d: edit_header(d / "model.safetensors", shift("model.norm.weight", -4)), "the one before it ends at"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "found both"),
        (lambda d: link_out(d, "config.json"), r"config.json: .* got a link to .*, outside of it"),
        (lambda d: link_out(d, "model.safetensors"), r"model.safetensors: .* got a link to .*, outside of it"),
        (lambda d: (shutil.rmtree(d), d.write_text("")), "expected a checkpoint directory, found a file"),
        (
            lambda d: ((d / "config.json").unlink(), (d / "config.json").symlink_to("config.json")),
            "got a link that leads nowhere",
        ),
    ],
)
def test_damaged_single_file_checkpoints_are_refused_in_one_line(llama, damage, message):
    damage(llama)
    with pytest.raises(ValueError, match=message) as error:
        HFReader(llama)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_one_line(llama):
    """Mapped into memory, it would end the process."""
    reader = HFReader(llama)
    truncate(llama / "model.safetensors", 30_000)
    with pytest.raises(ValueError, match="model.safetensors became shorter while it was read"):
        for name in reader.names:
            reader.read(name)


def test_links_within_the_directory_are_followed(llama):
    (llama / "blobs").mkdir()
    (llama / "model.safetensors").rename(llama / "blobs" / "x")
    (llama / "model.safetensors").symlink_to("blobs/x")
    check_tensors(HFReader(llama), Architecture.from_hf(llama))


def test_damaged_shards_and_indexes_are_refused(tmp_path):
    def fresh() -> tuple[Path, Path, list[Path], dict]:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        make_model("mistral").save_pretrained(directory, max_shard_size="20KB")
        index = directory / "model.safetensors.index.json"
        shards = sorted(directory.glob("*.safetensors"))
        return directory, index, shards, json.loads(index.read_text())["weight_map"]

    directory, _, shards, _ = fresh()
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"expected the shard {shards[1].name}"):
        HFReader(directory)

    directory, _, shards, _ = fresh()
    truncate(shards[-1], shards[-1].stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{shards[-1].name}.*truncated"):
        HFReader(directory)

    directory, index, shards, weight_map = fresh()
    edit_json(index, weight_map=weight_map | {"absent.weight": shards[0].name})
    with pytest.raises(ValueError, match="absent.weight.*lacks it"):
        HFReader(directory)

    directory, index, shards, weight_map = fresh()
    files = list(weight_map.values())  # a shard that stays in the index through another tensor
    name = next(n for n, f in weight_map.items() if f != shards[0].name and files.count(f) > 1)
    edit_json(index, weight_map=weight_map | {name: shards[0].name})
    with pytest.raises(ValueError, match="lacks it"):
        HFReader(directory)

    directory, _, shards, weight_map = fresh()
    save_file(load_file(shards[0]) | {name: torch.zeros(1)}, shards[0])
    with pytest.raises(ValueError, match=f"{name} in both"):
        HFReader(directory)

    directory, index, _, weight_map = fresh()
    edit_json(index, weight_map=weight_map | {"a": "../other/model.safetensors"})
    with pytest.raises(ValueError, match="expected plain .safetensors file names"):
        HFReader(directory)
