"""All that a fine-tuning prints under torchrun, rank by rank: a line that nobody expects fails the test."""

import re
import sys

import pytest
import torch
from finetune_runs import write_data, write_models
from launching import Launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.is_available(), reason="what is printed beside a GPU has not been seen yet"),
]

NUMBER, TIME = r"[\d.,:eE+-]+", r"\[?[\d-]+ [\d:.]+\]?"
DATA = [
    r"\$/train\.jsonl: 24 samples, 0 truncated to 32 tokens, 0 skipped \(no supervised token\)",
    r"24 samples share 21 rows of 32 tokens, 65\.5% of them filled",
    r"\$/valid\.jsonl: 8 samples, 0 truncated to 32 tokens, 0 skipped \(no supervised token\)",
]
# Of the package, in the order in which they come: "$" stands for the folder.
OURS = {
    "trained": [
        r"no CUDA device, running Megatron on the CPU over gloo",
        *DATA,
        r"objective target-sft\(eta=0\.5\), starting from the weights of \$/untied",
        r"training reads 16 rows of the 21 of an epoch: 0\.76 epochs",
        r"an evaluation reads 8 held-out samples in 8 rows",
        rf"peak memory per rank \(GiB\): {NUMBER} {NUMBER} {NUMBER} {NUMBER}",
    ],
    "resumed": [
        r"no CUDA device, running Megatron on the CPU over gloo",
        *DATA,
        r"going on with --train-iters 3 \(2 until now\); --use-checkpoint-opt-param-scheduler would keep the .*",
        r"objective target-sft\(eta=0\.5\), starting from the checkpoint in \$/saved",
        r"the state that was loaded is what was saved, bit for bit \(\d+ tensors\)",
        r"training reads 24 rows of the 21 of an epoch: 1\.14 epochs",
        r"an evaluation reads 8 held-out samples in 8 rows",
        r"exported the model to \$/out",
        rf"peak memory per rank \(GiB\): {NUMBER} {NUMBER} {NUMBER} {NUMBER}",
    ],
}
# How far what takes long is: on the first rank, and on the last, as often as the time asks for it.
PROGRESS = [
    rf"(reading \$/\w+\.jsonl|writing): {NUMBER}/{NUMBER} (samples|GB), {NUMBER} (samples|GB)/s, {NUMBER} left",
    rf"{NUMBER} tokens/s, {NUMBER} left",
]
# Megatron's, on every rank.
EVERY_RANK = [
    r" > number of parameters on \(tensor, gtp_weight_remat, pipeline\) model parallel rank \(\d, \d, \d\): \d+",
    rf"\[Rank \d\] \((after \d iterations|(before|after) save_.* for .*)\) memory \(MB\)( \| [a-z ]+: {NUMBER})+",
]
# On the first: the start, the layout, the data, checkpoints.
FIRST_RANK = [
    r"torch distributed is already initialized, skipping initialization \.\.\.",
    r"using world size: 4, data-parallel size: 1, .*, tensor-model-parallel size: 2, pipeline-model-parallel size: 2",
    r"Number of virtual stages per pipeline stage: None",
    r"accumulate and all-reduce gradients in fp32 for bfloat16 data type\.",
    r"using torch\.bfloat16 for parameters \.\.\.",
    r"INFO:megatron\.core\.num_microbatches_calculator:setting number of microbatches to constant 8",
    r"> (initializing torch distributed|setting random seeds to \d+|compiling dataset index builder) \.\.\.",
    r"> initialized (tensor model parallel|gtp weight remat|pipeline model parallel) with size \d",
    rf">>> done with dataset index builder\. Compilation time: {NUMBER} seconds",
    rf"time to initialize megatron \(seconds\): {NUMBER}",
    rf"\[(before|after) [a-z, -]+( initialize_megatron)?\] datetime: {TIME} ?",
    r"INFO:megatron\.core\.optimizer_param_scheduler:(> learning rate decay style: \w+| > overriding .+ value to .+)",
    r"> building train, validation, and test datasets \.\.\.",
    r" > datasets target sizes \(minimum size\):",
    r"    (train|validation|test): +\d+",
    r"(done with setup|training) \.\.\.",
    r"Overwriting rerun_state_machine\.current_iteration from -1 to \d\.\.\.",
    rf"(Total n|N)umber of (active )?parameters in [a-z ]+: +{NUMBER}",
    rf"Total number of (active )?parameters in billions: {NUMBER}",
    r"compute_activation_memory_without_sp",
    rf"Activation memory footprint per transformer layer \(precise, without SP\): {NUMBER} MB",
    r"Number of in-flight microbatches: \d",
    rf"Theoretical memory footprints: weight and optimizer={NUMBER} MB, activation={NUMBER} MB, total={NUMBER} MB",
    r"",
    rf"{TIME} saving checkpoint at iteration +\d to \$/saved in torch_dist format",
    r"Storing distributed optimizer sharded state of type dp_reshardable",
    rf"  {TIME} successfully saved checkpoint from iteration +\d to \$/saved \[ t 1/2, gtp_remat 1/1, p 1/2 \]",
    r"Evaluating on 8 samples|Evaluating iter 1/1",
    r"sharded_state_dict metadata loaded from the checkpoint: \{.*\}",
    r" loading distributed checkpoint from \$/saved at iteration 2",
    r" checkpoint version 3\.0",
    r"INFO:megatron\.core\.optimizer\.distrib_optimizer:Loading distributed optimizer sharded state of type .*",
    r"  successfully loaded checkpoint from \$/saved \[ t 1/2, gtp_remat 1/1, p 1/2 \] at iteration 2",
]
# On the last: steps, evaluations and times.
LAST_RANK = [
    r"> setting tensorboard \.\.\.",
    rf" {TIME} iteration +\d/ +\d \|( [a-zA-Z() ]+: +{NUMBER} \|)+ lm loss: {NUMBER} \|( [a-zA-Z() ]+: +{NUMBER} \|)+",
    rf" validation loss at iteration \d( on validation set)? \|( [a-zA-Z() ]+: {NUMBER} \|)+ ",
    r"-+",
    r"INFO:megatron\.core\.timers:\(min, max\) time across ranks \(ms\):",
    rf"    [a-z/-]+ \.+: \({NUMBER}, {NUMBER}\)",
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Of a training that starts and saves, and of one that goes on and exports: (the launcher's output, [(stdout,
    stderr) of each rank])."""
    folder = tmp_path_factory.mktemp("printed")
    write_models(folder)
    write_data(folder / "train.jsonl", 24, seed=1)
    write_data(folder / "valid.jsonl", 8, seed=2)
    words = ["--hf-model", folder / "untied", "--teacher-hf", folder / "teacher", "--objective", "target-sft"]
    words += [
        "--objective-args",
        "eta=0.5",
        "--sft-train",
        folder / "train.jsonl",
        "--sft-valid",
        folder / "valid.jsonl",
    ]
    words += ["--eval-iters", 1, "--eval-interval", 2, "--tensor-model-parallel-size", 2, "--sequence-parallel"]
    words += [
        "--pipeline-model-parallel-size",
        2,
        "--seq-length",
        32,
        "--micro-batch-size",
        1,
        "--global-batch-size",
        8,
    ]
    words += ["--lr", 1e-3, "--bf16", "--use-distributed-optimizer", "--log-interval", 1, "--save", folder / "saved"]
    words += ["--tensorboard-dir", folder / "board"]
    more = {
        "trained": ["--train-iters", 2],
        "resumed": ["--train-iters", 3, "--load", folder / "saved", "--save-hf", folder / "out"],
    }
    found = {}
    for name, own in more.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        command += ["--redirects", "3", "--log-dir", folder / name, "-m", "qtarget_megatron.finetune"]
        with Launch([*command, *words, *own]) as launch:
            done = launch.wait(200)
        ranks = [
            tuple(
                next((folder / name).glob(f"*/attempt_0/{rank}/{stream}.log")).read_text().replace(str(folder), "$")
                for stream in ("stdout", "stderr")
            )
            for rank in range(4)
        ]
        assert done.returncode == 0, "\n".join([done.stdout, *(text[-2000:] for rank in ranks for text in rank)])
        found[name] = done.stdout, ranks
    return found


def unexpected(text, patterns):
    return [line for line in text.splitlines() if not any(re.fullmatch(pattern, line) for pattern in patterns)]


@pytest.mark.parametrize("name", ["trained", "resumed"])
def test_every_line_is_known(printed, name):
    launcher, ranks = printed[name]
    assert launcher == ""
    assert [errors for _, errors in ranks] == [""] * 4
    ours, progress = ([f"qtarget_megatron: {pattern}" for pattern in patterns] for patterns in (OURS[name], PROGRESS))
    for rank, (output, _) in enumerate(ranks):
        patterns = EVERY_RANK + {0: FIRST_RANK + ours + progress[:1], 3: LAST_RANK + progress[1:]}.get(rank, [])
        assert unexpected(output, patterns) == [], f"rank {rank}"


@pytest.mark.parametrize("name", ["trained", "resumed"])
def test_the_packages_lines_are_the_first_ranks_once_and_in_order(printed, name):
    _, ranks = printed[name]
    lines = re.findall(r"^qtarget_megatron: (?!reading |writing: )(.*)", ranks[0][0], re.MULTILINE)
    assert len(lines) == len(OURS[name]), lines
    for line, pattern in zip(lines, OURS[name], strict=True):
        assert re.fullmatch(pattern, line), line
    assert ("\nqtarget_megatron: writing: " in ranks[0][0]) == (name == "resumed")
    steps = re.findall(r"^ .* iteration +(\d)/", ranks[3][0], re.MULTILINE)
    assert steps == {"trained": ["1", "2"], "resumed": ["3"]}[name]
