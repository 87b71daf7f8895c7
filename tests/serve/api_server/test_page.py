"""The page to try adapters: its routes in vLLM's application, and the page itself in a browser on a running server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from server import KEY
from world import Running, Steps, World, request

pytestmark = pytest.mark.vllm

SCREENSHOTS = os.environ.get("ADAPTER_MERGE_SCREENSHOTS")  # a folder to keep them in


def test_what_needs_the_key(steps: Steps, directory: Path) -> None:
    """The file itself needs none; what it asks does. Without --page nothing of it is there."""
    asked = [request("GET", "/page"), request("GET", "/page/adapters"), request("POST", "/page/verify", {"name": "x"})]
    page, *refused = steps(*asked, adapter_dir=directory, page=True, vllm_flags=("--api-key", "secret-of-ours"))
    assert page[0] == 200
    assert page[1].startswith("<!doctype html>")
    assert "secret-of-ours" not in page[1]
    assert [status for status, _ in refused] == [401, 401]
    absent = steps(*asked, adapter_dir=directory)
    assert [status for status, _ in absent] == [404, 404, 404]


def test_verdicts(steps: Steps, qwen2: World, directory: Path) -> None:
    """`verify` of the folder that is served; without a verdict when the adapter is not the one it was made of."""
    other = str(qwen2.adapters["dude-1"].raw)

    def verify(name: Any) -> tuple[Any, ...]:
        return request("POST", "/page/verify", {"name": name})

    listing = request("GET", "/page/adapters")
    before, absent, _, first, after, _, changed, wrong = steps(
        listing,
        verify("dude-2"),
        ("ask", "dude-2"),
        verify("dude-2"),
        listing,
        ("copy", other, str(directory / "dude-2")),
        listing,
        request("POST", "/page/verify", ["dude-2"]),
        adapters=("lora-1",),
        adapter_dir=directory,
        page=True,
    )
    models = {model["name"]: model for model in json.loads(before[1])["models"]}
    assert list(models) == ["base", "lora-1", "dude-2", "lora-2"]
    assert models["lora-1"]["loaded"] is True
    assert models["dude-2"]["loaded"] is False
    assert absent[0] == 404
    verdict = json.loads(first[1])
    assert verdict["passed"] is True, verdict
    assert verdict["text"].startswith("verified: 8 weights, relative error of dW at most ")
    models = {model["name"]: model for model in json.loads(after[1])["models"]}
    assert models["dude-2"]["verdict"] == verdict
    assert models["dude-2"]["method"] == "DuDe"
    assert changed[0] == 200
    assert wrong[0] == 400
    assert str(directory) not in first[1] + after[1]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 800, False), (390, 844, True)], ids=["laptop", "phone"])
def test_the_page_in_a_browser(running: Running, tmp_path: Path, width: int, height: int, phone: bool) -> None:
    """One prompt to the base and two adapters side by side: each card has its own model's text and figures."""
    prompt, names = "What is a low-rank adapter?", ["base", "lora-1", "dude-1"]
    texts = {}
    for name in names:
        status, body = running.server.post("completions", model=name, prompt=prompt, max_tokens=24, temperature=0)
        assert status == 200, body
        texts[name] = json.loads(body)["choices"][0]["text"]
    assert len(set(texts.values())) == 3
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{running.server.port}/page", width, height, phone)
        browser.wait("!document.getElementById('keyed').hidden")
        unauthorised = browser.problems()
        assert all("401" in problem for problem in unauthorised), unauthorised
        fill = "(id, text) => { const e = document.getElementById(id); e.value = text; e.onchange && e.onchange(); }"
        browser.evaluate(f"({fill})('key', {json.dumps(KEY)})")
        browser.wait("document.querySelectorAll('#models input').length >= 7")
        choose = f"e => e.checked = {json.dumps(names)}.includes(e.value)"
        browser.evaluate(f"document.querySelectorAll('#models input').forEach({choose})")
        for field, text in (("prompt", prompt), ("kind", "completion"), ("count", "24")):
            browser.evaluate(f"({fill})('{field}', {json.dumps(text)})")
        browser.evaluate("document.getElementById('run').click()")
        browser.wait("document.querySelectorAll('.answer[data-state=done]').length === 3")
        read = "c => [c.dataset.model, c.querySelector('.text').textContent]"
        assert dict(browser.evaluate(f"[...document.querySelectorAll('.answer')].map({read})")) == texts
        figures = browser.evaluate("[...document.querySelectorAll('.figures')].map(e => e.textContent)")
        assert all("first token " in text and "24 tokens" in text and "tokens/s" in text for text in figures), figures
        browser.evaluate("[...document.querySelectorAll('.verdict button')].forEach(b => b.click())")
        browser.wait("document.querySelectorAll('.badge.good').length === 2", 120)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
        columns = "new Set([...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().left)).size"
        assert browser.evaluate(columns) == (1 if phone else 3)
        small = "[...document.querySelectorAll('button, input[type=number], select')].filter(e => e.offsetParent)"
        assert browser.evaluate(f"Math.min(...{small}.map(e => e.offsetHeight))") >= 32
        browser.picture(Path(SCREENSHOTS or tmp_path) / f"{'phone' if phone else 'laptop'}.png")
        assert browser.problems() == unauthorised
