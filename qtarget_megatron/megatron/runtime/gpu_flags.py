"""Megatron's flags that ask for what this machine does not have: a GPU, or Transformer Engine's layers.

Megatron takes many of them silently where they have no effect, and trains in another precision than asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

# Beginnings of flags.
_OF_TRANSFORMER_ENGINE = (
    "--fp8-",
    "--no-fp8-",
    "--fp4-",
    "--keep-fp8-",
    "--reuse-grad-buf-for-mxfp8-",
    "--first-last-layers-bf16",
    "--moe-router-padding-for-fp8",
    "--moe-router-padding-for-quantization",
    "--te-",
    "--use-te-",
    "--use-transformer-engine-op-fuser",
    "--use-flash-attn",
    "--flash-attention-version",
    "--fused-residual-rmsnorm",
    "--tp-comm-overlap",
    "--delay-wgrad-compute",
    "--overlap-dispatch-backward-with-experts-wgrad",
    "--use-precision-aware-optimizer",
    "--use-grouped-gemm-for-",
    "--moe-single-grouped-",
    "--cpu-offloading-num-layers",
    "--fine-grained-activation-offloading",
)
_OF_A_GPU = (
    "--cuda-graph-",
    "--enable-cuda-graph",
    "--external-cuda-graph",
    "--optimizer-cuda-graph",
    "--delay-offload-until-cuda-graph",
    "--use-nccl-ub",
    "--nccl-",
    "--use-sharp",
    "--sharp-enabled-group",
    "--symmetric-ar-type",
    "--use-ring-exchange-p2p",
    "--use-kitchen-attention",
    "--kitchen-attention-backend",
    "--flash-decode",
    "--moe-enable-deepep",
    "--moe-deepep-",
    "--moe-hybridep-",
    "--moe-ncclep-",
    "--moe-flex-dispatcher-",
    "--high-priority-",
    "--use-persistent-ckpt-worker",  # without a GPU it dies, and a save waits for it for ever
)
# Flags some of whose values ask for it: (value -> whether that needs Transformer Engine, not just a GPU).
_VALUES = {
    "--attention-backend": {"flash": True, "fused": True},
    "--cross-entropy-fusion-impl": {"te": True},
    "--transformer-impl": {"transformer_engine": True, "inference_optimized": True},
    "--distributed-backend": {"nccl": False},
    "--pipeline-model-parallel-comm-backend": {"nccl": False},
    "--moe-token-dispatcher-type": {"flex": False},
}
_HARMLESS = {"--cuda-graph-impl": "none"}


def check_gpu_flags(argv: Sequence[str], args: argparse.Namespace, *, on_cpu: bool) -> None:
    """ValueError for a flag that would have no effect: on the CPU, or with layers that are not Transformer Engine's.

    argv: the user's own words. args: Megatron's, with the layers that it will build.
    """
    layers_of_its_own = on_cpu or args.transformer_impl == "local"
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, given, value = word.partition("=")
        value = value if given else following
        if not flag.startswith("--") or _HARMLESS.get(flag) == value:
            continue
        needs = _VALUES.get(flag, {}).get(value)
        if needs is None:
            needs = True if flag.startswith(_OF_TRANSFORMER_ENGINE) else False if flag.startswith(_OF_A_GPU) else None
        if needs is None or not (on_cpu or (needs and layers_of_its_own)):
            continue
        shown = f"{flag} {value}" if flag in _VALUES else flag
        if on_cpu:
            raise ValueError(f"{shown} needs a GPU, and this runs on the CPU: drop it")
        raise ValueError(
            f"{shown} needs the layers of Transformer Engine, and this runs with Megatron's local ones, where it would "
            "have no effect: install transformer_engine and do not give --transformer-impl local, or drop it"
        )


def check_fine_tuning(args: argparse.Namespace, *, live_teacher: bool, on_cpu: bool) -> None:
    """ValueError for a flag of a GPU under which Megatron would train something else than this model, or fail late.

    The weights are loaded when the model is built; a live teacher is stacked on the student, outside of its module
    tree, and what the pipeline sends is as wide as both.
    """
    for key in ("fp8_param_gather", "fp4_param_gather"):
        if getattr(args, key, False) and not args.skip_train:
            raise ValueError(
                f"{_flag(key)}: the optimizer would begin with the random numbers that the parameters hold before the "
                "weights are loaded, and write them over the model: drop it (--fp8-format alone is served)"
            )
    if args.init_model_with_meta_device:
        raise ValueError("--init-model-with-meta-device would drop the weights, which are loaded on the way: drop it")
    if args.cuda_graph_impl == "full_iteration":
        raise ValueError(
            "--cuda-graph-impl full_iteration: a step reads its batch and looks at its loss on the host: give local or "
            "transformer_engine"
        )
    if not live_teacher:
        return
    if args.cuda_graph_impl == "transformer_engine":
        raise ValueError(
            "--cuda-graph-impl transformer_engine captures layers as wide as student and live teacher together: give "
            "local, or cache the teacher (--teacher-cache)"
        )
    for key in ("tp_comm_overlap", *(() if on_cpu else ("use_cpu_initialization",))):
        if getattr(args, key):
            what = "has buffers of the student's width" if key == "tp_comm_overlap" else "leaves the teacher on the CPU"
            raise ValueError(f"{_flag(key)} {what}: drop it, or cache the teacher (--teacher-cache)")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
