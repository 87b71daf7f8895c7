"""A page to try the adapters of a running server, beside its API.

    GET  /page            page.html: one file, which loads nothing else; it needs no key, since a browser sends none
    GET  /page/adapters   the names that are served, and what is known of those that are loaded
    POST /page/verify     {"name": NAME}: `adapter-merge verify` of the served folder, weight by weight, in a process

`serve --page` gives the class to vLLM as --middleware, behind the key's check.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from adapter_merge.serve.conversion.cache import ENTRY
from adapter_merge.serve.conversion.served import Served
from adapter_merge.serve.conversion.stated_settings import flags_of

from .guard import path_of
from .loader import Loader

HTML = Path(__file__).with_name("page.html")


class Page:
    """Answers /page and what is below it; everything else goes on to the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.html = HTML.read_bytes()
        self.policy = policy(self.html.decode())
        self.verdicts: dict[str, dict[str, Any]] = {}  # by the served folder's name, which its content decides
        self.verifying = asyncio.Lock()  # one at a time: it takes a core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        routes = {
            ("GET", "/page"): self.show,
            ("GET", "/page/adapters"): self.adapters,
            ("POST", "/page/verify"): self.verify,
        }
        found = routes.get((scope.get("method", ""), path_of(scope))) if scope["type"] == "http" else None
        if found is None:
            await self.app(scope, receive, send)
        else:
            await (await found(Request(scope, receive)))(scope, receive, send)

    async def show(self, request: Request) -> Response:
        headers = {
            "Content-Security-Policy": self.policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
        }
        return Response(self.html, media_type="text/html", headers=headers)

    async def adapters(self, request: Request) -> Response:
        models, loader = served_models(request)
        bases = [base.name for base in models.base_model_paths]
        names = dict.fromkeys([*models.lora_requests, *await loader.look(loader.offered)])
        entries: list[dict[str, Any]] = [{"name": name, "base": True} for name in bases]
        for name in names:
            held = loader.held.get(name) if name in models.lora_requests else None
            about = {"loaded": False} if held is None else await loader.look(about_of, held)
            verdict = None if held is None else self.verdicts.get(held.folder.name)
            entries.append({"name": name, **about, "verdict": verdict})
        return JSONResponse({"base": bases[0], "models": entries})

    async def verify(self, request: Request) -> Response:
        models, loader = served_models(request)
        try:
            name = (await request.json())["name"]
        except (ValueError, TypeError, KeyError):
            return JSONResponse({"error": 'expected {"name": NAME}'}, 400)
        held = loader.held.get(name) if isinstance(name, str) and name in models.lora_requests else None
        if held is None:
            return JSONResponse({"error": f"{name!r:.200} is not loaded"}, 404)
        key = held.folder.name
        async with self.verifying:
            if key not in self.verdicts:
                verdict, final = await verdict_of(loader, held)
                if not final:
                    return JSONResponse(verdict)
                self.verdicts[key] = verdict
        return JSONResponse(self.verdicts[key])


def policy(html: str) -> str:
    """The Content-Security-Policy under which the page can run its own script and ask its own server, no more."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def served_models(request: Request) -> tuple[Any, Loader]:
    """vLLM's table of models, and our loader of this process."""
    from . import runtime

    assert runtime.loader is not None, "serve starts the server with the settings that make the loader"
    return request.app.state.openai_serving_models, runtime.loader


def about_of(served: Served) -> dict[str, Any]:
    """What is known of a loaded adapter, from the files of its folder."""
    entry = json.loads((served.folder / ENTRY).read_text("utf-8"))
    return {"loaded": True, "method": entry["method"], "rank": served.rank, "origin": served.origin}


async def verdict_of(loader: Loader, served: Served) -> tuple[dict[str, Any], bool]:
    """({"passed", "text"} of `verify`, whether it is one that stays).

    The adapter is the one on disk now. When it is not what this folder was made of any more there is no verdict.
    """
    entry = json.loads((served.folder / ENTRY).read_text("utf-8"))
    inputs = [loader.settings.base, entry["adapter"], str(served.folder)]
    options = ["--weights-only", "--json", "--quiet", *flags_of(entry["stated"])]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "ignore", "-m", "adapter_merge", "verify", *options, "--", *inputs),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await child.communicate()
    except BaseException:
        child.kill()
        raise
    try:
        report = json.loads(out)
        passed = bool(report["passed"])
    except (ValueError, KeyError, TypeError):
        lines = errors.decode(errors="replace").strip().splitlines()
        cause = lines[0].removeprefix("error: ") if lines else f"exit code {child.returncode}"
        return {"passed": False, "text": f"not verified: {loader.without_paths(cause, served.folder)}"}, False
    if not passed:
        problems = "; ".join(str(problem) for problem in report["problems"])
        return {"passed": False, "text": f"verify failed: {loader.without_paths(problems, served.folder)}"}, True
    worst = max((layer["relative_error"] for layer in report["layers"].values()), default=0.0)
    return {
        "passed": True,
        "text": f"verified: {len(report['layers'])} weights, relative error of dW at most {worst:.1g}",
    }, True
