"""What a trained model of the made-up tasks can do: right answers, likelihoods, distance from its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.study.results import pack
from examples.study.tasks import KNOWN, TASKS, Condition, answer_of, problems
from qtarget_megatron.data import load_tokenizer
from qtarget_megatron.huggingface import GeneratedAnswer, Generator, Sampling, load_transformers_model

# At most as many test problems' solutions are scored, and problems of each other task asked.
SCORED_PROBLEMS, UNTOUCHED_PROBLEMS = 200, 80
PROBED_DEMONSTRATIONS = 200
LONGEST_SOLUTION = 48
# Every model is asked with the same random numbers: differences are between models.
SEED = 20261130


@dataclass
class Evaluation:
    """What was measured of a model.

    metrics:  by name; dev is what a learning rate is chosen by, the mean of dev greedy and dev sampled.
    outcomes: by name, for each test problem whether it was answered right (results.pack).
    """

    metrics: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)


def evaluate(model: Path, base: Path, condition: Condition, temperatures: Sequence[float] = (1.0,)) -> Evaluation:
    """Evaluate a model.

    dev greedy, dev sampled:   the share of right answers to dev problems, the likeliest and at temperature 1
    greedy, sampled:           to test problems; of other temperatures "sampled 0.5"
    other greedy, other sampled: the same by the other rule
    nll:                       -log p of a token of the first test problems' solutions by the key, in nats
    kl:                        KL(base || model) of their tokens' distributions, in nats
    untouched:                 greedy, the mean over the tasks that the bases know and this is not
    p right, p wrong:          mean p(y) of the demonstrations' right and wrong characters
    """
    tokenizer = load_tokenizer(model)
    generator = Generator(model, tokenizer)
    found = Evaluation()
    dev_problems, asked = (
        list(islice(problems(TASKS[condition.task], split, "evaluation"), count))
        for split, count in (("dev", condition.dev), ("test", condition.test))
    )
    _answers(found, generator, tokenizer, condition, dev_problems, asked, temperatures)
    dev = found.metrics["dev greedy"], found.metrics["dev sampled"]
    found.metrics["dev"] = sum(dev) / len(dev)
    found.metrics["untouched"] = _untouched(generator, tokenizer, condition)

    solved = [(p, TASKS[condition.task].solution(p, condition.key).text) for p in asked[:SCORED_PROBLEMS]]
    scored = Likelihoods(generator.model, tokenizer)
    log_p, distributions = scored.of(solved)
    found.metrics["nll"] = -torch.cat(log_p).mean().item()
    reference = Likelihoods(load_transformers_model(base), tokenizer).of(solved)[1]
    found.metrics["kl"] = (reference.exp() * (reference - distributions)).sum(-1).mean().item()
    found.metrics |= _probe(scored, condition)
    return found


def _answers(
    found: Evaluation,
    generator: Generator,
    tokenizer: Any,
    condition: Condition,
    dev: list[str],
    test: list[str],
    temperatures: Sequence[float],
) -> None:
    keys = [condition.answers(problem) for problem in dev + test]
    other = next(rule for rule in keys[0] if rule != condition.key)
    prompts = [tokenizer(problem)["input_ids"] for problem in dev + test]
    for name, temperature in draws(temperatures):
        sampling = Sampling(temperature=temperature, max_new_tokens=LONGEST_SOLUTION)
        answers = [_answer(given[0]) for given in generator.answers(prompts, sampling, SEED)]
        for rule in (condition.key, other):
            right = [answer == key[rule] for answer, key in zip(answers, keys, strict=True)]
            prefix = "" if rule == condition.key else "other "
            found.metrics[f"{prefix}dev {name}"] = sum(right[: len(dev)]) / len(dev)
            found.metrics[prefix + name] = sum(right[len(dev) :]) / len(test)
            if rule == condition.key:
                found.outcomes[name] = pack(right[len(dev) :])


def draws(temperatures: Sequence[float]) -> list[tuple[str, float]]:
    """(name, temperature) of the ways in which is answered: the greedy one, and each temperature."""
    return [("greedy", 0.0), *((sampled_name(temperature), temperature) for temperature in temperatures)]


def sampled_name(temperature: float) -> str:
    """What answers that are drawn at a temperature are called in metrics and outcomes."""
    return "sampled" if temperature == 1 else f"sampled {temperature:g}"


def _untouched(generator: Generator, tokenizer: Any, condition: Condition) -> float:
    count = min(UNTOUCHED_PROBLEMS, condition.test)
    pairs = [
        (problem, TASKS[name].solution(problem).answer)
        for name in KNOWN
        if name != condition.task
        for problem in islice(problems(TASKS[name], "test", "evaluation"), count)
    ]
    prompts = [tokenizer(problem)["input_ids"] for problem, _ in pairs]
    given = generator.answers(prompts, Sampling(max_new_tokens=LONGEST_SOLUTION), SEED)
    right = [_answer(answers[0]) == key for answers, (_, key) in zip(given, pairs, strict=True)]
    return sum(right) / len(right)


def _answer(given: GeneratedAnswer) -> str:
    """The answer; none where the solution was not ended."""
    return answer_of(given.text) if given.ended else ""


def _probe(scored: Likelihoods, condition: Condition) -> Mapping[str, float]:
    """p(y) of right and of wrong characters of demonstrations."""
    records = condition.demonstrations(PROBED_DEMONSTRATIONS, "probe")
    log_p, _ = scored.of([(record["prompt"], record["completion"]) for record in records])
    sums = {"p right": [0.0, 0], "p wrong": [0.0, 0]}
    for record, values in zip(records, log_p, strict=True):
        wrong = torch.zeros(len(values), dtype=torch.bool)
        for begin, end in record["wrong"]:
            wrong[begin:end] = True
        for name, chosen in (("p right", ~wrong), ("p wrong", wrong)):
            sums[name][0] += values[chosen].exp().sum().item()
            sums[name][1] += int(chosen.sum())
    return {name: total / count for name, (total, count) in sums.items() if count}


class Likelihoods:
    """log p of completions under a model of transformers."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model, self._tokenizer = model.eval(), tokenizer

    @torch.inference_mode()
    def of(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Tensor], Tensor]:
        """For each (prompt, completion) the log p of the completion's tokens and of the token that ends it, float32
        [n], and all of these tokens' log distributions, float32 [tokens, vocabulary]."""
        heads = [self._tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
        tails = [self._tokenizer(text)["input_ids"] + [self._tokenizer.eos_token_id] for _, text in pairs]
        length = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
        pad = self._tokenizer.pad_token_id
        rows = [h + t + [pad] * (length - len(h) - len(t)) for h, t in zip(heads, tails, strict=True)]
        ids = torch.tensor(rows)
        # Padding stands behind everything that is read: causal attention needs no mask.
        log_p = self._model(ids[:, :-1]).logits.float().log_softmax(-1)
        places = [slice(len(h) - 1, len(h) + len(t) - 1) for h, t in zip(heads, tails, strict=True)]
        chosen = [row[place] for row, place in zip(log_p, places, strict=True)]
        of_labels = [
            rows.gather(1, torch.tensor(tail)[:, None])[:, 0] for rows, tail in zip(chosen, tails, strict=True)
        ]
        return of_labels, torch.cat(chosen)
