"""The examples for scripts of one's own: their three lines, against Megatron's own loss and against one process."""

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

from qtarget_megatron import objectives

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
    from qtarget_megatron.megatron.output_processor import OutputProcessor

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as in its command
    own = pretrain_script.QTARGET
    assert str(own._settings.objective) == "focal(gamma=2)"
    losses = {}
    for name, (objective, words) in runs.items():
        board = f"{folder}/{name}"
        sys.argv = ["pretrain_script", *map(str, [*FLAGS, "--tensorboard-dir", board, *words])]
        pretrain_script.QTARGET = {
            "focal": own,
            "sft": OutputProcessor("sft", vocab_size=pretrain_script.VOCABULARY),
            "sft of whole logits": OutputProcessor("sft", vocab_size=pretrain_script.VOCABULARY, chunk_size=None),
            None: None,
        }[objective]
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


def test_side_inputs_and_masks():
    """Without Megatron's loop: the output processor against the definition on one rank."""
    (differences,) = run_ranks(1, processor_differences, megatron=True)
    # Four units in the last place of a float32 of 4 to 8: the rounding of the logits and of the loss.
    assert differences == pytest.approx([0] * len(differences), abs=4 * 2**-21)


def processor_differences():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from qtarget_megatron.megatron.output_processor import OutputProcessor

    parallel_state.initialize_model_parallel()
    torch.manual_seed(3)
    hidden, weight = torch.randn(5, 2, 8), torch.randn(11, 8)

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, perform_initialization=False
    )
    output = ColumnParallelLinear(8, 11, config=config, init_method=None, bias=False)
    output.weight.data.copy_(weight)
    labels, mask = torch.randint(9, (2, 5)), torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]])
    scale = torch.rand(2, 5)
    processor = OutputProcessor("iw-sft", vocab_size=9)
    found = processor(
        hidden_states=hidden, output_layer=output, output_weight=None, labels=labels, loss_mask=mask,
        scale_logits=lambda x: x, context={"weight": scale}, config=config,
    )  # fmt: skip
    log_p = (hidden.double() @ weight.double().T)[..., :9].transpose(0, 1).log_softmax(-1)
    expected = -log_p.gather(-1, labels[..., None])[..., 0] * mask * scale
    p = processor.statistics.p.t()[mask.bool()]
    return [
        *(found - expected).flatten().tolist(),
        (p.log() - log_p.gather(-1, labels[..., None])[..., 0][mask.bool()]).abs().max().item(),
    ]


@pytest.mark.parametrize(
    ("objective", "words", "message"),
    [
        ("target-sft", ["eta=0.5"], "reads a second model, and an output processor has none: use"),
        ("no-such", [], "no-such"),
        (None, ["gamma=2"], "an Objective has its arguments already, got gamma=2"),
    ],
)
def test_what_an_output_processor_refuses(objective, words, message):
    (text,) = run_ranks(1, refusal, (objective, words), megatron=True)
    assert message in text and "\n" not in text


def refusal(objective, words):
    """objective: a name, or None for an Objective."""
    from qtarget_megatron.megatron.output_processor import OutputProcessor

    try:
        OutputProcessor(objective or objectives.from_arguments("sft", []), *words, vocab_size=9)
    except ValueError as error:
        return str(error)
