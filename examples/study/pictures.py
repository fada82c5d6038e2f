"""The pictures of a study's report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from examples.study.findings import COOLER, Findings

# The same arm looks the same in every picture.
STYLES = {
    "sft": ("#444444", "o"),
    "dft": ("#d1741f", "s"),
    "target-sft 0.5": ("#1f6fd1", "D"),
    "target-sft 1": ("#5aa9e6", "d"),
    "eaft": ("#8a5fbf", "^"),
    "asft": ("#c2a000", "v"),
    "sft-kl": ("#2f9e6e", "P"),
    "hybrid-kd": ("#c23b5a", "X"),
    "sft, filtered": ("#888888", "<"),
}
SHOWN = ("sft", "dft", "target-sft 0.5")


def draw(findings: Findings, out: Path) -> list[tuple[str, str]]:
    """Write the pictures for which there are results; (file, what it shows) of each."""
    import matplotlib

    matplotlib.use("Agg")
    pictures: list[tuple[str, Callable[..., str | None]]] = [
        ("rule.png", _wrong_rule),
        ("noise.png", _noise),
        ("forgetting.png", _forgetting),
        ("trust.png", _trust),
        ("results.png", _results),
    ]
    drawn = []
    for name, picture in pictures:
        caption = picture(findings, out / name)
        if caption is not None:
            drawn.append((name, caption))
    return drawn


def _by_share(findings: Findings, key: str) -> list[tuple[float, str]]:
    """(share, data) of the data that differ in a share of the demonstrations, from the least on."""
    found = [(data.condition[key], name) for name, data in findings.study.data.items() if data.condition.get(key)]
    return sorted(found)


def _wrong_rule(findings: Findings, path: Path) -> str | None:
    """Accuracy by the rule that the base knows and by the other one, against the share of demonstrations with the
    latter."""
    shares = _by_share(findings, "wrong_rule")
    base = findings.study.base_names()[0]
    if len(shares) < 2 or not findings.runs(base, shares[0][1], "sft"):
        return None
    figure, axes = _axes(2, "answers right, %")
    for axis, metric, title in zip(axes, ("greedy", "sampled"), ("likeliest answer", "sampled, T = 1"), strict=True):
        for arm in SHOWN:
            for key, line in (("a", "-"), ("b", "--")):
                points = []
                for share, data in shares:
                    own = findings.study.data[data].condition.get("key", "a")
                    values = findings.values(base, data, arm, metric if own == key else f"other {metric}")
                    points.append((share, values))
                label = f"{arm}, by the {'known rule' if key == 'a' else 'new rule'}"
                _line(axis, points, arm, line, label)
        for result in findings.runs(base, shares[-1][1], "sft", 0).values():
            own = findings.study.data[shares[-1][1]].condition.get("key", "a")
            known = result["metrics"][metric if own == "a" else f"other {metric}"]
            axis.axhline(100 * known, color="black", linestyle=":", linewidth=1, label="before, by the known rule")
        axis.set(title=title, xlabel="demonstrations that follow the new rule, %", ylim=(-3, 103))
    _save(figure, path, legend=True)
    return (
        f"Answers of {base} by the rule that the base model knows (solid) and by the new one (dashed), against the "
        "share of demonstrations that follow the new rule: the same trainings, whichever rule is called right. Bars: "
        "standard deviation over seeds."
    )


def _noise(findings: Findings, path: Path) -> str | None:
    shares = _by_share(findings, "wrong_steps")
    bases = findings.study.base_names()
    if len(shares) < 2 or not findings.runs(bases[0], shares[0][1], "sft"):
        return None
    clean = next((n for n, d in findings.study.data.items() if _is_clean_of(d.condition, shares, findings)), None)
    points_of = ([(0.0, clean)] if clean else []) + shares
    figure, axes = _axes(len(bases), "answers right, %")
    for axis, base in zip(axes, bases, strict=True):
        for arm in SHOWN:
            for metric, line in (("greedy", "-"), ("sampled", "--")):
                points = [(share, findings.values(base, data, arm, metric)) for share, data in points_of]
                _line(axis, points, arm, line, f"{arm}, {'likeliest' if metric == 'greedy' else 'T = 1'}")
        axis.set(title=base, xlabel="demonstrations with a wrong step, %")
    _save(figure, path, legend=True)
    return (
        "Right answers, the likeliest (solid) and sampled at T = 1 (dashed), against the share of demonstrations with "
        "one random wrong step."
    )


def _is_clean_of(condition: Any, shares: list[tuple[float, str]], findings: Findings) -> bool:
    """Whether these are the same task's demonstrations without a wrong one."""
    task = findings.study.data[shares[0][1]].condition.get("task")
    return condition.get("task") == task and not condition.get("wrong_steps") and not condition.get("wrong_rule")


def _forgetting(findings: Findings, path: Path) -> str | None:
    settings = [pair for pair in findings.settings("target-sft 0.5") if len(findings.runs(*pair, "sft-kl"))]
    settings = settings or findings.settings("target-sft 0.5")
    settings = [pair for pair in settings if len(findings.values(*pair, "sft", "untouched"))]
    if not settings:
        return None
    columns = min(5, len(settings))
    rows = -(-len(settings) // columns)
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=(2.6 * columns + 0.6, 2.6 * rows + 0.9), squeeze=False)
    ordered = sorted(settings, key=lambda pair: findings.study.base_names().index(pair[0]))
    for axis, (base, data) in zip(grid.flat, ordered, strict=False):
        for arm, (colour, marker) in STYLES.items():
            x, y = (findings.values(base, data, arm, metric) for metric in ("untouched", "sampled"))
            if len(x) and len(y):
                axis.errorbar(
                    *(100 * x.mean(), 100 * y.mean(), 100 * y.std(), 100 * x.std()),
                    color=colour, marker=marker, markersize=6, linewidth=1, label=arm,
                )  # fmt: skip
        before = findings.runs(base, data, "sft", 0)
        for result in before.values():
            metrics = result["metrics"]
            axis.plot(100 * metrics["untouched"], 100 * metrics["sampled"], "k*", markersize=10, label="before")
        axis.set_title(f"{data}, {base}", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in grid.flat[len(ordered) :]:
        axis.axis("off")
    for axis in grid[-1]:
        axis.set_xlabel("other tasks right, %", fontsize=8)
    for axis in grid[:, 0]:
        axis.set_ylabel("right at T = 1, %", fontsize=8)
    handles = dict(zip(*reversed(grid.flat[0].get_legend_handles_labels()), strict=True))
    places = max(2, 2 * columns)
    lines = -(-len(handles) // places)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=places, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, (0.25 * lines + 0.1) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return (
        "Right answers sampled at T = 1 against what is left of the tasks that were not trained (greedy), for each "
        "arm; the star is the base before."
    )


def _trust(findings: Findings, path: Path) -> str | None:
    """p(y) of right and of wrong characters over training."""
    lengths = sorted({0, *(s for grid in findings.study.grids for s in grid.steps), findings.study.steps})
    base = findings.study.base_names()[0]
    shown = [
        data for data in findings.study.data
        if len(findings.values(base, data, "dft", "p wrong", lengths[1] if len(lengths) > 2 else None))
    ]  # fmt: skip
    if len(lengths) < 3 or not shown:
        return None
    figure, axes = _axes(len(shown), "p(y) of a demonstration's character")
    for axis, data in zip(axes, shown, strict=True):
        for arm in SHOWN:
            for metric, line in (("p right", "-"), ("p wrong", "--")):
                points = [(steps, findings.values(base, data, arm, metric, steps)) for steps in lengths]
                _line(axis, points, arm, line, f"{arm}, {'right' if metric == 'p right' else 'wrong'}", scale=(1, 1))
        axis.set(title=data, xlabel="step")
    _save(figure, path, legend=True)
    return (
        "What a designed target trusts: mean p(y) of right (solid) and wrong (dashed) characters of demonstrations "
        f"over training, {base}."
    )


def _results(findings: Findings, path: Path) -> str | None:
    """Results of right steps, for each arm of the first grid; in front of them those of the base."""
    main = findings.study.grids[0]
    settings = [(base, data) for data in main.data for base in main.bases]
    settings = [pair for pair in settings if len(findings.values(*pair, "sft", "result greedy"))]
    if not settings:
        return None
    figure, axes = _axes(len(settings), "results of right steps, %")
    for axis, (base, data) in zip(axes, settings, strict=True):
        arms = [arm for arm in (*main.arms, COOLER) if findings.runs(base, data, arm)]
        for metric, fill in (("result greedy", "full"), ("result sampled", "none")):
            for result in findings.runs(base, data, "sft", 0).values():
                axis.plot(-1, 100 * result["metrics"][metric], "k*", markersize=10, fillstyle=fill)
            for place, arm in enumerate(arms):
                values = 100 * findings.values(base, data, arm, metric)
                colour, marker = STYLES.get(arm, ("#888888", "<"))
                axis.errorbar(
                    place, values.mean(), values.std(), color=colour, marker=marker, markersize=8, fillstyle=fill,
                    capsize=3, linestyle="none",
                )  # fmt: skip
        axis.set_xticks(range(-1, len(arms)), ["before", *(arm.replace(", ", ",\n") for arm in arms)], fontsize=8)
        axis.set(title=f"{data}, {base}", xlim=(-1.5, len(arms) - 0.5))
    _save(figure, path)
    return (
        "Results of right solutions' steps, each asked behind what stands before it: the share that is the likeliest "
        "number (filled), and the probability of these numbers at T = 1 (hollow). Bars: standard deviation over seeds."
    )


def _axes(count: int, label: str) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, 3.8), sharey=True, squeeze=False)
    axes[0][0].set_ylabel(label)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def _line(
    axis: Any, points: list[tuple[float, np.ndarray]], arm: str, line: str, label: str, scale: tuple = (100, 100)
) -> None:
    points = [(x, values) for x, values in points if len(values)]
    if not points:
        return
    colour, marker = STYLES[arm]
    axis.errorbar(
        [scale[0] * x for x, _ in points],
        [scale[1] * values.mean() for _, values in points],
        [scale[1] * values.std() for _, values in points],
        color=colour, marker=marker, markersize=4, linestyle=line, linewidth=1.6, capsize=2, label=label,
    )  # fmt: skip


def _save(figure: Any, path: Path, *, legend: bool = False) -> None:
    """legend: one for all, below."""
    import matplotlib.pyplot as plt

    if legend:
        figure.set_figheight(figure.get_figheight() + 0.7)
        lines, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            lines, labels, loc="lower center", ncols=-(-len(labels) // 2), fontsize=8, frameon=False, handlelength=3
        )
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight() if legend else 0, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
