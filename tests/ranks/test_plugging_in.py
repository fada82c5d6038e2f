"""The examples for scripts of one's own: their two lines, against Megatron's own loss and against one process."""

import contextlib
import io
import os
import sys
import time

import pytest
import torch
from finetune_runs import scalars
from launching import run_ranks
from megatron_reset import reset
from noise_floor import bound
from pretrain_flags import FLAGS, STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


def core_loop(runs):
    from examples.plugging_in import core_loop

    losses = {}
    for name, words in runs.items():
        losses[name] = core_loop.main([*words, "--steps", str(STEPS)])
        reset()
    return losses


def pretrain_script(runs, folder):
    """The script with each run's objective, by its name; None is Megatron's own loss."""
    from megatron.training import get_args

    from examples.plugging_in import pretrain_script

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as in its command
    attach, losses = pretrain_script.attach, {}
    others = {
        "focal": attach,
        "sft": lambda model, *objective, **keywords: attach(model, "sft", **keywords),
        "sft of whole logits": lambda model, *objective, **keywords: attach(model, "sft", chunk_size=None, **keywords),
        None: lambda *arguments, **keywords: None,
    }
    for name, (objective, words) in runs.items():
        board = f"{folder}/{name}"
        sys.argv = ["pretrain_script", *map(str, [*FLAGS, "--tensorboard-dir", board, *words])]
        pretrain_script.attach = others[objective]
        with contextlib.redirect_stdout(io.StringIO()):
            pretrain_script.main()
        assert get_args().calculate_per_token_loss
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            # A thread of TensorBoard's writes them.
            while len(written := scalars(board).get("lm loss", [])) < STEPS:
                time.sleep(0.05)
            losses[name] = written
        reset()
    return losses


def assert_same_losses(found, expected):
    for step, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        assert a == pytest.approx(b, rel=bound("lm loss", step)), step


def test_a_plain_megatron_core_loop():
    alone = {"megatron": ["--megatron-loss"], "sft": [], "dft": ["--objective", "dft"]}
    (one,) = run_ranks(1, core_loop, (alone,), megatron=True)
    assert_same_losses(one["sft"], one["megatron"])
    assert len(one["dft"]) == STEPS and one["dft"] != pytest.approx(one["megatron"], rel=1e-3)
    runs = {
        "TP2": ["--tp", "2", "--objective", "dft"],
        "PP2": ["--pp", "2", "--objective", "focal", "gamma=0"],
        "PP2 megatron": ["--pp", "2", "--megatron-loss"],
    }
    first, last = run_ranks(2, core_loop, (runs,), megatron=True)
    # The same weights are drawn where there is one pipeline stage.
    assert first["TP2"] == last["TP2"] and not first["PP2"]
    assert_same_losses(last["TP2"], one["dft"])
    assert_same_losses(last["PP2"], last["PP2 megatron"])


def test_a_pretraining_script_of_ones_own(tmp_path):
    kinds = {"focal": "focal", "sft": "sft", "whole": "sft of whole logits", "megatron": None}
    alone = {name: (objective, []) for name, objective in kinds.items()}
    (one,) = run_ranks(1, pretrain_script, (alone, str(tmp_path / "one")), megatron=True)
    assert_same_losses(one["sft"], one["megatron"])
    assert_same_losses(one["whole"], one["megatron"])
    assert one["focal"] != pytest.approx(one["megatron"], rel=1e-3)
    layouts = {"TP2": ["--tensor-model-parallel-size", 2], "PP2": ["--pipeline-model-parallel-size", 2], "DP2": []}
    runs = {f"{name} {kind}": (kinds[kind], flags) for name, flags in layouts.items() for kind in ("sft", "megatron")}
    several = run_ranks(2, pretrain_script, (runs, str(tmp_path / "two")), megatron=True)[-1]
    for name in layouts:
        assert_same_losses(several[f"{name} sft"], several[f"{name} megatron"])
