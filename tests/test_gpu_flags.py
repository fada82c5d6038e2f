"""Flags that ask for what is not there are refused, and no others."""

import argparse
from types import SimpleNamespace

import pytest
from launching import run_ranks

from qtarget_megatron.megatron import gpu_flags
from qtarget_megatron.megatron.gpu_flags import check_gpu_flags

LOCAL, ENGINE = SimpleNamespace(transformer_impl="local"), SimpleNamespace(transformer_impl="transformer_engine")


def refusal(*words, args=LOCAL, on_cpu=True):
    try:
        check_gpu_flags(words, args, on_cpu=on_cpu)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "words",
    [
        ["--fp8-format", "hybrid"],
        ["--fp8-format=e4m3"],
        ["--fp8-param-gather"],
        ["--fp4-format", "e2m1"],
        ["--attention-backend", "flash"],
        ["--attention-backend=fused"],
        ["--use-flash-attn"],
        ["--transformer-impl", "transformer_engine"],
        ["--tp-comm-overlap"],
        ["--delay-wgrad-compute"],
    ],
)
def test_what_needs_transformer_engine(words):
    """On the CPU, and on a GPU with local layers; with Transformer Engine's none is refused."""
    shown = words[0].partition("=")[0]
    on_cpu, local = refusal(*words), refusal("--bf16", *words, "--lr", "1", on_cpu=False)
    assert on_cpu.startswith(shown) and "needs a GPU" in on_cpu
    assert local.startswith(shown) and "install transformer_engine" in local
    assert refusal(*words, args=ENGINE, on_cpu=False) is None


@pytest.mark.parametrize(
    "words",
    [
        ["--cuda-graph-impl", "local"],
        ["--enable-cuda-graph"],
        ["--use-nccl-ub"],
        ["--distributed-backend", "nccl"],
        ["--use-sharp"],
        ["--moe-token-dispatcher-type", "flex"],
        ["--async-save", "--use-persistent-ckpt-worker"],
    ],
)
def test_what_needs_a_gpu(words):
    assert "needs a GPU" in refusal(*words)
    assert refusal(*words, on_cpu=False) is None


def test_what_the_cpu_does_is_not_refused():
    words = ["--attention-backend", "local", "--transformer-impl", "local", "--distributed-backend", "gloo", "--bf16"]
    words += ["--cuda-graph-impl", "none", "--overlap-grad-reduce", "--moe-token-dispatcher-type", "alltoall"]
    words += ["--cross-entropy-fusion-impl", "native", "--use-distributed-optimizer", "--hf-model", "fp8-format"]
    assert refusal(*words) is None and refusal() is None


def known_flags() -> list[str]:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(add_help=False))
    return [option for action in parser._actions for option in action.option_strings]


@pytest.mark.distributed
def test_every_name_is_one_of_megatrons():
    """A release that renames a flag must not leave a dead entry."""
    (known,) = run_ranks(1, known_flags, megatron=True)
    for beginning in (*gpu_flags._OF_TRANSFORMER_ENGINE, *gpu_flags._OF_A_GPU, *gpu_flags._VALUES):
        assert any(option.startswith(beginning) for option in known), beginning
