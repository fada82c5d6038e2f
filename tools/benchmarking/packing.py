"""What packed rows save: useful tokens per second of a training, the attention that makes them possible, and what it
costs to plan them: the inspection of the data, and the balance of the ranks."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.benchmarking import figures, machine, step
from tools.benchmarking.workers import MeasurementFailed, end_of

# Tokens of a conversation: log-normal, cut to these.
SHORTEST, LONGEST, MEDIAN, SIGMA = 50, 2000, 300, 0.8
SUPERVISED = 0.4
PADDED, PACKED = "a sample a row", "packed"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama and of a step. global_batch: rows of it."""

    name: str = "10M parameters"
    vocabulary: int = 8000
    hidden: int = 256
    intermediate: int = 1024
    layers: int = 6
    heads: int = 4
    groups: int = 4
    seq_length: int = 2048
    global_batch: int = 4
    steps: int = 6


SMOLLM2 = Shape(
    "SmolLM2-135M's shape", 49152, 576, 1536, layers=30, heads=9, groups=3, global_batch=2, steps=5
)  # fmt: skip
SMALL = Shape("small", 512, 64, 128, layers=2, heads=2, groups=1, global_batch=2, steps=4)


def lengths(count: int, seed: int) -> list[int]:
    """Tokens of as many conversations."""
    draw = random.Random(seed)
    return [min(max(round(MEDIAN * draw.lognormvariate(0, SIGMA)), SHORTEST), LONGEST) for _ in range(count)]


def measure_training(*, say: Callable[[str], None], shapes: list[dict[str, Any]], timeout: float) -> list[dict]:
    """One row for each model and way: seconds and supervised tokens of each step after the first two.

    Raises MeasurementFailed where a training fails, or takes more than ``timeout`` seconds.
    """
    rows = []
    for shape in (Shape(**given) for given in shapes):
        with tempfile.TemporaryDirectory(prefix="qtarget-benchmark-") as folder:
            write(shape, Path(folder))
            for way in (PADDED, PACKED):
                words = step.training(shape, ["--pack"] if way == PACKED else [])
                text = step.launch(Path(folder), words, 1, machine.cores(), timeout)
                seconds = step.seconds_of_steps(text)[step.WARM_UP_STEPS :]
                tokens = step.logged(text, "supervised tokens")[step.WARM_UP_STEPS :]
                if len(seconds) != shape.steps - step.WARM_UP_STEPS or len(tokens) != len(seconds):
                    raise MeasurementFailed(f"the log of {shape.name} does not report its steps:\n{end_of(text)}")
                speed = [count / time for count, time in zip(tokens, seconds, strict=True)]
                fill = step.fill(text)
                say(f"{shape.name}, {way}: {figures.summary(speed)['median']:.0f} supervised tokens per s")
                row = {"part": "training", "way": way, "fill": fill, "tokens": tokens, "speed": speed}
                rows.append(row | asdict(shape) | {"seconds": seconds, **figures.summary(speed)})
    return rows


def measure_balance(*, say: Callable[[str], None], samples: int, row_length: int, ranks: list[int]) -> list[dict]:
    """One row for each number of data-parallel ranks: how much the fullest has of a step's mean, by balance()."""
    import numpy as np

    from qtarget_megatron.data import RowPlan, SampleOrder, aligned_lengths, balance

    taken = aligned_lengths(np.array(lengths(samples, seed=8)), 8)
    started = time.perf_counter()
    epoch = RowPlan(SampleOrder([samples], seed=1), taken, row_length).epoch(0)
    seconds = time.perf_counter() - started
    fill = float(epoch.sums(np.array(lengths(samples, seed=8))).sum() / (len(epoch) * row_length))
    say(f"{samples} samples in {len(epoch)} rows, planned in {seconds:.1f} s")
    rows = []
    for number in ranks:
        # A row for each rank and micro-batch of four, as a step of a pipeline has them.
        of_tokens, of_attention = (
            balance(epoch.sums(taken.astype(np.float64) ** power), number, 4 * number) for power in (1, 2)
        )
        row = {"part": "balance", "ranks": number, "tokens": of_tokens, "attention": of_attention}
        rows.append(row | {"samples": samples, "row_length": row_length, "fill": fill, "seconds": seconds})
    return rows


def prepare_records(*, say: Callable[[str], None], folder: str, count: int) -> None:
    """Write records.jsonl, conversations of the benchmark's lengths in words of one token; and a tokenizer."""
    path = Path(folder)
    known = step.write_tokenizer(path, 4000)
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    (path / "chat_template.jinja").write_text(template)
    draw = random.Random(9)
    words = [" ".join(draw.choices(known, k=length // 3)) for length in lengths(200, seed=9)]
    with (path / "records.jsonl").open("w") as file:
        for _ in range(count):
            turns = [{"role": role, "content": draw.choice(words)} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")


def measure_inspection(*, say: Callable[[str], None], folder: str, start: str) -> dict[str, Any]:
    """On every rank: seconds of opening the records, of inspecting them and of planning an epoch, and the bytes of
    memory that stay and that were there meanwhile, for each record. start: which one it is, in the report."""
    import psutil

    from qtarget_megatron.data import RowPlan, SampleOrder, aligned_lengths, load_tokenizer, open_records
    from qtarget_megatron.megatron.training.inspection import inspect

    tokenizer = load_tokenizer(folder)
    process = psutil.Process()
    marks, clock = [process.memory_info().rss], [time.perf_counter()]
    records = open_records(Path(folder) / "records.jsonl")
    clock.append(time.perf_counter())
    with contextlib.redirect_stdout(io.StringIO()):
        found = inspect("benchmark: reading", records, tokenizer, 2048)
    clock.append(time.perf_counter())
    lengths = aligned_lengths(found.sizes.tokens.clip(max=2048), 8)
    plan = RowPlan(SampleOrder([len(lengths)], seed=1), lengths, 2048)
    rows = len(plan.epoch(0))
    clock.append(time.perf_counter())
    marks.append(process.memory_info().rss)
    opened, inspected, planned = (end - begin for begin, end in zip(clock, clock[1:], strict=False))
    say(f"{len(records)} records, {start}: {inspected:.1f} s, {rows} rows")
    row = {"part": "inspection", "start": start, "records": len(records), "bytes": records.num_bytes}
    row |= {"opened": opened, "inspected": inspected, "planned": planned}
    return row | {"memory": (marks[1] - marks[0]) / len(records)}


def write(shape: Shape, folder: Path) -> None:
    """student, of random weights, and train.jsonl: conversations of words at random, one token each."""
    write_model(shape, folder / "student")
    known = step.write_tokenizer(folder / "student", shape.vocabulary)
    draw = random.Random(5)
    with (folder / "train.jsonl").open("w") as file:
        # Enough for packed rows; those of a sample each come again.
        for length in lengths(12 * shape.global_batch * shape.steps, seed=6):
            completion = max(round(SUPERVISED * length), 2)
            words = {"prompt": length - completion, "completion": completion - 1}
            file.write(json.dumps({key: " ".join(draw.choices(known, k=n)) for key, n in words.items()}) + "\n")


def write_model(shape: Shape, folder: Path) -> None:
    """A Llama of random weights, in float32."""
    import torch
    import transformers

    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=shape.seq_length,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)


def measure_attention(
    *, say: Callable[[str], None], tokens: list[int], heads: int, width: int, seconds: float, min_rounds: int
) -> list[dict[str, Any]]:
    """One row for each length and attention: forward and backward of one row in float32, and memory beside results."""
    import torch

    from tools.benchmarking.measure import Subject, alternate, memory
    from tools.benchmarking.peers import local_attentions

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        attentions = local_attentions(heads, width)
    rows = []
    for length in tokens:
        inputs = [torch.randn(length, 1, heads, width) for _ in range(3)]
        upstream = torch.randn(length, 1, heads * width)

        def run(attend: Callable, inputs: list = inputs, upstream: Any = upstream) -> Any:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attend(*leaves)
            out.backward(upstream)
            return out.detach(), [x.grad for x in leaves]

        subjects = {name: Subject(lambda attend=attend: run(attend)) for name, attend in attentions.items()}
        results = {name: subject.run() for name, subject in subjects.items()}
        first, *others = results.values()
        for other in others:
            for ours, theirs in zip([first[0], *first[1]], [other[0], *other[1]], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        del results, first, others
        times = alternate(subjects, device=torch.device("cpu"), seconds=seconds, min_rounds=min_rounds)
        for name, subject in subjects.items():
            extra = memory(subject, torch.device("cpu"))[0].extra
            say(f"{length} tokens, {name}: {1000 * figures.summary(times[name])['median']:.1f} ms")
            row = {"part": "attention", "attention": name, "length": length, "heads": heads, "width": width}
            rows.append(row | {"extra_bytes": extra, "seconds": times[name], **figures.summary(times[name])})
    return rows
