"""REPORT.md of a study, and its pictures, from results.jsonl.

python -m examples.study.report OUT                   # of the study that was run into OUT, whole or not
python -m examples.study.report OUT --study FILE      # by another file of the same study
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from examples.study.findings import COOLER, EARLY, Findings
from examples.study.pictures import draw
from examples.study.results import ResultsFile
from examples.study.runs import number_of_runs
from examples.study.statistics import DRAWS, LEVEL, Interval, spread
from examples.study.study_file import SFT, TIE, Study, read_study

DESIGNED = "target-sft 0.5"
# Shares of what is right; those of a study that it has not measured are left out.
_RESULTS = ("result greedy", "result sampled")
METRICS = (*_RESULTS, "greedy", "sampled")
SAID = {
    "result greedy": "likeliest result of right steps",
    "result sampled": "such a result sampled, T = 1",
    "greedy": "likeliest answer",
    "sampled": "sampled, T = 1",
    "nll": "-log p",
}


def write_report(study_path: Path, out: Path) -> Path:
    """Write OUT/REPORT.md and its pictures; returns the former."""
    study = read_study(study_path)
    results = ResultsFile(out / "results.jsonl").read(study)
    findings = Findings(study, results)
    pictures = draw(findings, out)
    parts = [
        _head(study, results),
        _short(findings),
        _counts(findings),
        _expected(findings),
        *[f"![{caption}]({name})\n\n{caption}\n" for name, caption in pictures],
        _others(findings),
        _settings(findings),
        _rates(findings),
        _reading(study),
    ]
    path = out / "REPORT.md"
    temporary = out / ".REPORT.md.new"
    temporary.write_text("\n".join(part for part in parts if part), "utf-8")
    temporary.replace(path)
    print(f"study: wrote {path}" + (f" and {', '.join(name for name, _ in pictures)}" if pictures else ""), flush=True)
    return path


def _head(study: Study, results: dict) -> str:
    total = number_of_runs(study)
    hours = sum(sum(result["seconds"].values()) for result in results.values()) / 3600
    machines = _listed(result["machine"] for result in results.values())
    commits = _listed(f"`{result['commit']}`" for result in results.values())
    done = f"{len(results)} runs" if len(results) == total else f"**{len(results)} of {total} runs so far**"
    return (
        f"# {study.title}\n\n"
        f"{done} of {study.steps} steps, through `qtarget finetune`; {hours:.2f} hours of runs, "
        f"{study.workers} at a time, bases apart; "
        f"{machines or 'no machine yet'}; commit {commits or 'none yet'}. Written by `python -m examples.study.report` "
        "from `results.jsonl`; `examples/study/README.md` says what the data are.\n\n"
        "Figures are percentages of test problems, mean ± standard deviation over seeds; in brackets the difference to "
        f"sft of the same seeds and problems with its {LEVEL:.0%} bootstrap interval over seeds and problems "
        f"({DRAWS:,} draws). A **win** or **loss** is an interval without 0, a tie one that holds it.\n"
    )


def _listed(values: Iterable[str]) -> str:
    return ", ".join(f"{value}" for value in dict.fromkeys(values))


def _short(findings: Findings) -> str:
    """sft, the designed target and the best arm of each setting."""
    rows = []
    for base, data in findings.settings(SFT):
        if not findings.runs(base, data, DESIGNED):
            continue
        before = _before(findings, base, data)
        for metric in findings.measured(METRICS):
            best = max(_compared(findings, base, data), key=lambda arm: findings.values(base, data, arm, metric).mean())
            rows.append(
                [
                    data, base, SAID[metric],
                    "" if before is None else f"{100 * before[metric]:.1f}",
                    _share(findings.values(base, data, SFT, metric)),
                    _share(findings.values(base, data, DESIGNED, metric)),
                    _difference(findings.difference(base, data, DESIGNED, metric)),
                    f"{best} {_share(findings.values(base, data, best, metric))}",
                ]
            )  # fmt: skip
    return "## In short\n\n" + _table(
        ["data", "model", "answers", "before", SFT, DESIGNED, f"{DESIGNED} - sft", "best of all losses"], rows
    )


def _before(findings: Findings, base: str, data: str) -> dict | None:
    found = findings.runs(base, data, SFT, 0)
    return next(iter(found.values()))["metrics"] if found else None


def _compared(findings: Findings, base: str, data: str) -> list[str]:
    """The losses that were run in a setting with teachers of the base alone."""
    arms = findings.study.arms
    return [a for a in arms if arms[a].keep == 1 and arms[a].teacher == "base" and findings.runs(base, data, a)]


def _counts(findings: Findings) -> str:
    """Wins, ties and losses of each arm over the settings that all main arms share."""
    main = findings.study.grids[0]
    arms = list(dict.fromkeys([*main.arms, *_extra(findings)]))
    settings = [(base, data) for data in main.data for base in main.bases if findings.runs(base, data, SFT)]
    metrics = [*findings.measured(METRICS), "nll"]
    rows = []
    for arm in arms:
        if arm == SFT:
            continue
        row = [arm]
        for metric in metrics:
            found = Counter(findings.verdict(base, data, arm, metric) for base, data in settings)
            row.append(" / ".join(str(found[kind]) for kind in ("win", "tie", "loss")))
        rows.append(row)
    extra = [_NO_LOSSES.get(arm, _NO_LOSSES["filtered"]) for arm in _extra(findings)]
    said = ""
    if extra:
        said = "The last one is no loss: " if len(extra) == 1 else f"The last {len(extra)} are no losses: "
        said += "; ".join(dict.fromkeys(extra)) + ".\n\n"
    return f"## Wins / ties / losses against sft, {len(settings)} settings\n\n{said}" + _table(
        ["", *(SAID[metric] for metric in metrics)], rows
    )


_NO_LOSSES = {
    "filtered": "sft on the half of the data that the base finds likeliest",
    EARLY: "sft stopped where dev is best",
    COOLER: "sft's answers drawn at a lower temperature",
}


def _extra(findings: Findings) -> list[str]:
    filtered = [name for name, arm in findings.study.arms.items() if arm.keep < 1]
    settings = findings.settings(SFT)
    return [arm for arm in (*filtered, EARLY, COOLER) if any(findings.runs(*pair, arm) for pair in settings)]


def _expected(findings: Findings) -> str:
    """What was expected of sft and the designed target, and what came."""
    rows, wrong = [], 0
    for base, data in findings.settings(DESIGNED):
        for metric, expected in findings.study.data[data].expected.items():
            verdict = findings.verdict(base, data, DESIGNED, metric)
            came = {"win": DESIGNED, "loss": SFT, "tie": TIE}.get(verdict or "", "none yet")
            wrong += came != expected
            rows.append([data, base, SAID[metric], expected, came, "" if came == expected else "**wrong**"])
    if not rows:
        return ""
    return (
        f"## What was expected\n\nWho would win, sft or {DESIGNED}, was written into the study's file before the runs: "
        f"{len(rows) - wrong} of {len(rows)} came so.\n\n"
        + _table(["data", "model", "measured by", "expected", "came", ""], rows)
    )


def _others(findings: Findings) -> str:
    """The grids behind the first one, but those of shares and of shorter trainings, which are pictures."""
    parts = []
    for grid in findings.study.grids[1:]:
        pairs = [(base, data) for data in grid.data for base in grid.bases]
        if grid.steps or all(findings.study.data[data].learning_rates_from for _, data in pairs):
            continue
        table = _arms_table(findings, [(base, data, arm) for base, data in pairs for arm in [SFT, *grid.arms]])
        if table:
            parts.append(f"## {grid.name.capitalize()}\n\n{table}")
    return "\n".join(parts)


_SHARES = {
    "result greedy": "result, likeliest",
    "result sampled": "result, T = 1",
    "greedy": "likeliest",
    "sampled": "T = 1",
}
_DISTANCES = {"nll": "-log p", "kl": "KL"}


def _arms_table(findings: Findings, cells: Iterable[tuple[str, str, str]]) -> str:
    """A row for each (base, data, arm) that has been run, with what was measured."""
    shares, distances = findings.measured(_SHARES), findings.measured(_DISTANCES)
    untouched = findings.measured(["untouched"])
    head = ["data", "model", "arm", "lr"]
    for metric in shares:
        head += [_SHARES[metric], "to sft"]
    head += [*(_DISTANCES[metric] for metric in distances), *(["other tasks"] if untouched else []), "M", "trust"]
    rows = []
    for base, data, arm in cells:
        if not findings.runs(base, data, arm):
            continue
        rate = findings.rate(base, data, arm)
        row = [data, base, arm, "" if rate is None else f"{rate:g}"]
        for metric in shares:
            row.append(_share(findings.values(base, data, arm, metric)))
            row.append("" if arm == SFT else _difference(findings.difference(base, data, arm, metric)))
        row += [_number(findings.values(base, data, arm, metric), ".3f") for metric in distances]
        row += [_share(findings.values(base, data, arm, metric)) for metric in untouched]
        row += [_number(findings.values(base, data, arm, name), ".2f") for name in ("total mass", "trust")]
        rows.append(row)
    return _table(head, rows) if rows else ""


def _number(values: np.ndarray, form: str) -> str:
    return format(values.mean(), form) if len(values) else ""


def _settings(findings: Findings) -> str:
    """Every arm of every setting of the first grid, and the arms that are no losses."""
    main = findings.study.grids[0]
    arms = list(dict.fromkeys([*main.arms, *_extra(findings)]))
    cells = [(base, data, arm) for data in main.data for base in main.bases for arm in arms]
    results = "result: of right steps, asked behind what stands before it. " if findings.measured(_RESULTS) else ""
    untouched = "other tasks: greedy, of those that the base knew. " if findings.measured(["untouched"]) else ""
    explained = (
        f"lr: chosen by dev. {results}-log p: of a token of right solutions, in nats. KL: from the base, of those "
        f"tokens, in nats. {untouched}M: mean total mass of the target in training, trust its label's share; both "
        "change the step's effective size.\n"
    )
    return f"## Every setting\n\n{explained}\n" + _arms_table(findings, cells)


def _rates(findings: Findings) -> str:
    """Learning rates that were chosen at an end of the sweep, where a further one might be better."""
    rates = findings.study.learning_rates
    if len(rates) < 2:
        return ""
    ends: dict[float, list[str]] = {min(rates): [], max(rates): []}
    count = 0
    for arm in findings.study.arms:
        for base, data in findings.settings(arm):
            if findings.study.data[data].learning_rates_from is None:
                count += 1
                rate = findings.rate(base, data, arm)
                if rate in ends:
                    ends[rate].append(f"{arm} ({data}, {base})")
    lines = [f"- {rate:g}: {', '.join(names) or 'none'}\n" for rate, names in ends.items()]
    return (
        f"## Learning rates\n\nEach is chosen of {', '.join(f'{rate:g}' for rate in rates)} by dev problems, of the "
        f"first seed. Of {count}, those at an end of the sweep, where one beyond it might be better:\n\n"
        + "".join(lines)
    )


def _reading(study: Study) -> str:
    lines = [
        f"- {max(grid.seeds for grid in study.grids)} seeds of the data and their order, one of each base model: an "
        "interval over so few seeds is rather too narrow.",
        "- Many intervals: of twenty differences that are none, one comes out as a win or a loss by chance.",
    ]
    if any("task" in data.condition for data in study.data.values()):
        lines += [
            "- Models of less than a million parameters, made-up tasks: how the losses work, not how much they bring.",
            "- Which demonstrations are called wrong is the study's choice: the data rule-... and convention are the "
            "same but for the key.",
        ]
    if any("source" in data.condition for data in study.data.values()):
        lines.append("- Problems are split by the study itself, and few: no figure here is a benchmark score.")
    return "## What this does not show\n\n" + "".join(f"{line}\n" for line in lines)


def _share(values: np.ndarray) -> str:
    if not len(values):
        return ""
    mean, deviation = spread(100 * values)
    return f"{mean:.1f}" if np.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def _difference(found: Interval | None) -> str:
    if found is None:
        return ""
    mean, low, high = (100 * value for value in found)
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if found.verdict != "tie" else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that holds results.jsonl")
    parser.add_argument("--study", type=Path, metavar="FILE", help="the study (default: the file that was run, in OUT)")
    args = parser.parse_args(argv)
    try:
        write_report(args.study or _study_in(args.out), args.out)
    except ValueError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    return 0


def _study_in(out: Path) -> Path:
    found = sorted(out.glob("*.toml"))
    if len(found) != 1:
        raise ValueError(f"{out}: expected one study file (*.toml), found {len(found)}: give --study FILE")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
