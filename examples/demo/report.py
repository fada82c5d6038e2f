"""Turn a training run's console lines and TensorBoard scalars into a table and a picture."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.demo.answers import HeldOutScore
from examples.demo.launch import MemoryPeaks

# Tags that the fine-tuning entry point writes at each step; "<tag> validation" at each evaluation.
LOSS = "lm loss"
TRUST = "trust"
LABEL_PROBABILITY = "p(y)"
ENTROPY = "entropy"
LABEL_MASS = "label mass"
RESIDUAL_MASS = "residual mass"
SUPERVISED, FILL = "supervised tokens", "row fill"
TRAINING_TAGS = (LOSS, TRUST, LABEL_PROBABILITY, ENTROPY, LABEL_MASS, RESIDUAL_MASS, SUPERVISED, FILL)

EXPORT_TOLERANCE = 1e-3

Series = list[tuple[int, float]]

_ITERATION = re.compile(r"\biteration\s+(\d+)\s*/\s*(\d+)\s*\|")
_VALUE = re.compile(r"\s*([^|:]+):\s*([-+0-9.eE]+|nan|inf|-inf)\s*\|")


@dataclass(frozen=True)
class StepLine:
    """One logged training step: its number, the last step's number, and every `name: value`."""

    step: int
    num_steps: int
    values: dict[str, float]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the step."""
        return self.values["elapsed time per iteration (ms)"] / 1000

    def compact(self) -> str:
        """Return the step as one short line for people who wait."""
        parts = [f"step {self.step:3d}/{self.num_steps}"]
        parts += [
            f"{tag} {self.values[tag]:.4f}"
            for tag in (LOSS, TRUST, LABEL_PROBABILITY, "grad norm")
            if tag in self.values
        ]
        return "  ".join(parts + [f"{self.seconds:.1f} s"])


def parse_step_line(line: str) -> StepLine | None:
    """Return the step that a line of Megatron's log reports, or None if it reports none."""
    found = _ITERATION.search(line)
    if found is None:
        return None
    values = {name.strip(): float(value) for name, value in _VALUE.findall(line[found.end() :])}
    if "elapsed time per iteration (ms)" not in values:
        return None
    return StepLine(step=int(found[1]), num_steps=int(found[2]), values=values)


def read_scalars(folder: Path) -> dict[str, Series]:
    """Return {tag: [(step, value), ...]} of all TensorBoard scalars under `folder`.

    Raises:
        ValueError: a tag the report needs is missing, so the run did not log what it should.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    missing = [tag for tag in TRAINING_TAGS if tag not in tags]
    if missing:
        raise ValueError(
            f"{folder}: expected TensorBoard scalars {', '.join(missing)}, found {', '.join(sorted(tags)) or 'none'}"
        )
    # Megatron evaluates once more at the end: a step may be there twice, with the same value.
    return {tag: sorted({event.step: event.value for event in events.Scalars(tag)}.items()) for tag in tags}


def summarise(
    scalars: Mapping[str, Series],
    steps: Sequence[StepLine],
    peaks: MemoryPeaks,
    before: HeldOutScore,
    after: HeldOutScore,
) -> dict:
    """Return the run's figures as one JSON-ready object.

    Losses are in nats, memory in bytes, times in seconds: those of steps without the first one,
    which warms up.

    Raises:
        ValueError: no step was logged.
    """
    if not steps:
        raise ValueError("the training log holds no step: there is nothing to report")
    seconds = [step.seconds for step in steps[1:]] or [steps[0].seconds]
    step_seconds = statistics.median(seconds)
    return {
        "steps": len(steps),
        "training": {
            tag: {
                "first": scalars[tag][0][1],
                "last": scalars[tag][-1][1],
                "mean": statistics.fmean(value for _, value in scalars[tag]),
            }
            for tag in TRAINING_TAGS
        },
        "validation": {tag: scalars[f"{tag} validation"] for tag in TRAINING_TAGS if f"{tag} validation" in scalars},
        "held_out_by_transformers": {"before": asdict(before), "after": asdict(after)},
        "step_seconds_median": step_seconds,
        "supervised_tokens_per_second": statistics.fmean(value for _, value in scalars[SUPERVISED]) / step_seconds,
        "peak_memory_per_rank": [peaks.per_rank[rank] for rank in sorted(peaks.per_rank)],
        "peak_memory_together": peaks.together,
    }


def check_export(scalars: Mapping[str, Series], after: HeldOutScore) -> None:
    """Compare mean p(y) of the last evaluation in training with transformers' on the export.

    Both are float32 and see the same held-out tokens, so only the order of sums differs.

    Raises:
        ValueError: they differ by more than 1e-3, so what was exported is not what was trained.
    """
    _, trained = scalars[f"{LABEL_PROBABILITY} validation"][-1]
    if abs(trained - after.trust) > EXPORT_TOLERANCE:
        raise ValueError(
            f"held-out p(y) was {trained:.4f} at the end of training, transformers finds "
            f"{after.trust:.4f} in the exported model: expected equal within {EXPORT_TOLERANCE}"
        )


def markdown_table(summary: Mapping) -> str:
    """Return the figures of `summarise` as a Markdown table."""
    training = summary["training"]
    before = summary["held_out_by_transformers"]["before"]
    after = summary["held_out_by_transformers"]["after"]
    rows = [
        ("training loss of the objective, first and last step", training[LOSS], "{:.4f}"),
        ("p(y), first and last step", training[LABEL_PROBABILITY], "{:.4f}"),
        ("trust, first and last step", training[TRUST], "{:.4f}"),
        ("entropy in nats, first and last step", training[ENTROPY], "{:.4f}"),
    ]
    lines = ["| figure | before | after |", "|---|---:|---:|"]
    lines.append(
        f"| held-out -log p(y), by transformers, {after['num_tokens']} tokens "
        f"| {before['loss']:.4f} | {after['loss']:.4f} |"
    )
    lines.append(f"| held-out p(y), by transformers | {before['trust']:.4f} | {after['trust']:.4f} |")
    lines += [f"| {name} | {form.format(tag['first'])} | {form.format(tag['last'])} |" for name, tag, form in rows]
    for tag, name in ((LABEL_PROBABILITY, "p(y)"), (LOSS, "loss of the objective")):
        series = summary["validation"].get(tag, [])
        if len(series) > 1:
            (first_step, first), (last_step, last) = series[0], series[-1]
            lines.append(
                f"| held-out {name}, by Megatron, after steps {first_step} and {last_step} | {first:.4f} | {last:.4f} |"
            )
    lines += ["", "| figure | value |", "|---|---:|"]
    lines.append(f"| steps | {summary['steps']} |")
    lines.append(f"| mean trust over the run | {training[TRUST]['mean']:.4f} |")
    lines.append(f"| mean p(y) over the run | {training[LABEL_PROBABILITY]['mean']:.4f} |")
    lines.append(f"| seconds per step (median) | {summary['step_seconds_median']:.1f} |")
    lines.append(f"| supervised tokens in a step | {training[SUPERVISED]['mean']:.0f} |")
    lines.append(f"| supervised tokens per second | {summary['supervised_tokens_per_second']:.0f} |")
    lines.append(f"| of the rows' tokens a sample's | {training[FILL]['mean']:.1%} |")
    per_rank = summary["peak_memory_per_rank"]
    if per_rank:
        shown = ", ".join(f"{size / 2**30:.2f}" for size in per_rank)
        lines.append(f"| peak resident memory of each rank, GiB | {shown} |")
    if summary["peak_memory_together"]:
        lines.append(
            "| peak memory of all ranks together, GiB (shared pages once) "
            f"| {summary['peak_memory_together'] / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def markdown_answers(question: str, solution: str, before: str, after: str) -> str:
    """Return one held-out question, the data's solution and the two greedy answers as Markdown."""
    parts = {
        "A held-out question": question,
        "The data's solution": solution,
        "Answer before": before,
        "Answer after": after,
    }
    quoted = [f"**{name}**\n\n" + _quote(text) for name, text in parts.items()]
    return "\n\n".join(quoted) + "\n"


def _quote(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def draw_curves(scalars: Mapping[str, Series], title: str, path: Path) -> None:
    """Draw loss, confidence and entropy over the steps into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    panels = [
        ("loss of the objective (nats)", {"training": LOSS, "held-out": f"{LOSS} validation"}),
        ("trust in the data's tokens", {"training": TRUST, "held-out": f"{TRUST} validation"}),
        (
            "entropy of the model (nats)",
            {"training": ENTROPY, "held-out": f"{ENTROPY} validation"},
        ),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    try:
        figure.suptitle(title)
        for axis, (name, curves) in zip(axes, panels, strict=True):
            for (label, tag), style in zip(curves.items(), ("o-", "s--"), strict=True):
                if tag in scalars:
                    number, values = zip(*scalars[tag], strict=True)
                    axis.plot(number, values, style, label=label, markersize=4)
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            axis.legend()
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def write_report(folder: Path, summary: Mapping, answers: str) -> str:
    """Write report.json and report.md into `folder`; return the Markdown."""
    markdown = f"# Demo run\n\n{markdown_table(summary)}\n{answers}\n![curves](curves.png)\n"
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    return markdown
