"""The base models of a study that trains its own, from nothing, through qtarget finetune."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from examples.study.jobs import Models, command, flag_words
from examples.study.study_file import Base, Study
from examples.study.tasks import KNOWN, TASKS, is_known, problems
from examples.study.tokenizer import VOCABULARY_SIZE, character_tokenizer

BATCH_SIZE = 64
# The base's own training decays to the latter; its further training begins anew.
LEARNING_RATE, LEAST_LEARNING_RATE = 2e-3, 2e-4
SEED = 1


def models_of(base: Base, folder: Path) -> Models:
    """Where a base's models are, or will be."""
    if base.model is not None:
        return Models(base.model, base.strong)
    own = folder / "bases" / base.name
    return Models(own / "base", own / "strong" if base.strong_steps else None)


def missing(study: Study, folder: Path) -> list[str]:
    """The bases that are to be trained yet."""
    found = []
    for name in study.base_names():
        models = models_of(study.bases[name], folder)
        if study.bases[name].model is None and not all(m.is_dir() for m in (models.base, models.strong) if m):
            found.append(name)
    return found


def train_base(study: Study, name: str, folder: Path) -> None:
    """Train a base, and its better version; each appears when it is complete."""
    base = study.bases[name]
    models = models_of(base, folder)
    own = models.base.parent
    own.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(own / "start", ignore_errors=True)
    _write_start(own / "start", dict(base.config))
    _train(study, base, own / "start", models.base, base.steps, first=0)
    if models.strong is not None:
        _train(study, base, models.base, models.strong, base.strong_steps, first=base.steps)


def _train(study: Study, base: Base, start: Path, end: Path, steps: int, *, first: int) -> None:
    """first: how many steps' worth of problems are left out, as they were trained on."""
    if end.is_dir():
        return
    train = end.parent / f"{end.name}.jsonl"
    _write_problems(train, first * BATCH_SIZE, (first + steps) * BATCH_SIZE)
    seq_length = study.flags["seq-length"]
    words: dict[str, Any] = {
        "hf-model": start,
        "sft-train": train,
        "objective": "sft",
        "seq-length": seq_length,
        "no-pack": True,
        "micro-batch-size": BATCH_SIZE,
        "global-batch-size": BATCH_SIZE,
        "train-iters": steps,
        "lr": LEARNING_RATE,
        "min-lr": LEAST_LEARNING_RATE,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": min(50, steps - 1),
        "clip-grad": 1.0,
        "adam-beta2": 0.98,
        "weight-decay": 0.01,
        "seed": SEED,
        "log-interval": 1,
        "tensorboard-log-interval": 1,
        "metrics-jsonl": end.parent / f"{end.name}-metrics.jsonl",
        "save-hf": end,
        "cpu": bool(study.flags.get("cpu")),
    }
    command((), "finetune", flag_words(words), end.parent / f"{end.name}.log")
    train.unlink()


def _write_problems(path: Path, first: int, end: int) -> None:
    """Problems of the known tasks in their shares, those from first on."""
    draw = random.Random("base")
    drawn = {name: filter(is_known, problems(TASKS[name], "train", "base")) for name in KNOWN}
    with path.open("w", encoding="utf-8") as file:
        for number in range(end):
            (name,) = draw.choices(list(KNOWN), list(KNOWN.values()))
            problem = next(drawn[name])
            if number >= first:
                record = {"prompt": problem, "completion": TASKS[name].solution(problem).text}
                file.write(json.dumps(record) + "\n")


def _write_start(folder: Path, config: dict[str, Any]) -> None:
    """A random Llama in float32 with the tokenizer of the tasks."""
    import torch
    import transformers

    end = VOCABULARY_SIZE - 1
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end,
            tie_word_embeddings=True,
            initializer_range=0.05,
            **config,
        )
    )
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
