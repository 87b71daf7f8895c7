"""`adapter-merge serve ONNX_DIR`: opens an export and serves it until it is stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from adapter_merge.errors import InputError, MissingDependencyError
from adapter_merge.export.engine.decoder_settings import GENAI
from adapter_merge.export.engine.prompting import Prompter
from adapter_merge.export.engine.providers import check_packages
from adapter_merge.export.folder.contents import read_export

KEYS = ("ADAPTER_MERGE_API_KEY", "VLLM_API_KEY")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve_export(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    shutdown_timeout: int = 30,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the decoder export in `folder` on host:port until the process gets SIGINT or SIGTERM.

    Raises InputError for an export that generates no text, and MissingDependencyError.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError(
            f"serving an export needs {error.name}", hint="pip install 'adapter-merge[onnx,onnx-server]'"
        ) from error
    from .batching import DecoderEngine, Engine, Worker
    from .genai_engine import GenaiEngine
    from .routes import LOCAL, Service, make_application

    key = choose_server_key(api_key)
    check_packages("onnx_ir", "transformers")
    manifest = read_export(folder)
    if manifest.kind != "decoder":
        raise InputError(f"{folder}: this export generates no text", expected="an exported decoder")
    stops = Prompter(folder).stops
    with_genai = manifest.mode != "batched" and (folder / GENAI).is_file()
    engine: Engine = (GenaiEngine if with_genai else DecoderEngine)(folder, manifest.device, stops)
    service = Service(folder, manifest, Worker(engine))
    local = host in LOOPBACK
    app = make_application(service, key, LOCAL if local else None)
    names = ", ".join((service.name, *service.adapters))
    say(f"{folder}: {manifest.mode}, {'onnxruntime-genai' if with_genai else 'onnxruntime'}; models: {names}")
    reach = "reachable from this machine only" if local else "reachable from every network of this machine"
    open_to_all = "" if key or local else "; NO API KEY: anyone who can reach this address can use it"
    say(f"http://{host}:{port}/v1 ({reach}{open_to_all})")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=shutdown_timeout)


def choose_server_key(api_key: str | None) -> str | None:
    """Return the key that requests must send: `api_key`, else the environment's; None where neither is stated.

    Raises InputError for a key that is stated but empty, since the server would then accept every request.
    """
    stated = {"--api-key": api_key, **{name: os.environ.get(name) for name in KEYS}}
    name, key = next(((name, key) for name, key in stated.items() if key is not None), ("", None))
    if key is not None and not key.strip():
        raise InputError(f"{name} is empty", expected="a key", hint="leave it out to serve without a key")
    return key
