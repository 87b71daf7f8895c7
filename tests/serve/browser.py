"""Chromium without a window, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a browser in a process of its own, which reaches no other machine."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None, "the tests of the page need chromium"
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
        closed = ("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, *closed, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.profile = profile
        self.count = 0
        self.events: list[dict[str, Any]] = []
        self.closing = ExitStack()
        self.closing.callback(self.process.wait, timeout=30)
        self.closing.callback(self.process.terminate)

    def __enter__(self) -> Browser:
        from websockets.sync.client import connect  # uvicorn, which vLLM depends on, brings it

        try:
            port = self._port(self.profile / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            self.socket = self.closing.enter_context(connect(pages[0]["webSocketDebuggerUrl"], max_size=2**26))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.closing.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.close()

    def _port(self, file: Path) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if file.exists() and (lines := file.read_text().splitlines()):
                return int(lines[0])
            time.sleep(0.1)
        raise AssertionError("chromium did not start")

    def call(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def evaluate(self, code: str) -> Any:
        """The value of a JavaScript expression, awaited when it is a promise."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str, width: int, height: int, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=phone)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def wait(self, code: str, limit: float = 60) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + limit
        while not self.evaluate(f"Boolean({code})"):
            assert time.monotonic() < deadline, f"never true: {code}"
            time.sleep(0.05)

    def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def problems(self) -> list[str]:
        """What the page's console and its requests complained of, and every request to another host."""
        self.evaluate("1")
        found = []
        for event in self.events:
            about = event["params"]
            if event["method"] == "Log.entryAdded" and about["entry"]["level"] == "error":
                found.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(str(about["exceptionDetails"]))
            elif event["method"] == "Network.requestWillBeSent":
                url = about["request"]["url"]
                if not url.startswith("http://127.0.0.1:"):
                    found.append(f"a request to {url}")
        return found
