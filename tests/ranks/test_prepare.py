"""One way from a command line to a run: what fine-tuning and its plan make of the same words."""

from dataclasses import replace

import pytest
from finetune_runs import write_data, write_models
from launching import run_ranks

pytestmark = [pytest.mark.distributed]

COMMANDS = {
    "least": ["--train-iters", 3, "--lr", 1e-4],
    "samples": ["--train-samples", 64, "--lr", 1e-4, "--global-batch-size", 8],
    "layout": ["--train-iters", 3, "--lr", 1e-4, "--bf16", "--micro-batch-size", 2, "--seq-length", 24],
    "optimizer": ["--train-iters", 3, "--lr", 0, "--optimizer", "sgd", "--use-distributed-optimizer"],
    "objective": ["--train-iters", 3, "--lr", 1e-4, "--objective", "focal", "--objective-args", "gamma=1"],
    "recompute": ["--train-iters", 3, "--lr", 1e-4, "--recompute-granularity", "selective", "--save-interval", 7],
    "on nan": ["--train-iters", 3, "--lr", 1e-4, "--bf16", "--qtarget-on-nan", "skip", "--eval-interval", 2],
    "validation": ["--train-iters", 3, "--lr", 1e-4, "--sft-valid", "VALID", "--eval-iters", 2],
}


def of_both(words):
    """What differs between the arguments of a training and those of its plan: flag -> (training, plan)."""
    from qtarget_megatron.megatron.planning import plan
    from qtarget_megatron.megatron.runtime.prepare import prepare
    from qtarget_megatron.megatron.training.arguments import TRAINING, fill_in

    trained = prepare(words, TRAINING)
    fill_in(trained)
    # The rest of what finetune sets before Megatron completes the arguments.
    trained.args.calculate_per_token_loss = True
    plan.record_architecture(trained.args, trained.student)
    planned, _ = plan._read(plan.PlanOptions(world_size=1), words)
    ours, theirs = vars(trained.args), vars(planned.args)
    assert ours.keys() == theirs.keys()
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def of_all(commands):
    return {name: of_both(words) for name, words in commands.items()}


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    write_models(folder)
    write_data(folder / "valid.jsonl", 8, seed=2)
    shared = ["--cpu", "--hf-model", folder / "untied", "--sft-train", folder / "valid.jsonl"]
    commands = {
        name: [str(folder / "valid.jsonl") if word == "VALID" else str(word) for word in (*shared, *words)]
        for name, words in COMMANDS.items()
    }
    return run_ranks(1, of_all, (commands,), megatron=True)[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_plan_has_the_defaults_of_the_training(differences, name):
    assert differences[name] == {}


def without_a_training(words):
    from qtarget_megatron.megatron.planning import plan
    from qtarget_megatron.megatron.runtime.prepare import Purpose, prepare
    from qtarget_megatron.megatron.training.arguments import TRAINING, fill_in

    told = []
    for flags in ([], ["--train-iters", "3"], ["--train-iters", "3", "--lr", "1e-4", "--micro-batch", "2"]):
        for purpose in (TRAINING, replace(TRAINING, refused=("--train-iters",))):
            try:
                fill_in(prepare([*words, *flags], purpose))
                told.append(None)
            except ValueError as error:
                told.append(str(error))
    planned, _ = plan._read(plan.PlanOptions(world_size=64), words)
    frozen = prepare(["--bf16"], Purpose(flags=("--no-initialization",)), hf_model=words[2], cpu=True)
    return told, planned.args.world_size, planned.args.train_iters, frozen.args.perform_initialization


def test_what_is_missing_or_has_no_meaning_is_named(tmp_path):
    write_models(tmp_path)
    words = ["--cpu", "--hf-model", str(tmp_path / "untied")]
    ((told, world_size, iterations, initialises),) = run_ranks(1, without_a_training, (words,), megatron=True)
    missing = ["--epochs or --train-iters is missing: give one of them", "--lr is missing: give it"]
    assert told[:2] == [missing[0]] * 2
    assert told[2:4] == [missing[1], "--train-iters has no meaning for this command: drop it"]
    assert "unknown flag --micro-batch" in told[4]
    # A plan is for other ranks than these, and needs no length.
    assert (world_size, iterations) == (64, 1)
    assert not initialises
