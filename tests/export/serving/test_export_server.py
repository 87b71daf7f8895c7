"""The server of exports over its socket: verify --server, OpenAI's fields, streaming, mixed adapters, the key."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("fastapi")

import uvicorn

from adapter_merge.api.verify_server import verify_server
from adapter_merge.errors import InputError
from adapter_merge.export.engine.prompting import Prompter
from adapter_merge.export.folder.contents import read_export
from adapter_merge.export.serving.batching import DecoderEngine, Engine, Worker
from adapter_merge.export.serving.command import serve_export
from adapter_merge.export.serving.genai_engine import GenaiEngine
from adapter_merge.export.serving.routes import Service, make_application
from adapter_merge.verification.completions_client import ServedModel

pytestmark = pytest.mark.onnx
KEY = "a-key"
PROMPTS = ("Hello, world", "A much longer prompt than the other one has", "Three")
Reference = Callable[[Path, Path | None, list[int]], torch.Tensor]


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A server of `folder` on a free port."""
    stops = Prompter(folder).stops
    manifest = read_export(folder)
    engine: Engine = (DecoderEngine if manifest.mode == "batched" else GenaiEngine)(folder, "cpu", stops)
    app = make_application(Service(folder, manifest, Worker(engine)), KEY)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
            yield port
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module", params=["switchable", "batched"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    with serving(request.getfixturevalue(request.param)) as port:
        yield request.param, port


def ask(
    port: int, path: str, body: dict[str, Any] | None = None, key: str | None = KEY, host: str | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"Host": host} if host else {}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def complete(port: int, model: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "temperature": 0, "return_token_ids": True, **fields}
    status, text = ask(port, "/v1/completions", body)
    assert status == 200, text
    return dict(json.loads(text)["choices"][0])


def greedy(reference: Reference, base: Path, adapter: Path | None, ids: list[int], count: int) -> list[int]:
    made: list[int] = []
    while len(made) < count and made[-1:] != [257]:
        made.append(int(reference(base, adapter, ids + made)[-1].argmax()))
    return made


@pytest.mark.slow
def test_verify_server_proves_it(served: tuple[str, int], pico: Path, adapters: dict[str, Path]) -> None:
    """By log-probabilities and greedy tokens against the live adapter; a name that answers as another fails."""
    _, port = served

    def judged(model: str, adapter: str) -> str:
        at = ServedModel(f"http://127.0.0.1:{port}", model, KEY)
        report = verify_server(pico, adapters[adapter], at, prompts=PROMPTS[:2], generated=6, dtype="float32")
        return str(report["verdict"])

    assert [judged("lora", "lora"), judged("dcft", "dcft")] == ["PASS", "PASS"]
    assert judged("dcft", "lora") == "FAIL"
    assert judged("export", "lora") == "FAIL"  # the base, named after the folder


def test_requests_at_once_get_their_own_adapters(
    served: tuple[str, int], pico: Path, adapters: dict[str, Path], reference: Reference
) -> None:
    _, port = served
    wanted = [("lora", PROMPTS[0]), ("export", PROMPTS[1]), ("dcft", PROMPTS[2]), ("lora", PROMPTS[1])]
    with ThreadPoolExecutor(2 * len(wanted)) as pool:
        found = list(pool.map(lambda one: complete(port, *one, max_tokens=6), 2 * wanted))
    expected = []
    for (model, _), choice in zip(wanted, found, strict=False):
        expected.append(greedy(reference, pico, adapters.get(model), choice["prompt_token_ids"], 6))
    for tokens, choice in zip(2 * expected, found, strict=True):
        assert choice["token_ids"] == tokens
        assert choice["finish_reason"] == ("stop" if tokens[-1] == 257 else "length")


def test_a_stream_says_the_same(served: tuple[str, int]) -> None:
    _, port = served
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "lora", "messages": messages, "temperature": 0, "max_tokens": 12}
    whole = json.loads(ask(port, "/v1/chat/completions", body)[1])
    status, text = ask(port, "/v1/chat/completions", {**body, "stream": True})
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert said == whole["choices"][0]["message"]["content"] != ""
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_a_stop_text_ends_the_answer_before_it(served: tuple[str, int]) -> None:
    _, port = served
    text = complete(port, "lora", PROMPTS[0], max_tokens=16)["text"]
    stop = text[2:4]
    choice = complete(port, "lora", PROMPTS[0], max_tokens=16, stop=[stop])
    assert len(stop) == 2 and choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_a_seed_repeats_an_answer(served: tuple[str, int]) -> None:
    _, port = served
    answers = [
        complete(port, "lora", "Hello", temperature=1.5, seed=seed, max_tokens=12)["token_ids"] for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "nobody", "prompt": "hi"}, 404, "lora"),
        ({"model": "lora", "prompt": "hi", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"model": "lora", "prompt": "hi", "n": 2}, 400, "n"),
        ({"model": "lora", "prompt": ""}, 400, "empty"),
        ({"model": "lora", "prompt": [5, 384]}, 400, "vocabulary of 384"),
        ({"model": "lora", "prompt": [-1]}, 400, "greater than or equal to 0"),
        ({"model": "lora", "prompt": [5] * 600}, 400, "too long for export"),
    ],
)
def test_what_it_refuses(served: tuple[str, int], body: dict[str, Any], status: int, said: str) -> None:
    _, port = served
    got, text = ask(port, "/v1/completions", body)
    assert got == status and said in json.loads(text)["error"]["message"]
    assert "/tmp" not in text


def test_the_key_and_the_host(served: tuple[str, int]) -> None:
    _, port = served
    assert [ask(port, "/v1/models", key=key)[0] for key in (KEY, None, "a-kez")] == [200, 401, 401]
    assert ask(port, "/v1/completions", {"model": "lora", "prompt": "hi"}, key=None)[0] == 401
    assert ask(port, "/health", key=None)[0] == 200
    assert ask(port, "/v1/models", host="evil.example")[0] == 400  # a page that names itself to reach a local server
    assert ask(port, "/openapi.json")[0] == ask(port, "/docs")[0] == 404
    listed = [entry["id"] for entry in json.loads(ask(port, "/v1/models")[1])["data"]]
    assert listed[0] == "export" and {"lora", "dcft"} <= set(listed)


def test_a_damaged_adapter_fails_its_own_requests_alone(switchable: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(switchable, folder)
    (folder / "lora.onnx_adapter").write_bytes(b"damaged")
    with serving(folder) as port:
        body = {"model": "lora", "prompt": "hi", "max_tokens": 2}
        status, text = ask(port, "/v1/completions", body)
        assert status == 500 and "not an ONNX Runtime adapter" in text and str(tmp_path) not in text
        status, text = ask(port, "/v1/completions", {**body, "stream": True})
        assert status == 200 and "not an ONNX Runtime adapter" in text and "[DONE]" not in text
        assert complete(port, "dora", "hi", max_tokens=2)["token_ids"]


def test_serve_refuses_what_belongs_to_vllm(switchable: Path) -> None:
    from click.testing import CliRunner

    from adapter_merge.cli.main import group

    for more in (["x=./adapter"], ["--allow-loading"], ["--", "--dtype", "float16"]):
        done = CliRunner().invoke(group, ["serve", str(switchable), *more])
        assert done.exit_code == 2 and "is an ONNX export" in done.output


@pytest.mark.parametrize(("key", "variable"), [("", None), (" ", None), (None, "ADAPTER_MERGE_API_KEY")])
def test_an_empty_key_is_refused(
    switchable: Path, key: str | None, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(*_: object, **__: object) -> None:
        raise AssertionError("served without a key")

    monkeypatch.setattr(uvicorn, "run", served)
    if variable:
        monkeypatch.setenv(variable, "")
    with pytest.raises(InputError, match="is empty"):
        serve_export(switchable, api_key=key)
