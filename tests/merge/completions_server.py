"""An OpenAI-compatible HTTP server in this process that answers from real transformers models."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

STANDARD = {
    "model", "prompt", "max_tokens", "temperature", "echo", "logprobs", "presence_penalty", "frequency_penalty",
}  # fmt: skip


@dataclass
class Behaviour:
    """What the server can do, and what is wrong with it."""

    models: dict[str, Any]  # transformers models by name
    tokenizer: Any
    extensions: bool = True  # prompt_logprobs and return_token_ids
    echo: bool = True
    refuses_unknown: bool = False  # keys of a request that the standard does not have
    key: str | None = None
    chat_only: bool = False
    cuts_last: bool = False  # the answer lacks its last token and claims to have ended
    drops_end: bool = False  # the end-of-sequence token is left out of the answer
    shift: float = 0.0  # added to every log-probability
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@torch.no_grad()
def complete(behaviour: Behaviour, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(status, answer) of one POST to /v1/completions."""
    if behaviour.refuses_unknown and body.keys() - STANDARD:
        return 400, {"error": {"message": f"unexpected: {sorted(body.keys() - STANDARD)}"}}
    if body["model"] not in behaviour.models:
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
    model, tokenizer = behaviour.models[body["model"]], behaviour.tokenizer
    prompt = body["prompt"] if isinstance(body["prompt"], list) else tokenizer(body["prompt"])["input_ids"]
    end = model.config.eos_token_id
    ids, values, reason = list(prompt), [], "length"
    for _ in range(body["max_tokens"]):
        row = rows(model, ids)[-1]
        ids.append(int(row.argmax()))
        values.append(float(row.max()) - behaviour.shift)
        if ids[-1] == end:
            reason = "stop"
            break
    made = ids[len(prompt) :]
    if reason == "stop" and behaviour.drops_end:
        made, values = made[:-1], values[:-1]
    if behaviour.cuts_last and len(made) > 1:
        made, values, reason = made[:-1], values[:-1], "stop"
    choice: dict[str, Any] = {"index": 0, "text": tokenizer.decode(made), "finish_reason": reason, "logprobs": None}
    if "logprobs" in body:
        shown = made
        if body.get("echo") and behaviour.echo:
            values, shown = [None, *scores(model, prompt, behaviour.shift), *values], [*prompt, *made]
        choice["logprobs"] = {"tokens": [tokenizer.decode([token]) for token in shown], "token_logprobs": values}
    if behaviour.extensions and body.get("return_token_ids"):
        choice |= {"token_ids": made, "prompt_token_ids": prompt}
    if behaviour.extensions and "prompt_logprobs" in body:
        told = zip(prompt[1:], scores(model, prompt, behaviour.shift), strict=True)
        choice["prompt_logprobs"] = [None, *({str(token): {"logprob": value}} for token, value in told)]
    return 200, {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}


def rows(model: Any, ids: list[int]) -> Tensor:
    """(T, vocabulary) of log-probabilities, in the model's own dtype until the softmax."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits.float().log_softmax(-1)


def scores(model: Any, ids: list[int], shift: float) -> list[float]:
    found = rows(model, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return [value - shift for value in found.tolist()]


def handler(behaviour: Behaviour) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, make: Callable[[], tuple[int, dict[str, Any]]]) -> None:
            behaviour.headers.append(dict(self.headers))
            if behaviour.key is not None and self.headers.get("Authorization") != f"Bearer {behaviour.key}":
                status, content = 401, {"error": "Unauthorized"}
            else:
                status, content = make()
            raw = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            listed = [{"id": name, "object": "model"} for name in behaviour.models]
            self.answer(lambda: (200, {"object": "list", "data": listed}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour.asked.append(body)
            known = self.path == "/v1/completions" and not behaviour.chat_only
            self.answer(lambda: complete(behaviour, body) if known else (404, {"detail": "Not Found"}))

    return Handler


@contextmanager
def running(behaviour: Behaviour) -> Iterator[str]:
    """The address of a server that behaves so, on the loopback interface."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(behaviour))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
