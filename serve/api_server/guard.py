"""Middleware of the API server: it checks the key, and refuses new requests while the server drains.

vLLM's own check of --api-key covers paths under /v1, /v2 and a few more. Its server has others that answer requests or
change what is served: /invocations, /adapters, /tokenize, /pause. Here every path needs the key, but those that are
listed as open. vLLM puts the classes in when it is given --middleware with their names.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

# Health checks and metrics: what probes and scrapers read without a key. They tell nothing of requests' contents.
# /page is the same static file for everyone; what it asks needs the key.
OPEN = frozenset({"/health", "/ping", "/metrics", "/metrics/", "/page"})
HEALTH = frozenset({"/health", "/ping"})


class RequireKey:
    """Answers 401 to every request without one of the server's keys, unless its path is open or no key is set.

    The keys are vLLM's: --api-key, else VLLM_API_KEY. OPTIONS needs none (CORS asks before it sends a key).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS":
            keys = keys_of(scope["app"])
            if keys and path_of(scope) not in OPEN and not carries(Headers(scope=scope), keys):
                await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Drain:
    """Answers 503 to new requests and health checks from the moment on that the engine is told to stop.

    vLLM finishes the requests that it has, but would answer later ones with 200 and no text.
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
        """See the call of `engine.shutdown`, with which vLLM's server begins to stop."""
        self.watched = True
        if engine is None:
            return
        stop = engine.shutdown

        def shutdown(*args: Any, **kwargs: Any) -> Any:
            self.draining = True
            return stop(*args, **kwargs)

        engine.shutdown = shutdown


def keys_of(app: Any) -> list[bytes]:
    """sha256 of each key that vLLM's server was given."""
    keys = app.state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    return [hashlib.sha256(key.encode()).digest() for key in keys if key]


def path_of(scope: Scope) -> str:
    """The path below the server's root path."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def carries(headers: Headers, keys: list[bytes]) -> bool:
    """True when the request has one of `keys` as its bearer token."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    given = hashlib.sha256(token.encode()).digest()
    return scheme.lower() == "bearer" and any(secrets.compare_digest(given, key) for key in keys)
