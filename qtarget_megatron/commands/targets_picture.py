"""The picture that inspect_targets draws: trust by objective and token, and where the mass goes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import ColorbarBase
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

# Lightness falls all the way, so that the order survives any colour vision and a grey print.
TRUST_COLOURS = ["#ffffe0", "#e3f1b6", "#b5dfb8", "#7cc8bc", "#46aec4", "#2b8abd", "#2a62a6", "#27408b"]
# For the objectives' marks; told apart by shape as well.
MARK_COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#000000", "#56b4e9", "#7f6000"]
MARK_SHAPES = "oDs^vPX*"
INK, PALE, STRIP_P, STRIP_H = "#222222", "#767676", "#4d6a8a", "#b06a3b"
FONT = "DejaVu Sans Mono"

# Inches.
WIDTH, MARGIN, ROW, CHARACTER = 13.5, 0.35, 0.215, 0.073
DPI = 150
PANEL_HEIGHT, PANEL_COLUMNS, PANELS = 2.3, 3, 6
LONGEST_TOKEN, LONGEST_LABEL, BARS, LOWEST_Q = 22, 30, 7, -0.3


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the report of inspect_targets, its text made visible and its objectives labelled, into a PNG."""
    with matplotlib.rc_context({"font.family": FONT, "text.parse_math": False, "axes.unicode_minus": False}):
        figure = picture(report)
        # Agg draws at most 2^16 pixels a side.
        figure.savefig(path, format="png", dpi=min(DPI, 60_000 / figure.get_figheight()))


def picture(report: dict[str, Any]) -> Figure:
    """The figure that draw() saves."""
    objectives, tokens = report["objectives"], report["tokens"]
    names = [_cut(row["label"], LONGEST_LABEL) for row in objectives]
    left = MARGIN + CHARACTER * (max(map(len, [*names, "entropy"])) + 1)
    lines = _lines(tokens, int((WIDTH - MARGIN - left) / CHARACTER))
    moved = _most_moved(tokens)
    panel_rows = -(-len(moved) // PANEL_COLUMNS)
    block = len(objectives) + 4.3  # token, strips of p(y) and entropy, space
    heights = dict(head=1.3, map=block * ROW * len(lines), space=0.5, panels=panel_rows * (PANEL_HEIGHT + 0.75))
    legend_rows = -(-(len(objectives) + 1) // PANEL_COLUMNS)
    heights["legend"] = 0.15 + 0.22 * legend_rows
    total = sum(heights.values())

    # Figure, not pyplot: no window system is asked for, and nothing stays behind.
    figure = Figure(figsize=(WIDTH, total), facecolor="white")

    def axes(x: float, top: float, width: float, height: float) -> Axes:
        return figure.add_axes((x / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))

    _heading(figure, report, total)
    _colour_bar(axes(WIDTH - MARGIN - 3.6, 0.72, 3.6, 0.14), tokens)
    top = heights["head"]
    _token_map(axes(0, top, WIDTH, heights["map"]), report, names, lines, left, block)
    top += heights["map"] + heights["space"]
    figure.text(
        MARGIN / WIDTH,
        1 - (top - 0.2) / total,
        "Where the mass goes: the tokens that the objectives move most",
        fontsize=11,
        weight="bold",
        color=INK,
    )
    each = (WIDTH - MARGIN) / PANEL_COLUMNS
    for number, index in enumerate(moved):
        row, column = divmod(number, PANEL_COLUMNS)
        place = axes(MARGIN + column * each + 1.25, top + row * (PANEL_HEIGHT + 0.75) + 0.2, each - 1.6, PANEL_HEIGHT)
        _panel(place, tokens[index], index + 1)
    _legend(figure, objectives, 1 - (total - heights["legend"]) / total)
    return figure


def _heading(figure: Figure, report: dict[str, Any], total: float) -> None:
    teacher = f", teacher {report['teacher']}" if report["teacher"] else ""
    shown, supervised = report["num_tokens"], report["supervised_tokens"]
    count = f"{shown} supervised tokens" if shown == supervised else f"first {shown} of {supervised} supervised tokens"
    x = MARGIN / WIDTH
    figure.text(x, 1 - 0.42 / total, "How far each objective trusts each token", fontsize=15, weight="bold", color=INK)
    models, source = (drawable(_cut(text, 100)) for text in (f"{report['model']}{teacher}", report["source"]))
    figure.text(x, 1 - 0.7 / total, models, fontsize=10, color=INK)
    figure.text(x, 1 - 0.94 / total, f"{source}: {count}", fontsize=9, color=PALE)


def _colour_bar(axes: Axes, tokens: list[dict]) -> None:
    values = [reading["trust"] for token in tokens for reading in token["objectives"] if reading["trust"] is not None]
    low, high = min(values, default=0) < -1e-9, max(values, default=1) > 1 + 1e-9
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[low, high]
    bar = ColorbarBase(axes, cmap=_colours(), norm=Normalize(0, 1), orientation="horizontal", extend=extend)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1])
    bar.ax.tick_params(labelsize=8, length=2, color=PALE)
    bar.outline.set_linewidth(0.5)
    axes.set_title("trust in the label: c_y, its share of Q", fontsize=9, color=INK, pad=4)


def _token_map(
    axes: Axes, report: dict[str, Any], names: list[str], lines: list[list[tuple[int, int]]], left: float, block: float
) -> None:
    """Rows of cells in line with the tokens' text; x in inches, y in rows from the top."""
    axes.set(xlim=(0, WIDTH), ylim=(block * len(lines), 0))
    axes.axis("off")
    tokens, colours = report["tokens"], _colours()
    highest = max([token["entropy"] or 0.0 for token in tokens] + [1e-9])
    cells, fills = [], []
    strips: dict[str, list[Any]] = {STRIP_P: [], STRIP_H: []}
    for number, line in enumerate(lines):
        top = number * block
        p_row, h_row = top + 1 + len(names) + 0.15, top + 2 + len(names) + 0.25
        for row, name in enumerate(names):
            axes.text(left - 0.08, top + 1.5 + row, name, ha="right", va="center", fontsize=8, color=INK)
        axes.text(left - 0.08, p_row + 0.5, "p(y)", ha="right", va="center", fontsize=8, color=STRIP_P)
        axes.text(left - 0.08, h_row + 0.5, "entropy", ha="right", va="center", fontsize=8, color=STRIP_H)
        x = left
        for index, width in line:
            token, wide = tokens[index], width * CHARACTER
            middle = x + wide / 2
            text = drawable(_cut(token["text"], LONGEST_TOKEN))
            axes.text(middle, top + 0.5, text, ha="center", va="center", fontsize=8.5, color=INK)
            for row, reading in enumerate(token["objectives"]):
                trust = reading["trust"]
                fill = colours(trust) if trust is not None else (1, 1, 1, 1)
                cells.append(Rectangle((x, top + 1 + row), wide, 1))
                fills.append(fill)
                figure = "-" if trust is None else _short(trust)
                ink = "white" if _luminance(fill) < 0.5 else INK
                axes.text(middle, top + 1.53 + row, figure, ha="center", va="center", fontsize=6.5, color=ink)
            for colour, base, share in (
                (STRIP_P, p_row, token["p"] or 0.0),
                (STRIP_H, h_row, (token["entropy"] or 0.0) / highest),
            ):
                strips[colour].append(Rectangle((x + 0.02, base + 1 - 0.95 * share), wide - 0.04, 0.95 * share))
            x += wide
        for base in (p_row, h_row):
            axes.plot([left, x], [base + 1, base + 1], color="#bbbbbb", linewidth=0.6)
    axes.add_collection(PatchCollection(cells, facecolors=fills, edgecolors="white", linewidths=0.8))
    for colour, bars in strips.items():
        axes.add_collection(PatchCollection(bars, facecolors=colour, edgecolors="none", alpha=0.8))
    note = f"strips: p(y) from 0 to 1, entropy from 0 to {highest:.2f} nats"
    axes.text(left, block * len(lines) - 0.55, note, fontsize=7.5, color=PALE, va="center")


def _panel(axes: Axes, token: dict, number: int) -> None:
    """p as bars, the Q of each objective as marks, for the likeliest alternatives of one token."""
    best: dict[int, float] = {}
    for reading in token["objectives"]:
        for one in reading["alternatives"]:
            height = max(one["p"] or 0.0, one["q"] or 0.0)
            best[one["id"]] = max(best.get(one["id"], 0.0), height)
    ids = sorted(best, key=lambda index: -best[index])[:BARS]
    if token["id"] not in ids:
        ids[-1] = token["id"]
    lowest, count = 0.0, len(token["objectives"])
    for order, reading in enumerate(token["objectives"]):
        listed = {one["id"]: one for one in reading["alternatives"]}
        # Side by side, or equal values would hide each other.
        shift = (order - (count - 1) / 2) * min(0.16, 0.72 / count)
        for row, index in enumerate(ids):
            q = listed[index]["q"] or 0.0
            place = min(max(q, LOWEST_Q), 1.0)
            lowest = min(lowest, place)
            # Beyond the axis (a raw Q may be negative, or above 1): hollow, at its end.
            beyond = abs(q - place) > 1e-6
            style = _mark(order)
            edge = dict(markerfacecolor="white", markeredgecolor=style["color"]) if beyond else {}
            axes.plot(
                place,
                row + shift,
                **style,
                **(dict(markeredgecolor="white") | edge),
                markersize=5,
                markeredgewidth=1.0 if beyond else 0.4,
                clip_on=False,
                zorder=3,
            )
    share = {one["id"]: one["p"] or 0.0 for one in token["objectives"][0]["alternatives"]}
    texts = {one["id"]: one["text"] for one in token["objectives"][0]["alternatives"]}
    axes.barh(range(len(ids)), [share[index] for index in ids], height=0.8, color="#c9ced6", zorder=1)
    axes.set_yticks(range(len(ids)), [drawable(_cut(texts[index], 14)) for index in ids], fontsize=8.5)
    for label, index in zip(axes.get_yticklabels(), ids, strict=True):
        label.set_color(INK)
        if index == token["id"]:
            label.set_weight("bold")
    axes.set(xlim=(lowest - 0.06 if lowest < -1e-6 else 0.0, 1.0), ylim=(len(ids) - 0.4, -0.6))
    axes.axvline(0, color="#999999", linewidth=0.7)
    axes.tick_params(axis="x", labelsize=7.5, color=PALE)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    text = drawable(_cut(token["text"], 14))
    # Over the names as well, which are as wide as the space to the left of the axes.
    axes.set_title(
        f"token {number}  {text}   p(y) {_short(token['p'] or 0.0)}", fontsize=9, loc="left", color=INK, pad=5
    )


def _legend(figure: Figure, objectives: list[dict], height: float) -> None:
    entries = [Patch(color="#c9ced6", label="p, the model now; label in bold; hollow: beyond the axis")]
    for order, row in enumerate(objectives):
        entries.append(
            Line2D(
                [],
                [],
                linestyle="",
                **_mark(order),
                markersize=5.5,
                label=f"Q of {row['label']}",
            )
        )
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(MARGIN / WIDTH, height),
        ncol=PANEL_COLUMNS,
        fontsize=8.5,
        frameon=False,
        borderaxespad=0,
    )


def _mark(order: int) -> dict[str, str]:
    """Colour and shape of an objective's mark; after as many as there are colours, other shapes."""
    rounds, colour = divmod(order, len(MARK_COLOURS))
    return {"color": MARK_COLOURS[colour], "marker": MARK_SHAPES[(order + rounds) % len(MARK_SHAPES)]}


def _lines(tokens: list[dict], capacity: int) -> list[list[tuple[int, int]]]:
    """Tokens wrapped to lines: (index, width in characters), wide enough for the text and the figures below it."""
    lines: list[list[tuple[int, int]]] = [[]]
    used = 0
    for index, token in enumerate(tokens):
        width = max(len(drawable(_cut(token["text"], LONGEST_TOKEN))) + 1, 5)
        if used + width > capacity and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append((index, width))
        used += width
    return lines


def _most_moved(tokens: list[dict]) -> list[int]:
    """Indices of the tokens that the objectives together move most, in order of the text."""

    def moved(index: int) -> float:
        return sum(min(reading["moved_mass"] or 0.0, 1.0) for reading in tokens[index]["objectives"])

    return sorted(sorted(range(len(tokens)), key=moved, reverse=True)[:PANELS])


def drawable(text: str) -> str:
    """The text with characters that the font lacks by their number."""
    return "".join(c if ord(c) in _characters() else f"\\u{ord(c):04x}" for c in text)


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())


@lru_cache(maxsize=1)
def _colours() -> LinearSegmentedColormap:
    colours = LinearSegmentedColormap.from_list("trust", TRUST_COLOURS)
    # Outside of [0, 1] the label is pushed away, or pulled harder than sft pulls it.
    return colours.with_extremes(under="#f4a6a6", over="#4a1466")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _short(value: float) -> str:
    """At most 4 characters where it can be: 0.63, .004, 12.3."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.3g}"
    return "<.01" if value > 0 else ">-.01"


def _luminance(colour: tuple) -> float:
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue
