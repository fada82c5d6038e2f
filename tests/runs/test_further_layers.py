"""Layers that predict further tokens, as checkpoints of DeepSeek-V3 have them: converted bit for bit, trained, or
carried along."""

import json
import math
import shutil

import pytest
import torch
from checkpoint_models import assert_same_bits
from conversion_runs import read_tensors, run_all, variant
from finetune_runs import run_all as train_all
from finetune_runs import vocabulary, write_data
from finetune_runs import write_model as write_trainable
from further_layers import add_further, further_log_probabilities
from launching import run_ranks
from layout_runs import SEQUENCE_PARALLEL, ep, launch, pp, tp
from quantized_models import stands_for, write_fp8
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import encode
from tools.first_hour.families import write_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

CONVERTED = ["deepseek_v3", "glm4_moe", "deepseek_v3-fp8"]
LAYOUTS = {
    1: {"single": []},
    2: {"pp2": pp(2), "tp2-ep2": [*tp(2), *ep(2, 1)]},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("further")
    for name in ("deepseek_v3", "glm4_moe"):
        add_further(write_model(folder / name, name, tied=False))
    add_further(write_model(folder / "deepseek_v3-bf16", "deepseek_v3", tied=False, dtype=torch.bfloat16))
    stands_for(folder / "deepseek_v3-fp8", write_fp8(folder / "deepseek_v3-bf16", folder / "deepseek_v3-fp8"))
    sizes = dict(vocab_size=vocabulary(), max_position_embeddings=64, num_attention_heads=4, hidden_size=32)
    sizes |= dict(intermediate_size=48, num_hidden_layers=3, first_k_dense_replace=1, moe_intermediate_size=20)
    latent = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4)
    latent |= dict(v_head_dim=8, n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2)
    plain = dict(num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(7)
    for name, family, extra in (("latent", "DeepseekV3", latent), ("plain", "Glm4Moe", plain)):
        write_trainable(folder / name, family, sizes | extra, generator)
        add_further(folder / name)
    write_data(folder / "train.jsonl", 8, seed=2)
    return folder


def convert(size, jobs, timeout=420):
    """Exit code and output of the first rank, by job."""
    jobs = {name: ("convert_output", *map(str, words)) for name, words in jobs.items()}
    results = run_ranks(size, run_all, (jobs,), timeout, megatron=True)
    for name, (code, printed) in results[0].items():
        assert code == 0, f"{name}: {printed[-2000:]}"
    return {name: printed for name, (_, printed) in results[0].items()}


def test_import_and_export_give_back_every_bit(workspace, tmp_path):
    """Every layout exports what another one has imported."""
    places = [(size, layout, words) for size, of in LAYOUTS.items() for layout, words in of.items()]
    for size in LAYOUTS:
        jobs = {}
        for name in CONVERTED:
            for _, layout, words in (place for place in places if place[0] == size):
                ckpt = tmp_path / f"{name} {layout}"
                jobs[f"import {ckpt}"] = ["import", "--hf-model", workspace / name, "--save", ckpt, *words]
        convert(size, jobs)
    for size in LAYOUTS:
        jobs = {}
        for name in CONVERTED:
            for place, (other, layout, words) in enumerate(places):
                if other == size:
                    ckpt, out = tmp_path / f"{name} {places[place - 1][1]}", tmp_path / f"{name} {layout} out"
                    source = ["--hf-model", workspace / name, "--load", ckpt, "--save-hf", out]
                    jobs[f"export {out}"] = ["export", *source, *words]
        convert(size, jobs)
    for name in CONVERTED:
        for _, layout, _ in places:
            out = tmp_path / f"{name} {layout} out"
            source = workspace / (f"{name}-stands-for" if name.endswith("-fp8") else name)
            assert_same_bits(read_tensors(out), read_tensors(source))
            assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_what_a_checkpoint_does_not_hold_is_copied_or_said_to_be_left_out(workspace, tmp_path):
    """A HybridModel has no such layers."""
    source = workspace / "deepseek_v3"
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=lambda *_: ["model.safetensors"])
    load = ["--load", tmp_path / "ckpt"]
    said = convert(
        1,
        {
            "import": ["import", "--hf-model", source, "--save", tmp_path / "ckpt", "--model-class", "hybrid"],
            "copied": ["export", "--hf-model", source, *load, "--save-hf", tmp_path / "copied"],
            "none": ["export", "--hf-model", bare, *load, "--save-hf", tmp_path / "none"],
        },
    )
    expected = read_tensors(source)
    assert_same_bits(read_tensors(tmp_path / "copied"), expected)
    own = {name: tensor for name, tensor in expected.items() if not name.startswith("model.layers.4.")}
    assert 0 < len(own) < len(expected)
    assert_same_bits(read_tensors(tmp_path / "none"), own)
    counts = {
        name: json.loads((tmp_path / name / "config.json").read_text())["num_nextn_predict_layers"]
        for name in ("copied", "none")
    }
    assert counts == {"copied": 1, "none": 0}
    assert "a HybridModel has none" in said["import"]
    assert "are copied" in said["copied"] and "the export has none either" in said["none"]


def words(workspace, model, *more):
    return ["--hf-model", workspace / model, "--sft-train", workspace / "train.jsonl", "--objective", "sft", *more]


HEADS = ["--mtp-num-layers", 1]
STILL = ["--train-iters", 1, "--lr", 0, "--min-lr", 0]


@pytest.fixture(scope="module")
def single(workspace):
    runs = {f"{model} trained": words(workspace, model, *HEADS) for model in ("latent", "plain")}
    runs["plain trained"] += ["--save-hf", workspace / "plain trained"]
    runs["latent still"] = words(workspace, "latent", *HEADS, *STILL, "--save-hf", workspace / "latent still")
    runs["latent without"] = words(workspace, "latent", "--save-hf", workspace / "latent without")
    return launch(1, runs, workspace, timeout=300)


@pytest.mark.parametrize("model", ["latent", "plain"])
def test_the_first_loss_is_that_of_the_checkpoint(workspace, single, model):
    """Of every label that is two places on, by its log-probability in float64."""
    tokenizer, total, count = byte_tokenizer(CHATML, eos="<|im_end|>"), 0.0, 0
    for line in (workspace / "train.jsonl").read_text().splitlines():
        sample = encode(tokenizer, json.loads(line), 32)
        ids, supervised = torch.tensor(sample.input_ids), torch.tensor(sample.supervised)
        losses = -further_log_probabilities(workspace / model, ids)[supervised[2:]]
        total, count = total + losses.sum().item(), count + len(losses)
    # A step of all samples.
    scalars = single[f"{model} trained"]["scalars"]
    assert scalars["mtp 1 loss"][0] == pytest.approx(total / count, rel=1e-6) and count > 30
    assert not math.isclose(scalars["mtp 1 loss"][0], scalars["lm loss"][0], rel_tol=1e-3)


def test_two_ranks_train_them_like_one_process(workspace, single):
    runs = {
        "plain at TP2 SP": words(workspace, "plain", *HEADS, *tp(2), *SEQUENCE_PARALLEL),
        "plain at PP2": words(workspace, "plain", *HEADS, *pp(2), "--decoder-first-pipeline-num-layers", 2),
        "latent at EP2": words(workspace, "latent", *HEADS, *ep(2)),
    }
    runs["plain at PP2"] += ["--save-hf", workspace / "plain staged"]
    for name, result in launch(2, runs, workspace, timeout=300).items():
        expected = single[f"{name.split()[0]} trained"]
        for tag in ("lm loss", "mtp 1 loss", "grad-norm"):
            assert result["scalars"][tag] == pytest.approx(expected["scalars"][tag], rel=2e-5), (name, tag)
    got, want = read_tensors(workspace / "plain staged"), read_tensors(workspace / "plain trained")
    before = read_tensors(workspace / "plain")
    assert got.keys() == want.keys() == before.keys()
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, atol=1e-5), name
        assert name.endswith("correction_bias") or not torch.equal(tensor, before[name]), f"{name} was not trained"


def test_an_export_has_them_trained_or_as_they_were(workspace, single):
    source = read_tensors(workspace / "latent")
    assert_same_bits(read_tensors(workspace / "latent still"), source)
    trained, own = read_tensors(workspace / "latent without"), "model.layers.3."
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    assert trained.keys() == source.keys() and not torch.equal(trained["lm_head.weight"], source["lm_head.weight"])
    for name, tensor in trained.items():
        if name.startswith(own):
            # The model's own embedding and head, which loaders share with these layers.
            copied = copies.get(name.removeprefix(own))
            assert torch.equal(tensor, source[name] if copied is None else trained[copied]), name
    assert "--mtp-num-layers 1 trains them" in single["latent without"]["printed"]


def test_what_does_not_belong_together_is_refused(workspace, tmp_path):
    def other(weights):
        weights["model.layers.3.embed_tokens.weight"][5, 3] += 1e-3

    model, ckpt = ["--hf-model", workspace / "deepseek_v3"], tmp_path / "ckpt"
    hybrid = ["export", *model, "--load", ckpt, "--save-hf", tmp_path / "out", "--model-class", "hybrid"]
    jobs = {"import": ["import", *model, "--save", ckpt], "hybrid": hybrid}
    jobs = {name: ("convert_output", *map(str, words)) for name, words in jobs.items()}
    (done,) = run_ranks(1, run_all, (jobs,), 200, megatron=True)
    assert done["import"][0] == 0 and done["hybrid"][0] == 2, done
    assert "drop --model-class hybrid" in done["hybrid"][1] and not (tmp_path / "out").exists()
    variant(workspace / "latent", tmp_path / "other", tensors=other)
    variant(workspace / "latent", tmp_path / "missing", tensors=lambda w: w.pop("model.layers.3.eh_proj.weight"))
    runs = {
        "count": words(workspace, "latent", "--mtp-num-layers", 2),
        "other": words(tmp_path, "other", *HEADS, "--sft-train", workspace / "train.jsonl"),
        "missing": words(tmp_path, "missing", *HEADS, "--sft-train", workspace / "train.jsonl"),
    }
    runs["missing in an export"] = [*runs["missing"][: -len(HEADS) - 2], "--sft-train", workspace / "train.jsonl"]
    runs["missing in an export"] += ["--save-hf", tmp_path / "never"]
    runs = {name: [str(word) for word in run] for name, run in runs.items()}
    (results,) = run_ranks(1, train_all, (runs, str(workspace)), 200, megatron=True)
    said = {
        "count": "give --mtp-num-layers 1, or drop the flag",
        "other": "expected model.layers.3.embed_tokens.weight to be the same as model.embed_tokens.weight",
        **dict.fromkeys(("missing", "missing in an export"), "1 missing: model.layers.3.eh_proj.weight"),
    }
    for name, result in results.items():
        assert result["code"] == 2 and said[name] in result["printed"], (name, result["printed"][-2000:])
