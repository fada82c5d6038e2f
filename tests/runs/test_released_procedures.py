"""Methods whose inputs must live during training, against their released procedure over a whole small training."""

import numpy as np
import pytest
import torch
from layout_runs import SEQUENCE_PARALLEL, launch, pp, tp
from released_procedures import BOUND, assert_follows, columns, descend, records, training_words, write_workspace

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

CP = ["--context-parallel-size", 2]
REFRESH, CLIP, FASTER = 8, 0.05, 0.002


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("procedures")
    return folder, write_workspace(folder)


def iw_sft(log_p, before):
    """As released: the exponential of the mean log ratio over a sample, clamped to 16."""
    weight = (log_p.detach() - before).mean().exp().clamp(0.0, 16.0)
    return -weight * log_p, weight.expand(len(log_p))


def psft(log_p, old):
    """As released: the clipped ratio."""
    ratio = (log_p - old).exp()
    loss = -torch.minimum(ratio, ratio.clamp(1 - 0.2, 1 + CLIP))
    return loss, torch.where(ratio <= 1 + CLIP, ratio, 0.0)


@pytest.fixture(scope="module")
def iw_sft_trainings(workspace):
    """Losses and mean label masses of each step, and the exports, at several layouts."""
    folder, rows = workspace
    common = training_words(folder, rows)

    def words(name, *more, data="train"):
        export = ["--save-hf", folder / f"hf-{name}"]
        return [*common, "--sft-train", folder / f"{data}.jsonl", "--objective", "iw-sft", *more, *export]

    live = ["--teacher-hf", folder / "untied"]
    unpacked = ["--no-pack", "--global-batch-size", len(records(folder))]
    scored = ["--objective-args", "start=data"]
    found = launch(
        1,
        {"live": words("live", *live, *unpacked), "data": words("data", *scored, data="scored")},
        folder,
        300,
    )
    found |= launch(
        2,
        {
            "live CP2": words("live CP2", *live, *CP),
            "live CP2, not packed": words("live CP2, not packed", *live, *CP, *unpacked),
            "live TP2 SP": words("live TP2 SP", *live, *tp(2), *SEQUENCE_PARALLEL, "--micro-batch-size", 2),
            "live PP2": words("live PP2", *live, *pp(2)),
            "data DP2": words("data DP2", *scored, data="scored"),
        },
        folder,
        400,
    )
    return columns(found)


def test_iw_sft_is_the_released_procedure(workspace, iw_sft_trainings):
    folder, _ = workspace
    expected, weights = descend(folder, iw_sft)
    assert expected[0, 1] == 1 and expected[-1, 1] > 1.5, "the weights change"
    for name, values in iw_sft_trainings.items():
        assert_follows(folder, name, values, expected, weights)


def test_weights_scored_once_are_another_method(workspace, iw_sft_trainings):
    """Of the model against itself they are all 1; any others are as fixed."""
    once, _ = descend(workspace[0], lambda log_p, before: (-log_p, torch.ones_like(log_p)))
    assert np.abs(iw_sft_trainings["live"] / once - 1).max() > 1000 * BOUND


@pytest.fixture(scope="module")
def psft_trainings(workspace):
    folder, rows = workspace
    common = training_words(folder, rows, rate=FASTER)

    def words(name, *more, refresh=REFRESH, data="train"):
        parameters = ["--objective-args", f"epsilon_high={CLIP}", f"refresh={refresh}"]
        export = ["--save-hf", folder / f"hf-{name}"]
        return [*common, "--sft-train", folder / f"{data}.jsonl", "--objective", "psft", *parameters, *more, *export]

    unpacked = ["--no-pack", "--global-batch-size", len(records(folder))]
    found = launch(
        1,
        {
            "psft": words("psft", *unpacked),
            "frozen": words("frozen", refresh=0, data="scored"),
        },
        folder,
        300,
    )
    found |= launch(
        2,
        {
            "psft CP2": words("psft CP2", *CP),
            "psft TP2 SP": words("psft TP2 SP", *tp(2), *SEQUENCE_PARALLEL, "--micro-batch-size", 2),
            "psft PP2": words("psft PP2", *pp(2)),
            "psft DP2": words("psft DP2"),
        },
        folder,
        400,
    )
    return columns(found)


def test_psft_is_the_released_procedure(workspace, psft_trainings):
    folder, _ = workspace
    expected, weights = descend(folder, psft, refresh=REFRESH, rate=FASTER)
    masses = expected[:, 1].reshape(-1)
    assert (masses[::REFRESH] == 1).all() and masses.min() < 0.8, "tokens are clipped, and start anew"
    for name, values in psft_trainings.items():
        if name != "frozen":
            assert_follows(folder, name, values, expected, weights)


def test_a_frozen_psft_is_another_method(workspace, psft_trainings):
    folder, _ = workspace
    expected, weights = descend(folder, psft, rate=FASTER)
    assert expected[-1, 1] == 0, "no token is trained any more"
    assert_follows(folder, "frozen", psft_trainings["frozen"], expected, weights)
    renewed, _ = descend(folder, psft, refresh=REFRESH, rate=FASTER)
    assert np.abs(psft_trainings["frozen"] / renewed - 1).max() > 1000 * BOUND
