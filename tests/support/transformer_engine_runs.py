"""Fine-tuning runs, and commands, on Megatron's layers for Transformer Engine, over the stand-in for it, on the CPU.

Megatron looks for Transformer Engine when it is imported. So these ranks are processes of their own, in which nothing
has imported it yet: launch them by launching.run_ranks without megatron=True.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import conversion_runs
import finetune_runs
from megatron_reset import reset

STAND_IN = Path(__file__).parent / "transformer_engine_stand_in"
# What a GPU has beside the flags that finetune finds by itself, and what the stand-in does not have.
FLAGS = ["--transformer-impl", "transformer_engine", "--no-rope-fusion"]
FLAGS += ["--distributed-backend", "gloo", "--num-workers", 0]


def run_all(
    runs: dict[str, tuple[list, str | None]],
    commands: dict[str, tuple[str, list]],
    models: dict[str, tuple[str, list]],
    folder: str,
) -> tuple[dict[str, dict], dict[str, tuple[int, str]], dict[str, float]]:
    """finetune_runs.run_all of (words, name of a fault below that the stand-in has meanwhile, or None);
    finetune_runs.run_tool of each command's name and words; of each model's directory and flags by how much its logits
    differ at most from transformers'.

    Each run's result has under "layers" how many of Transformer Engine's layers were built, by the names of their
    classes.
    """
    _prepare()
    results = {}
    for name, (words, fault) in runs.items():
        with _counted() as layers, FAULTS[fault]() if fault else contextlib.nullcontext():
            (result,) = finetune_runs.run_all({name: [*FLAGS, *words]}, folder).values()
        results[name] = result | {"layers": dict(layers)}
    converted = {name: finetune_runs.run_tool(tool, [*words, *FLAGS]) for name, (tool, words) in commands.items()}
    return results, converted, {name: _difference(Path(model), words) for name, (model, words) in models.items()}


def _difference(directory: Path, words: list) -> float:
    from qtarget_megatron.megatron.jobs.against_transformers import compare_with_transformers
    from qtarget_megatron.megatron.jobs.open_model import open_model

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model = open_model(directory, [str(word) for word in [*FLAGS, *words]])
        found = compare_with_transformers(model, directory, conversion_runs.tokens(model.args.seq_length))
    reset()
    return found.max_difference


def _prepare() -> None:
    """Import Megatron with the stand-in, on a CPU that passes for a GPU which Transformer Engine serves."""
    assert "megatron.core" not in sys.modules, "Megatron has looked for Transformer Engine already"
    sys.path.insert(0, str(STAND_IN))
    import megatron_preload  # noqa: F401
    import torch
    import transformer_engine
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from qtarget_megatron.megatron.runtime import prepare

    assert HAVE_TE and Path(transformer_engine.__file__).is_relative_to(STAND_IN)
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    for name in ("implementation_flags", "check_gpu_flags"):
        setattr(prepare, name, functools.partial(_as_on_a_gpu, getattr(prepare, name)))


def _as_on_a_gpu(function, *args, on_cpu: bool, **more):
    """The flags that a machine with a GPU and Transformer Engine gets, and those that it refuses."""
    return function(*args, on_cpu=False, **more)


@contextlib.contextmanager
def _counted():
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    layers, init = Counter(), TransformerEngineBaseModule.__init__

    def count(layer):
        init(layer)
        layers[type(layer).__name__] += 1

    with mock.patch.object(TransformerEngineBaseModule, "__init__", count):
        yield layers


@contextlib.contextmanager
def _built_otherwise(name: str, change):
    """change(layer) once a layer of a class has been built."""
    from transformer_engine import pytorch

    layer_class = getattr(pytorch, name)
    init = layer_class.__init__

    def build(layer, *args, **kwargs):
        init(layer, *args, **kwargs)
        change(layer)

    with mock.patch.object(layer_class, "__init__", build):
        yield


def _unmark_norm(layer) -> None:
    layer.layer_norm_weight.sequence_parallel = False


def _rename_norm(layer) -> None:
    layer.register_parameter("norm_weight", layer.layer_norm_weight)
    del layer.layer_norm_weight


def _own_heads_only():
    from transformer_engine.pytorch.distributed import Copy

    return mock.patch.object(Copy, "backward", staticmethod(lambda context, gradient: (gradient, None)))


# What Transformer Engine, or Megatron's use of it, could do otherwise.
FAULTS = {
    "the gradient of a norm is not summed over the ranks": functools.partial(
        _built_otherwise, "LayerNormLinear", _unmark_norm
    ),
    "a norm has another name": functools.partial(_built_otherwise, "LayerNormLinear", _rename_norm),
    "the gradient of an input is that of this rank's columns": _own_heads_only,
}
