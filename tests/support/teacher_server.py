"""Servers that speak as vLLM and SGLang do, for a small model of transformers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Teacher:
    """What a server says. model: of transformers, replaceable; asked: the prompts so far.

    troubles: taken one for each question: "busy" (503), "gone" (the connection ends), else text of a 400.
    """

    def __init__(self, model, max_logprobs: int = 20):
        self.model, self.max_logprobs = model, max_logprobs
        self.asked: list[list[int]] = []
        self.troubles: list[str] = []
        self.key: str | None = None
        self.shift = 0
        self.lock = threading.Lock()

    def log_p(self, ids: list[int]) -> torch.Tensor:
        """float32 [n, V], of the token at each place; its first row is of no use."""
        with torch.no_grad(), self.lock:
            logits = self.model(torch.tensor([ids])).logits[0].float()
        return torch.log_softmax(logits, -1).roll(1 + self.shift, 0)


def vllm_answer(teacher: Teacher, question: dict) -> dict:
    ids, k = question["prompt"], question["prompt_logprobs"]
    assert question["max_tokens"] == 1 and question["model"] == "teacher"
    rows: list[dict | None] = [None]
    for token, row in zip(ids[1:], teacher.log_p(ids)[1:], strict=True):
        best = row.topk(min(k, teacher.max_logprobs)).indices.tolist()
        rank = int((row > row[token]).sum()) + 1
        entries = {token: rank} | {index: place for place, index in enumerate(best, start=1)}
        # In no particular order, the token of the prompt among them.
        rows.append({str(i): {"logprob": float(row[i]), "rank": r, "decoded_token": "x"} for i, r in entries.items()})
    return {"object": "text_completion", "choices": [{"text": "x", "prompt_logprobs": rows}]}


def sglang_answer(teacher: Teacher, question: dict) -> dict:
    ids, k = question["input_ids"], question["top_logprobs_num"]
    assert question["return_logprob"] and question["logprob_start_len"] == 0
    log_p = teacher.log_p(ids)
    own = [[None, ids[0], None]] + [
        [float(row[token]), token, None] for token, row in zip(ids[1:], log_p[1:], strict=True)
    ]
    top = [None] + [
        [[float(row[i]), i, None] for i in row.topk(min(k, teacher.max_logprobs)).indices.tolist()] for row in log_p[1:]
    ]
    return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def _answer(self, code: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refused(self) -> bool:
        teacher = self.server.teacher
        if teacher.key is not None and self.headers.get("Authorization") != f"Bearer {teacher.key}":
            self._answer(401, {"error": "no key"})
            return True
        return False

    def do_GET(self):
        if self._refused():
            return
        known = {
            "/v1/models": {"object": "list", "data": [{"id": "teacher"}, {"id": "other"}]},
            "/get_model_info": {"model_path": "teacher"},
        }
        self._answer(200, known[self.path]) if self.path in known else self._answer(404, {"error": "no such path"})

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        teacher = self.server.teacher
        if self._refused():
            return
        with teacher.lock:
            trouble = teacher.troubles.pop(0) if teacher.troubles else None
        if trouble == "gone":
            self.close_connection = True
            self.connection.close()
        elif trouble is not None:
            self._answer(503 if trouble == "busy" else 400, {"error": trouble})
        else:
            with teacher.lock:
                teacher.asked.append(question.get("prompt") or question.get("input_ids"))
            answer = vllm_answer if self.path == "/v1/completions" else sglang_answer
            self._answer(200, answer(teacher, question))


@contextlib.contextmanager
def served(teacher: Teacher) -> Iterator[str]:
    """The URL of a server on a free port, while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.teacher = teacher
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
