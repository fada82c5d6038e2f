"""How far a training at a layout is from one on one rank in float32, and how far it may be.

A bound is what one rank says about itself, twice. It trains again in float32 with its hidden dimension in another
order, so that all sums are added up otherwise. And it trains in the precision of the layout, by the same kernels. How
far these are from the reference is the noise of each tensor; a layout is a further draw of the same roundings, and may
have MARGIN times as much.

    difference of a tensor = ||found - reference|| / ||reference||       (L2)
    noise of a tensor      = max(reordered, min(precision, 2 (u / 2^-24) reordered))
    bound of a tensor      = MARGIN max(its noise, the median noise of its kind)

u is the unit roundoff of the precision: what is reordered says how far a tensor magnifies roundings, so a kernel that
is wrong on one rank too does not pass for a rounding. The change of a weight is known as well as float32 holds the
weight: its noise is at least 2^-24 ||weight|| / ||change|| in each step.

A loss, or a gradient's norm, is one number, whose noise may be small by chance. It is a mean of many, and no mean of
errors is larger than their root mean square: the bound of a loss is MARGIN times that of the errors of micro-batches,
the bound of a norm MARGIN times that of the norms of all tensors, each weighted as in the mean.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MARGIN = 4
# Scalars are float32, added up and divided in it: some roundings of 2^-24.
_LEAST_SCALAR = 2.0**-22
# A tensor that is nearly zero, as the gradient of a bias of keys, is measured by a part of what tensors have elsewhere.
_LEAST_SIZE = 1e-3
LOSS, NORM, TOKENS = "loss", "gradient norm", "supervised tokens"
_TAGS = {LOSS: "lm loss", NORM: "grad-norm", TOKENS: "supervised tokens"}
CHANGE = "change of weights"


def gradient_of(step: int) -> str:
    """The kind of tensors that are the gradients of a step, counted from 1."""
    return f"gradient of step {step}"


@dataclass
class Training:
    """What one training has computed, on one rank or, of tensors, on this rank.

    scalars: LOSS, NORM and TOKENS of each step, as Megatron logs them; on the rank that logs.
    losses:  of each step, (sum, tokens) of each micro-batch.
    tensors: kind -> (name, tensor), gradients of each step and the change of the weights.
    """

    scalars: dict[str, list[float]]
    losses: list[list[tuple[float, int]]]
    tensors: dict[str, list[tuple[str, Tensor]]]

    def save(self, path: Path, key: str) -> None:
        """Write it to a safetensors file. key: says what it is, see saved_key()."""
        tensors = {f"{kind}/{name}": tensor for kind, of_kind in self.tensors.items() for name, tensor in of_kind}
        metadata = {"scalars": json.dumps(self.scalars), "losses": json.dumps(self.losses), "key": json.dumps(key)}
        # Whoever finds a file of that name finds a whole one.
        new = path.with_name(f"{path.name}.new")
        save_file(tensors, new, metadata=metadata)
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Training:
        """What save() has written."""
        tensors: dict[str, list[tuple[str, Tensor]]] = {}
        with safe_open(path, "pt") as file:
            for key in file.keys():
                kind, _, name = key.partition("/")
                tensors.setdefault(kind, []).append((name, file.get_tensor(key)))
            metadata = {key: json.loads(text) for key, text in file.metadata().items()}
        return cls(metadata["scalars"], metadata["losses"], tensors)


def saved_key(path: Path) -> str | None:
    """The key that a training was saved with; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("key", "null"))
    except (OSError, ValueError, SafetensorError):
        return None


def read_scalars(board: Path) -> dict[str, list[float]]:
    """The scalars of a training from its TensorBoard folder; none where it has no file."""
    # Seconds of imports.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not board.is_dir():
        return {}
    events = EventAccumulator(str(board)).Reload()
    return {name: [event.value for event in events.Scalars(tag)] for name, tag in _TAGS.items()}


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from the reference's.

    off:   L2 norm of the difference, relative to the reference's; infinite where something is not a number.
    ratio: of the reference that is in it, <found, reference> / <reference, reference>.
    """

    off: float
    ratio: float


@dataclass(frozen=True)
class Reference:
    """The training that all are compared with: its tensors by kind and name, in the model's order."""

    tensors: dict[str, dict[str, Tensor]]
    sizes: dict[str, dict[str, float]]

    @classmethod
    def of(cls, training: Training, order: Sequence[str]) -> Reference:
        """order: names of all tensors of the model."""
        tensors, sizes = {}, {}
        kinds = [*(gradient_of(step) for step in range(1, len(training.losses) + 1)), CHANGE]
        for kind in kinds:
            found = dict(training.tensors[kind])
            tensors[kind] = {name: found[name] for name in order if name in found}
            norms = {name: tensor.norm().item() for name, tensor in tensors[kind].items()}
            numbers = sum(tensor.numel() for tensor in tensors[kind].values())
            usual = math.sqrt(sum(norm**2 for norm in norms.values()) / numbers)
            sizes[kind] = {
                name: max(norm, _LEAST_SIZE * usual * tensors[kind][name].numel() ** 0.5)
                for name, norm in norms.items()
            }
        return cls(tensors, sizes)

    def distances(self, found: Mapping[str, Iterable[tuple[str, Tensor]]]) -> dict[tuple[str, str], Distance]:
        """How far each tensor is, by kind and name; the larger distance where a rank has two of a name."""
        result: dict[tuple[str, str], Distance] = {}
        for kind, of_kind in found.items():
            for name, tensor in of_kind:
                distance = self._distance(kind, name, tensor)
                if (kind, name) not in result or result[kind, name].off < distance.off:
                    result[kind, name] = distance
        return result

    def _distance(self, kind: str, name: str, tensor: Tensor) -> Distance:
        expected = self.tensors[kind][name]
        off = (tensor - expected).norm().item() / self.sizes[kind][name] if tensor.shape == expected.shape else math.inf
        if not math.isfinite(off):
            return Distance(math.inf, math.nan)
        square = (expected * expected).sum().item()
        return Distance(off, (tensor * expected).sum().item() / square if square else math.nan)


@dataclass(frozen=True)
class OneRankTrainings:
    """What one rank has computed: the reference, the same reordered, the same in the precision of the layout (on a CPU
    in float32 that is the reordered one)."""

    reference: Training
    reordered: Training
    precision: Training


@dataclass(frozen=True)
class Bounds:
    """The largest differences of a layout that is right: of tensors by kind and name, of scalars by name and step."""

    tensors: dict[tuple[str, str], float]
    scalars: dict[tuple[str, int], float]

    @classmethod
    def of(
        cls, alone: OneRankTrainings, reference: Reference, weights: Mapping[str, Tensor], roundoff: float
    ) -> Bounds:
        """From what one rank has computed.

        weights:  the first ones, by name.
        roundoff: unit roundoff of the precision of the layout.
        """
        most = 2 * roundoff / 2.0**-24
        steps = len(alone.reference.losses)
        reordered, precision = (reference.distances(other.tensors) for other in (alone.reordered, alone.precision))
        tensors: dict[tuple[str, str], float] = {}
        for kind, names in reference.tensors.items():
            own = {name: reordered[kind, name].off for name in names}
            if kind == CHANGE:
                for name, size in reference.sizes[kind].items():
                    own[name] = max(own[name], steps * 2.0**-24 * weights[name].float().norm().item() / size)
            usual = statistics.median(own.values())
            noise = {
                name: max(off, min(precision[kind, name].off, most * max(off, usual))) for name, off in own.items()
            }
            usual = statistics.median(noise.values())
            tensors |= {(kind, name): MARGIN * max(value, usual) for name, value in noise.items()}
        scalars = {}
        for step in range(1, steps + 1):
            for name, noise_of in ((LOSS, _loss_noise), (NORM, _norm_noise)):
                least = max(noise_of(alone.reference, alone.reordered, step), _LEAST_SCALAR)
                noise_in = noise_of(alone.reference, alone.precision, step)
                scalars[name, step] = MARGIN * max(least, min(noise_in, most * least))
            scalars[TOKENS, step] = 0.0
        return cls(tensors, scalars)


def _loss_noise(expected: Training, found: Training, step: int) -> float:
    """Root mean square over tokens of the error in the mean loss of their micro-batch, relative to the mean loss."""
    sums, others = expected.losses[step - 1], found.losses[step - 1]
    tokens = sum(count for _, count in sums)
    mean = sum(total for total, _ in sums) / max(tokens, 1)
    square = sum((a - b) ** 2 / count for (a, count), (b, _) in zip(sums, others, strict=True) if count)
    return math.sqrt(square / max(tokens, 1)) / abs(mean) if mean else 0.0


def _norm_noise(expected: Training, found: Training, step: int) -> float:
    """Root mean square of the relative errors of the tensors' norms, weighted by the squares of the norms."""
    errors, weights, others = 0.0, 0.0, dict(found.tensors[gradient_of(step)])
    for name, tensor in expected.tensors[gradient_of(step)]:
        norm = tensor.norm().item()
        errors, weights = errors + (others[name].norm().item() - norm) ** 2, weights + norm**2
    return math.sqrt(errors / weights) if weights else 0.0


@dataclass(frozen=True)
class Difference:
    """What is off, and how far it may be.

    what:  kind of a tensor, or a scalar with its step.
    name:  of the tensor.
    rank:  that has the worst copy.
    """

    what: str
    name: str
    off: float
    bound: float
    rank: int
    ratio: float = math.nan

    @property
    def ok(self) -> bool:
        return self.off <= self.bound


def compare_tensors(
    reference: Reference, bounds: Bounds, of_ranks: Sequence[Mapping[tuple[str, str], Distance]]
) -> list[Difference]:
    """The worst copy of each tensor over all ranks, in the model's order; of_ranks: what each has found."""
    found = []
    for kind, names in reference.tensors.items():
        for name in names:
            copies = [(ranks[kind, name], rank) for rank, ranks in enumerate(of_ranks) if (kind, name) in ranks]
            # A tensor that no rank has is as far off as can be.
            worst, rank = max(copies, key=lambda copy: copy[0].off, default=(Distance(math.inf, math.nan), 0))
            found.append(Difference(kind, name, worst.off, bounds.tensors[kind, name], rank, worst.ratio))
    return found


def compare_scalars(
    expected: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[float]], bounds: Bounds, rank: int
) -> list[Difference]:
    """Scalars of each step, as relative differences; rank: that logs them."""
    result = []
    for (name, step), bound in bounds.scalars.items():
        want = expected[name][step - 1]
        values = found.get(name, ())
        off = abs(values[step - 1] - want) if len(values) >= step else math.inf
        off = off / abs(want) if want else off
        result.append(Difference(f"{name} of step {step}", "", off if math.isfinite(off) else math.inf, bound, rank))
    return result
