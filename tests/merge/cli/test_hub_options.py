"""--push-to, --revision, --token and offline runs against a local stand-in of the hub's HTTP interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import make_models
from stand_in_hub import COMMIT, TOKEN, Hub, hub_environment

pytestmark = pytest.mark.preloaded("torch")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("work"), "lora")


def run(hub: Hub, folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own that knows this hub alone."""
    settings = hub_environment(hub.url, folder / "home")
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
        (["--public"], {}, "--public needs --push-to"),
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
