"""A web page on which the adapters of a running server can be tried.

    GET  /page            page.html: one file, which loads no other file; needs no key, since a browser sends none
    GET  /page/adapters   the served names, with method, rank and origin of the loaded adapters
    POST /page/verify     {"name": NAME}: runs `adapter-merge verify` on the served folder in a child process

`serve --page` passes the class to vLLM as --middleware, after the middleware that checks the key.
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
from adapter_merge.serve.conversion.served_folder import Served
from adapter_merge.serve.conversion.stated_settings import flags_of

from .adapter_loader import Loader
from .key_and_draining import path_of

HTML = Path(__file__).with_name("page.html")


class Page:
    """Answers requests for /page and the paths below it; passes all others to the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.html = HTML.read_bytes()
        self.policy = make_policy(self.html.decode())
        self.verdicts: dict[str, dict[str, Any]] = {}  # by the served folder's name, a hash of its content
        self.verifying = asyncio.Lock()  # one verification at a time, since it occupies a core

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
        """Answer with page.html."""
        headers = {
            "Content-Security-Policy": self.policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
        }
        return Response(self.html, media_type="text/html", headers=headers)

    async def adapters(self, request: Request) -> Response:
        """Answer with the served names and the properties of loaded adapters."""
        models, loader = find_models(request)
        bases = [base.name for base in models.base_model_paths]
        names = dict.fromkeys([*models.lora_requests, *await loader.look(loader.list_offered)])
        entries: list[dict[str, Any]] = [{"name": name, "base": True} for name in bases]
        for name in names:
            held = loader.served.get(name) if name in models.lora_requests else None
            about = {"loaded": False} if held is None else await loader.look(describe_served, held)
            verdict = None if held is None else self.verdicts.get(held.folder.name)
            entries.append({"name": name, **about, "verdict": verdict})
        return JSONResponse({"base": bases[0], "models": entries})

    async def verify(self, request: Request) -> Response:
        """Answer with the verdict on a loaded adapter; a final verdict is kept."""
        models, loader = find_models(request)
        try:
            name = (await request.json())["name"]
        except (ValueError, TypeError, KeyError):
            return JSONResponse({"error": 'expected {"name": NAME}'}, 400)
        held = loader.served.get(name) if isinstance(name, str) and name in models.lora_requests else None
        if held is None:
            return JSONResponse({"error": f"{name!r:.200} is not loaded"}, 404)
        key = held.folder.name
        async with self.verifying:
            if key not in self.verdicts:
                verdict, final = await run_verify(loader, held)
                if not final:
                    return JSONResponse(verdict)
                self.verdicts[key] = verdict
        return JSONResponse(self.verdicts[key])


def make_policy(html: str) -> str:
    """Return a Content-Security-Policy that only allows the page's own script and style, and its own server."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def find_models(request: Request) -> tuple[Any, Loader]:
    """Return vLLM's table of models, and the loader of this process."""
    from . import runtime_loading as runtime

    assert runtime.loader is not None, "serve starts the server with the settings that make the loader"
    return request.app.state.openai_serving_models, runtime.loader


def describe_served(served: Served) -> dict[str, Any]:
    """Return method, rank and origin of a loaded adapter, from the files of its folder."""
    entry = json.loads((served.folder / ENTRY).read_text("utf-8"))
    return {"loaded": True, "method": entry["method"], "rank": served.rank, "origin": served.origin}


async def run_verify(loader: Loader, served: Served) -> tuple[dict[str, Any], bool]:
    """Return {"passed", "text"} of `verify`, and True where the verdict is final.

    `verify` reads the adapter from disk. Where that is no longer the adapter from which this folder was made, the
    result is an error and not final.
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
