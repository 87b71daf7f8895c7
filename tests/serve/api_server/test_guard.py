"""Who may do what on the server's routes: vLLM's own application, as the plan starts it, asked over HTTP."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from world import Steps, World, request

pytestmark = pytest.mark.vllm

KEY = "a-secret"

LOADING = (
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/root"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "lora-1"}),
    ("POST", "/adapters", {"name": "x", "src": "/root"}),
    ("DELETE", "/adapters/lora-1", None),
)
ANSWERING = (
    ("POST", "/invocations", {"model": "base", "prompt": "x"}),
    ("POST", "/tokenize", {"model": "base", "prompt": "x"}),
    ("POST", "/scale_elastic_ep", {}),
    ("GET", "/v1/models", None),
    ("GET", "/version", None),
)


def test_a_folder_of_adapters_opens_no_administration(steps: Steps, directory: Path) -> None:
    """--adapter-dir alone: names are found, but nothing can be loaded or unloaded from outside, with no key set."""
    asked = [request(*each) for each in LOADING]
    *answers, found, loaded = steps(*asked, ("ask", "lora-2"), ("loaded",), adapters=("lora-1",), adapter_dir=directory)
    assert [status for status, _ in answers] == [404, 404, 404, 404]
    assert found == [200, ""]
    assert set(loaded) == {"lora-1", "lora-2"}


def test_a_setting_of_the_shell_opens_nothing(steps: Steps, directory: Path) -> None:
    shell = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    (answer,) = steps(request("DELETE", "/adapters/lora-1"), adapters=("lora-1",), adapter_dir=directory, shell=shell)
    assert answer[0] == 404


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_every_route_needs_the_key(steps: Steps, directory: Path, by: str) -> None:
    """Without the key 401 for whatever is not a health check or metrics, and with a wrong one; with it, none."""
    everything = [*LOADING, *ANSWERING]
    results = steps(
        *(request(*each) for each in everything),
        *(request(*each, KEY + "x") for each in everything),
        ("loaded",),
        *(request("GET", path) for path in ("/health", "/ping", "/metrics", "/health/x", "//health")),
        *(request(*each, KEY) for each in everything),
        adapters=("lora-1",),
        adapter_dir=directory,
        loading=True,
        vllm_flags=("--api-key", "another", KEY) if by == "flag" else (),
        shell={"VLLM_API_KEY": KEY} if by == "environment" else {},
    )
    count = len(everything)
    assert [status for status, _ in results[: 2 * count]] == [401] * (2 * count)
    assert set(results[2 * count]) == {"lora-1"}
    open_ones = results[2 * count + 1 : 2 * count + 6]
    assert [status for status, _ in open_ones] == [200, 200, 200, 401, 401]
    assert not {401} & {status for status, _ in results[-count:]}


def test_clients_load_from_allowed_folders_only(steps: Steps, qwen2: World, directory: Path, tmp_path: Path) -> None:
    """Outside of the roots nothing is looked at, whatever leads there; no error lists a folder or a path of ours."""
    root = tmp_path / "more"
    shutil.copytree(qwen2.adapters["dude-1"].raw, root / "inner" / "dude")
    secret = tmp_path / "secret-place"
    shutil.copytree(qwen2.adapters["lora-1"].raw, secret)
    (root / "link").symlink_to(secret)
    (root / "partly").mkdir()
    shutil.copyfile(secret / "adapter_config.json", root / "partly" / "adapter_config.json")
    (root / "partly" / "adapter_model.safetensors").symlink_to(secret / "adapter_model.safetensors")
    (root / "junk").mkdir()
    (root / "junk" / "password.txt").write_text("x")
    outside = [str(secret), "/root", "/", "/no/such", "link", f"{root}/../secret-place", "../secret-place", "partly",
               "org/adapter", "junk", "", "a\0b", str(tmp_path)]  # fmt: skip
    right = [str(root / "inner" / "dude"), "inner/dude", "lora-2", str(directory / "dude-2")]

    def loads(name: str, path: str) -> list[Any]:
        vllm = request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, KEY)
        return [vllm, request("POST", "/adapters", {"name": name + "-s", "src": path}, KEY)]

    asked = [each for number, path in enumerate([*outside, *right]) for each in loads(f"n{number}", path)]
    removed = [request("DELETE", "/adapters/n13-s", None, KEY), request("DELETE", "/adapters/n13-s", None, KEY)]
    *answers, loaded = steps(
        *asked, *removed, ("loaded",), adapter_dir=directory, loading=True, roots=[root], vllm_flags=("--api-key", KEY)
    )
    refused, accepted = answers[: 2 * len(outside)], answers[2 * len(outside) : -2]
    for status, text in refused:
        assert status == 400, text
        for word in ("password", str(tmp_path), "adapter_config.json,"):
            assert word not in text
    unseen = {text.replace("-s", "").split("cannot be served")[-1] for _, text in refused[2:8]}
    assert len(unseen) == 1, "what is there and what is not looks the same from outside"
    assert [status for status, _ in accepted] == [200] * (2 * len(right)), accepted
    assert [status for status, _ in answers[-2:]] == [200, 404]
    assert len(loaded) == 2 * len(right) - 1


def test_an_adapter_loaded_by_its_path_is_never_served_stale(steps: Steps, qwen2: World, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    folder = str(root / "moving")
    raws = [str(qwen2.adapters[name].raw) for name in ("lora-1", "dude-1")]
    results = steps(
        ("copy", raws[0], folder),
        request("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": folder}),
        ("loaded",),
        ("copy", raws[1], folder),
        ("ask", "a"),
        ("loaded",),
        ("remove", folder),
        ("ask", "a"),
        ("loaded",),
        loading=True,
        roots=[root],
        vllm_flags=("--max-lora-rank=16",),
    )
    assert results[1][0] == 200
    assert results[4] == [200, ""]
    assert results[2]["a"] != results[5]["a"]
    assert results[7][0] == 404
    assert results[8] == {}


def test_an_unknown_name_is_answered_with_those_that_are(steps: Steps, directory: Path) -> None:
    answer, locks = steps(("ask", "dude-3"), ("locks",), adapters=("lora-1",), adapter_dir=directory)
    assert answer == [404, "The model `dude-3` does not exist. There are: base, lora-1, dude-2, lora-2."]
    assert locks == 1  # of lora-1: none for each name that somebody tries


def test_models_lists_what_the_folder_offers(steps: Steps, directory: Path) -> None:
    """Before and after the first use of a name, and no folder without a file."""
    (directory / "empty").mkdir()
    listing = request("GET", "/v1/models")
    before, _, after = steps(listing, ("ask", "dude-2"), listing, adapters=("lora-1",), adapter_dir=directory)
    for status, text in (before, after):
        assert status == 200
        cards = {card["id"]: card for card in json.loads(text)["data"]}
        assert sorted(cards) == ["base", "dude-2", "lora-1", "lora-2"]
        assert cards["lora-2"]["parent"] == "base"
        assert cards["lora-2"]["root"] is None
        assert str(directory) not in text


def test_figures_by_adapter(steps: Steps, qwen2: World, directory: Path) -> None:
    """/metrics after requests, a conversion, a refresh and refusals, in vLLM's own registry."""
    (directory / "broken").mkdir()
    (directory / "broken" / "adapter_config.json").write_text("{")
    other = str(qwen2.adapters["lora-1"].raw)
    *_, (status, text) = steps(
        *(("ask", name) for name in ("base", "dude-2", "dude-2", "lora-2", "nobody", "broken")),
        ("copy", other, str(directory / "lora-2")),
        ("ask", "lora-2"),
        request("GET", "/metrics"),
        adapter_dir=directory,
    )
    assert status == 200
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("adapter_merge_"))
    requests = {name: float(figures[f'adapter_merge_requests_total{{adapter="{name}"}}']) for name in
                ("base", "dude-2", "lora-2")}  # fmt: skip
    assert requests == {"base": 1, "dude-2": 2, "lora-2": 2}
    assert not [name for name in figures if "nobody" in name], "a name that somebody tries is no label"
    assert float(figures['adapter_merge_refused_total{reason="unknown"}']) == 1
    assert float(figures['adapter_merge_refused_total{reason="unservable"}']) == 1
    assert float(figures["adapter_merge_conversion_seconds_count"]) == 3
    assert float(figures["adapter_merge_conversion_seconds_sum"]) > 0
    assert float(figures["adapter_merge_conversion_failures_total"]) == 1
    assert float(figures['adapter_merge_refreshes_total{adapter="lora-2"}']) == 1
    assert float(figures["adapter_merge_cache_entries"]) == 3
    assert float(figures["adapter_merge_cache_bytes"]) > 10_000


def test_a_request_for_a_known_adapter_looks_at_one_file(steps: Steps, directory: Path) -> None:
    """The largest, and at most once a second at all of them: an edit of a small one is seen then."""
    folder = str(directory / "dude-2")
    _, seen, *_, broken = steps(
        ("ask", "dude-2"),
        ("looks", "dude-2", 200, folder),
        ("write", f"{folder}/adapter_config.json", "{"),
        ("wait", 1.1),
        ("ask", "dude-2"),
        adapter_dir=directory,
    )
    whole = 1 + int(seen["seconds"])
    assert 200 <= seen["stat"] <= 200 + whole
    assert seen.get("os.scandir", 0) <= whole
    assert seen.keys() <= {"stat", "os.scandir", "seconds"}
    assert broken[0] == 400


REPEATS = int(os.environ.get("ADAPTER_MERGE_LEAK_REQUESTS", "120"))


def test_requests_that_fail_hold_nothing(steps: Steps, qwen2: World, directory: Path, tmp_path: Path) -> None:
    """Descriptors before and after requests of every kind that fails, the first few apart (imports, caches)."""
    shutil.copytree(qwen2.adapters["dude-1"].raw, directory / "above")  # rank 16 where at most 8 is served
    (directory / "broken").mkdir()
    kinds: list[tuple[Any, ...]] = [
        ("ask", "above"),
        ("ask", "broken"),
        ("ask", "nobody"),
        ("ask", "../x"),
        ("leave", "above"),
        request("POST", "/v1/load_lora_adapter", {"lora_name": "y", "lora_path": "above"}),
        request("POST", "/adapters", {"name": "y", "src": "above"}),
    ]
    for name in ("lora-2", *(f"copy-{number}" for number in range(40))):
        if name != "lora-2":
            (directory / name).symlink_to(directory / "lora-2")
    failing: list[tuple[Any, ...]] = [
        ("ask", "lora-2"),
        *(("ask", f"copy-{number}") for number in range(40)),
        request("POST", "/v1/load_lora_adapter", {"lora_name": "z", "lora_path": "lora-2"}),
        request("POST", "/adapters", {"name": "z", "src": "lora-2"}),
    ]
    results = steps(
        ("break", True),
        *kinds,
        *failing[:2],
        ("descriptors",),
        *(("repeat", REPEATS, *kind) for kind in kinds),
        *(("repeat", max(1, REPEATS // 40), *kind) for kind in failing),
        ("descriptors",),
        ("break", False),
        ("ask", "lora-2"),
        adapter_dir=directory,
        loading=True,
        vllm_flags=("--max-lora-rank=8",),
    )
    start = 1 + len(kinds) + 2
    before, after = results[start], results[-3]
    assert results[-1] == [200, ""]
    for kind, answers in zip([*kinds, *failing], results[start + 1 : -3], strict=True):
        assert len(answers) == 1, (kind, answers)
        assert not answers[0][0].startswith("[200"), (kind, answers)
    assert after <= before + 2, f"{before} descriptors before, {after} after"


def test_a_draining_server_takes_nothing_new(steps: Steps) -> None:
    """Health turns with the engine's shutdown, and a new request gets 503 instead of an empty answer."""
    asked = [request("GET", "/health"), request("GET", "/v1/models"), request("GET", "/metrics")]
    results = steps(*asked, ("stop",), *asked, adapters=("lora-1",))
    assert [status for status, _ in (*results[:3], *results[4:])] == [200, 200, 200, 503, 503, 200]
