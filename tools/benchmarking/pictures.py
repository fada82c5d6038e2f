"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from tools.benchmarking import figures

Row = dict[str, Any]

OURS, IN_PLACE, PEER = "#0072b2", "#56b4e9", "#b8bec6"
# Told apart by shape as well.
LINES = [("#0072b2", "o"), ("#d55e00", "s"), ("#6b7280", "D"), ("#009e73", "^")]
INK, PALE = "#222222", "#6b7280"
DPI = 130
MIB = 2**20


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"axes.unicode_minus": False}):
        figure.savefig(path, format="png", dpi=DPI)


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors=PALE, labelcolor=INK, labelsize=8)
    axes.set_axisbelow(True)


def _colour(method: str) -> str:
    if method.startswith(("fused head", "qtarget")):
        return IN_PLACE if "in place" in method else OURS
    return IN_PLACE if "in place" in method else PEER


def kernels(rows: list[Row], path: Path) -> None:
    """Time as a multiple of the floor: a row for each objective, a column for each shape, the fewest threads."""
    threads = min((row["threads"] for row in rows if row["threads"]), default=None)
    rows = [row for row in rows if row["threads"] == threads]
    shapes = list(dict.fromkeys((row["tokens"], row["vocabulary"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["objective"] for row in rows if row["objective"]))
    methods = {name: list(dict.fromkeys(row["method"] for row in rows if row["objective"] == name)) for name in names}
    heights = [len(methods[name]) for name in names]
    figure = Figure(
        figsize=(1.8 + 3.0 * len(shapes), 1.6 + 0.27 * sum(heights) + 0.5 * len(names)), layout="constrained"
    )
    grid = figure.subplots(len(names), len(shapes), squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, name in zip(grid, names, strict=True):
        for axes, shape in zip(line, shapes, strict=True):
            here = [row for row in rows if (row["tokens"], row["vocabulary"], row["dtype"]) == shape]
            copied = next(row for row in here if row["method"] == "copy")
            bars = {row["method"]: _over_floor(row, copied) for row in here if row["objective"] == name}
            places = [place for place, method in enumerate(methods[name]) if method in bars]
            shown = [method for method in methods[name] if method in bars]
            axes.barh(places, [bars[m] for m in shown], height=0.72, color=[_colour(m) for m in shown])
            for place, method in zip(places, shown, strict=True):
                axes.text(bars[method], place, f" {bars[method]:.1f}", va="center", fontsize=8, color=INK)
            axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set(xlim=(0, max(bars.values()) * 1.18), ylim=(len(methods[name]) - 0.4, -0.6))
            labels = methods[name] if shape == shapes[0] else []
            axes.set_yticks(range(len(labels)), labels)
            _bare(axes)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.3, linewidth=0.5)
            if name == names[0]:
                axes.set_title(f"{shape[0]} x {shape[1]}\n{shape[2]}", fontsize=9.5, color=INK)
        line[0].set_ylabel(name, fontsize=10, weight="bold", color=INK)
    where = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    figure.suptitle(f"Loss of given logits, forward and backward{where}", fontsize=13, weight="bold", color=INK)
    figure.supxlabel("times the floor, which is what moving the bytes alone takes (dashed)", fontsize=9, color=INK)
    _save(figure, path)


def _over_floor(row: Row, copied: Row) -> float:
    return row["median"] / figures.floor_seconds(row["passes"], copied["logits_bytes"], copied["seconds"])


def head(rows: list[Row], path: Path) -> None:
    """Time and extra memory of each method: a row for each case."""
    keys = ("objective", "tokens", "hidden", "vocabulary", "dtype", "supervised")
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[key] for key in keys), []).append(row)
    heights = [len(group) for group in cases.values()]
    figure = Figure(figsize=(11, 1.2 + 0.3 * sum(heights) + 0.55 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, ((objective, tokens, hidden, vocabulary, dtype, share), group) in zip(grid, cases.items(), strict=True):
        names = [f"{r['method']}, chunk {r['chunk_size']}" if r["chunk_size"] else r["method"] for r in group]
        for axes, values in zip(
            line,
            ([r["median"] * 1e3 for r in group], [r["extra_bytes"] / MIB for r in group]),
            strict=True,
        ):
            axes.barh(range(len(group)), values, height=0.72, color=[_colour(r["method"]) for r in group])
            for place, value in enumerate(values):
                text = f" {value:.0f}" if value >= 99.5 else f" {value:#.3g}"
                axes.text(value, place, text, va="center", fontsize=8, color=INK)
            axes.set(xlim=(0, max(values) * 1.15 or 1), ylim=(len(group) - 0.4, -0.6))
            _bare(axes)
            axes.grid(axis="x", alpha=0.3, linewidth=0.5)
            axes.tick_params(axis="y", length=0)
        line[0].set_yticks(range(len(names)), names)
        line[1].set_yticks([])
        line[0].set_title(
            f"{objective}: {tokens} tokens ({share:.0%} supervised), hidden {hidden}, vocabulary {vocabulary}, {dtype}",
            fontsize=9,
            color=INK,
            loc="left",
        )
    for axes, label in zip(grid[-1], ("time, ms", "extra memory, MiB"), strict=True):
        axes.set_xlabel(label, fontsize=9, color=INK)
    figure.suptitle("Output layer and loss, forward and backward", fontsize=13, weight="bold", color=INK)
    _save(figure, path)


def growth(rows: list[Row], path: Path) -> None:
    """Time against tokens, vocabulary and shards with fitted lines, and memory against tokens."""
    from tools.benchmarking.report import series

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    grid = figure.subplots(2, 2)
    found = series(rows)
    for axes, (name, label) in zip(
        grid.flat,
        {
            "time by tokens": "tokens",
            "time by vocabulary": "vocabulary",
            "time by shards": "share of the vocabulary on a rank, 1/T",
        }.items(),
        strict=False,
    ):
        lines = [(objective, points) for (kind, objective), points in found.items() if kind == name]
        for (objective, points), (colour, mark) in zip(lines, LINES, strict=False):
            x, y = zip(*points, strict=True)
            fixed, slope, _ = figures.line(x, y)
            fitted = [(fixed + slope * value) * 1e3 for value in x]
            axes.plot(x, fitted, color=colour, linewidth=1, alpha=0.6)
            axes.plot(
                x,
                [value * 1e3 for value in y],
                linestyle="",
                color=colour,
                marker=mark,
                markersize=6,
                label=f"{objective}: {fixed * 1e3:.2f} ms + proportional",
            )
        _logarithmic(axes, x, reciprocal=name == "time by shards")
        axes.set_xlabel(label, fontsize=9, color=INK)
        axes.set_ylabel("ms", fontsize=9, color=INK)
        row = next(row for row in rows if row["series"] == name)
        shape = {
            "time by tokens": f"vocabulary {row['vocabulary']}",
            "time by vocabulary": f"{row['tokens']} tokens",
            "time by shards": f"{row['tokens']} x {row['vocabulary']}, slowest shard",
        }
        axes.set_title(f"{name} ({shape[name]})", fontsize=10.5, color=INK)
        axes.legend(fontsize=8.5, frameon=False)
    _memory(grid.flat[3], [row for row in rows if row["series"] == "memory"])
    figure.suptitle("Growth: one thread, float32, forward and backward", fontsize=13, weight="bold", color=INK)
    _save(figure, path)


def _memory(axes: Axes, rows: list[Row]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method, (colour, mark) in zip(methods, LINES, strict=False):
        x, y = zip(*((r["tokens"], r["extra_bytes"] / MIB) for r in rows if r["method"] == method), strict=True)
        chunk = next(row["chunk_size"] for row in rows if row["method"] == method)
        label = f"{method}, chunk {chunk}" if chunk else method
        axes.plot(x, y, color=colour, marker=mark, markersize=6, linewidth=1.2, label=label)
    _logarithmic(axes, x)
    axes.set_xlabel("tokens", fontsize=9, color=INK)
    axes.set_ylabel("MiB beyond inputs and results", fontsize=9, color=INK)
    shape = rows[0]
    axes.set_title(
        f"memory of output layer and loss (hidden {shape['hidden']}, vocabulary {shape['vocabulary']})",
        fontsize=10.5,
        color=INK,
    )
    axes.legend(fontsize=8.5, frameon=False)


def _logarithmic(axes: Axes, x, reciprocal: bool = False) -> None:
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(list(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: (f"1/{1 / value:.0f}" if value < 1 else "1") if reciprocal else f"{value:.0f}")
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _bare(axes)
    axes.grid(alpha=0.3, linewidth=0.5)


# Part of the benchmark -> what draws its picture.
DRAWN: dict[str, Callable[[list[Row], Path], None]] = {
    "kernels": kernels,
    "head": head,
    "growth": growth,
    "cuda": kernels,
}
