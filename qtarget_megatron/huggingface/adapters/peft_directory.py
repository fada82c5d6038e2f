"""PEFT's directories of adapters: adapter_config.json and adapter_model.safetensors, read and written.

Nothing of PEFT is needed, and nothing that a file says is executed. A directory that is written here holds, in the
metadata of its safetensors file, the SHA-256 of the model that its adapters were trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtarget_megatron.huggingface.adapters.lora import EXPERTS, TARGETS, Lora, adapted_modules, targets_of
from qtarget_megatron.huggingface.config.architecture import Architecture
from qtarget_megatron.huggingface.config.config_file import read_json_object, shown
from qtarget_megatron.huggingface.weights.reader import is_finite
from qtarget_megatron.huggingface.weights.safetensors_file import PlannedTensor, SafetensorsFile, file_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_DIGEST, _DTYPE = "base_sha256", "base_dtype"
# Fields of adapter_config.json -> the values under which an adapter is the plain one that is trained here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
}
_NOT_CONVERTED = ("qwen2_moe",)
# Under these the weights of the model were changed before the training.
_CHANGES_WEIGHTS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")


def tensor_name(module: str, factor: str) -> str:
    """The name of a factor, "A" or "B", of a Hugging Face module's adapter."""
    return f"{_PREFIX}{module}.lora_{factor}.weight"


class PeftDirectory:
    """Reads the adapters of a PEFT directory for a model; Factors for load_factor().

    lora: what they are.
    base: (SHA-256, dtype) of the model that they were trained on, None where it is not said.

    ValueError, in one line, where a file is missing, damaged or of another kind, where the adapters are no plain LoRA,
    and where they are not those of this model: names and shapes are compared, no numbers are read.
    """

    def __init__(self, directory: str | Path, arch: Architecture):
        self.directory = Path(directory)
        config = self._config()
        names, metadata = self._names()
        self.base = (metadata[_DIGEST], metadata[_DTYPE]) if {_DIGEST, _DTYPE} <= metadata.keys() else None
        modules = {match["module"] for name in names if (match := _NAME.fullmatch(name))}
        other = [name for name in names if not _NAME.fullmatch(name)]
        if other or not modules:
            got = other[0] if other else "none"
            raise ValueError(
                f"{self.directory / WEIGHTS}: expected tensors like {tensor_name('MODULE', 'A')}, got {got}"
            )
        self.lora = self._lora(config, targets_of(arch, modules))
        expected = adapted_modules(arch, self.lora)
        problems = sorted(modules - expected.keys())
        if problems:
            raise ValueError(
                f"{self.directory}: {problems[0]} has an adapter there, and a {arch.family} model of --hf-model has no "
                "such layer: these are the adapters of another model"
            )
        if missing := sorted(expected.keys() - modules):
            raise ValueError(
                f"{self.directory}: expected an adapter for {missing[0]}, as its like have one, got none: adapters of "
                "some layers only are not read"
            )
        rank = self.lora.rank
        for module, (rows, columns) in expected.items():
            for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                name = tensor_name(module, factor)
                if name not in names or names[name] != shape:
                    found = list(names[name]) if name in names else "none"
                    raise ValueError(
                        f"{self.directory}: expected {name} of shape {list(shape)}, got {found}: the adapters are "
                        "those of another model, or were trained with several ranks"
                    )

    def read(self, module: str, factor: str) -> Tensor:
        """A or B of a module, in the dtype of the file. ValueError where a number is NaN or infinite."""
        name = tensor_name(module, factor)
        values = self._file.get_tensor(name)
        if not is_finite(values):
            raise ValueError(f"{self.directory / WEIGHTS}: expected finite numbers, got NaN or infinity in {name}")
        return values

    @cached_property
    def _file(self) -> Any:
        # Opened once: of a model with experts the header has ten thousands of names.
        return safe_open(self.directory / WEIGHTS, "pt")

    def _config(self) -> dict:
        path = self.directory / CONFIG
        if not path.is_file():
            raise ValueError(f"--lora-from {self.directory}: expected a PEFT directory with {CONFIG}, found none")
        config = read_json_object(path)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{path}: expected peft_type LORA, got {shown(config.get('peft_type'))}")
        for key, plain in _PLAIN.items():
            if config.get(key) not in plain:
                raise ValueError(f"{path}: {key} {shown(config[key])} is not plain LoRA, and is not trained here")
        how = config.get("init_lora_weights")
        if isinstance(how, str) and how.startswith(_CHANGES_WEIGHTS):
            raise ValueError(
                f"{path}: init_lora_weights {shown(how)} has changed the model's weights as well: merge the adapters, "
                "or convert them to plain ones with PEFT"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            if config.get(key):
                raise ValueError(f"{path}: expected one rank and alpha for all layers, got {key} {shown(config[key])}")
        return config

    def _names(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        path = self.directory / WEIGHTS
        if not path.is_file():
            raise ValueError(
                f"--lora-from {self.directory}: expected {WEIGHTS}, found none; other formats are not read"
            )
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                return shapes, dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: expected a safetensors file, got: {shown(error)}") from None

    def _lora(self, config: dict, targets: tuple[str, ...]) -> Lora:
        path, rank, alpha = self.directory / CONFIG, config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"{path}: expected r to be a number of 1 or more, got {shown(rank)}")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
            raise ValueError(f"{path}: expected lora_alpha to be a number above 0, got {shown(alpha)}")
        dropout = config.get("lora_dropout", 0.0)
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"{path}: expected lora_dropout of at least 0 and below 1, got {shown(dropout)}")
        return Lora(rank, float(alpha), float(dropout), bool(config.get("use_rslora", False)), targets)


def config_bytes(arch: Architecture, lora: Lora, base: str) -> bytes:
    """adapter_config.json. base: the name or directory of the model that the adapters belong to."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": target_modules(arch, lora),
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def target_modules(arch: Architecture, lora: Lora) -> list[str]:
    """PEFT's names of the adapted modules: the last part of a name, or as many parts as tell it from modules that have
    no adapter."""
    everything = {module for target in TARGETS for module in adapted_modules(arch, Lora(1, targets=(target,)))}
    adapted = adapted_modules(arch, lora).keys()
    frozen = everything - adapted
    found = set()
    for module in adapted:
        parts = module.split(".")
        names = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found.add(next(name for name in names if not any(other.endswith(f".{name}") for other in frozen)))
    return sorted(found)


def not_loaded(arch: Architecture, lora: Lora) -> str | None:
    """What of these adapters PEFT does not load beside transformers 5, which has all experts of a layer in one; None
    where it loads them.

    PEFT 0.21.2 (utils/transformers_weight_conversion.py) takes the names of MLPs for those of experts, and knows no
    experts of a qwen2_moe.
    """
    if arch.experts is None:
        return None
    in_experts, mlp = EXPERTS in lora.targets, [name for name in ("gate", "up", "down") if name in lora.targets]
    if arch.family in _NOT_CONVERTED:
        return EXPERTS if in_experts else None
    return " ".join(mlp) or None


def planned_tensors(arch: Architecture, lora: Lora, dtype: torch.dtype) -> dict[str, PlannedTensor]:
    """What adapter_model.safetensors holds."""
    planned = {}
    for module, (rows, columns) in adapted_modules(arch, lora).items():
        planned[tensor_name(module, "A")] = PlannedTensor((lora.rank, columns), dtype)
        planned[tensor_name(module, "B")] = PlannedTensor((rows, lora.rank), dtype)
    return planned


def adapter_bytes(arch: Architecture, lora: Lora, dtype: torch.dtype) -> int:
    """Size of adapter_model.safetensors, but for its metadata."""
    return file_bytes(planned_tensors(arch, lora, dtype))


def write_weights(
    folder: Path,
    planned: Mapping[str, PlannedTensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    base: tuple[str, str] | None = None,
) -> None:
    """Write adapter_model.safetensors.

    tensors: all that are planned, in any order.
    base:    as PeftDirectory.base.

    ValueError where a number is NaN or infinite.
    """
    metadata = {} if base is None else {_DIGEST: base[0], _DTYPE: base[1]}
    with SafetensorsFile(folder / WEIGHTS, planned, metadata) as file:
        for name, values in tensors:
            if not is_finite(values):
                raise ValueError(
                    f"expected finite adapters to export, got NaN or infinity in {name}: the training has diverged"
                )
            file.write(name, [values])
        file.check_complete()
