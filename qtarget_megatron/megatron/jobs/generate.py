"""Answers to the questions of a data set, by transformers, from a Hugging Face directory or a Megatron checkpoint."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtarget_megatron.data import AUTO, Records, load_tokenizer, open_prompts, prompt_at, writes_date
from qtarget_megatron.huggingface import Generator, Sampling, read_config
from qtarget_megatron.megatron.runtime import cpu_platform, logs
from qtarget_megatron.megatron.runtime.lora_flags import saved_lora
from qtarget_megatron.megatron.runtime.progress import Progress
from qtarget_megatron.megatron.weights.checkpoint_folder import checkpoint_directory, saved_arguments
from qtarget_megatron.resumable import ResumableLines, directory_digest

_log = logs.of("generate")
FIELDS = ("answers", "ended")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What is answered, and how.

    hf_model:   Hugging Face directory: architecture, tokenizer, and the weights, unless load is given.
    data:       the questions, a file or folder as for training; answers that it holds are left out of the prompts.
    out:        the records of data with the fields of FIELDS: the texts of the answers, and whether each was ended by
                the model or cut.
    load:       Megatron checkpoint with the weights, of a whole model or of adapters; ckpt_step: its iteration.
    batch_size: prompts at a time.
    seed:       of what is drawn; a batch's answers follow from it and the batch alone.
    overwrite:  replace out, and fields of these names.
    """

    hf_model: Path
    data: Path
    out: Path
    sampling: Sampling = field(default_factory=Sampling)
    data_format: str = AUTO
    data_date: str | None = None
    load: Path | None = None
    ckpt_step: int | None = None
    batch_size: int = 16
    seed: int = 0
    dtype: str | None = None
    cpu: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size: expected 1 or more, got {self.batch_size}")


def generate(options: GenerateOptions) -> tuple[int, int]:
    """Answer a data set. Returns the number of answers, and how many of them were cut.

    A run that was ended goes on where it stopped, if it is asked for the same. ValueError for bad input, before
    anything is written.
    """
    device, dtype = _device(options)
    config = read_config(options.hf_model)
    limit = config.get("text_config", config).get("max_position_embeddings")
    tokenizer = load_tokenizer(options.hf_model)
    file = open_prompts(options.data, options.data_format)
    if len(file) == 0:
        raise ValueError(f"--data {options.data}: expected a record at least, got none")
    date = _date(options, tokenizer)
    checkpoint = None
    if options.load is not None:
        checkpoint = Path(checkpoint_directory(str(options.load), options.ckpt_step))
    # Before minutes of loading: each question is one.
    prompts = [_prompt(file, index, tokenizer, date, limit, options) for index in range(len(file))]

    lines = ResumableLines(options.out, _made_from(options, file, checkpoint, date, dtype))
    lines.check(overwrite=options.overwrite, inputs=[options.data])
    done = lines.open()
    _log.info("%d questions%s, %s on %s", len(file), f", {done} of them answered" if done else "", dtype, device)
    cut = 0
    with _hugging_face_directory(options, checkpoint) as directory:
        generator = Generator(directory, tokenizer, dtype=getattr(torch, dtype), device=device)
        progress = Progress("generate: answering", len(file), done, unit="questions")
        # What is there may end within a batch, whose rest must be drawn as if it did not.
        for begin in range(done - done % options.batch_size, len(file), options.batch_size):
            batch = prompts[begin : begin + options.batch_size]
            given = generator.answers(batch, options.sampling, options.seed + begin)
            answered = []
            for index, answers in enumerate(given, begin):
                if index >= done:
                    texts, ended = [a.text for a in answers], [a.ended for a in answers]
                    answered.append(json.dumps(file.raw(index) | dict(zip(FIELDS, (texts, ended), strict=True))))
                    cut += ended.count(False)
            lines.append(answered)
            progress.report(begin + len(batch))
    lines.finish()
    return (len(file) - done) * options.sampling.samples, cut


def _device(options: GenerateOptions) -> tuple[str, str]:
    """(device, dtype)"""
    on_cpu = options.cpu or cpu_platform.is_active() or not torch.cuda.is_available()
    device = "cpu" if on_cpu else "cuda"
    return device, options.dtype or ("bfloat16" if device == "cuda" else "float32")


def _date(options: GenerateOptions, tokenizer: Any) -> datetime.date | None:
    """The date that the chat template writes, if it asks for one."""
    if options.data_date is None:
        return datetime.date.today() if writes_date(tokenizer) else None
    try:
        return datetime.date.fromisoformat(options.data_date)
    except ValueError:
        raise ValueError(f"--data-date: expected YYYY-MM-DD, got {options.data_date!r}") from None


def _prompt(
    file: Records, index: int, tokenizer: Any, date: datetime.date | None, limit: int | None, options: GenerateOptions
) -> list[int]:
    """limit: of the tokens that the model takes."""
    stray = [name for name in FIELDS if name in file.raw(index)]
    if stray and not options.overwrite:
        raise ValueError(
            f'{file.where(index)}: the record has "{stray[0]}" already: give --overwrite to replace it, or rename it'
        )
    prompt = prompt_at(file, tokenizer, index, date)
    if not prompt:
        raise ValueError(f"{file.where(index)}: the question has no tokens: expected one at least")
    if limit is not None and len(prompt) >= limit:
        raise ValueError(
            f"{file.where(index)}: the question has {len(prompt)} tokens, and the model takes {limit}: no token of an "
            "answer fits behind it; shorten it, or leave it out"
        )
    return prompt


def _made_from(
    options: GenerateOptions, file: Records, checkpoint: Path | None, date: datetime.date | None, dtype: str
) -> dict[str, Any]:
    return {
        "--hf-model": directory_digest(options.hf_model),
        "--load": None if checkpoint is None else directory_digest(checkpoint),
        "--data": file.digest,
        "--data-format": file.form,
        "--data-date": None if date is None else date.isoformat(),
        "--batch-size": options.batch_size,
        "--seed": options.seed,
        "--dtype": dtype,
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(options.sampling).items()},
    }


@contextlib.contextmanager
def _hugging_face_directory(options: GenerateOptions, checkpoint: Path | None) -> Iterator[Path]:
    """The directory that transformers loads: hf_model, or what a checkpoint is exported to while it is needed."""
    if checkpoint is None:
        yield options.hf_model
        return
    with tempfile.TemporaryDirectory(dir=options.out.absolute().parent, prefix=".generate-") as temporary:
        directory = Path(temporary) / "model"
        words = ["--hf-model", options.hf_model, "--load", options.load, "--save-hf", directory]
        words += ["--lora-merge"] if saved_lora(saved_arguments(checkpoint)) is not None else []
        words += ["--ckpt-step", options.ckpt_step] if options.ckpt_step is not None else []
        words += ["--cpu"] if options.cpu else []
        _log.info("exporting %s, for transformers to load it", options.load)
        # A process of its own: Megatron's memory and its stand-ins for a GPU go with it.
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        command = [sys.executable, "-m", "qtarget_megatron.export", *map(str, words)]
        ended = subprocess.run(command, env=alone, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if ended.returncode != 0:
            said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
            reason = next((line for line in said if "export: error: " in line), said[-1] if said else "no message")
            raise ValueError(f"--load {options.load} cannot be exported: {reason.rpartition('error: ')[2]}")
        yield directory
