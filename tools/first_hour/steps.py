"""The steps of the first hour on a GPU, in their order: what is cheap and decides about the rest comes first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """function: "module:name", called with a Work and the arguments in a process of its own; it returns lines of
    Markdown, or raises. limit: seconds after which that process and all that it started are ended."""

    name: str
    title: str
    function: str
    limit: float
    arguments: dict[str, Any] = field(default_factory=dict)


_PACKAGE = __name__.rpartition(".")[0]


def _check(name: str, title: str, function: str, limit: float = 300, **arguments: Any) -> Step:
    return Step(name, title, f"{_PACKAGE}.checks:{function}", limit, arguments)


def _training(name: str, title: str, function: str, limit: float = 300, **arguments: Any) -> Step:
    return Step(name, title, f"{_PACKAGE}.training:{function}", limit, arguments)


# The names in tools/first_hour/families.py, which imports torch; a test compares.
FAMILIES = ("llama2", "llama3", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_normalized", "qwen2_moe")
FAMILIES += ("gpt_oss", "mixtral", "mistral_window", "qwen2_windows", "smollm3", "deepseek_v3", "phi3", "glm", "glm4")
FAMILIES += ("granite", "ernie4_5", "seed_oss", "glm4_moe", "biases")


STEPS: tuple[Step, ...] = (
    _check("build", "nvidia-smi, nvcc, pip install, and what was built", "build", 1200),
    _check("cuda-tests", "pytest -m cuda", "cuda_tests", 900),
    _check("memcheck", "compute-sanitizer's memcheck on a kernel test", "sanitizer", 600, tool="memcheck"),
    _check("racecheck", "compute-sanitizer's racecheck on a kernel test", "sanitizer", 600, tool="racecheck"),
    _check("objectives", "every objective, both losses: cuda against the reference in float64", "objectives", 900),
    _check("graph", "the same, replayed from a torch.cuda.graph", "losses_on_a_device", way="captured"),
    _check("stream", "the same on a stream that is not the default one", "losses_on_a_device", way="stream"),
    _check("second-gpu", "the same on the second of two GPUs", "losses_on_a_device", way="second device"),
    _check("kernels", "kernels next to Megatron's, Liger's, Transformer Engine's", "benchmark", 1200, part="cuda"),
    _training("finetune-cpu", "a tiny model trained on the CPU, to compare with", "finetune_cpu"),
    _training("finetune-te", "the same with Transformer Engine alone", "finetune", layers="engine"),
    _training("finetune-apex", "the same with Apex's fused accumulation", "finetune", layers="apex"),
    _training("finetune-local", "the same with Megatron's local layers", "finetune", layers="local"),
    _check("verify-nccl", "verify_parallel over NCCL on all GPUs", "verify_parallel", 900),
    _check("no-labels", "batches without a supervised token over NCCL", "no_labels"),
    _training("waits-sft", "waits of the host in a step of sft", "waits", variant="sft, fused head"),
    _training("waits-live", "waits with a live teacher", "waits", variant="target-sft, live teacher"),
    _training("waits-cached", "waits with a cached teacher", "waits", variant="target-sft, cached teacher"),
    _check("head", "the fused head in chunks of 512 to 4096, and its peers", "benchmark", 1200, part="cuda-head"),
    *(
        _training(
            f"te-{name}", f"load, export and check of {name} by Transformer Engine's layers", "convert", family=name
        )
        for name in FAMILIES
    ),
    _training("context-parallel", "context parallelism of 2 with a live teacher", "context_parallel"),
    *(
        _training(
            f"overlap-{'tied' if tied else 'untied'}",
            f"--overlap-grad-reduce, --overlap-param-gather, {'tied' if tied else 'untied'} output layer",
            "with_and_without",
            flags=["--overlap-grad-reduce", "--overlap-param-gather"],
            plain=["--use-distributed-optimizer"],
            gpus=2,
            tied=tied,
        )
        for tied in (False, True)
    ),
    _training(
        "tp-comm-overlap",
        "--tp-comm-overlap",
        "with_and_without",
        flags=["--tp-comm-overlap"],
        plain=["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        gpus=2,
        engine=True,
    ),
    *(
        _training(
            f"graphs-{name}",
            f"--cuda-graph-impl {implementation}",
            "with_and_without",
            flags=["--cuda-graph-impl", implementation],
            engine=engine,
        )
        for name, implementation, engine in (("local", "local", False), ("te", "transformer_engine", True))
    ),
    _training("fp8", "--fp8-format hybrid", "fp8"),
)
