"""A server that answers as the hub does: the routes that downloads and uploads use, on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40
TOKEN = "hf_" + "x" * 34  # may write


class Hub(ThreadingHTTPServer):
    """Repositories with their files (name -> path -> bytes) and visibility, what was asked for, and what was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.sent: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """The settings of a process that knows the hub at `url` alone."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            self.reply(200, {"name": "me", "type": "user", "auth": {}}) if self.allowed() else self.reply(401, {})
        elif path.startswith("/api/models/"):
            owner, name, kind = (*path.removeprefix("/api/models/").split("/"), "", "")[:3]
            self.describe(f"{owner}/{name}", kind)
        elif path.count("/") < 5:
            self.reply(404, {})
        else:
            owner, name, _, _, inner = path[1:].split("/", 4)
            content = self.server.files[f"{owner}/{name}"][inner]
            if self.command == "GET":
                self.server.sent.append(inner)
            self.reply(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def describe(self, name: str, kind: str) -> None:
        files = self.server.files.get(name)
        if files is None:
            self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif kind == "tree":
            self.reply(
                200,
                [{"type": "file", "path": key, "size": len(value), "oid": "0" * 40} for key, value in files.items()],
            )
        else:
            self.reply(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": key} for key in files]})

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
            self.reply(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})
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

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(text)), "Content-Type": "application/json", **(headers or {})
        }.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
