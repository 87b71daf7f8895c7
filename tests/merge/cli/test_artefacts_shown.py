"""inspect and report of what this project has written, and doctor and hints of what is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from cli_runs import make_models, run
from safetensors.torch import load_file

from adapter_merge.cli import environment
from adapter_merge.files import installation


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("work"), "lora", "dora")
    pair = [folder / "base", folder / "lora"]
    assert run("merge", *pair, "-o", folder / "merged", "--keep-preimage").code == 0
    assert run("delta", *pair, "-o", folder / "delta").code == 0
    assert run("factor", *pair, "-o", folder / "factors").code == 0
    return folder


def test_inspect_knows_a_merged_model_and_deltas(work: Path) -> None:
    done = run("inspect", work / "merged")
    assert done.code == 0 and done.out.startswith("merged model") and "lora: LoRA, 2 weights" in done.out, done.err
    assert "restore" in done.out and "pre-image" in done.out
    said = json.loads(run("inspect", work / "delta", "--json").out)
    assert said["artefact"] == "deltas" and said["adapters"][0]["name"] == "lora" and not said["problems"]
    assert "LoRA" in run("inspect", work / "factors").out  # an adapter like any other
    (work / "delta" / "delta.safetensors").rename(work / "kept")
    done = run("inspect", work / "delta")
    (work / "kept").rename(work / "delta" / "delta.safetensors")
    assert done.code == 1 and "delta.safetensors" in done.err


def test_report_of_a_delta_is_measured(work: Path) -> None:
    found = {entry["name"]: entry for entry in json.loads(run("report", work / "delta", "--json").out)["modules"]}
    base, deltas = load_file(work / "base/model.safetensors"), load_file(work / "delta/delta.safetensors")
    assert len(found) == len(deltas) == 2
    for name, delta in deltas.items():
        entry = found[name.removesuffix(".weight")]
        assert entry["delta_norm"] == pytest.approx(float(delta.double().norm()), rel=1e-6)
        assert entry["relative_delta"] == pytest.approx(float(delta.norm() / base[name].norm()), rel=1e-5)


def test_report_without_the_base_that_it_needs_is_refused(work: Path) -> None:
    done = run("report", work / "dora", "-o", work / "page.html")
    assert done.code == 1 and "--base BASE" in done.err and not (work / "page.html").exists()
    assert run("report", work / "dora", "--base", work / "base", "--json").code == 0


def test_a_preimage_is_not_part_of_the_size(work: Path) -> None:
    sizes = json.loads(run("report", work / "merged", "--json").out)["sizes"]
    kept = sum(path.stat().st_size for path in (work / "merged" / "preimage").rglob("*") if path.is_file())
    whole = sum(path.stat().st_size for path in (work / "merged").rglob("*") if path.is_file())
    manifest = (work / "merged" / "adapter_merge.json").stat().st_size
    assert sizes["pre-image"] == kept and sizes["merged model"] == whole - kept - manifest


def test_doctor_says_what_demo_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.version
    assert environment.examine()["works"]["demo"] == "yes"

    def without_gguf(name: str) -> str:
        if name == "gguf":
            raise environment.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environment, "version", without_gguf)
    works = environment.examine()["works"]
    assert works["verify"] == "yes" and works["demo"].startswith("no: pip install") and "[demo]" in works["demo"]


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'adapter-merge[report]'"),
        ({"url": "file:///src/am", "dir_info": {"editable": True}}, "pip install -e '/src/am[report]'"),
        ({"url": "file:///src/a%20m", "dir_info": {}}, "pip install '/src/a m[report]'"),
        ({"url": "file:///x/am-1-any.whl", "archive_info": {}}, "pip install '/x/am-1-any.whl[report]'"),
        (
            {"url": "https://host/am.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            "pip install 'adapter-merge[report] @ git+https://host/am.git@ab12'",
        ),
        ({"url": "https://host/am.whl", "archive_info": {}}, "pip install 'adapter-merge[report] @ https://host/am.whl'"),
    ],
)  # fmt: skip
def test_a_hint_names_the_package_as_it_was_installed(
    origin: dict[str, object] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            return json.dumps(origin) if origin is not None and name == "direct_url.json" else None

    monkeypatch.setattr(installation, "distribution", lambda name: Installed())
    assert installation.install_command("report") == command


def test_the_installation_of_these_tests_is_named() -> None:
    stated = json.loads(distribution("adapter-merge").read_text("direct_url.json") or "{}")
    folder = str(stated.get("url", "")).removeprefix("file://")
    assert folder in installation.install_command("onnx", "report") and "[onnx,report]" in installation.install_command(
        "onnx", "report"
    )


def test_demo_refuses_a_base_that_is_not_there_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "adapter_merge", "demo", "--base", "./nope", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert done.returncode == 1 and "./nope" in done.stderr and "bug" not in done.stderr
    assert not (tmp_path / "out").exists()
