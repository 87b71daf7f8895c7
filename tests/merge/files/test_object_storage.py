"""Models and adapters on object storage: a real S3 server (moto) behind a relay that cuts connections."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from click.testing import CliRunner
from merge_models import base_tensors, expected, read_model, write_base, write_lora
from stand_in_s3 import BUCKET, Relay, put

from adapter_merge.cli.main import group
from adapter_merge.errors import InputError, OutputError
from adapter_merge.files import object_storage
from adapter_merge.files.object_storage import fetch, upload

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(group, arguments)


def test_base_adapter_and_output_on_s3(relay: Relay, tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "german", tensors)
    (base / "flax_model.msgpack").write_bytes(bytes(1 << 20))  # a file that nothing reads
    exact = expected(tensors, adapter)
    base_url, adapter_url = put(base, "llama/base"), put(adapter, "adapters/german")
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    done = run("merge", base_url, adapter_url, "-o", str(tmp_path / "out"), "--push-to", f"s3://{BUCKET}/merged")
    assert done.exit_code == 0, done.output
    found = read_model(tmp_path / "out")
    assert set(found) == set(tensors)
    for name, tensor in exact.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=2**-7, atol=1e-3)
    assert not list((tmp_path / "cache").rglob("*.msgpack"))
    again = fetch(f"s3://{BUCKET}/merged")
    names = {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert all((again / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)
    before = relay.bytes
    assert run("inspect", adapter_url, "--base", base_url).exit_code == 0
    assert relay.bytes - before < 100_000  # lists alone: the copies are used again


def test_a_connection_that_breaks_is_asked_again_for_what_is_left(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "PIECE_BYTES", 1 << 18)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(torch.randint(0, 255, (3_000_001,), dtype=torch.uint8).numpy().tobytes())
    url = put(folder, "large")
    monkeypatch.setattr(object_storage, "ATTEMPTS", 4)
    relay.cuts, relay.limit = 3, 100_000
    copy = fetch(url)
    assert relay.cuts == 0
    assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_run_that_ended_early_goes_on_where_it_stopped(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(object_storage, "ATTEMPTS", 1)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(torch.randint(0, 255, (2_000_000,), dtype=torch.uint8).numpy().tobytes())
    url = put(folder, "large")
    relay.stop = relay.bytes + 1_000_000
    with pytest.raises(InputError, match="cannot be read") as caught:
        fetch(url)
    assert "run the command again" in str(caught.value)
    relay.stop, before = 1 << 60, relay.bytes
    assert (fetch(url) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert relay.bytes - before < 1_400_000
    assert not list((tmp_path / "cache").rglob(".partial-*"))


def test_a_changed_object_is_another_copy(relay: Relay, tmp_path: Path) -> None:
    tensors = base_tensors()
    adapter = write_lora(tmp_path / "german", tensors)
    url = put(adapter, "adapters/german")
    first = fetch(url)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    put(adapter, "adapters/german")
    second = fetch(url)
    assert first != second
    assert first.name == second.name == "german"
    assert json.loads((second / "adapter_config.json").read_text())["lora_alpha"] == 99
    assert json.loads((first / "adapter_config.json").read_text())["lora_alpha"] == config["lora_alpha"]


def test_what_is_refused(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such folder"):
        fetch(f"s3://{BUCKET}/nothing")
    with pytest.raises(InputError, match="ftp:// is unknown"):
        fetch("ftp://host/model")
    boto3.client("s3").put_object(Bucket=BUCKET, Key="bad/../../evil.safetensors", Body=b"x")
    with pytest.raises(InputError, match="outside its folder"):
        fetch(f"s3://{BUCKET}/bad")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    url = put(out, "taken")
    shown = run("merge", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "new"), "--push-to", url)
    assert shown.exit_code != 0
    assert not (tmp_path / "new").exists()
    boto3.client("s3").put_object(Bucket=BUCKET, Key="taken/other.bin", Body=b"x")
    with pytest.raises(OutputError, match="does not have"):
        upload(out, url)
