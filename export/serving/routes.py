"""The server's routes: /v1/models, /v1/completions, /v1/chat/completions (with and without streaming) and /health."""

from __future__ import annotations

import hmac
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from adapter_merge.errors import AdapterMergeError, InputError
from adapter_merge.export.engine.prompting import Prompter, Sampling, limit_to_context
from adapter_merge.export.folder.export_manifest import Manifest

from .answer_text import Answer, stream_text
from .batching import Worker
from .engine_job import Job
from .requests import ChatRequest, CompletionRequest

LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Refused(Exception):
    """A request that is refused with an HTTP status and an error of OpenAI's API."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Service:
    """One export and its model names: the folder's name for the base, and one name for each adapter."""

    def __init__(self, folder: Path, manifest: Manifest, worker: Worker) -> None:
        self.folder, self.worker, self.prompter = folder, worker, Prompter(folder)
        self.name = folder.resolve().name
        self.adapters = tuple(manifest.adapters) if manifest.mode != "merged" else ()
        if self.name in self.adapters:
            raise InputError(f"{folder}: one of its adapters has the folder's name", hint="rename the folder")
        self.started = int(time.time())

    def adapter(self, model: str) -> str | None:
        """Return the adapter of a request's model; None for the model itself."""
        if model == self.name:
            return None
        if model not in self.adapters:
            names = ", ".join((self.name, *self.adapters))
            raise Refused(404, f"no model {model[:200]!r}; there are: {names}", "NotFoundError")
        return model

    def job(self, model: str, ids: list[int], sampling: Sampling, scored: bool = False) -> Job:
        """Queue a job. Raises Refused for tokens or lengths that the model does not have."""
        adapter = self.adapter(model)
        size = len(self.prompter.tokenizer)
        limit = self.vocabulary or size
        wrong = [token for token in ids if token >= limit]
        if wrong:
            raise Refused(400, f"token {wrong[0]} is outside the vocabulary of {limit}")
        try:
            sampling = limit_to_context(self.folder, len(ids), sampling)
        except InputError as error:
            raise Refused(400, self.describe(error)) from error
        return self.worker.submit(Job(ids, adapter, sampling, scored))

    def describe(self, error: AdapterMergeError) -> str:
        """Return the cause of `error` without the folder's path, which clients must not see."""
        return error.problems[0].cause.replace(str(self.folder), self.name)

    @property
    def vocabulary(self) -> int:
        """The size of the model's vocabulary; 0 where its settings do not state it."""
        from adapter_merge.export.engine.decoder_settings import decoder_settings

        return int(decoder_settings(self.folder).get("model", {}).get("vocab_size", 0))


def make_application(service: Service, api_key: str | None, hosts: tuple[str, ...] | None = LOCAL) -> FastAPI:
    """Return the application with all routes.

    api_key: the key that requests must send; None: no key. hosts: accepted names in the Host header; None: all. The
    list prevents web pages from reaching a loopback server under a host name of their own (DNS rebinding).
    """

    def authorise(request: Request) -> None:
        sent_key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(sent_key.encode(), api_key.encode()):
            raise Refused(401, "this server requires an API key", "AuthenticationError")

    app = FastAPI(title="adapter-merge", docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts])
    _add_error_handlers(app, service)
    with_key = [Depends(authorise)]

    @app.get("/health")
    def health() -> Response:
        return Response()

    @app.get("/v1/models", dependencies=with_key)
    def models() -> dict[str, Any]:
        return _list_models(service)

    @app.post("/v1/completions", dependencies=with_key)
    def completions(body: CompletionRequest) -> Response:
        return _complete(service, body)

    @app.post("/v1/chat/completions", dependencies=with_key)
    def chat(body: ChatRequest) -> Response:
        return _chat(service, body)

    return app


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    """Answer every error with an error object of OpenAI's API."""

    @app.exception_handler(Refused)
    def refuse(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(_error(str(error), error.kind, error.status), error.status)

    @app.exception_handler(RequestValidationError)
    def refuse_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        message = "; ".join(f"{'.'.join(map(str, entry['loc'][1:]))}: {entry['msg']}" for entry in error.errors()[:5])
        return JSONResponse(_error(message, "invalid_request_error", 400), 400)

    @app.exception_handler(AdapterMergeError)
    def report_failure(_: Request, error: AdapterMergeError) -> JSONResponse:
        return JSONResponse(_error(service.describe(error), "server_error", 500), 500)


def _list_models(service: Service) -> dict[str, Any]:
    names = [(service.name, None), *((name, service.name) for name in service.adapters)]
    common = {"object": "model", "created": service.started, "owned_by": "adapter-merge"}
    return {"object": "list", "data": [{"id": name, **common, "parent": parent} for name, parent in names]}


def _complete(service: Service, body: CompletionRequest) -> Response:
    """Answer a completion request."""
    prompt, prompter = body.prompt, service.prompter
    ids = prompter.encode(prompt, raw=True) if isinstance(prompt, str) and prompt else prompt
    if isinstance(ids, str):
        raise Refused(400, "the prompt is empty")
    sampling = Sampling(body.max_tokens, body.temperature, body.top_p, body.seed)
    scored = body.prompt_logprobs is not None or (body.echo and body.logprobs is not None)
    if body.stream and (scored or body.echo or body.logprobs is not None):
        raise Refused(400, "stream cannot be combined with echo, logprobs or prompt_logprobs")
    job = service.job(body.model, ids, sampling, scored)
    answer = Answer()
    parts = stream_text(job, prompter.stream(), prompter.stops, body.stops, answer)
    head = _head("cmpl", "text_completion", body.model)
    if body.stream:
        return _stream(head, parts, answer, ids, lambda text: {"text": text}, service.describe)
    list(parts)
    choice = _completion(prompter, body, ids, job, answer)
    return JSONResponse({**head, "choices": [choice], "usage": _usage(ids, answer)})


def _chat(service: Service, body: ChatRequest) -> Response:
    """Answer a chat request."""
    ids = _chat_prompt(service, body)
    count = body.max_completion_tokens or body.max_tokens or 2**31
    job = service.job(body.model, ids, Sampling(count, body.temperature, body.top_p, body.seed))
    answer = Answer()
    parts = stream_text(job, service.prompter.stream(), service.prompter.stops, body.stops, answer)
    if body.stream:
        head = _head("chatcmpl", "chat.completion.chunk", body.model)

        def delta(text: str) -> dict[str, Any]:
            return {"delta": {"role": "assistant", "content": text}}

        return _stream(head, parts, answer, ids, delta, service.describe)
    list(parts)
    head = _head("chatcmpl", "chat.completion", body.model)
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.reason, "logprobs": None}
    return JSONResponse({**head, "choices": [choice], "usage": _usage(ids, answer)})


def _chat_prompt(service: Service, body: ChatRequest) -> list[int]:
    """Return the token ids of a chat in the model's chat template."""
    tokenizer = service.prompter.tokenizer
    if not tokenizer.chat_template:
        raise Refused(400, f"{service.name} has no chat template: use /v1/completions")
    messages = [message.model_dump() for message in body.messages]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a chat template may raise any exception
        raise Refused(400, f"the chat template refuses these messages: {str(error)[:200]}") from error
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _completion(
    prompter: Prompter, body: CompletionRequest, ids: list[int], job: Job, answer: Answer
) -> dict[str, Any]:
    """Return the one choice of a completion."""
    text = prompter.tokenizer.decode(ids) + answer.text if body.echo else answer.text
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": answer.reason, "logprobs": None}
    if body.logprobs is not None:
        tokens = [*(ids if body.echo else ()), *(token.id for token in answer.tokens)]
        values: list[float | None] = [None, *job.prompt_logprobs] if body.echo else []
        values += [token.logprob for token in answer.tokens]
        shown = [prompter.tokenizer.decode([token]) for token in tokens]
        choice["logprobs"] = {"tokens": shown, "token_logprobs": values, "top_logprobs": None}
    if body.prompt_logprobs is not None:
        scored = zip(ids[1:], job.prompt_logprobs, strict=True)
        choice["prompt_logprobs"] = [None, *({str(token): {"logprob": value}} for token, value in scored)]
    if body.return_token_ids:
        choice |= {"token_ids": [token.id for token in answer.tokens], "prompt_token_ids": ids}
    return choice


def _stream(
    head: dict[str, Any], parts: Iterator[str], answer: Answer, ids: list[int], choice: Any, describe: Any
) -> StreamingResponse:
    """Return the answer as server-sent events: one chunk per part of the text, one with reason and usage, then [DONE].

    choice: maps a text to the entries of a chunk's choice. describe: maps an error to its message.
    """

    def events() -> Iterator[str]:
        try:
            for text in parts:
                yield _event({**head, "choices": [{"index": 0, **choice(text), "finish_reason": None}]})
        except AdapterMergeError as error:  # the headers have been sent, so the error is an event
            yield _event(_error(describe(error), "server_error", 500))
            return
        last = {"index": 0, **choice(""), "finish_reason": answer.reason}
        yield _event({**head, "choices": [last], "usage": _usage(ids, answer)})
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(ids: list[int], answer: Answer) -> dict[str, int]:
    count = len(answer.tokens)
    return {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}


def _error(message: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
