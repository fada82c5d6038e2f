"""Context parallelism over the local layers' attention: it trains as one process does."""

import pytest
from finetune_runs import write_data, write_models
from layout_runs import assert_layouts, compare_exports, launch, pp, tp

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


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
        "untied weighted-sft": ["--hf-model", workspace / "untied", *data, "--objective", "weighted-sft"],
        "untied cft": ["--hf-model", workspace / "untied", *data, "--objective", "cft"]
        + ["--objective-args", "denominator=critical"],
        "untied pear": ["--hf-model", workspace / "untied", *data, "--objective", "pear", "--objective-args"]
        + ["level=block", "block=3", "ratio_low=-2", "ratio_high=1", "--teacher-hf", workspace / "teacher"],
        "tied wit": ["--hf-model", workspace / "tied", *data, "--objective", "wit"]
        + ["--objective-args", "prompt=0.3", "response=0.8"],
        "untied psft": ["--hf-model", workspace / "untied", *data, "--objective", "psft"]
        + ["--objective-args", "refresh=0"],
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
        "untied pear at CP4": [*kinds["untied pear"], "--context-parallel-size", 4],
        "untied psft at CP4": [*kinds["untied psft"], "--context-parallel-size", 4],
    }
    for world_size, runs in ((2, two), (4, four)):
        assert_layouts(launch(world_size, exporting(runs), workspace, 300), single)
        for name in runs:
            kind = name.split(" at ")[0]
            compare_exports(workspace / name, workspace / kind, workspace / kind.split()[0])
