"""vLLM's own HTTP application and table of adapters, as `adapter-merge serve` starts them, in front of no engine.

What answers are computed is the business of other tests: here an engine that loads nothing stands behind routes, keys,
names and holds. A job is the plan's command and environment and a list of steps, of which each gives one result.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Engine:
    """As much of an EngineClient as the table of adapters and the health check ask for."""

    def __init__(self, model_config: Any) -> None:
        self.model_config, self.renderer, self.input_processor = model_config, None, None
        self.loaded: list[Any] = []
        self.broken = False

    async def add_lora(self, request: Any) -> bool:
        if self.broken:
            raise RuntimeError(f"Call to add_lora method failed: {request.lora_path} is not for this engine")
        self.loaded.append(request)
        return True

    async def check_health(self) -> None:
        pass

    def shutdown(self, timeout: float | None = None) -> None:
        pass


def looks(request: Callable[[], Any], count: int, folder: str) -> dict[str, float]:
    """Looks below `folder` that `count` requests cause, by kind, and the seconds that they took."""
    seen: Counter[str] = Counter()
    stat = os.stat

    def counted(path: Any, *args: Any, **kwargs: Any) -> Any:
        seen["stat"] += str(path).startswith(folder)
        return stat(path, *args, **kwargs)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.scandir", "os.listdir") and str(arguments[0]).startswith(folder):
            seen[event] += 1

    sys.addaudithook(audit)
    os.stat = counted  # type: ignore[assignment]
    began = time.monotonic()
    try:
        for _ in range(count):
            assert request() == [200, ""]
    finally:
        os.stat = stat
    return {**seen, "seconds": time.monotonic() - began}


def run(command: list[str], environment: dict[str, str], steps: list[dict[str, Any]]) -> None:
    """Print the steps' results, as one line of JSON at the end."""
    os.environ.update(environment)
    from fastapi.testclient import TestClient
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from adapter_merge.serve.api_server import runtime_loading as runtime

    runtime.register()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
    model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    engine = Engine(model_config)
    modules = [LoRAModulePath(module.name, module.path, "base") for module in args.lora_modules or []]
    app = build_app(args, ("generate",), model_config)
    app.state.engine_client, app.state.log_stats = engine, False
    with TestClient(app, raise_server_exceptions=False) as client:
        models = OpenAIServingModels(engine, [BaseModelPath("base", args.model)], lora_modules=modules)
        app.state.openai_serving_models = models
        serving = BaseServing(models, model_config)
        client.portal.call(models.init_static_loras)

        def ask(name: str) -> list[Any]:
            """The check that every kind of request makes of its model's name."""
            refused = client.portal.call(serving._check_model, SimpleNamespace(model=name))
            return [200, ""] if refused is None else [refused.error.code, refused.error.message]

        def leave(name: str) -> None:
            """Ask, and go away while the answer is on its way."""

            async def cancelled() -> None:
                task = asyncio.create_task(serving._check_model(SimpleNamespace(model=name)))
                await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            client.portal.call(cancelled)

        def step(what: str, *values: Any) -> Any:
            if what == "request":
                method, path, content, key = values
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                answer = client.request(method, path, json=content, headers=headers)
                return [answer.status_code, answer.text]
            if what == "ask":
                return ask(*values)
            if what == "leave":
                return leave(*values)
            if what == "break":
                engine.broken = values[0]
            if what == "copy":
                shutil.rmtree(values[1], ignore_errors=True)
                shutil.copytree(*values)
            if what == "write":
                Path(values[0]).write_text(values[1])
            if what == "wait":
                time.sleep(values[0])
            if what == "remove":
                shutil.rmtree(values[0])
            if what == "stop":
                return app.state.engine_client.shutdown(timeout=30)
            if what == "loaded":
                return {name: request.lora_path for name, request in models.lora_requests.items()}
            if what == "locks":
                return len(models.lora_resolver_lock)
            if what == "descriptors":
                gc.collect()
                return sum(1 for _ in Path("/proc/self/fd").iterdir())
            if what == "looks":
                return looks(lambda: ask(values[0]), *values[1:])
            if what == "repeat":
                count, *inner = values
                return Counter(str(step(*inner)) for _ in range(count)).most_common()
            return None

        results = [step(*one) for one in steps]
    print("\nRESULTS " + json.dumps(results), flush=True)
