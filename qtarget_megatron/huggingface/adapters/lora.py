"""What a low-rank adapter is, and which of a model's linear layers have one.

    y = W x + s B A dropout(x),    s = alpha / r, or alpha / sqrt(r) with rsLoRA

W [out, in] is frozen, A [r, in] and B [out, r] are trained; B is 0 at first. Hu et al. 2021 (arXiv 2106.09685);
rsLoRA: Kalajdzievski 2023 (arXiv 2312.03732). Each projection of a Hugging Face model has factors of its own, also
where Megatron has several in one linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from qtarget_megatron.huggingface.config import families
from qtarget_megatron.huggingface.config.architecture import Architecture
from qtarget_megatron.huggingface.weights.parameter_map import LinearLayer
from qtarget_megatron.huggingface.weights.tensors import hf_tensor_shapes

EXPERTS = "experts"
# What --lora-targets names -> the roles of the tensors that get an adapter.
_ROLES = {
    "q": ("query", "query_down", "query_up"),
    "k": ("key", "key_value_down", "key_value_up"),
    "v": ("value", "key_value_down", "key_value_up"),
    "o": ("attention_output",),
    "gate": ("gate", "shared_gate"),
    "up": ("up", "shared_up"),
    "down": ("down", "shared_down"),
    EXPERTS: ("expert_gate", "expert_up", "expert_down"),
}
TARGETS = tuple(_ROLES)
_ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Lora:
    """The adapters of a model. ValueError for numbers that are none, unknown targets or the same one twice.

    rank:    r.
    alpha:   of the factor s.
    dropout: probability that a number of an adapter's input is 0 in training.
    rslora:  s = alpha / sqrt(r).
    targets: of TARGETS.
    """

    rank: int
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = _ATTENTION

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"--lora-rank: expected 1 or more, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"--lora-alpha: expected a number above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--lora-dropout: expected at least 0 and below 1, got {self.dropout}")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            got = unknown[0] if unknown else "none"
            raise ValueError(f"--lora-targets: expected some of {', '.join(TARGETS)}, got {got}")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"--lora-targets: expected each once, got {' '.join(self.targets)}")
        # The order in which they are given means nothing.
        object.__setattr__(self, "targets", tuple(target for target in TARGETS if target in self.targets))

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the tensors that get an adapter, in any model."""
        return frozenset(role for target in self.targets for role in _ROLES[target])


def default_targets(arch: Architecture) -> tuple[str, ...]:
    """Attention and MLP; of a model with experts attention alone, which every reader of PEFT's directories knows."""
    return _ATTENTION if arch.experts is not None else (*_ATTENTION, "gate", "up", "down")


def check_targets(arch: Architecture, lora: Lora) -> None:
    """ValueError where a target is no projection of this model, or is one together with others that are not given."""
    present = {role for role, _ in _present(arch)}
    for target in lora.targets:
        if present.isdisjoint(_ROLES[target]):
            why = "no expert has a tensor of its own" if arch.experts and target == EXPERTS else "it has no such layer"
            raise ValueError(f"--lora-targets {target}: {why} in a {arch.family} model: drop it")
    family = families.by_name(arch.family)
    for group in (("q", "k", "v"), ("gate", "up"), ("k", "v")):
        given = [target for target in group if target in lora.targets]
        if not 0 < len(given) < len(group):
            continue
        names = {family.tensor(role, layer=0) for target in group for role in _ROLES[target] if role in present}
        of_each = [
            {
                family.tensor(role, layer=0)
                for role in _ROLES[target]
                if role in present and not role.startswith("shared")
            }
            for target in group
        ]
        if names and all(one and one == of_each[0] for one in of_each):
            raise ValueError(
                f"--lora-targets {' '.join(given)}: a {arch.family} model has one projection for {', '.join(group)}: "
                "give all of them, or none"
            )


@lru_cache(maxsize=8)  # asked once per parameter
def adapted_modules(arch: Architecture, lora: Lora) -> Mapping[str, tuple[int, int]]:
    """The linear layers of the Hugging Face model that have an adapter, by name -> (out, in), in checkpoint order."""
    shapes, found = hf_tensor_shapes(arch), {}
    for role, name in _present(arch):
        if role in lora.roles:
            rows, columns = shapes[name]
            found[name.removesuffix(".weight")] = (rows, columns)
    return MappingProxyType(found)


def targets_of(arch: Architecture, modules: Collection[str]) -> tuple[str, ...]:
    """The targets that have a layer among modules of the Hugging Face model, in the order of TARGETS."""
    roles = {role for role, name in _present(arch) if name.removesuffix(".weight") in modules}
    return tuple(target for target in TARGETS if not roles.isdisjoint(_ROLES[target]))


def adapter_numbers(arch: Architecture, lora: Lora) -> int:
    """How many numbers all adapters have together."""
    return sum(lora.rank * (rows + columns) for rows, columns in adapted_modules(arch, lora).values())


def adapter_shard_numbers(arch: Architecture, lora: Lora, linear: LinearLayer, ranks: int) -> int:
    """How many numbers the adapter beside a linear layer of Megatron's has on each of the ranks that it is cut over."""
    count = len({number for number in projections(linear.sources, arch, lora) if number is not None})
    if count == 0:
        return 0
    cut, whole = (linear.rows, count * linear.columns) if linear.cut == 0 else (linear.columns, linear.rows)
    return lora.rank * (cut // ranks + whole)


def _present(arch: Architecture) -> Iterator[tuple[str, str]]:
    """Role and name of the matrices of a checkpoint that can have an adapter."""
    family, shapes = families.by_name(arch.family), hf_tensor_shapes(arch)
    roles = list(dict.fromkeys(role for of_target in _ROLES.values() for role in of_target))
    for layer in range(arch.num_layers):
        for role in roles:
            count = arch.experts.count if role.startswith("expert_") and arch.has_experts(layer) else 1
            for expert in range(count):
                name = family.tensor(role, layer=layer, expert=expert)
                if name in shapes:
                    yield role, name


def projections(names: Sequence[str], arch: Architecture, lora: Lora) -> tuple[int | None, ...]:
    """For each tensor that a linear layer of Megatron's is made of, which of its adapters' A its rows read; None for a
    projection without an adapter. Tensors of one name are one projection.

    names: of the tensors, which may repeat.
    """
    modules = adapted_modules(arch, lora)
    numbers = {
        name: i for i, name in enumerate(dict.fromkeys(n for n in names if n.removesuffix(".weight") in modules))
    }
    return tuple(numbers.get(name) for name in names)
