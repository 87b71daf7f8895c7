"""A client of an OpenAI-compatible server: its models, and its log-probabilities of given tokens.

Prompts are sent as token ids, so that the server's tokenizer does not affect the figures. `Scoring` lists the three
ways to get log-probabilities.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from adapter_merge.errors import AdapterMergeError, InputError, MismatchError, UnsupportedError

TIMEOUT = 300.0  # seconds for one answer
LARGEST = 64 * 2**20  # bytes of one answer
SHOWN = 300  # characters of a server's error message that are shown
MISSING = (404, 405)
REFUSED = (400, 404, 405, 422, 501)  # the server does not support the request or a part of it
STANDARD: dict[str, Any] = {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0}
# vLLM and SGLang take the penalty from generation_config.json when a request does not state it.
EXTENSIONS: dict[str, Any] = {"repetition_penalty": 1.0, "return_token_ids": True}
TOKEN_ID = re.compile(r"token_id:(\d+)")
CRASH_HINT = (
    "read the server's log. Versions of vLLM fail on a CPU at prompt_logprobs with LoRA unless --lora-target-modules "
    "leaves lm_head out, as adapter-merge serve does"
)


class Scoring(StrEnum):
    """The ways to get log-probabilities of given tokens from a server. The values are written to reports."""

    PROMPT_LOGPROBS = "prompt_logprobs"  # vLLM's extension of /v1/completions
    ECHO = "echo"  # the standard's `echo` with `logprobs`
    GENERATED = "generated"  # neither: only those of the tokens that the server generates


@dataclass(frozen=True)
class ServedModel:
    """A model name on a server. url: with or without the trailing /v1; timeout: seconds for one answer."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class Continuation:
    """A server's answer: token ids (None where it gives only their text), and their log-probabilities."""

    ids: tuple[int | None, ...]
    texts: tuple[str, ...]
    logprobs: tuple[float, ...]
    stopped: bool  # at an end-of-sequence token, which some servers leave out


class _Refused(Exception):
    """Raised when the server refuses a request with a status of REFUSED."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class CompletionsClient:
    """A client of one model on one server. Every method raises InputError for an unexpected answer."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.url = _parse_url(served.url)
        self._opener = urllib.request.build_opener(_NoRedirects())
        self._scoring: Scoring | None = None
        self._extensions = EXTENSIONS
        key = served.api_key
        if key is not None and (not key or not key.isascii() or not key.isprintable()):
            raise InputError("the API key holds characters that a header cannot carry", expected="printable ASCII")

    @property
    def scoring(self) -> Scoring:
        """The way in which log-probabilities were obtained; known after the first `score`."""
        return self._scoring or Scoring.GENERATED

    def models(self) -> tuple[str, ...]:
        """The model names that the server lists; empty where it has no list."""
        try:
            content = self._request("models", None)
        except _Refused as refused:
            if refused.status in MISSING:
                return ()
            raise self._make_error("models", refused) from refused
        listed = content.get("data")
        if not isinstance(listed, list):
            raise InputError(
                f"{self.url}/models: not a list of models", hint="is this an OpenAI-compatible server's address?"
            )
        return tuple(str(entry["id"]) for entry in listed if isinstance(entry, dict) and "id" in entry)

    def score(self, ids: Sequence[int]) -> list[float] | None:
        """Return the log-probability of each of ids[1:] given those before it; None where the server gives none.

        Raises MismatchError when the server scored other tokens than the ones that were sent.
        """
        if self._scoring in (None, Scoring.PROMPT_LOGPROBS):
            values = self._score_by_extension(ids)
            if values is not None:
                self._scoring = Scoring.PROMPT_LOGPROBS
                return values
        if self._scoring in (None, Scoring.ECHO):
            values = self._score_by_echo(ids)
            if values is not None:
                self._scoring = Scoring.ECHO
                return values
        if self._scoring not in (None, Scoring.GENERATED):
            raise InputError(f"{self.url}: gave log-probabilities of one prompt and not of another")
        self._scoring = Scoring.GENERATED
        return None

    def generate(self, ids: Sequence[int], count: int) -> Continuation:
        """Generate `count` greedy tokens after `ids`, or fewer where the answer ends."""
        body = {"prompt": list(ids), "max_tokens": count, "logprobs": 1, **STANDARD}
        choice = self._read_choice(self._complete_extended(body))
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict) or not isinstance(logprobs.get("token_logprobs"), list):
            raise UnsupportedError(
                f"{self.url}: answers without log-probabilities",
                expected="logprobs.token_logprobs in every choice of /v1/completions",
                hint="must log-probabilities be switched on in the server's settings?",
            )
        values = [self._read_logprob(value) for value in logprobs["token_logprobs"]]
        texts = [str(text) for text in logprobs.get("tokens") or ()]
        token_ids = choice.get("token_ids")
        if isinstance(token_ids, list) and all(isinstance(token, int) for token in token_ids):
            tokens: list[int | None] = list(token_ids)
        else:
            tokens = [int(match[1]) if (match := TOKEN_ID.fullmatch(text)) else None for text in texts]
        if len(tokens) != len(values) or (texts and len(texts) != len(values)):
            raise InputError(f"{self.url}: gave {len(tokens)} tokens and {len(values)} log-probabilities of them")
        return Continuation(tuple(tokens), tuple(texts), tuple(values), choice.get("finish_reason") == "stop")

    def count_tokens(self, text: str) -> tuple[int | None, list[int] | None]:
        """Return the number of tokens of `text` on the server, and their ids; None for what it does not state."""
        content = self._complete_extended({"prompt": text, "max_tokens": 1, **STANDARD})
        token_ids = self._read_choice(content).get("prompt_token_ids")
        usage = content.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return count if isinstance(count, int) else None, token_ids if isinstance(token_ids, list) else None

    def _score_by_extension(self, ids: Sequence[int]) -> list[float] | None:
        """Return log-probabilities by vLLM's prompt_logprobs; None where the server does not support it."""
        body = {"prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0, **STANDARD}
        try:
            content = self._complete({**body, **self._extensions})
        except _Refused as refused:
            if refused.status in REFUSED and self._scoring is None:
                return None
            raise self._make_error("completions", refused) from refused
        entries = self._read_choice(content).get("prompt_logprobs")
        if not isinstance(entries, list):
            return None
        if len(entries) != len(ids):
            raise self._make_token_error(f"{len(ids)} tokens", f"log-probabilities of {len(entries)}")
        values = []
        for token, entry in zip(ids[1:], entries[1:], strict=True):
            if not isinstance(entry, dict) or not isinstance(entry.get(str(token)), dict):
                raise self._make_token_error(
                    f"a log-probability of token {token}", f"of {', '.join(entry or ('none',))}"
                )
            values.append(self._read_logprob(entry[str(token)].get("logprob")))
        return values

    def _score_by_echo(self, ids: Sequence[int]) -> list[float] | None:
        """Return log-probabilities by echo and logprobs; None where the server does not support them."""
        body = {"prompt": list(ids), "max_tokens": 1, "echo": True, "logprobs": 1, **STANDARD}
        try:
            content = self._complete(body)
        except _Refused as refused:
            if refused.status in REFUSED and self._scoring is None:
                return None
            raise self._make_error("completions", refused) from refused
        logprobs = self._read_choice(content).get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(values, list) or len(values) <= 1 < len(ids):
            return None
        if len(values) not in (len(ids), len(ids) + 1):  # the prompt only, or with the generated token
            raise self._make_token_error(f"{len(ids)} tokens", f"log-probabilities of {len(values)}")
        return [self._read_logprob(value) for value in values[1 : len(ids)]]

    def _complete_extended(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` with the extensions, or without them where the server accepts only the standard."""
        try:
            return self._complete({**body, **self._extensions})
        except _Refused as refused:
            if not self._extensions or refused.status not in (400, 422):
                raise self._make_error("completions", refused) from refused
            first = refused
        try:
            content = self._complete(body)
        except _Refused:
            raise self._make_error("completions", first) from first
        self._extensions = {}
        return content

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request to /v1/completions."""
        return self._request("completions", {"model": self.served.model, **body})

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Return the JSON object at `path`: GET, or POST with a body. Raises _Refused and InputError."""
        headers = {"Accept": "application/json"}
        if self.served.api_key is not None:
            headers["Authorization"] = f"Bearer {self.served.api_key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=self.served.timeout) as answer:
                raw = answer.read(LARGEST + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise _Refused(error.code, _read_message(error.read(LARGEST))) from error
        except TimeoutError as error:
            raise InputError(f"{self.url}: did not answer within {self.served.timeout:g} s") from error
        except urllib.error.URLError as error:
            raise InputError(
                f"{self.url}: cannot be reached", got=_shorten(str(error.reason)), hint="is the server running there?"
            ) from error
        except (http.client.HTTPException, OSError) as error:
            got = f"{type(error).__name__}: {_shorten(str(error))}"
            raise InputError(f"{self.url}: closed the connection", got=got, hint=CRASH_HINT) from error
        try:
            content = json.loads(raw) if len(raw) <= LARGEST else None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise InputError(
                f"{self.url}/{path}: the answer is not a JSON object",
                got=_shorten(raw[:SHOWN].decode(errors="replace")),
                hint="is this an OpenAI-compatible server's address?",
            )
        return content

    def _make_error(self, path: str, refused: _Refused) -> AdapterMergeError:
        """Return the error for a refused request that is not retried."""
        got = f"{refused.status}: {refused.message}"
        if refused.status in (401, 403):
            cause = "refuses this API key" if self.served.api_key else "asks for an API key"
            return InputError(f"{self.url}: {cause}", got=got, hint="--api-key, or ADAPTER_MERGE_API_KEY")
        if 300 <= refused.status < 400:
            return InputError(f"{self.url}: redirects to another address", got=got, hint="give that address")
        if path == "completions" and refused.status in MISSING:
            offered = self.models()
            if self.served.model in offered:
                return UnsupportedError(
                    f"{self.url}: has no /v1/completions, only chat",
                    expected="log-probabilities of a prompt that is given as token ids",
                    got=got,
                    hint="a chat endpoint adds its own template to the prompt: use the address of the engine itself",
                )
            names = ", ".join(_shorten(name) for name in offered) or "no names"
            return InputError(
                f"{self.url}: offers no model {self.served.model!r}", expected=f"one of: {names}", got=got
            )
        if refused.status >= 500:
            return InputError(f"{self.url}: the server failed", got=got, hint=CRASH_HINT)
        return InputError(f"{self.url}/{path}: the request is refused", got=got)

    def _make_token_error(self, expected: str, got: str) -> MismatchError:
        """Return the error for a server that scored other tokens than those of the request."""
        return MismatchError(
            f"{self.url}: scores other tokens than the ones that were sent",
            expected=expected,
            got=_shorten(got),
            hint="the server changes prompts, or has another vocabulary than BASE",
        )

    def _read_choice(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the only choice of a completion. Raises InputError."""
        choices = content.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise InputError(f"{self.url}: the answer is not a completion", expected="one choice")
        return choices[0]

    def _read_logprob(self, value: object) -> float:
        """Return a log-probability as float. Raises InputError for any other value."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
            raise InputError(
                f"{self.url}: the answer holds a wrong log-probability",
                expected="a number of at most 0",
                got=_shorten(repr(value)),
            )
        return float(value)


def _parse_url(url: str) -> str:
    """Return the address of the server's /v1, from an address with or without it. Raises InputError."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or parts.query or parts.fragment or parts.username is not None or not url.isprintable() or " " in url:
        raise InputError(
            f"{url!r}: not the address of a server", expected="http://HOST:PORT", hint="pass a key with --api-key"
        )
    plain = url.rstrip("/")
    return plain if plain.endswith("/v1") else plain + "/v1"


def _read_message(raw: bytes) -> str:
    """Return the error message in a server's answer."""
    text = raw.decode(errors="replace")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _shorten(text)
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    return _shorten(content if isinstance(content, str) else json.dumps(content))


def _shorten(text: str) -> str:
    """Return `text` as one short line without control characters."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return plain if len(plain) <= SHOWN else plain[:SHOWN] + "..."
