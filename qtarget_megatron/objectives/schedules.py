"""Parameters of an objective that change over a training's steps.

A schedule is written NAME=PIECE[,PIECE ...], a piece FROM[:TO]@START-END[%][:SHAPE]::

    eta=0:0.5@0-20%                  from 0 to 0.5 over the first fifth of the steps, 0.5 from there on
    eta=0:0.5@100-500:cosine         along half a cosine between steps 100 and 500
    lam=1@0-50%,0.1@50-100%          1 in the first half, 0.1 in the second

START and END count steps, or hundredths of the training's. Before the first piece the value is what that begins with,
between two pieces and behind the last what the piece before ends with. An objective is built anew for each value, from
the factory of its name: nothing is compiled, and a step's value depends on its number alone, so that a training resumes
exactly.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qtarget_megatron.objectives.registry import Objective, factory_of, get, parse_arguments

SHAPES = ("linear", "cosine")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PIECE = re.compile(
    rf"(?P<first>{_NUMBER})(?::(?P<last>{_NUMBER}))?"
    r"@(?P<start>\d+(?:\.\d+)?)-(?P<end>\d+(?:\.\d+)?)(?P<percent>%?)(?::(?P<shape>[a-z]+))?"
)


@dataclass(frozen=True)
class Piece:
    """From first at start to last at end. shape: one of SHAPES."""

    first: float
    last: float
    start: float
    end: float
    shape: str = "linear"

    def value(self, place: float) -> float:
        """At a place from start to end."""
        share = (place - self.start) / (self.end - self.start)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.first + (self.last - self.first) * share


@dataclass(frozen=True)
class Schedule:
    """A parameter's value over a training.

    in_percent: start and end of the pieces are hundredths of the training, not steps.
    text:       as it was written.
    """

    parameter: str
    pieces: tuple[Piece, ...]
    in_percent: bool
    text: str

    def value(self, step: int, steps: int | None) -> float:
        """For the step after `step` finished ones, of a training of `steps`."""
        place = float(step)
        if self.in_percent:
            assert steps is not None  # see ScheduledObjective.check_length
            place = 100 * step / steps
        before = self.pieces[0].first
        for piece in self.pieces:
            if place < piece.start:
                break
            if place < piece.end:
                return piece.value(place)
            before = piece.last
        return before


def parse_schedule(word: str) -> Schedule:
    """A schedule as the command line gives it. ValueError for one that is none."""
    parameter, separator, text = word.partition("=")
    if not separator or not parameter or not text:
        raise ValueError(f"a schedule is NAME=FROM:TO@START-END[%], as eta=0:0.5@0-20%, got {word!r}")
    pieces: list[Piece] = []
    units: set[bool] = set()
    for part in text.split(","):
        found = _PIECE.fullmatch(part)
        if found is None:
            raise ValueError(
                f"schedule {word!r}: {part!r} is no FROM[:TO]@START-END[%][:SHAPE], as 0:0.5@0-20% or 1@100-500"
            )
        first, start, end = float(found["first"]), float(found["start"]), float(found["end"])
        last, shape = first if found["last"] is None else float(found["last"]), found["shape"] or SHAPES[0]
        units.add(bool(found["percent"]))
        if shape not in SHAPES:
            raise ValueError(f"schedule {word!r}: a shape is one of {', '.join(SHAPES)}, got {shape!r}")
        if not start < end or (found["percent"] and end > 100):
            raise ValueError(f"schedule {word!r}: {part!r} must begin before it ends, a share at 100% at most")
        if pieces and start < pieces[-1].end:
            raise ValueError(f"schedule {word!r}: {part!r} begins before the piece before it ends: give them in order")
        pieces.append(Piece(first, last, start, end, shape))
    if len(units) > 1:
        raise ValueError(f"schedule {word!r}: give all pieces in steps, or all in %")
    return Schedule(parameter, tuple(pieces), units.pop(), word)


class ScheduledObjective:
    """An objective some of whose parameters follow schedules.

    widest: the objective at one of the values at which it reads most: it stands for all of them where the model and the
            data are prepared.

    Raises ValueError for a parameter that is unknown or given twice, for a value of a schedule that the objective
    refuses, and where values differ in what they read of the data, or in what the mean is taken over.
    """

    def __init__(self, name: str, arguments: Sequence[str], schedules: Sequence[str]):
        """arguments: KEY=VALUE of the parameters that stay."""
        self._name, self._fixed = name, parse_arguments(arguments)
        self.schedules = tuple(parse_schedule(word) for word in schedules)
        # The micro-batches of a step ask for the same one.
        self._build = functools.lru_cache(maxsize=8)(self._make)
        names = [schedule.parameter for schedule in self.schedules]
        for parameter in names:
            if parameter in self._fixed or names.count(parameter) > 1:
                raise ValueError(f"objective parameter {parameter!r} is given twice: by its schedule alone is enough")
            if parameter not in inspect.signature(factory_of(name)).parameters:
                get(name, **self._fixed, **{parameter: 0.0})  # which names those that there are
        ends = [self._build(values) for values in self._corners()]
        self.widest = max(ends, key=lambda objective: (objective.needs_teacher, objective.request.width))
        for objective in ends:
            if _kind(objective) != _kind(self.widest):
                raise ValueError(
                    f"the schedules of {name} take it from {objective} to {self.widest}, which read different fields "
                    "of the data, take the mean over different tokens, or another model as the second one: choose "
                    "values of one kind"
                )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of those that follow a schedule."""
        return tuple(schedule.parameter for schedule in self.schedules)

    def values(self, step: int, steps: int | None) -> tuple[float, ...]:
        """Values of the parameters, for the step after `step` finished ones, of a training of `steps`."""
        return tuple(schedule.value(step, steps) for schedule in self.schedules)

    def at(self, step: int, steps: int | None) -> Objective:
        """The objective of that step."""
        return self._build(self.values(step, steps))

    def check_length(self, steps: int | None) -> None:
        """ValueError where a share of the training is asked for, and its length is not known."""
        for schedule in self.schedules:
            if schedule.in_percent and not steps:
                raise ValueError(
                    f"--objective-schedule {schedule.text}: a share of the training needs its length: give "
                    "--train-iters, --train-samples or --epochs"
                )

    def __str__(self) -> str:
        fixed = [f"{key}={value}" for key, value in self._fixed.items()]
        return f"{self._name}({', '.join([*fixed, *(schedule.text for schedule in self.schedules)])})"

    def _make(self, values: tuple[float, ...]) -> Objective:
        return get(self._name, **self._fixed, **dict(zip(self.parameters, values, strict=True)))

    def _corners(self) -> list[tuple[float, ...]]:
        """Values at and between the ends of every schedule's pieces, the others at their first."""
        first = [schedule.pieces[0].first for schedule in self.schedules]
        found = [tuple(first)]
        for place, schedule in enumerate(self.schedules):
            for piece in schedule.pieces:
                for value in (piece.first, (piece.first + piece.last) / 2, piece.last):
                    found.append((*first[:place], value, *first[place + 1 :]))
        return found


def _kind(objective: Objective) -> tuple[tuple[str, ...], str | None, int]:
    """What a training is prepared for."""
    return objective.token_inputs, objective.denominator, objective.refresh
