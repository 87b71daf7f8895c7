"""--push-to, --revision, --token and offline runs against a local stand-in of the hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from cli_runs import make_models

TOKEN = "hf_" + "x" * 34
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """The routes that an upload uses: repositories with their files, visibility and the tokens that were sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(f"GET {path}")
        if path == "/api/whoami-v2":
            self.reply(200, {"name": "me", "type": "user", "auth": {}}) if self.allowed() else self.reply(401, {})
        elif path.startswith("/api/models/"):
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if name in self.server.files:
                self.reply(200, {"id": name, "sha": COMMIT, "siblings": []})
            else:
                self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
        else:
            self.reply(404, {})

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {path}")
        if not self.allowed():
            self.reply(401, {})
        elif path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
            self.server.files.setdefault(name, {})
            private = said["private"] if "private" in said else said.get("visibility") == "private"
            self.server.private.setdefault(name, private)
            self.reply(200, {"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":  # the card's metadata
            self.reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for file in files
            ]  # fmt: skip
            self.reply(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": entry["oid"], "size": entry["size"],
                 "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}}}}
                for entry in json.loads(body)["objects"]
            ]  # fmt: skip
            self.reply(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif "/commit/" in path:
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[name][value["path"]] = self.server.objects[value["oid"]]
            self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT,
                             "hookOutput": "", "success": True})  # fmt: skip
        else:
            self.reply(404, {})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.reply(200, {})

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def reply(
        self, status: int, content: Any, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(text)), "Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("work"), "lora")


def run(hub: Hub, folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own that knows this hub alone."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "adapter_merge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings, **environment})


def test_an_output_is_uploaded_whole_and_private(hub: Hub, work: Path, tmp_path: Path) -> None:
    pair = [work / "base", work / "lora", "-o", tmp_path / "out"]
    done = run(hub, tmp_path, "merge", *pair, "--push-to", "me/merged", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/merged/commit/{COMMIT}" in done.stderr
    assert hub.private == {"me/merged": True}
    local = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.files["me/merged"] == local and {"README.md", "adapter_merge.json", "model.safetensors"} <= local.keys()
    done = run(
        hub, tmp_path, "factor", *pair[:2], "-o", tmp_path / "f", "--push-to", "me/f", "--public", "--token", TOKEN
    )
    assert done.returncode == 0 and hub.private["me/f"] is False, done.stderr
    assert "adapter_model.safetensors" in hub.files["me/f"] and "README.md" in hub.files["me/f"]
    done = run(hub, tmp_path, "convert", work / "lora", tmp_path / "c", "--push-to", "me/c", HF_TOKEN=TOKEN)
    assert done.returncode == 0 and "adapter_config.json" in hub.files["me/c"], done.stderr


def test_everything_is_checked_before_the_work(hub: Hub, work: Path, tmp_path: Path) -> None:
    pair = ["merge", work / "base", work / "lora", "-o", tmp_path / "out"]
    hub.files["me/there"] = {"model.safetensors": b"another"}
    for arguments, environment, cause in (
        (["--push-to", "me/there"], {"HF_TOKEN": TOKEN}, "exists already"),
        (["--push-to", "me/new"], {"HF_TOKEN": "hf_wrong"}, "the hub refuses"),
        (["--push-to", "me/new"], {}, "the hub refuses"),
        (["--push-to", "new"], {"HF_TOKEN": TOKEN}, "organisation/name"),
        (["--push-to", "me/new"], {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        (["--push-to", "me/new"], {"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        (["--public"], {}, "--public belongs to --push-to"),
    ):
        done = run(hub, tmp_path, *pair, *arguments, **environment)
        assert done.returncode in (1, 2) and cause in done.stderr and "bug" not in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
    assert hub.files == {"me/there": {"model.safetensors": b"another"}}
    done = run(hub, tmp_path, *pair, "--push-to", "me/there", "--overwrite", HF_TOKEN=TOKEN)
    assert done.returncode == 0 and hub.files["me/there"]["model.safetensors"] != b"another", done.stderr


def test_a_dry_run_lists_what_would_go(hub: Hub, work: Path, tmp_path: Path) -> None:
    pair = ["merge", work / "base", work / "lora", "-o", tmp_path / "out", "--push-to", "me/new"]
    done = run(hub, tmp_path, *pair, "--dry-run", HF_TOKEN=TOKEN)
    assert done.returncode == 0 and "private repository me/new" in done.stderr, done.stderr
    listed = {
        line.removeprefix("would upload ") for line in done.stderr.splitlines() if line.startswith("would upload ")
    }
    assert not hub.files and not any(line.startswith("POST") for line in hub.asked)
    assert run(hub, tmp_path, *pair, HF_TOKEN=TOKEN).returncode == 0
    assert set(hub.files["me/new"]) == {name for name in listed if " " not in name}


def test_a_revision_is_of_a_hub_id(hub: Hub, work: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "merge", work / "base", work / "lora", "-o", tmp_path / "out", "--revision", "v1")
    assert done.returncode == 2 and "--revision" in done.stderr
    for base, asked in (("org/base", "/api/models/org/base/revision/v1"), ("gpt2", "/api/models/gpt2/revision/v1")):
        done = run(hub, tmp_path, "merge", base, work / "lora", "-o", tmp_path / "out", "--revision", "v1")
        assert done.returncode == 1 and f"{base}" in done.stderr and f"GET {asked}" in hub.asked, done.stderr


def test_offline_asks_no_hub(hub: Hub, work: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "merge", "org/base", work / "lora", "-o", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "org/base" in done.stderr and "bug" not in done.stderr and not hub.asked
