"""What experts' balance is over: the tokens of the data, whatever pads them, at every layout; and what a coefficient
means. The truth is transformers in float64, sample by sample without padding, and autograd."""

import json

import numpy as np
import pytest
import torch
import transformers
from finetune_runs import run_all, run_tool, vocabulary, write_model
from launching import run_ranks
from row_data import padded_rows
from safetensors.torch import load_file
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, encode

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(500)]

SHORT, LONG, SAMPLES, EXPERTS, SEED = 48, 72, 8, 4, 7
RATE = 0.01  # of the updates of DeepSeek's correction
COMMON = [
    "--no-pack",
    *("--micro-batch-size", 2, "--global-batch-size", SAMPLES, "--train-iters", 1, "--seed", SEED),
    *("--optimizer", "sgd", "--sgd-momentum", 0, "--weight-decay", 0, "--clip-grad", 0, "--log-interval", 1),
    *("--lr", 1.0, "--min-lr", 1.0, "--lr-decay-style", "constant", "--distributed-timeout-minutes", 3),
]
TERMS = {"aux_loss": 0.6, "seq_aux_loss": 0.9, "global_aux_loss": 0.4, "z": 0.02}
ALLTOALL = ["--moe-token-dispatcher-type", "alltoall"]
CAPPED = [*ALLTOALL, "--moe-expert-capacity-factor", 0.8]
RECOMPUTED = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]


def terms(*names):
    """The flags of these terms; one type in Megatron's list is as good as several."""
    kinds = [name for name in names if name != "z"]
    words = ["--moe-z-loss-coeff", TERMS["z"]] if "z" in names else []
    if kinds:
        words += ["--moe-router-load-balancing-type", *kinds, "--moe-aux-loss-coeff", *(TERMS[kind] for kind in kinds)]
    return words


def seq(length):
    return ["--seq-length", length]


def layout(tensor=1, pipeline=1, experts=1):
    words = ["--tensor-model-parallel-size", tensor, "--pipeline-model-parallel-size", pipeline]
    words += ["--expert-model-parallel-size", experts]
    return [*words, "--sequence-parallel", "--expert-tensor-parallel-size", 1] if tensor > 1 else words


ALL = terms(*TERMS)
# Ranks -> run -> (flags, terms, data-parallel ranks).
RUNS = {
    1: {name: ([*terms(name), *seq(LONG)], [name], 1) for name in TERMS}
    | {"all at 48": ([*ALL, *seq(SHORT)], TERMS, 1)},
    2: {
        "TP2": ([*ALL, *seq(LONG), *layout(tensor=2)], TERMS, 1),
        "EP2": ([*ALL, *seq(LONG), *layout(experts=2)], TERMS, 2),
        "DP2 and weights that count": (
            [*ALL, *seq(SHORT), *layout(), "--objective", "cft", "--objective-args", "denominator=critical"],
            TERMS,
            2,
        ),
        "interleaved": (
            [*ALL, *seq(SHORT), *layout(pipeline=2), "--num-layers-per-virtual-pipeline-stage", 1],
            TERMS,
            1,
        ),
    },
    4: {
        "PP4": ([*ALL, *seq(LONG), *layout(pipeline=4)], TERMS, 1),
        "TP2 and PP2, recomputed": ([*ALL, *seq(LONG), *layout(tensor=2, pipeline=2), *RECOMPUTED], TERMS, 1),
    },
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("balance")
    draw, sizes = torch.Generator().manual_seed(3), dict(vocab_size=vocabulary(), max_position_embeddings=128)
    sizes |= dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    routed = dict(moe_intermediate_size=20, num_local_experts=EXPERTS, num_experts_per_tok=2)
    few = dict(num_hidden_layers=4, num_key_value_heads=2, head_dim=16)
    write_model(folder / "experts", "Qwen3Moe", sizes | few | routed, draw)
    latent = dict(num_hidden_layers=3, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=6)
    latent |= dict(qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2)
    write_model(
        folder / "latent", "DeepseekV3", sizes | latent | dict(moe_intermediate_size=20, first_k_dense_replace=1), draw
    )
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    choose = np.random.default_rng(5)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(SAMPLES):
            # Prompts and answers of very different lengths: real, supervised and all tokens are far apart.
            letters = ("".join(choose.choice(list("abcdefg "), size=choose.integers(1, 12))) for _ in range(2))
            turns = [
                {"role": role, "content": f"x{text}x"}
                for role, text in zip(("user", "assistant"), letters, strict=True)
            ]
            record = {"messages": turns}
            supervised = int(encode(tokenizer, record, 1000).supervised.sum())
            record["critical"] = [index % 3 == 0 for index in range(supervised)]
            file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def micro_batches(workspace):
    """The token ids of every sample, micro-batch by micro-batch, in the order of the training."""
    tokenizer, file = byte_tokenizer(CHATML, eos="<|im_end|>"), JsonlFile(workspace / "train.jsonl")
    data = padded_rows(file, tokenizer, LONG, num_rows=SAMPLES, seed=SEED)
    ids = [encode(tokenizer, file.record(int(data[i]["sample"])), 1000).input_ids for i in range(SAMPLES)]
    lengths = [len(sample) for sample in ids]
    assert max(lengths) <= SHORT and max(lengths) > 1.5 * min(lengths)
    return [[torch.as_tensor(sample) for sample in ids[i : i + 2]] for i in range(0, SAMPLES, 2)]


class Routed:
    """A model of transformers in float64; logits() are those of its routers, for a sample as it is."""

    def __init__(self, directory):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, experts_implementation="eager"
        )
        self.found = {}
        for name, module in self.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: self._keep(name, module, inputs, output)
                )

    def _keep(self, name, module, inputs, output):
        logits = inputs[0].reshape(-1, inputs[0].shape[-1]) @ module.weight.t()
        self.found[name] = logits, next(part for part in output if part.dtype == torch.int64)

    def __call__(self, ids):
        """Layer -> (logits [n, E], chosen experts [n, k])."""
        self.found = {}
        self.model(ids[None])
        return dict(self.found)


def fraction(logits):
    """How many of the tokens have each expert among their two best, divided by all choices."""
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(2, dim=1).indices, 1)
    return chosen.sum(0) / chosen.sum()


def balance(logits, chosen=None):
    """E sum_i f_i P_i."""
    return EXPERTS * (fraction(logits if chosen is None else chosen).detach() * logits.softmax(-1).mean(0)).sum()


def mean(values):
    return sum(values) / len(values)


def truth(directory, micro_batches, names, ranks):
    """Gradients of the sum of these terms, each times its coefficient, by name of the parameter."""
    routed = Routed(directory)
    # Layer -> micro-batch -> sample -> logits.
    runs = [[routed(ids) for ids in batch] for batch in micro_batches]
    total = 0
    for layer in routed.found:
        batches = [[sample[layer][0] for sample in batch] for batch in runs]
        together = [torch.cat(batch) for batch in batches]
        # What all data-parallel ranks compute at the same time, and with what came before in the step.
        rounds = [torch.cat(together[i : i + ranks]) for i in range(0, len(together), ranks)]
        values = {
            "aux_loss": mean([balance(batch) for batch in together]),
            "seq_aux_loss": mean([balance(sample) for batch in batches for sample in batch]),
            "global_aux_loss": mean([balance(logits, torch.cat(rounds[: i + 1])) for i, logits in enumerate(rounds)]),
            "z": mean([batch.logsumexp(-1).square().mean() for batch in together]),
        }
        total = total + sum(TERMS[name] * values[name] for name in names)
    total.backward()
    return dict(
        part
        for name, parameter in routed.model.named_parameters()
        if parameter.grad is not None
        for part in as_on_disk(name, parameter.grad)
    )


def as_on_disk(name, gradient):
    """transformers has the matrices of all experts in one."""
    place, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        for expert, both in enumerate(gradient):
            for part, rows in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                yield f"{place}.{expert}.{part}.weight", rows
    elif place.endswith(".experts"):
        yield from ((f"{place}.{expert}.{last}.weight", matrix) for expert, matrix in enumerate(gradient))
    else:
        yield name, gradient


def tensors(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def train_and_score(runs, scores, folder):
    """run_all's results; the command score writes a file for each entry of scores."""
    results = run_all(runs, folder, COMMON)
    for name, words in scores.items():
        code, printed = run_tool("score", words)
        results[name] = {"code": code, "printed": printed}
    return results


def launch(world_size, runs, workspace, lengths, layout=()):
    """lengths: also score the data with experts of limited capacity, cut to so many tokens."""
    runs = {name: [str(word) for word in [*words, "--save-hf", workspace / name]] for name, words in runs.items()}
    scores = {}
    for length in lengths:
        words = ["--hf-model", workspace / "experts", "--data", workspace / "train.jsonl", *CAPPED, *seq(length)]
        out = workspace / f"scored by {world_size} at {length}"
        scores[out.name] = [*words, "--micro-batch-size", 2, "--out", out, *layout]
    results = run_ranks(world_size, train_and_score, (runs, scores, str(workspace)), 300, megatron=True)
    for rank, outcome in enumerate(results):
        for name, result in outcome.items():
            assert result["code"] in (0, None), f"{name} on rank {rank}:\n{result['printed'][-3000:]}"
    return results[-1]


def trained(workspace, model, words):
    return ["--hf-model", workspace / model, "--sft-train", workspace / "train.jsonl", *words]


@pytest.fixture(scope="module")
def single(workspace):
    """One process: without a term, with and without padding that matters; each term; corrections; capacity."""
    runs = {"off": seq(SHORT)}
    runs["off, cft"] = [*seq(SHORT), "--objective", "cft", "--objective-args", "denominator=critical"]
    runs |= {name: words for name, (words, *_) in RUNS[1].items()}
    runs |= {f"capped at {length}": [*seq(length), *CAPPED, *terms("aux_loss")] for length in (SHORT, LONG)}
    runs = {name: trained(workspace, "experts", words) for name, words in runs.items()}
    bias = ["--moe-router-bias-update-rate", RATE, "--lr", 1e-9, "--min-lr", 1e-9]
    taught = ["--objective", "target-sft", "--objective-args", "eta=0.5", "--teacher-hf", workspace / "latent"]
    valid = ["--sft-valid", workspace / "train.jsonl", "--eval-iters", 1]
    runs["bias"] = trained(workspace, "latent", [*seq(LONG), *bias, *taught, *valid])
    return launch(1, runs, workspace, [SHORT, LONG])


def assert_is_the_truth(workspace, name, expected, off):
    before, after = tensors(workspace / off), tensors(workspace / name)
    worst = 0.0
    for key, gradient in expected.items():
        # The learning rate is 1. A weight of size 1 is rounded to 6e-8, twice; sums are of float32.
        error = (before[key].double() - after[key].double() - gradient).abs().max().item()
        worst = max(worst, gradient.abs().max().item())
        assert error < 1e-6 + 2e-5 * gradient.abs().max().item(), (name, key, error, gradient.abs().max().item())
    assert worst > 0.01, f"{name}: nothing was to be seen"


@pytest.mark.parametrize("name", RUNS[1])
def test_a_coefficient_means_what_it_says_whatever_the_padding(workspace, micro_batches, single, name):
    _, names, ranks = RUNS[1][name]
    assert_is_the_truth(workspace, name, truth(workspace / "experts", micro_batches, names, ranks), "off")


@pytest.mark.parametrize("ranks", [2, 4])
def test_at_every_layout(workspace, micro_batches, single, ranks):
    runs = {name: trained(workspace, "experts", words) for name, (words, *_) in RUNS[ranks].items()}
    if ranks == 2:
        runs["capped at EP2"] = trained(
            workspace, "experts", [*seq(LONG), *CAPPED, *terms("aux_loss"), *layout(experts=2)]
        )
        bias = ["--moe-router-bias-update-rate", RATE, "--lr", 1e-9, "--min-lr", 1e-9, *layout(pipeline=2)]
        bias += ["--decoder-first-pipeline-num-layers", 2]
        runs["bias at PP2"] = trained(workspace, "latent", [*seq(LONG), *bias])
    results = launch(ranks, runs, workspace, [LONG] if ranks == 4 else [], layout(pipeline=ranks))
    for name, (_, names, replicas) in RUNS[ranks].items():
        expected = truth(workspace / "experts", micro_batches, names, replicas)
        assert_is_the_truth(workspace, name, expected, "off, cft" if "cft" in map(str, runs[name]) else "off")
    if ranks == 2:
        assert_close_losses(results["capped at EP2"], single["capped at 48"])
        assert_corrections(workspace, "bias at PP2", micro_batches)
    else:
        assert scored(workspace, 4, LONG) == pytest.approx(scored(workspace, 1, SHORT), abs=1e-5)


def scored(workspace, ranks, length):
    lines = (workspace / f"scored by {ranks} at {length}").read_text().splitlines()
    return [value for line in lines for value in json.loads(line)["old_log_prob"]]


def assert_close_losses(found, expected):
    # Sums of float32 in another order.
    assert found["scalars"]["lm loss"] == pytest.approx(expected["scalars"]["lm loss"], rel=1e-6)


def test_padding_takes_no_room_of_experts(workspace, single):
    assert_close_losses(single["capped at 72"], single["capped at 48"])
    found, expected = (tensors(workspace / f"capped at {length}") for length in (LONG, SHORT))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6, msg=key)
    # Float32 sums in another order, of log-probabilities of about -6.
    assert scored(workspace, 1, LONG) == pytest.approx(scored(workspace, 1, SHORT), abs=1e-5)
    # Some tokens found no room.
    assert single["capped at 48"]["scalars"]["lm loss"][0] != pytest.approx(
        single["aux_loss"]["scalars"]["lm loss"][0], rel=1e-4
    )


def assert_corrections(workspace, name, micro_batches):
    routed = Routed(workspace / "latent")
    runs = [routed(ids) for batch in micro_batches for ids in batch]
    before, after = tensors(workspace / "latent"), tensors(workspace / name)
    for layer in routed.found:
        counts = torch.cat([run[layer][1] for run in runs]).flatten().bincount(minlength=8).float()
        key = f"{layer}.e_score_correction_bias"
        moved = after[key] - before[key]
        assert counts.unique().numel() > 2
        torch.testing.assert_close(
            moved, RATE * torch.sign(counts.mean() - counts), rtol=0, atol=1e-7, msg=f"{name} {key}"
        )


def test_corrections_move_by_the_tokens_of_the_data(workspace, micro_batches, single):
    """With a teacher that has experts as well, and an evaluation: neither counts."""
    assert_corrections(workspace, "bias", micro_batches)
