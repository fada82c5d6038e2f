"""Answers of the model in a Hugging Face directory, by transformers' generate(): batched, greedy or sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qtarget_megatron.huggingface.compare.transformers_model import load_transformers_model


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    temperature:    p^(1/temperature), normalised, is drawn from; 0 takes the likeliest token each time.
    top_p:          of the likeliest tokens, as many as have this mass together; 1: all.
    top_k:          of the likeliest tokens, so many; 0: all.
    samples:        answers to a prompt.
    max_new_tokens: where an answer is cut.

    Raises ValueError for numbers that cannot be.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p: expected a mass above 0, at most 1, got {self.top_p:g}")
        for name, least in (("top_k", 0), ("samples", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', '-')}: expected {least} or more, got {getattr(self, name)}")
        if self.temperature == 0:
            for name, neutral in (("top_p", 1.0), ("top_k", 0), ("samples", 1)):
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f"{name.replace('_', '-')} {getattr(self, name):g}: a greedy answer is the same each time: "
                        "give a temperature above 0 as well"
                    )


class GeneratedAnswer(NamedTuple):
    """An answer.

    text:  without the token that ended it.
    ended: whether the model ended it; False where it was cut.
    """

    text: str
    ended: bool


class Generator:
    """The model of a directory, which answers prompts.

    directory: a Hugging Face directory; no code in it is run. Of its generation_config.json only the tokens that end
        an answer are read, beside the tokenizer's own.
    tokenizer: its tokenizer.
    """

    def __init__(
        self, directory: Path, tokenizer: Any, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ):
        from transformers import GenerationConfig

        self.model = load_transformers_model(directory, dtype).to(device).eval()
        self._directory, self._tokenizer, self._device = directory, tokenizer, device
        self._ends = _end_tokens(self.model, tokenizer)
        # What the directory recommends (temperature, penalties, lengths) must not mix with what is asked for.
        self.model.generation_config = GenerationConfig()
        self._longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[GeneratedAnswer]]:
        """For each prompt, token ids, its answers. The prompts are one batch, padded on the left.

        The same seed gives the same answers to the same batch on the same machine.

        Raises ValueError for a prompt without tokens, or one that leaves no room for an answer.
        """
        longest = max(map(len, prompts))
        room = sampling.max_new_tokens
        if self._longest is not None:
            room = min(room, self._longest - longest)
        if room < 1:
            raise ValueError(
                f"a prompt has {longest} tokens, and {self._directory} takes {self._longest}: no token of an answer "
                "fits behind it; shorten it, or leave it out"
            )
        if not all(map(len, prompts)):
            raise ValueError("a prompt has no tokens: expected one at least")
        pad = self._tokenizer.pad_token_id
        pad = self._ends[0] if pad is None and self._ends else pad or 0
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        torch.manual_seed(seed)
        generated = self.model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=room,
            eos_token_id=self._ends or None,
            pad_token_id=pad,
            num_return_sequences=sampling.samples,
            **_drawn(sampling),
        )
        rows = [self._answer(row) for row in generated[:, longest:].tolist()]
        return [rows[begin : begin + sampling.samples] for begin in range(0, len(rows), sampling.samples)]

    def _answer(self, ids: list[int]) -> GeneratedAnswer:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        text = self._tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return GeneratedAnswer(text, end is not None)


def _drawn(sampling: Sampling) -> dict[str, Any]:
    """The arguments of generate() that say how a token is chosen."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of generation_config.json or config.json."""
    found = []
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(found))
