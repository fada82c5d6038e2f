"""What a study is made of, read from a TOML file: base models, data, arms, and the grids that cross them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from examples.demo.prepare import MODEL_FOLDER, cache_directory

SFT = "sft"
# What a grid's outcome is called where no arm wins.
TIE = "tie"
# A base's model: the one that the demo fetches.
DEMO_MODEL = "demo:smollm2"


@dataclass(frozen=True)
class Arm:
    """A way to train, which is compared with others.

    objective, args: of finetune.
    teacher:         the model of the base that an objective with a second model reads: base or strong.
    keep:            the share of the demonstrations that is trained on, the likeliest by the base model.
    temperatures:    at which answers are drawn, besides the greedy ones.
    """

    name: str
    objective: str
    args: tuple[str, ...] = ()
    teacher: str = "base"
    keep: float = 1.0
    temperatures: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Base:
    """A model that trainings begin with: a Hugging Face directory, or sizes of one that the study trains itself.

    model, strong: directories, or DEMO_MODEL; strong: a better model with the same tokenizer.
    config:        of transformers' LlamaConfig.
    steps:         of its own training.
    strong_steps:  for how many more the better one is trained.
    """

    name: str
    model: Path | None = None
    strong: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    strong_steps: int = 0


@dataclass(frozen=True)
class Data:
    """Demonstrations, and what is asked afterwards.

    condition:           what they are, as their kind reads it: tasks.Condition, real.RealProblems or lm_eval.Harness.
    learning_rates_from: the data whose learning rates are taken, where none are swept.
    expected:            metric -> the arm that was expected to win against sft, or sft, or tie; written before.
    """

    name: str
    condition: Mapping[str, Any]
    learning_rates_from: str | None = None
    expected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """Every combination of data, bases and arms.

    seeds: at the learning rate that the dev split has chosen.
    steps: shorter trainings on the same schedule, at the learning rate of the whole one, 0 the base as it is; empty:
           the whole one.
    """

    name: str
    data: tuple[str, ...]
    bases: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int = 5
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Study:
    """A whole study.

    steps:          of each training.
    learning_rates: of which the dev split chooses, for each base, data and arm.
    demonstrations: different ones in a training.
    workers:        trainings at a time.
    launcher:       the words that start finetune's ranks, as torchrun --nproc-per-node 8; empty: one process.
    flags:          of finetune.
    """

    title: str
    steps: int
    learning_rates: tuple[float, ...]
    bases: Mapping[str, Base]
    data: Mapping[str, Data]
    arms: Mapping[str, Arm]
    grids: tuple[Grid, ...]
    demonstrations: int = 0
    workers: int = 2
    launcher: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)

    def base_names(self) -> list[str]:
        """The bases that grids use, in their order."""
        return list(dict.fromkeys(base for grid in self.grids for base in grid.bases))


def read_study(path: Path) -> Study:
    """The study of a TOML file; paths in it are relative to its folder. ValueError for one that cannot be."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    try:
        return _study(tomllib.loads(text), path.parent)
    except (tomllib.TOMLDecodeError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _study(table: dict[str, Any], folder: Path) -> Study:
    bases = {name: _base(name, value, folder) for name, value in _table(table, "bases").items()}
    data = {name: _data(name, value, folder) for name, value in _table(table, "data").items()}
    arms = {name: _arm(name, value) for name, value in _table(table, "arms").items()}
    grids = tuple(_grid(number, value) for number, value in enumerate(table.pop("grids", []), 1))
    launcher = table.pop("launcher", "")
    learning_rates = tuple(table.pop("learning_rates", ()))
    _check_keys("study", table, Study)
    if len(learning_rates) != len(set(learning_rates)) or not learning_rates or min(learning_rates) <= 0:
        raise ValueError(f"learning_rates: expected different positive numbers, got {list(learning_rates)}")
    study = Study(
        bases=bases,
        data=data,
        arms=arms,
        grids=grids,
        launcher=tuple(launcher.split()),
        learning_rates=learning_rates,
        **table,
    )
    _check_names(study)
    for name in ("steps", "workers"):
        if getattr(study, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(study, name)}")
    return study


def _table(table: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    found = table.pop(name, None)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"expected tables [{name}.NAME], one at least")
    return found


def _base(name: str, table: dict[str, Any], folder: Path) -> Base:
    for key in ("model", "strong"):
        if key in table:
            demo = table[key] == DEMO_MODEL
            table[key] = cache_directory() / MODEL_FOLDER if demo else folder / Path(table[key]).expanduser()
    _check_keys(f"[bases.{name}]", table, Base)
    base = Base(name, **table)
    if (base.model is None) == (not base.config):
        raise ValueError(f"[bases.{name}]: expected model = DIRECTORY, or config with steps, and not both")
    if base.config and base.steps < 1:
        raise ValueError(f"[bases.{name}]: expected steps, of its own training")
    return base


def _data(name: str, table: dict[str, Any], folder: Path) -> Data:
    own = {key: table.pop(key) for key in ("learning_rates_from", "expected") if key in table}
    if isinstance(table.get("train"), str):
        table["train"] = str(folder / Path(table["train"]).expanduser())
    return Data(name, condition=table, **own)


def _arm(name: str, table: dict[str, Any]) -> Arm:
    _check_keys(f"[arms.{name}]", table, Arm)
    arm = Arm(name, **{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    if not 0 < arm.keep <= 1:
        raise ValueError(f"[arms.{name}]: keep: expected a share above 0, at most 1, got {arm.keep}")
    if arm.teacher not in ("base", "strong"):
        raise ValueError(f"[arms.{name}]: teacher: expected base or strong, got {arm.teacher!r}")
    return arm


def _grid(number: int, table: dict[str, Any]) -> Grid:
    _check_keys(f"grid {number}", table, Grid)
    grid = Grid(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    if grid.seeds < 1:
        raise ValueError(f"grid {grid.name}: seeds: expected 1 or more, got {grid.seeds}")
    return grid


def _check_keys(what: str, table: Mapping[str, Any], kind: type) -> None:
    known = {field.name for field in fields(kind)}
    if strange := sorted(table.keys() - known):
        raise ValueError(f"{what}: unknown key {strange[0]!r}: expected {', '.join(sorted(known - {'name'}))}")


def _check_names(study: Study) -> None:
    """ValueError for names that are not defined, and for arms that lack what their objective reads."""
    from qtarget_megatron import objectives

    asked = {}
    for name, arm in study.arms.items():
        asked[name] = set(objectives.from_arguments(arm.objective, list(arm.args)).token_inputs)
        if "weight" in asked[name] and arm.teacher != "strong":
            raise ValueError(f'[arms.{name}]: its weights are of a better model: give teacher = "strong"')
    for grid in study.grids:
        for kind in ("data", "bases", "arms"):
            for name in getattr(grid, kind):
                if name not in getattr(study, kind):
                    raise ValueError(f"grid {grid.name}: there is no [{kind}.{name}]")
        for data in grid.data:
            if "task" not in study.data[data].condition and any("critical" in asked[name] for name in grid.arms):
                raise ValueError(f"grid {grid.name}: which tokens of [data.{data}] are critical is not known")
        if any(study.arms[name].teacher == "strong" for name in grid.arms):
            for name in grid.bases:
                base = study.bases[name]
                if base.strong is None and base.strong_steps < 1:
                    raise ValueError(f"grid {grid.name}: [bases.{name}] has no strong model")
        if any(not 0 <= steps < study.steps for steps in grid.steps):
            raise ValueError(f"grid {grid.name}: steps: expected 0 or more, fewer than the study's {study.steps}")
    for name, data in study.data.items():
        source = data.learning_rates_from
        if source is not None and (source not in study.data or study.data[source].learning_rates_from is not None):
            raise ValueError(
                f"[data.{name}]: learning_rates_from: expected data whose learning rates are swept, got {source}"
            )
        if strange := sorted(set(data.expected.values()) - study.arms.keys() - {TIE}):
            raise ValueError(f"[data.{name}]: expected: there is no arm {strange[0]!r}")
