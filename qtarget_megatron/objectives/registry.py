"""What an objective is, and how one is found by name."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import math
import os
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qtarget_megatron.statistics import Divergence, Residuals, StatisticsRequest, TokenStatistics

TokenInputs = Mapping[str, Tensor]
# Loss, label mass, masses of the residuals and of the divergence.
LossAndMasses = tuple[Tensor | None, Tensor | float, Sequence[Tensor | float]]
Evaluate = Callable[[TokenStatistics, TokenInputs], LossAndMasses]
SampleValue = Callable[[TokenStatistics, TokenInputs], Tensor]

_LABEL_MASS = "label_mass"
# What a token input may hold, besides being finite. The slack above 0 is the rounding of whoever computed the value.
_TOKEN_INPUT_RANGES = {"critical": (0.0, 1.0), "is_prompt": (0.0, 1.0), "old_log_prob": (-math.inf, 1e-3)}


@dataclass(frozen=True)
class Objective:
    """One objective with its parameters fixed.

    evaluate:     (stats, inputs) -> (loss, c_y, [c_i ...]); float64 [N] tensors, loss in nats. Must be elementwise. A
                  mass that is the same for all tokens may be a number. The loss may be None, for the cross-entropy of
                  the target itself: -c_y log p(y) + sum_i c_i CE(r_i, p) + d D(p, r_1), where a mass of 0 adds
                  exactly 0.
    residuals:    (a, b) of each residual softmax(a*z + b*t), at most two.
    divergence:   of the model from the first residual; its mass d is then the last of the masses.
    sample_mean:  (stats, inputs) -> float64 [N], elementwise; evaluate reads its mean over the supervised tokens of
                  each token's sample as stats.sample_mean, and their number as stats.sample_size.
    sample_after: likewise; evaluate reads its sum over the supervised tokens of each token's sample that come after the
                  token's block of sample_block such tokens as stats.sample_after, and their number as
                  stats.tokens_after.
    token_inputs: names of the per-token side inputs it needs, handed to evaluate as float64 [N] tensors.
    denominator:  what a batch's mean is divided by: the number of non-zero entries of this token input, or of
                  "label_mass", c_y; None: the number of supervised tokens.
    refresh:      0: the second model is another one, and frozen. Else the trained model itself as it was at the last
                  step that this number divides; training keeps that copy.
    note:         what differs from the method as released, in a sentence; training prints it when it starts.
    name, parameters: filled in by register().

    Statistics that evaluate reads and that are computed only on request (see StatisticsRequest): collision, top_k,
    residual_entropy (for stats.kl_divergence()), residual_label.
    """

    evaluate: Evaluate = field(repr=False)
    residuals: Residuals = ()
    token_inputs: tuple[str, ...] = ()
    denominator: str | None = None
    refresh: int = 0
    note: str = ""
    collision: bool = False
    top_k: int = 0
    residual_entropy: bool = False
    residual_label: bool = False
    divergence: Divergence | None = None
    sample_mean: SampleValue | None = field(default=None, repr=False)
    sample_after: SampleValue | None = field(default=None, repr=False)
    sample_block: int = 1
    name: str = "unregistered"
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _ = self.request  # which checks it
        if self.denominator not in (None, _LABEL_MASS, *self.token_inputs):
            raise ValueError(
                f"denominator {self.denominator!r} must be {_LABEL_MASS!r} or one of the token_inputs "
                f"{self.token_inputs}"
            )
        if self.refresh and (self.refresh < 0 or not self.needs_teacher):
            raise ValueError(f"refresh must be 0 or more, and is of a second model that is read, got {self.refresh}")

    @functools.cached_property
    def request(self) -> StatisticsRequest:
        """The statistics that the kernels compute for it."""
        return StatisticsRequest(
            self.residuals,
            self.collision,
            self.top_k,
            self.residual_entropy,
            self.residual_label,
            self.divergence,
        )

    @property
    def needs_teacher(self) -> bool:
        """True where some residual reads the second model's logits (b != 0)."""
        return any(b != 0 for _, b in self.residuals)

    @property
    def needs_samples(self) -> bool:
        """Whether it reads what is of a whole sample."""
        return self.sample_mean is not None or self.sample_after is not None

    @property
    def needs_losses_to_count(self) -> bool:
        """Whether num_tokens needs the label masses, which are known with the losses."""
        return self.denominator == _LABEL_MASS

    def num_tokens(self, supervised: Tensor, token_inputs: Mapping[str, Tensor], label_mass: Tensor) -> Tensor:
        """How many tokens the mean loss is divided by, int64 []: the supervised ones, or those of the denominator.

        supervised, token_inputs: of one shape. label_mass: of the same tokens in any shape, as the statistics have it.
        """
        if self.denominator is None:
            return supervised.sum()
        if self.denominator == _LABEL_MASS:
            return (label_mass != 0).sum()
        return (supervised & (token_inputs[self.denominator] != 0)).sum()

    def __str__(self) -> str:
        parameters = ", ".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.name}({parameters})"


_REGISTRY: dict[str, Callable[..., Objective]] = {}
_EXAMPLES: dict[str, dict[str, Any]] = {}
_REFUSED: dict[str, str] = {}


def register(
    name: str, *, example: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Objective]], Callable[..., Objective]]:
    """Register an objective factory under a name; '-' and '_' are the same in names.

    The factory's keywords are the objective's parameters: they can be given to get() and on the command line.
    example: values for those without a default, with which verify_parallel tries the objective.
    Raises ValueError where the name is taken.
    """
    key = _key(name)

    def decorate(factory: Callable[..., Objective]) -> Callable[..., Objective]:
        if key in _REGISTRY:
            raise ValueError(f"an objective named {key!r} is registered already: choose another name")
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def build(*args: Any, **kwargs: Any) -> Objective:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return replace(factory(*args, **kwargs), name=key, parameters=tuple(bound.arguments.items()))

        _REGISTRY[key], _EXAMPLES[key] = build, dict(example or {})
        return build

    return decorate


def refuse(name: str, reason: str) -> None:
    """Make get() answer a name with the reason why no objective can be built for it."""
    _REFUSED[_key(name)] = reason


def names() -> list[str]:
    """Names of all registered objectives, sorted."""
    return sorted(_REGISTRY)


def example(name: str) -> Objective | None:
    """An objective with the parameters of its example, else their defaults; None where it is unknown, or where a
    parameter has neither."""
    key = _key(name)
    if key not in _REGISTRY:
        return None
    parameters, known = _EXAMPLES[key], inspect.signature(_REGISTRY[key]).parameters.values()
    complete = all(p.default is not inspect.Parameter.empty or p.name in parameters for p in known)
    return _REGISTRY[key](**parameters) if complete else None


def describe() -> str:
    """Name, parameters and docstring of every registered objective, as text."""
    texts = []
    for name in names():
        factory = _REGISTRY[name]
        parameters = " ".join(
            f"{key}={'...' if parameter.default is inspect.Parameter.empty else parameter.default}"
            for key, parameter in inspect.signature(factory).parameters.items()
        )
        texts.append(f"{name} {parameters}\n" + textwrap.indent(inspect.cleandoc(factory.__doc__ or ""), "    "))
    return "\n\n".join(texts)


def get(name: str, **parameters: Any) -> Objective:
    """Build a registered objective by name, e.g. ``get("target-sft", eta=0.3)``.

    Raises ValueError for an unknown name, an unknown or missing parameter, or a value out of range.
    """
    factory = factory_of(name)
    accepted = inspect.signature(factory).parameters
    for key in parameters:
        if key not in accepted:
            known = ", ".join(str(p) for p in accepted.values()) or "none"
            raise ValueError(f"objective {_key(name)!r} has no parameter {key!r}: its parameters are {known}")
    for key, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and key not in parameters:
            raise ValueError(f"objective {_key(name)!r} needs the parameter {key!r}: give {key}=VALUE")
    return factory(**parameters)


def factory_of(name: str) -> Callable[..., Objective]:
    """What builds the objective of this name. ValueError for an unknown one."""
    factory = _REGISTRY.get(_key(name))
    if factory is None and _key(name) in _REFUSED:
        raise ValueError(f"objective {_key(name)!r} is not available: {_REFUSED[_key(name)]}")
    if factory is None:
        raise ValueError(f"unknown objective {name!r}: expected one of {', '.join(names())}")
    return factory


def register_from_file(path: str | os.PathLike[str]) -> None:
    """Run a Python file that registers objectives. The file is the user's own program, not data: it is executed.

    Raises ValueError for a file that is missing, fails, or registers nothing.
    """
    known = set(_REGISTRY)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"{path}: expected a Python file that registers objectives (NAME.py), found none")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except (Exception, SystemExit) as error:
        raise ValueError(failure(error, path)) from error
    if set(_REGISTRY) == known:
        raise ValueError(f"{path} registers no objective: decorate a function with @objectives.register(NAME)")


def failure(error: BaseException, path: str | os.PathLike[str]) -> str:
    """One line about an error that a user's Python file raised: "FILE:LINE: what", and the place in another file where
    it arose, if it did."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename is not None:
        # Nothing of a file that does not parse has run: it has no frame.
        places.append((error.filename, error.lineno))
        text = error.msg
    own = os.path.realpath(path)
    line = next((line for file, line in reversed(places) if os.path.realpath(file) == own), 0)
    first_line = (text.strip().splitlines() or [""])[0]
    file, at = places[-1] if places else (path, line)
    elsewhere = "" if os.path.realpath(file) == own else f" (at {file}:{at})"
    return f"{path}:{line}: {type(error).__name__}: {first_line}{elsewhere}"


def from_arguments(name: str, arguments: Sequence[str]) -> Objective:
    """Build an objective from command-line words such as ``["eta=0.5"]``."""
    return get(name, **parse_arguments(arguments))


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Parameters from command-line words such as ``["eta=0.5"]``; values are Python literals or plain text."""
    parameters: dict[str, Any] = {}
    for word in arguments:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise ValueError(f"an objective argument is KEY=VALUE, got {word!r}")
        if key in parameters:
            raise ValueError(f"objective argument {key!r} is given twice")
        try:
            parameters[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parameters[key] = text
    return parameters


def _key(name: str) -> str:
    return name.replace("_", "-").lower()


def check_token_input(name: str, values: Tensor) -> None:
    """Raise ValueError unless the values of a token input (any shape) are finite and in its range."""
    low, high = _TOKEN_INPUT_RANGES.get(name, (-math.inf, math.inf))
    wrong = ~(values.isfinite() & (values >= low) & (values <= high))
    if wrong.any():
        expected = {"critical": "0 or 1", "old_log_prob": "log-probabilities in nats"}.get(name, "finite numbers")
        raise ValueError(f"token_inputs[{name!r}] must hold {expected}, got {values[wrong][0].item():g}")


def in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    """A parameter's value as a float. ValueError unless it is a finite number in [low, high], or (low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value <= high or not math.isfinite(value):
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
    return float(value)
