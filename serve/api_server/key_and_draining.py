"""Middleware of the API server: it checks the key, and refuses new requests while the server drains.

vLLM's own check of --api-key covers paths under /v1, /v2 and a few more. Its server has other paths that answer
requests or change its state: /invocations, /adapters, /tokenize, /pause. With this middleware every path needs the key,
except those in OPEN. vLLM installs the classes when their names are given as --middleware.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

# Health checks and metrics, which probes and scrapers read without a key; they hold nothing of requests' contents.
# /page is a static file; the requests that it sends need the key.
OPEN = frozenset({"/health", "/ping", "/metrics", "/metrics/", "/page"})
HEALTH = frozenset({"/health", "/ping"})


class RequireKey:
    """Answers 401 to every request without one of the server's keys, unless its path is open or no key is set.

    The keys are vLLM's: --api-key, else VLLM_API_KEY. OPTIONS needs none (CORS preflight requests carry no key).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS":
            keys = hash_keys(scope["app"])
            if keys and path_of(scope) not in OPEN and not has_valid_key(Headers(scope=scope), keys):
                await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Drain:
    """Answers 503 to new requests and health checks after the engine's shutdown has begun.

    vLLM finishes the running requests, but would answer new ones with status 200 and no text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.draining = False
        self.watched = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.watched:
            self.watch(getattr(scope["app"].state, "engine_client", None))
        if self.draining and scope["type"] in ("http", "websocket") and path_of(scope) not in OPEN - HEALTH:
            headers = {"Connection": "close", "Retry-After": "5"}
            await JSONResponse({"error": "The server is shutting down"}, 503, headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def watch(self, engine: Any) -> None:
        """Wrap `engine.shutdown`, which vLLM's server calls when it begins to stop."""
        self.watched = True
        if engine is None:
            return
        stop = engine.shutdown

        def shutdown(*args: Any, **kwargs: Any) -> Any:
            self.draining = True
            return stop(*args, **kwargs)

        engine.shutdown = shutdown


def hash_keys(app: Any) -> list[bytes]:
    """Return the sha256 of each API key of vLLM's server."""
    keys = app.state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    return [hashlib.sha256(key.encode()).digest() for key in keys if key]


def path_of(scope: Scope) -> str:
    """Return the request's path below the server's root path."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def has_valid_key(headers: Headers, keys: list[bytes]) -> bool:
    """Return True when the sha256 of the request's bearer token is one of `keys`."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    given = hashlib.sha256(token.encode()).digest()
    return scheme.lower() == "bearer" and any(secrets.compare_digest(given, key) for key in keys)
