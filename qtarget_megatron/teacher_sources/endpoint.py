"""A server of vLLM or SGLang as a teacher: the log-probabilities of a prompt's tokens.

vLLM     POST /v1/completions  {"prompt": [ids], "prompt_logprobs": k, "max_tokens": 1, ...}
         choices[0].prompt_logprobs: for each token null, or {"id": {"logprob": x, "rank": r, ...}}, the k most likely
         ones and the token that is there
SGLang   POST /generate        {"input_ids": [ids], "return_logprob": true, "logprob_start_len": 0,
                                "top_logprobs_num": k, "sampling_params": {"max_new_tokens": 1}}
         meta_info.input_token_logprobs: [x, id, ...] of each token, input_top_logprobs: a list of such

Token ids are sent, so that no template or tokenizer of the server has a say. Each answer says which token stands where;
it must be the one that was sent.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qtarget_megatron.data import EncodedSample
from qtarget_megatron.teacher_cache import SampleEntries
from qtarget_megatron.teacher_sources.source import entries_of

KINDS = ("vllm", "sglang")
_MODELS = {"vllm": "/v1/models", "sglang": "/get_model_info"}
_ASKED = {"vllm": "/v1/completions", "sglang": "/generate"}
# Seconds before the first try again, twice as long each time.
_PAUSE = 0.5


@dataclass
class Endpoint:
    """A server. ValueError where it cannot be reached, says no model, or answers with anything else than asked for.

    url:      http://HOST:PORT, with or without /v1.
    kind:     one of KINDS.
    model:    name of its model; None: the first one that it serves.
    api_key:  sent as a bearer token.
    timeout:  seconds that an answer may take.
    tries:    of a request that the server did not answer, or answered with an error of its own.
    """

    url: str
    kind: str
    k: int
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    parallel: int = 8
    timeout: float = 300.0
    tries: int = 6
    precision: str = field(default="as served", init=False)
    top_p: float | None = field(default=None, init=False)
    repeats: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected a server of {' or '.join(KINDS)}, got {self.kind!r}")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url: expected http://HOST:PORT, got {self.url!r}")
        self.url = self.url.rstrip("/").removesuffix("/v1")
        served = self._served()
        if self.model is not None and self.kind == "vllm" and self.model not in served:
            raise ValueError(f"{self.url} serves {', '.join(served) or 'no model'}, not {self.model!r}: check --model")
        if not served:
            raise ValueError(f"{self.url} names no model: is it a server of {self.kind}?")
        self.name = self.model or served[0]
        self.made_from = hashlib.sha256(json.dumps([self.kind, self.name]).encode()).hexdigest()

    def _served(self) -> list[str]:
        """Names of its models."""
        answer = self._request(_MODELS[self.kind], None)
        try:
            if self.kind == "sglang":
                return [str(answer["model_path"])]
            return [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.url}{_MODELS[self.kind]}: not the answer of a {self.kind} server") from error

    def entries(self, index: int, sample: EncodedSample) -> SampleEntries:
        supervised = np.flatnonzero(sample.supervised)
        ids = sample.input_ids[: supervised[-1] + 1].tolist()
        answer = self._request(_ASKED[self.kind], self._question(ids))
        try:
            rows = _of_vllm(answer, ids) if self.kind == "vllm" else _of_sglang(answer, ids)
            kept = [sorted(rows[place], key=lambda entry: -entry[1])[: self.k] for place in supervised.tolist()]
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            why = f": {error}" if type(error) is ValueError else ""
            raise ValueError(
                f"{self.url}: the answer to sample {index} has no log-probabilities of its prompt{why}"
            ) from error
        fewest = min(len(row) for row in kept)
        if fewest < self.k:
            more = f": start it with --max-logprobs {self.k}" if self.kind == "vllm" else ""
            raise ValueError(f"{self.url} gave {fewest} entries of a token of sample {index}, expected {self.k}{more}")
        table = np.array(kept, dtype=np.float64)
        return entries_of(index, sample, table[..., 0].astype(np.int64), table[..., 1])

    def _question(self, ids: list[int]) -> dict[str, Any]:
        if self.kind == "sglang":
            asked = dict(return_logprob=True, logprob_start_len=0, top_logprobs_num=self.k)
            return dict(input_ids=ids, sampling_params=dict(max_new_tokens=1, temperature=0), **asked)
        # At least one token has to be generated.
        return dict(model=self.name, prompt=ids, max_tokens=1, temperature=0, prompt_logprobs=self.k)

    def _request(self, path: str, question: dict[str, Any] | None) -> Any:
        """The JSON of an answer. A server that is busy or restarts is asked again."""
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if question is None else json.dumps(question).encode()
        why = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}: {_shortened(error.read())}"
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, http.client.HTTPException) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError:
                why = "the answer is no JSON"
                break
        raise ValueError(f"{self.url}{path}: {why}")


def _of_vllm(answer: Any, ids: list[int]) -> list[list[tuple[int, float]]]:
    """(id, log p) of each token's entries; none of the first token."""
    rows = answer["choices"][0]["prompt_logprobs"]
    _check_length(rows, ids)
    found: list[list[tuple[int, float]]] = [[]]
    for token, row in zip(ids[1:], rows[1:], strict=True):
        if str(token) not in row:
            raise ValueError(f"token {token} was sent, and is not among those of its place")
        found.append([(int(key), float(entry["logprob"])) for key, entry in row.items()])
    return found


def _of_sglang(answer: Any, ids: list[int]) -> list[list[tuple[int, float]]]:
    meta = answer["meta_info"]
    rows, tokens = meta["input_top_logprobs"], meta["input_token_logprobs"]
    _check_length(rows, ids)
    _check_length(tokens, ids)
    if [int(entry[1]) for entry in tokens] != ids:
        raise ValueError("other tokens than those that were sent")
    return [[(int(entry[1]), float(entry[0])) for entry in row or ()] for row in rows]


def _check_length(rows: list[Any], ids: list[int]) -> None:
    if len(rows) != len(ids):
        raise ValueError(f"expected {len(ids)} tokens, got {len(rows)}")


def _shortened(body: bytes) -> str:
    text = " ".join(body.decode(errors="replace").split())
    return text if len(text) <= 300 else f"{text[:300]}..."
