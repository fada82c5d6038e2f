"""Context parallelism, with an attention of the test's own: Megatron's local one does not gather keys, and
Transformer Engine's needs a GPU. All else is the product's: batches, positions, loss, normalisation, gradients."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from finetune_runs import run_all, write_data, write_models
from layout_runs import assert_layouts, compare_exports, launch, pp, tp

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


class Gather(torch.autograd.Function):
    """The parts of all ranks in rank order, along a new first dimension; backward sums the gradients."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None


class GatheringAttention(torch.nn.Module):
    """Causal attention of this rank's queries to the keys of the whole sequence.

    Of 2 C chunks of the sequence, rank r of C holds chunks r and 2 C - 1 - r, as Megatron cuts it.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, pg_collection=None, **unused):
        super().__init__()
        self.group, self.scale = pg_collection.cp, config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask, **unused):
        """query ``[s/C, b, heads, d]``, key and value ``[s/C, b, groups, d]``: ``[s/C, b, heads d]``."""
        ranks, local = self.group.size(), query.shape[0]
        chunks = torch.arange(local * ranks).view(2 * ranks, -1)
        positions = torch.stack([torch.cat([chunks[r], chunks[2 * ranks - 1 - r]]) for r in range(ranks)])
        share = query.shape[2] // key.shape[2]
        key, value = (Gather.apply(x, self.group).flatten(0, 1).repeat_interleave(share, 2) for x in (key, value))
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self.scale
        future = positions.flatten()[None, :] > positions[self.group.rank()][:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def run_with_gathering_attention(runs, folder):
    from megatron.core.transformer.spec_utils import ModuleSpec

    from qtarget_megatron.megatron.model import build

    local_spec = build.layer_spec

    def layer_spec(*args):
        block = local_spec(*args)
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention
            attention.submodules = dataclasses.replace(
                attention.submodules, core_attention=ModuleSpec(module=GatheringAttention)
            )
        return block

    build.layer_spec = layer_spec
    try:
        return run_all(runs, folder)
    finally:
        build.layer_spec = local_spec


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=5)
    return folder


def test_context_parallel_ranks_train_like_one_process(workspace):
    data = ["--sft-train", workspace / "train.jsonl"]
    target = ["--objective", "target-sft", "--objective-args", "eta=0.4", "--teacher-hf", workspace / "teacher"]
    kinds = {
        # Live teacher; weights of samples and lists of tokens among the side inputs; a denominator of its own.
        "untied target-sft": ["--hf-model", workspace / "untied", *data, *target],
        "tied target-sft": ["--hf-model", workspace / "tied", *data, *target],
        "untied iw-sft": ["--hf-model", workspace / "untied", *data, "--objective", "iw-sft"],
        "untied cft": ["--hf-model", workspace / "untied", *data, "--objective", "cft"]
        + ["--objective-args", "denominator=critical"],
        "untied psft": ["--hf-model", workspace / "untied", *data, "--objective", "psft"],
    }

    def exporting(runs):
        return {name: [*words, "--save-hf", workspace / name] for name, words in runs.items()}

    single = launch(1, exporting(kinds), workspace, timeout=240)
    cp = ["--context-parallel-size", 2]
    two = {f"{kind} at CP2": [*words, *cp] for kind, words in kinds.items()}
    four = {
        "untied target-sft at TP2CP2": [*kinds["untied target-sft"], *tp(2), *cp, "--sequence-parallel"],
        "tied target-sft at PP2CP2": [*kinds["tied target-sft"], *pp(2), *cp],
        "untied cft at CP2DP2": [*kinds["untied cft"], *cp, "--use-distributed-optimizer"],
        "untied psft at CP4": [*kinds["untied psft"], "--context-parallel-size", 4],
    }
    for world_size, runs in ((2, two), (4, four)):
        assert_layouts(launch(world_size, exporting(runs), workspace, 300, run=run_with_gathering_attention), single)
        for name in runs:
            kind = name.split(" at ")[0]
            compare_exports(workspace / name, workspace / kind, workspace / kind.split()[0])
