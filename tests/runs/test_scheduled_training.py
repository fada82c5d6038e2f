"""--objective-schedule: each step trains with its own parameters, as trainings with fixed ones do from step to step."""

import pytest
from finetune_runs import write_data, write_models
from layout_runs import launch, tensors, tp

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]
SCALARS = ("lm loss", "trust", "label mass", "residual mass", "total mass", "grad-norm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One launch of two ranks: a scheduled training of four steps, whole and resumed in its middle, and the same four
    steps as two trainings with fixed parameters, the second of which resumes from the first."""
    folder = tmp_path_factory.mktemp("schedule")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    common = [
        *("--hf-model", folder / "untied", "--sft-train", folder / "train.jsonl", *tp(2)),
        *("--objective", "target-sft", "--teacher-hf", folder / "teacher", "--save-interval", 2),
    ]

    def words(*more, save):
        return [*common, *more, "--save", folder / save, "--save-hf", folder / f"hf-{save}"]

    # At 0 no teacher is read.
    schedule = ["--objective-schedule", "eta=0@0-50%,0.8@50-100%"]
    found = launch(
        2,
        {
            "whole": words(*schedule, save="whole"),
            "first": words(*schedule, "--exit-interval", 2, save="resumed"),
            "resumed": words(*schedule, "--load", folder / "resumed", save="resumed"),
            "fixed-0": words("--objective-args", "eta=1e-300", "--exit-interval", 2, save="fixed"),
            "fixed-1": words("--objective-args", "eta=0.8", "--load", folder / "fixed", save="fixed"),
        },
        folder,
        240,
    )
    return folder, found


def test_each_step_logs_its_parameters(runs):
    _, found = runs
    assert found["whole"]["scalars"]["objective eta"] == pytest.approx([0, 0, 0.8, 0.8])


def test_a_training_that_resumes_is_the_whole_one(runs):
    folder, found = runs
    for tag in SCALARS:
        whole, first, resumed = (found[name]["scalars"][tag] for name in ("whole", "first", "resumed"))
        assert first + resumed == whole, tag
    whole, resumed = tensors(folder / "hf-whole"), tensors(folder / "hf-resumed")
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_steps_are_those_of_trainings_with_fixed_parameters(runs):
    folder, found = runs
    for tag in SCALARS:
        whole, first, second = (found[name]["scalars"][tag] for name in ("whole", "fixed-0", "fixed-1"))
        assert first + second == pytest.approx(whole, rel=1e-6), tag
    whole, fixed = tensors(folder / "hf-whole"), tensors(folder / "hf-fixed")
    for name, tensor in whole.items():
        # An eta of 1e-300 is a residual of the student's logits times 1 - 1e-300, and of the teacher's times next to 0.
        assert (tensor - fixed[name]).abs().max() <= 1e-6, name
