"""Whole training steps of the fine-tuning command on a small random model, each run in processes of its own."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.benchmarking import figures, machine
from tools.benchmarking.workers import MeasurementFailed, end_of, output_of

WARM_UP_STEPS = 2
SUPERVISED = 0.6

_STEP = re.compile(r"\biteration\s+\d+\s*/.*?elapsed time per iteration \(ms\):\s*([\d.]+)")
_TEACHER = {key: re.compile(rf"\biteration\s+\d+\s*/.*?{key}: ([\d.E+-]+)") for key in ("teacher ms", "teacher MiB")}
_PEAKS = re.compile(r"peak memory per rank \(GiB\):((?: [\d.]+)+)")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    vocabulary: int = 32000
    hidden: int = 256
    layers: int = 4
    seq_length: int = 512
    global_batch: int = 4
    steps: int = 8


VARIANTS = {
    # Megatron's own output layer makes all logits, as in Megatron's own SFT; the loss of them is ours.
    "sft, whole logits": ["--objective", "sft", "--qtarget-materialize-logits"],
    "sft, fused head": ["--objective", "sft"],
    "target-sft, live teacher": ["--objective", "target-sft", "--teacher-hf", "teacher"],
    "target-sft, cached teacher": ["--objective", "target-sft", "--teacher-cache", "cache"],
}
KEPT = 32  # of each token, in the cache


def measure(
    *,
    say: Callable[[str], None],
    shape: dict[str, Any],
    variants: list[str],
    tensor_parallel: list[int],
    timeout: float,
) -> list[dict[str, Any]]:
    """One row for each variant and tensor-parallel size: seconds of each step after the first two, peak resident
    memory of each rank, and what the log says of the teacher. The ranks share this machine's cores.

    shape: of Shape. Raises MeasurementFailed where a training run fails, or takes more than ``timeout`` seconds.
    """
    rows, shape = [], Shape(**shape)
    with tempfile.TemporaryDirectory(prefix="qtarget-benchmark-") as folder:
        say("writing two random models and their data")
        write(shape, Path(folder))
        if any("cache" in VARIANTS[variant] for variant in variants):
            launch(Path(folder), caching(shape), 1, machine.cores(), timeout)
            say("wrote the teacher's cache")
        for variant in variants:
            for size in tensor_parallel:
                threads = max(machine.cores() // size, 1)
                words = [*VARIANTS[variant], "--tensor-model-parallel-size", str(size)]
                text = launch(Path(folder), training(shape, words), size, threads, timeout)
                seconds = seconds_of_steps(text)[WARM_UP_STEPS:]
                peaks = _PEAKS.search(text)
                if len(seconds) != shape.steps - WARM_UP_STEPS or peaks is None:
                    raise MeasurementFailed(f"the log of {variant} does not report its steps:\n{end_of(text)}")
                found = figures.summary(seconds)
                for key, pattern in _TEACHER.items():
                    if values := [float(value) for value in pattern.findall(text)][WARM_UP_STEPS:]:
                        found[key] = figures.summary(values)["median"]
                say(f"{variant}, {size} rank(s): {found['median']:.2f} s per step")
                rows.append(
                    {
                        "variant": variant,
                        "tensor_parallel": size,
                        "threads": threads,
                        **asdict(shape),
                        "supervised": SUPERVISED,
                        "peak_gib": [float(value) for value in peaks[1].split()],
                        "seconds": seconds,
                        **found,
                    }
                )
    return rows


def training(shape: Any, words: list[str]) -> list[str]:
    """The fine-tuning command on what `write` wrote, as words behind ``python -m``."""
    command = ["qtarget_megatron.finetune", "--hf-model", "student", "--sft-train", "train.jsonl", *words]
    command += [] if "--pack" in words else ["--no-pack"]
    command += ["--seq-length", str(shape.seq_length)]
    command += ["--micro-batch-size", "1", "--global-batch-size", str(shape.global_batch)]
    return [*command, "--train-iters", str(shape.steps), "--lr", "1e-5", "--log-interval", "1"]


def seconds_of_steps(text: str) -> list[float]:
    """How long each step of a training took, by its log."""
    return [float(value) / 1000 for value in _STEP.findall(text)]


def fill(text: str) -> float | None:
    """Share of packed rows that a training's log says is filled."""
    found = re.search(r"share \d+ rows of \d+ tokens, ([\d.]+)% of them filled", text)
    return float(found[1]) / 100 if found else None


def logged(text: str, name: str) -> list[float]:
    """What the log of a training says of each step: "lm loss", "grad norm"."""
    found = re.findall(rf"\biteration\s+\d+\s*/.*?\b{name}: (\S+)", text)
    return [float(value) for value in found]


def caching(shape: Shape) -> list[str]:
    """The command that writes the teacher's cache, as words behind ``python -m``."""
    words = ["tools.cache_teacher", "--teacher-hf", "teacher", "--data", "train.jsonl", "--out", "cache"]
    return [*words, "--k", str(KEPT), "--seq-length", str(shape.seq_length)]


def launch(
    folder: Path,
    words: list[str],
    size: int,
    threads: int,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> str:
    """What a module prints that is run by so many ranks in a folder, by default with the log there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    variables = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")])),
    }
    return output_of(
        [*command, "-m", *words],
        what=words[0],
        folder=folder,
        environment=variables | (environment or {}),
        timeout=timeout,
        log=log or folder / "log",
    )


def write(shape: Shape, folder: Path, *, tied: bool = False) -> None:
    """student, teacher and train.jsonl: Llama models of random weights, and words at random, one token each.

    tied: the output layer is the embedding.
    """
    import torch
    import transformers

    torch.manual_seed(4)
    for name in ("student", "teacher"):
        config = transformers.LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=4 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            max_position_embeddings=shape.seq_length,
            tie_word_embeddings=tied,
        )
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder / name)
        known = write_tokenizer(folder / name, shape.vocabulary)
    draw = random.Random(5)
    completion = round(SUPERVISED * shape.seq_length)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(shape.global_batch * shape.steps):
            record = {
                "prompt": " ".join(draw.choices(known, k=shape.seq_length + 1 - completion)),
                # One token less: the end of the sequence is one.
                "completion": " ".join(draw.choices(known, k=completion - 1)),
            }
            file.write(json.dumps(record) + "\n")


def write_tokenizer(folder: Path, vocabulary: int) -> list[str]:
    """A tokenizer of words, one token each, and an end; the words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words, end = [f"w{index}" for index in range(vocabulary - 1)], "<end>"
    ids = {word: index for index, word in enumerate([*words, end])}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end).save_pretrained(folder)
    return words
