"""Flags that ask for what is not there are refused, and no others."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from launching import run_ranks

from qtarget_megatron import kernels
from qtarget_megatron.megatron.runtime import architecture_flags, gpu_flags
from qtarget_megatron.megatron.runtime.gpu_flags import check_gpu_flags

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


FUSED = {
    "--no-gradient-accumulation-fusion": {"fused_weight_gradient_mlp_cuda"},
    "--no-masked-softmax-fusion": {
        "scaled_upper_triang_masked_softmax_cuda",
        "scaled_masked_softmax_cuda",
        "scaled_softmax_cuda",
    },
}
APEX = set().union({"apex"}, *FUSED.values())


@pytest.mark.parametrize("present", [set(), {"transformer_engine"}, APEX, {"transformer_engine", *APEX}, {"apex"}])
def test_each_fused_kernel_goes_by_the_modules_that_hold_it(monkeypatch, present):
    """Apex without its extensions holds none, Transformer Engine brings none."""
    find = architecture_flags.importlib.util.find_spec
    known = {"transformer_engine", *APEX}
    monkeypatch.setattr(
        architecture_flags.importlib.util,
        "find_spec",
        lambda name, *more: (name if name in present else None) if name in known else find(name, *more),
    )
    flags = architecture_flags.implementation_flags(on_cpu=False)
    for flag, modules in FUSED.items():
        assert (flag in flags) == (not modules <= present), flag
    assert ("--transformer-impl" in flags) == ("transformer_engine" not in present)
    assert ("--dist-ckpt-strictness" in flags) == ("transformer_engine" in present)
    on_cpu = architecture_flags.implementation_flags(on_cpu=True)
    assert set(FUSED) <= set(on_cpu) and "--transformer-impl" in on_cpu and "gloo" in on_cpu


FREE = dict(
    fp8_param_gather=False,
    fp4_param_gather=False,
    skip_train=False,
    init_model_with_meta_device=False,
    cuda_graph_impl="none",
    tp_comm_overlap=False,
    use_cpu_initialization=False,
)


def refused(*, live_teacher=False, on_cpu=False, **changed):
    try:
        gpu_flags.check_fine_tuning(SimpleNamespace(**FREE | changed), live_teacher=live_teacher, on_cpu=on_cpu)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fp8_param_gather": True}, "random numbers"),
        ({"fp4_param_gather": True}, "random numbers"),
        ({"init_model_with_meta_device": True}, "would drop the weights"),
        ({"cuda_graph_impl": "full_iteration"}, "on the host"),
    ],
)
def test_what_fine_tuning_does_not_serve(changed, reason):
    ((key, value),) = changed.items()
    found = refused(**changed)
    assert found.startswith(f"--{key.replace('_', '-')}") and reason in found
    assert refused(live_teacher=True, **changed) == found
    assert refused() is None and refused(live_teacher=True) is None
    assert refused(fp8_param_gather=True, skip_train=True) is None


@pytest.mark.parametrize(
    ("changed", "on_cpu"),
    [
        ({"cuda_graph_impl": "transformer_engine"}, None),
        ({"tp_comm_overlap": True}, None),
        ({"use_cpu_initialization": True}, True),
    ],
)
def test_what_a_live_teacher_does_not_go_with(changed, on_cpu):
    """on_cpu: whether the same is served there."""
    found = refused(live_teacher=True, **changed)
    assert "cache the teacher" in found
    assert refused(**changed) is None
    assert (refused(live_teacher=True, on_cpu=True, **changed) is None) == bool(on_cpu)
    assert refused(live_teacher=True, cuda_graph_impl="local") is None


@pytest.mark.parametrize(
    ("archs", "gpu", "serves"),
    [
        ("80;90;100", (8, 0), True),
        ("80;90;100", (8, 6), True),
        ("80;90;100", (8, 9), True),
        ("80;90;100", (7, 5), False),
        ("80;90;100", (7, 0), False),
        ("80;90;100", (9, 0), True),
        ("80;90;100", (12, 0), True),
        ("90", (8, 0), False),
        ("90", (10, 0), True),
        ("86", (8, 0), False),
    ],
)
def test_a_gpu_that_the_kernels_were_not_built_for_gets_the_reference(monkeypatch, archs, gpu, serves):
    info = {"cuda": True, "cuda_archs": archs}
    native = kernels.native
    monkeypatch.setattr(native, "extension", lambda: SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(native.torch.cuda, "get_device_capability", lambda *device: gpu)
    native.has_cuda.cache_clear()
    native._problem_of.cache_clear()
    try:
        if serves:
            assert kernels.choose("auto", "cuda", torch.bfloat16) is native
            assert kernels.choose("cuda", "cuda", torch.bfloat16) is native
            return
        with pytest.warns(UserWarning, match=f"this GPU is sm_{gpu[0]}{gpu[1]}: backend='auto' uses"):
            assert kernels.choose("auto", "cuda", torch.bfloat16) is kernels.reference
        with pytest.raises(ValueError, match=f"was built for sm_{archs[:2]}.* or use 'reference'"):
            kernels.choose("cuda", "cuda", torch.bfloat16)
    finally:
        native.has_cuda.cache_clear()
        native._problem_of.cache_clear()
