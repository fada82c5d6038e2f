"""Whole training steps of the fine-tuning command on a small random model, each run in processes of its own."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.benchmarking import figures, machine
from tools.benchmarking.workers import TAIL_LINES, MeasurementFailed, end_tree

WARM_UP_STEPS = 2
SUPERVISED = 0.6

_STEP = re.compile(r"\biteration\s+\d+\s*/.*?elapsed time per iteration \(ms\):\s*([\d.]+)")
_TEACHER = {key: re.compile(rf"\biteration\s+\d+\s*/.*?{key}: ([\d.E+-]+)") for key in ("teacher ms", "teacher MiB")}
_PEAKS = re.compile(r"peak memory per rank \(GiB\):((?: [\d.]+)+)")


@dataclass(frozen=True)
class Shape:
    """Of the model and of a step."""

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
        _write(shape, Path(folder))
        if any("cache" in VARIANTS[variant] for variant in variants):
            words = ["tools.cache_teacher", "--teacher-hf", "teacher", "--data", "train.jsonl", "--out", "cache"]
            words += ["--k", str(KEPT), "--seq-length", str(shape.seq_length)]
            _launch(Path(folder), words, 1, machine.cores(), timeout)
            say("wrote the teacher's cache")
        for variant in variants:
            for size in tensor_parallel:
                threads = max(machine.cores() // size, 1)
                text = _train(Path(folder), shape, VARIANTS[variant], size, threads, timeout)
                seconds = [float(value) / 1000 for value in _STEP.findall(text)][WARM_UP_STEPS:]
                peaks = _PEAKS.search(text)
                if len(seconds) != shape.steps - WARM_UP_STEPS or peaks is None:
                    raise MeasurementFailed(f"the log of {variant} does not report its steps:\n{_end_of(text)}")
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


def _train(folder: Path, shape: Shape, words: list[str], size: int, threads: int, timeout: float) -> str:
    """What a training run prints."""
    command = ["qtarget_megatron.finetune", "--hf-model", "student", "--sft-train", "train.jsonl", *words]
    command += ["--tensor-model-parallel-size", str(size), "--seq-length", str(shape.seq_length)]
    command += ["--micro-batch-size", "1", "--global-batch-size", str(shape.global_batch)]
    command += ["--train-iters", str(shape.steps), "--lr", "1e-5", "--log-interval", "1"]
    return _launch(folder, command, size, threads, timeout)


def _launch(folder: Path, words: list[str], size: int, threads: int, timeout: float) -> str:
    """What a module prints that is run by so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["-m", *words]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")])),
    }
    with (folder / "log").open("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise MeasurementFailed(f"{words[0]} took more than {timeout:.0f} s and was ended") from None
        finally:
            end_tree(process.pid)
            process.wait()
        log.seek(0)
        text = log.read()
    if status != 0:
        raise MeasurementFailed(f"{words[0]} ended with status {status}; the end of its log:\n{_end_of(text)}")
    return text


def _end_of(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines()[-TAIL_LINES:])


def _write(shape: Shape, folder: Path) -> None:
    """student, teacher and train.jsonl: Llama models of random weights, and words at random, one token each."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(shape.vocabulary - 1)}
    end = "<end>"
    backend = Tokenizer(models.WordLevel(vocab=words | {end: len(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    torch.manual_seed(4)
    for name in ("student", "teacher"):
        config = transformers.LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=4 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            max_position_embeddings=shape.seq_length,
        )
        transformers.LlamaForCausalLM(config).float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw, known = random.Random(5), list(words)
    completion = round(SUPERVISED * shape.seq_length)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(shape.global_batch * shape.steps):
            record = {
                "prompt": " ".join(draw.choices(known, k=shape.seq_length + 1 - completion)),
                # One token less: the end of the sequence is one.
                "completion": " ".join(draw.choices(known, k=completion - 1)),
            }
            file.write(json.dumps(record) + "\n")
