"""REPORT.md, from the results that are there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tools.benchmarking import figures
from tools.benchmarking.lora import COPY, ITSELF, LORA, PARTS, WHOLE
from tools.benchmarking.packing import LONGEST, MEDIAN, SHORTEST, SUPERVISED
from tools.benchmarking.step import KEPT

Result = dict[str, Any]
Row = dict[str, Any]

MIB = 2**20
# Load average per core above which times are marked as not to be trusted.
BUSY = 0.5


def load(folder: Path, name: str) -> Result | None:
    """What a part measured; None where it has not been run. ValueError where the file is not one of ours."""
    path = folder / f"{name}.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: expected results of this benchmark, got no JSON ({error}): remove it") from None
    if not isinstance(data, dict) or data.get("benchmark") != name or "rows" not in data:
        raise ValueError(f"{path}: expected results of {name}: remove it")
    return data


def write(folder: Path) -> list[Path]:
    """Write pictures and REPORT.md, each only once it is complete; returns their paths. ValueError without results."""
    from tools.benchmarking import pictures

    results = {name: load(folder, name) for name in SECTIONS}
    results = {name: result for name, result in results.items() if result is not None}
    if not results:
        raise ValueError(f"{folder} holds no results to report: measure something first")
    written = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as incomplete:
        names = [f"{name}.png" for name in results if name in pictures.DRAWN]
        for name in names:
            part = name.removesuffix(".png")
            pictures.DRAWN[part](results[part]["rows"], Path(incomplete, name))
        Path(incomplete, "REPORT.md").write_text(markdown(results, set(pictures.DRAWN)), encoding="utf-8")
        for name in [*names, "REPORT.md"]:
            os.replace(Path(incomplete, name), folder / name)
            written.append(folder / name)
    return written


def markdown(results: dict[str, Result], pictured: set[str]) -> str:
    """The report as Markdown, its sections in the order of SECTIONS."""
    newest = max(results.values(), key=lambda result: result["date"])
    lines = ["# Benchmarks", "", _INTRODUCTION, "", *table(["machine and versions", ""], newest["machine"].items())]
    lines += ["", "Times are medians [first to third quartile]. A ratio is that of the medians, in brackets the"]
    lines += ["quartiles of the ratios of runs that followed each other."]
    for name, (title, section) in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        if name not in results:
            lines += [f"Not measured (`python tools/benchmark.py {name}`)."]
            continue
        result = results[name]
        lines += [_origin(result, newest["machine"]), ""]
        if name in pictured:
            lines += [f"![{title}]({name}.png)", ""]
        lines += section(result["rows"])
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
Written by `make bench` (`tools/benchmark.py`; `--help` says what it measures). Every run's time is in the JSON files
next to this one."""


def _origin(result: Result, machine: dict[str, str]) -> str:
    dirty = " with uncommitted changes" if result["dirty"] else ""
    commit, date = result["commit"][:12], result["date"].replace("T", " ").replace("+00:00", " UTC")
    load, cores = result["load_average"], result["cores"]
    parts = [f"Measured {date} at commit `{commit}`{dirty} in {result['took']:.0f} s; load average before: {load:.2f}."]
    other = [f"{key}: {value}" for key, value in result["machine"].items() if machine.get(key) != value]
    if other:
        parts.append(f"Not on the machine above, but: {'; '.join(other)}.")
    if result["quick"]:
        parts.append("**Small shapes and few runs, to try the tool (`--quick`): no figures to quote.**")
    if load > BUSY * cores:
        parts.append("**The machine was busy: no figures to quote.**")
    return " ".join(parts)


def table(heads: Sequence[str], rows) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:#.3g}"


def spread(row: Row, factor: float = 1.0) -> str:
    """median [q1 to q3], times factor."""
    median, q1, q3 = (figure(row[key] * factor) for key in ("median", "q1", "q3"))
    return f"{median} [{q1} to {q3}]"


def compare(row: Row, with_: Row | None) -> str:
    """How many times as long as another row, with the quartiles of the pairs; nothing for the row itself."""
    if with_ is None or with_ is row:
        return "-"
    found = figures.ratio(row["seconds"], with_["seconds"])
    return f"{figure(found['value'])} [{figure(found['q1'])} to {figure(found['q3'])}]"


def _groups(rows: list[Row], *keys: str) -> Iterator[tuple[tuple, list[Row]]]:
    def key(row: Row) -> tuple:
        return tuple(row[name] for name in keys)

    order = {value: number for number, value in enumerate(dict.fromkeys(map(key, rows)))}
    for value, group in groupby(sorted(rows, key=lambda row: order[key(row)]), key):
        yield value, list(group)


def _pick(rows: list[Row], **values: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in values.items())), None)


# ---- the sections


def kernels(rows: list[Row]) -> list[str]:
    lines = [
        "Forward and backward of the loss of given logits, all of whose tokens are supervised. *In place* writes the "
        "gradient over the logits, as Megatron does by itself with float32; elsewhere it is new memory in each run"
        + (", whose pages the system must provide." if rows[0]["threads"] else "."),
        "",
        f"Floor: passes x bytes of the logits / bandwidth, with {figures.PASSES} passes without a teacher (read z, "
        f"read z, write the gradient), {figures.PASSES_WITH_TEACHER} with one (read z and t, read z and t, write the "
        f"gradient). Bandwidth: {figures.COPY_PASSES} x bytes of the logits / median time of copying them, which takes "
        "its turn among the methods, on as many threads. Where the logits fit the last-level cache, so does the copy. "
        "Below 1: the copy reads the memory that it overwrites, a kernel that writes past the caches does not.",
        "",
        "Extra memory: the most that torch's allocator holds at once beyond inputs and results, as a multiple of the "
        "logits. `target-sft` with eta = 0.5; *eager* is the loss as one would write it in torch, *torch.compile* the "
        "same compiled for the shape (for `sft` of `cross_entropy` of a float32 copy). 16-bit logits in plain *torch* "
        "keep a 16-bit loss.",
    ]
    for (tokens, vocabulary, dtype, threads), group in _groups(rows, "tokens", "vocabulary", "dtype", "threads"):
        copied = _pick(group, method="copy")
        speed = figures.bandwidth(copied["logits_bytes"], copied["seconds"]) / 1e9
        where = f", {threads} thread(s)" if threads else ""
        lines += [
            "",
            f"### {tokens} x {vocabulary}, {dtype}{where}",
            "",
            f"Logits: {figure(copied['logits_bytes'] / MIB)} MiB; a copy takes {spread(copied, 1e3)} ms, which is "
            f"{speed:.1f} GB/s.",
            "",
        ]
        heads = ["objective", "method", "ms", "times the floor", "times qtarget", "times qtarget, in place"]
        cells = []
        for row in group:
            if row is copied:
                continue
            floor = figures.floor_seconds(row["passes"], copied["logits_bytes"], copied["seconds"])
            same = [other for other in group if other["objective"] == row["objective"]]
            cells.append(
                [
                    row["objective"],
                    row["method"],
                    spread(row, 1e3),
                    figure(row["median"] / floor),
                    compare(row, _pick(same, method="qtarget")),
                    compare(row, _pick(same, method="qtarget, in place")),
                    f"{row['extra_bytes'] / row['logits_bytes']:.2f}",
                ]
            )
        order = list(dict.fromkeys(row[0] for row in cells))
        lines += table([*heads, "extra memory"], sorted(cells, key=lambda row: order.index(row[0])))
    return lines


def divergences(rows: list[Row]) -> list[str]:
    lines = [
        "Forward and backward of the loss of given logits with a teacher, all of whose tokens are supervised, the "
        "gradient written over the logits. *Eager, in chunks* is the same as one would write it in torch, "
        f"{rows[0]['chunk_size']} tokens at a time, in float32; with the largest entries only, it gathers the model's "
        "log-probabilities of them. The teacher's whole row or its largest entries are there already. A divergence "
        "other than the forward KL reads both rows once more where its slope needs the merged normalisers. Extra "
        "memory: the most that torch's allocator holds at once beyond inputs and results, as a multiple of the logits."
    ]
    for (tokens, vocabulary, dtype, threads), group in _groups(rows, "tokens", "vocabulary", "dtype", "threads"):
        sft = _pick(group, objective="sft")
        kd, copied = _pick(group, objective="kd"), _pick(group, method="copy")
        lines += [
            "",
            f"### {tokens} x {vocabulary}, {dtype}, {threads} thread(s)",
            "",
            f"Logits: {figure(group[0]['logits_bytes'] / MIB)} MiB; a copy takes {spread(copied)} s.",
            "",
        ]
        lines += table(
            ["objective", "method", "teacher", "s", "times sft", "times kd", "times qtarget", "extra memory"],
            [
                [
                    row["objective"],
                    row["method"],
                    row["teacher"],
                    spread(row),
                    compare(row, sft),
                    compare(row, kd),
                    compare(row, _pick(group, objective=row["objective"], teacher=row["teacher"])),
                    f"{row['extra_bytes'] / row['logits_bytes']:.3f}",
                ]
                for row in group
                if row["method"] != "copy"
            ],
        )
    return lines


def head(rows: list[Row]) -> list[str]:
    lines = [
        "Forward and backward of output layer and loss, with the gradients of hidden states and weight. *Fused head*: "
        "`qtarget_linear_cross_entropy`, four matrix products instead of three, on supervised tokens only. *Whole "
        "logits, in place*: the product, then `qtarget_cross_entropy(inplace=True)`; *torch*: the product, then "
        "`cross_entropy`; *eager*: both products, then Target-SFT as one would write it. The fused head adds the "
        "weight's gradient up in float32: with 16-bit weights that is extra memory, except where it is Megatron's "
        "`main_grad` (*main_grad*), as in training.",
        "",
        "Memory is that of one run. Extra: the most that torch's allocator holds at once beyond inputs and results "
        "(loss and gradients), exact, recorded by the allocator itself. Resident: growth of the process's peak "
        "resident memory, results included (`VmHWM`, reset before the run), which also sees what the libraries take "
        "for themselves.",
    ]
    keys = ("tokens", "hidden", "vocabulary", "dtype", "objective", "supervised", "threads")
    for (tokens, hidden, vocabulary, dtype, objective, share, threads), group in _groups(rows, *keys):
        size = tokens * vocabulary * (4 if dtype == "float32" else 2) / MIB
        lines += [
            "",
            f"### {objective}, {tokens} tokens ({share:.0%} supervised), hidden {hidden}, vocabulary {vocabulary}, "
            f"{dtype}{f', {threads} thread(s)' if threads else ''}",
            "",
            f"Logits as a whole: {figure(size)} MiB.",
            "",
        ]
        first = group[0]
        lines += table(
            ["method", "chunk", "ms", "times the fused head", "extra MiB", "allocated MiB", "resident MiB"],
            [
                [
                    row["method"],
                    row["chunk_size"] or "-",
                    spread(row, 1e3),
                    compare(row, first),
                    figure(row["extra_bytes"] / MIB),
                    figure(row["allocated_bytes"] / MIB),
                    "-" if row["resident_bytes"] is None else figure(row["resident_bytes"] / MIB),
                ]
                for row in group
            ],
        )
        lines += _weight_gradient(group)
    return lines


def _weight_gradient(rows: list[Row]) -> list[str]:
    """What the weight's gradient takes: pairs of runs with and without it."""
    from tools.benchmarking.head import FROZEN, FUSED  # which imports torch

    cells = []
    for row in rows:
        if row["method"] == FROZEN:
            whole = _pick(rows, method=FUSED, chunk_size=row["chunk_size"])
            pairs = zip(whole["seconds"], row["seconds"], strict=True)
            taken = figures.summary([with_it - without for with_it, without in pairs])
            cells.append([row["chunk_size"], spread(taken, 1e3), figure(taken["median"] / whole["median"])])
    heads = ["chunk", "ms for the weight's gradient", "of the fused head's time"]
    return ["", *table(heads, cells)] if cells else []


def collective(rows: list[Row]) -> list[str]:
    lines = [
        "Over gloo on this machine's loopback, a run from when all ranks are there until the last one is done. First "
        "the collectives alone: our all-gather with the merge of the statistics that follows it, and as many "
        "all-reduces of float32 as Megatron's losses make, without the arithmetic between them. Then whole losses, "
        "forward and backward, of few columns, so that the collectives are what is seen.",
        "",
    ]
    cells = []
    for (ranks, tokens), group in _groups(rows, "ranks", "tokens"):
        raw = [row for row in group if not row["method"].startswith("whole loss")]
        for part in (raw, [row for row in group if row not in raw]):
            cells += [[ranks, tokens, row["method"], spread(row, 1e6), compare(row, part[0])] for row in part]
    return lines + table(["ranks", "tokens", "method", "µs", "times ours (sft)"], cells)


def step(rows: list[Row]) -> list[str]:
    first = rows[0]
    lines = [
        f"`python -m qtarget_megatron.finetune` in float32 on random Llama models of hidden size {first['hidden']}, "
        f"{first['layers']} layers and {first['vocabulary']} tokens (the teacher has the student's shape), "
        f"{first['global_batch']} samples of {first['seq_length']} tokens a step, {first['supervised']:.0%} of them "
        "supervised, Adam. *Whole logits* is nearest to Megatron's own SFT: its output layer and its three matrix "
        "products; the loss of the logits is ours there too, as Megatron's cross-entropy has no place in the plug-in. "
        f"The cache keeps {KEPT} entries of each token. Runs are one after another, the ranks share the cores. Peak: "
        "resident memory of each rank, libraries included. Of the teacher: what a step's log reports, which is its "
        "forward without the output layer (live) or reading its entries (cached), and the memory of weights and of a "
        "micro-batch.",
        "",
    ]
    cells = []
    for (size,), group in _groups(rows, "tensor_parallel"):
        base = group[0]
        for row in group:
            change = "-" if row is base else figure(row["median"] / base["median"])
            tokens = row["global_batch"] * row["seq_length"] / row["median"]
            peaks = ", ".join(f"{peak:.2f}" for peak in row["peak_gib"])
            teacher = [figure(row[key]) if key in row else "-" for key in ("teacher ms", "teacher MiB")]
            cells.append([size, row["threads"], row["variant"], spread(row), change, figure(tokens), peaks, *teacher])
    heads = ["ranks", "threads each", "variant", "s per step", "times the first", "tokens per s", "peak GiB"]
    heads += ["teacher ms", "teacher MiB"]
    return lines + table(heads, cells)


def lora(rows: list[Row]) -> list[str]:
    whole, copied, itself = (
        _pick(rows, trained=trained, teacher=teacher)
        for trained, teacher in ((WHOLE, COPY), (LORA, COPY), (LORA, ITSELF))
    )
    peaks = [sum(row["bytes"].values()) for row in (whole, copied, itself)]
    of_whole, of_copied = (figure(peaks[2] / peak) for peak in peaks[:2])
    lines = [
        f"Steps in float32, forward, backward and Adam, of a random Llama ({whole['name']}: "
        f"{whole['trained_numbers']:,} parameters) on {whole['global_batch']} rows of {whole['seq_length']} tokens, "
        f"{whole['supervised']:.0%} of them supervised, one rank of {whole['threads']} thread(s); the trainings take "
        "turns step by step in one process, on the CPU. With a teacher `target-sft`, which has the model's weights: *a "
        "copy* is `--teacher-hf` with the directory of `--hf-model`, *itself* `--teacher-self`; without one `sft`. "
        f"LoRA has rank {whole['rank']} at its default targets. Memory: bytes of the parameters, of the teacher's, of "
        "Megatron's buffers of gradients, of Adam's states; and of a step, the most that torch's allocator holds at "
        "once beside them. The peak is their sum. Other precisions have other shares (`qtarget plan`).",
        "",
        f"LoRA with itself as teacher takes {compare(itself, whole)} times as long as all weights with a copy, and "
        f"{of_whole} times the memory; next to LoRA with a copy it is {compare(itself, copied)} times the time, and "
        f"{of_copied} times the memory.",
        "",
    ]
    cells = []
    for row in rows:
        held = [figure(row["bytes"][part] / MIB) for part in PARTS]
        peak = sum(row["bytes"].values())
        name = [row["trained"], row["teacher"], f"{row['trained_numbers']:,}"]
        change = "-" if row is whole else figure(peak / peaks[0])
        cells.append([*name, spread(row), compare(row, whole), *held, figure(peak / MIB), change])
    heads = ["trained", "teacher", "numbers trained", "s per step", "times the first", "MiB of weights"]
    return lines + table([*heads, *PARTS[1:], "peak MiB", "times the first"], cells)


def data(rows: list[Row]) -> list[str]:
    attention = [row for row in rows if row["part"] == "attention"]
    training = [row for row in rows if row["part"] == "training"]
    first = attention[0]
    lines = [
        f"Core attention of the local layers, forward and backward of one row of {first['heads']} heads of "
        f"{first['width']}, float32, one thread. Memory: torch's allocator beyond inputs and results.",
        "",
    ]
    cells = []
    for (length,), group in _groups(attention, "length"):
        for row in group:
            more = "-" if row is group[0] else compare(row, group[0])
            cells.append([f"{length:,}", row["attention"], spread(row, 1000), more, figure(row["extra_bytes"] / 2**20)])
    lines += table(["tokens", "attention", "ms", "times ours", "MiB"], cells)
    lines += ["", *_planning([row for row in rows if row["part"] in ("balance", "inspection")])]
    lines += [
        "",
        f"`python -m qtarget_megatron.finetune` in float32 on random models, data of {SHORTEST} to {LONGEST:,} tokens "
        f"(log-normal around {MEDIAN}), {SUPERVISED:.0%} of them supervised. Useful: supervised. A ratio is of steps "
        "by their number.",
        "",
    ]
    cells = []
    for (name,), group in _groups(training, "name"):
        for row in group:
            more = "-" if row is group[0] else _faster(row, group[0])
            fill = "-" if row["fill"] is None else f"{row['fill']:.1%}"
            size = f"{row['global_batch']} x {row['seq_length']:,}"
            cells.append([name, size, row["way"], spread(row), more, fill])
    return lines + table(["model", "tokens a step", "rows", "useful tokens per s", "times the first", "filled"], cells)


def _planning(rows: list[Row]) -> list[str]:
    """What it costs to know the data's lengths, and how evenly the planned rows are shared."""
    inspected = [row for row in rows if row["part"] == "inspection"]
    first, shared = inspected[0], [row for row in rows if row["part"] == "balance"]
    known = shared[0]
    lines = [
        f"Reading {first['records']:,} conversations ({first['bytes'] / 1e9:.2f} GB of JSON) on two ranks, with a "
        "tokenizer of words, and planning the rows of an epoch; memory: what more a rank has then, for each record.",
        "",
    ]
    cells = []
    for row in inspected:
        seconds = [figure(row[key]) for key in ("opened", "inspected", "planned")]
        cells.append([row["start"], *seconds, figure(row["memory"])])
    lines += table(["", "s to open", "s to inspect", "s to plan an epoch", "bytes a record"], cells)
    lines += [
        "",
        f"{known['samples']:,} such samples in rows of {known['row_length']:,} tokens, {known['fill']:.1%} filled, "
        "four rows a step for each data-parallel rank: the fullest rank against the mean, averaged over the steps, of "
        "tokens and of the squares of the samples' lengths, with which attention's work goes.",
        "",
    ]
    cells = [[str(row["ranks"]), f"{row['tokens']:.3f}", f"{row['attention']:.2f}"] for row in shared]
    return lines + table(["data-parallel ranks", "tokens", "attention"], cells)


def _faster(row: Row, than: Row) -> str:
    found = figures.ratio(row["speed"], than["speed"])
    return f"{figure(found['value'])} [{figure(found['q1'])} to {figure(found['q3'])}]"


def growth(rows: list[Row]) -> list[str]:
    lines = [
        "One thread, float32, gradient in place, forward and backward. A straight line, a fixed cost and picoseconds "
        "per logit (token times column), is fitted to each series; the last column says how far, relative to its time, "
        "the worst point lies from it. Shards are timed one after another, collectives are not in it; the slowest "
        "shard counts.",
        "",
    ]
    cells = []
    for (name, objective), points in series(rows).items():
        x, y = zip(*points, strict=True)
        fixed, slope, deviation = figures.line(x, y)
        sizes = f"{figure(x[0])} to {figure(x[-1])}" if name == "time by shards" else f"{x[0]} to {x[-1]}"
        row = next(row for row in rows if row["series"] == name)
        logits = {"time by tokens": row["vocabulary"], "time by vocabulary": row["tokens"]}.get(
            name, row["tokens"] * row["vocabulary"]
        )
        cost = [figure(fixed * 1e3), figure(slope / logits * 1e12), f"{deviation:.1%}"]
        cells.append([name, objective, sizes, figure(y[0] * 1e3), figure(y[-1] * 1e3), *cost])
    heads = ["ms, smallest", "ms, largest", "fixed ms", "ps per logit", "off the line"]
    lines += table(["series", "objective", "sizes", *heads], cells)
    memory = [row for row in rows if row["series"] == "memory"]
    shape = memory[0]
    lines += [
        "",
        f"Memory of output layer and loss (hidden {shape['hidden']}, vocabulary {shape['vocabulary']}), MiB of torch's "
        "allocator beyond inputs and results, by number of tokens:",
        "",
    ]
    tokens = list(dict.fromkeys(row["tokens"] for row in memory))
    body = [
        [name, *(figure(row["extra_bytes"] / MIB) for row in group)] for (name,), group in _groups(memory, "method")
    ]
    return lines + table(["method", *map(str, tokens)], body)


def series(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(series, objective) -> points (size, median seconds), by size; of shards 1/T and the slowest shard."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        if row["series"] == "memory":
            continue
        size = {"time by tokens": row["tokens"], "time by vocabulary": row["vocabulary"]}.get(row["series"])
        if size is None:
            size = 1 / row["shards"]
        points = found.setdefault((row["series"], row["objective"]), {})
        points[size] = max(points.get(size, 0.0), row["median"])
    order = list(dict.fromkeys(name for name, _ in found))
    return {key: sorted(found[key].items()) for key in sorted(found, key=lambda key: order.index(key[0]))}


def convert(rows: list[Row]) -> list[str]:
    size = rows[0]["model_bytes"]
    lines = [
        f"`tools/convert_hf.py` on a random model of {size / 1e9:.2f} GB in bfloat16, ranks as processes of this "
        "machine that share its cores and disk. *Read*: the Hugging Face files into the model. *Import*: that, and "
        "Megatron's checkpoint written. *Export*: the checkpoint read into the model, and the Hugging Face files "
        "written with their SHA-256. Files that are read are in the page cache as far as it holds them, files that are "
        "written are on the disk at the end. Without the start of the processes. Peak: growth of a rank's resident "
        "memory (`VmHWM`), and as a multiple of its shard of the model; the bound is the shard and the largest "
        "parameter as a whole, the embedding.",
        "",
    ]
    cells = []
    for (tp, pp), group in _groups(rows, "tensor_parallel", "pipeline_parallel"):
        for row in group:
            peaks, shards = row["resident_bytes"], row["shard_bytes"]
            known = None not in peaks
            cells.append(
                [
                    f"TP {tp} x PP {pp}",
                    row["threads"],
                    row["way"],
                    spread(row),
                    figure(row["model_bytes"] / row["median"] / 1e9),
                    ", ".join(figure(shard / MIB) for shard in shards),
                    ", ".join(figure(peak / MIB) for peak in peaks) if known else "-",
                    ", ".join(f"{p / s:.2f}" for p, s in zip(peaks, shards, strict=True)) if known else "-",
                ]
            )
    heads = [
        "layout",
        "threads each",
        "way",
        "s",
        "GB per s",
        "shard MiB by rank",
        "peak MiB by rank",
        "times the shard",
    ]
    return lines + table(heads, cells)


SECTIONS: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
    "kernels": ("Kernels", kernels),
    "divergences": ("Divergences", divergences),
    "head": ("Output layer and loss", head),
    "collective": ("Collectives", collective),
    "step": ("Training steps", step),
    "lora": ("LoRA", lora),
    "data": ("Packed rows", data),
    "growth": ("Growth", growth),
    "convert": ("Conversion", convert),
    "cuda": ("Kernels on a GPU", kernels),
    "cuda-head": ("Output layer and loss on a GPU", head),
}
