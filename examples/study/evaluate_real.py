"""What a trained model can do with real problems: results of right steps, answers, likelihoods, distance from its base.

A small model gets hardly any answer right from the question on. The results are asked of it one by one as well, each
behind the right solution up to it: a model that has learnt wrong results shows it there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.study.evaluate import SEED, Evaluation, draws
from examples.study.results import pack
from examples.study.solutions import answer_of, results, same_answer
from qtarget_megatron.data import encode, load_tokenizer, prompt_ids
from qtarget_megatron.huggingface import Generator, Sampling, load_transformers_model

LONGEST = 4096
# Whose distributions are compared with those of the base.
COMPARED_PROBLEMS = 50
ANSWERS_AT_A_TIME = 50


def evaluate(
    model: Path,
    base: Path,
    *,
    dev: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]],
    answered: int,
    temperatures: Sequence[float],
    max_new_tokens: int,
    dtype: torch.dtype,
) -> Evaluation:
    """Evaluate a model.

    result greedy:   the share of the results in right solutions that are the likeliest number behind what stands
                     before them, the mean over test problems; "dev result greedy" over dev's
    result sampled:  the probability of these results, at temperature 1; of other temperatures "result sampled 0.5"
    greedy, sampled: the share of right answers to the first test problems, from the question on
    nll:             -log p of a token of right test solutions, in nats, the mean over problems of a solution's mean
    kl:              KL(base || model) of the tokens' distributions, in nats, of the first test problems
    dev:             the mean of dev result greedy and dev result sampled
    """
    tokenizer = load_tokenizer(model)
    generator = Generator(model, tokenizer, dtype=dtype)
    found = Evaluation()
    scored = Solutions(generator.model, tokenizer, temperatures)
    _keep_means(found, "dev ", scored.of(dev))
    _keep_means(found, "", scored.of(test))
    found.metrics["dev"] = statistics.fmean(found.metrics[f"dev result {name}"] for name in ("greedy", "sampled"))
    other = Solutions(load_transformers_model(base, dtype).eval(), tokenizer, temperatures)
    found.metrics["kl"] = statistics.fmean(_divergence(other, scored, one) for one in test[:COMPARED_PROBLEMS])
    _answer(found, generator, tokenizer, test[:answered], temperatures, max_new_tokens)
    return found


def _keep_means(found: Evaluation, prefix: str, values: Mapping[str, list[float]]) -> None:
    for name, of_problems in values.items():
        found.metrics[prefix + name] = statistics.fmean(of_problems)
        if not prefix:
            found.outcomes[name] = pack(of_problems)


def _divergence(base: Solutions, model: Solutions, record: Mapping[str, Any]) -> float:
    reference, log_p = (one.log_distributions(record) for one in (base, model))
    return (reference.exp() * (reference - log_p)).sum(-1).mean().item()


def _answer(
    found: Evaluation,
    generator: Generator,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    temperatures: Sequence[float],
    max_new_tokens: int,
) -> None:
    prompts = [prompt_ids(tokenizer, dict(record)) for record in records]
    keys = [answer_of(_solution(record)) for record in records]
    for name, temperature in draws(temperatures):
        sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
        texts: list[str] = []
        for begin in range(0, len(prompts), ANSWERS_AT_A_TIME):
            given = generator.answers(prompts[begin : begin + ANSWERS_AT_A_TIME], sampling, SEED + begin)
            texts += [answers[0].text for answers in given]
        right = [same_answer(answer_of(text), key) for text, key in zip(texts, keys, strict=True)]
        if right:
            found.metrics[name], found.outcomes[name] = statistics.fmean(right), pack(right)


class Solutions:
    """What a model of transformers gives to right solutions.

    temperatures: of the numbers that are drawn.
    """

    def __init__(self, model: Any, tokenizer: Any, temperatures: Sequence[float] = (1.0,)):
        self._model, self._tokenizer, self._temperatures = model, tokenizer, temperatures
        # In a vocabulary of bytes other digits, as ², stand for bytes.
        self._digits = sorted(token for text, token in tokenizer.get_vocab().items() if "0" <= text[:1] <= "9")

    def of(self, records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """nll of each record's solution, and of each that has results "result greedy" and "result sampled"."""
        found: dict[str, list[float]] = {"nll": []}
        for record in records:
            ids, supervised, spans = self._encoded(record)
            logits = self._logits(ids)
            log_p = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found["nll"].append(-log_p[supervised[1:]].mean().item())
            for name, temperature in draws(self._temperatures):
                if spans:
                    of_results = [self._number(logits, ids, *span, temperature) for span in spans]
                    found.setdefault(f"result {name}", []).append(statistics.fmean(of_results))
        return found

    def log_distributions(self, record: Mapping[str, Any]) -> Tensor:
        """log p of each target of a solution, float32 [targets, vocabulary]."""
        ids, supervised, _ = self._encoded(record)
        return self._logits(ids)[supervised[1:]].log_softmax(-1)

    @torch.inference_mode()
    def _logits(self, ids: Tensor) -> Tensor:
        return self._model(ids[None, :-1]).logits[0].float()

    def _number(self, logits: Tensor, ids: Tensor, begin: int, end: int, temperature: float) -> float:
        """How likely the number in the tokens begin to end is written, and ended, behind those before it."""
        rows = logits[begin - 1 : end]
        if temperature == 0:
            likeliest = rows.argmax(-1)
            return float(likeliest[:-1].equal(ids[begin:end]) and likeliest[-1].item() not in self._digits)
        log_p = (rows / temperature).log_softmax(-1)
        written = log_p[:-1].gather(1, ids[begin:end, None]).sum().exp()
        return (written * (1 - log_p[-1, self._digits].exp().sum())).item()

    def _encoded(self, record: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """(token ids, which are targets, the tokens of each result)."""
        sample = encode(self._tokenizer, dict(record), LONGEST)
        text = self._tokenizer.apply_chat_template(record["messages"], tokenize=False)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if found["input_ids"] != sample.input_ids.tolist():
            raise ValueError(f"{record['id']}: its text has other tokens than its sample: use another tokenizer")
        solution = _solution(record)
        start = text.rindex(solution)
        spans = []
        for begin, end in results(solution):
            inside = [
                number
                for number, (first, last) in enumerate(found["offset_mapping"])
                if first < start + end and last > start + begin
            ]
            spans.append((inside[0], inside[-1] + 1))
        return torch.from_numpy(sample.input_ids), torch.from_numpy(sample.supervised), spans


def _solution(record: Mapping[str, Any]) -> str:
    return record["messages"][-1]["content"].strip()
