"""`adapter-merge verify --server` against the real server: right adapters pass, wrong and missing ones fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from server import KEY
from world import Running

from adapter_merge.api.verify_server import verify_server
from adapter_merge.cli.main import group
from adapter_merge.errors import InputError
from adapter_merge.verification.completions_client import ServedModel

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

NAMES = ("lora-1", "dcft-1", "dude-1")


def verified(running: Running, adapter: Path, model: str, *more: str) -> dict[str, Any]:
    """The report of the command, whose exit code must say the same."""
    arguments = ["verify", str(running.world.base), str(adapter), "--server", running.server.url, "--model", model]
    result = CliRunner().invoke(group, [*arguments, "--api-key", KEY, "--tokens", "8", "--json", *more])
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if report.get("passed") else 1), result.output
    return report


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_that_was_trained_passes(running: Running, name: str) -> None:
    report = verified(running, running.world.adapters[name].raw, name)
    assert (report["verdict"], report["way"], report["notes"]) == ("PASS", "prompt_logprobs", []), report
    assert report["log_probabilities"]["difference"]["max"] < 1e-4 < 1 < report["log_probabilities"]["effect"]["max"]
    assert report["greedy"]["equal"] == report["greedy"]["total"] == 32


def test_swapped_names_fail(running: Running) -> None:
    for name, other in zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True):
        report = verified(running, running.world.adapters[name].raw, other)
        assert report["verdict"] == "FAIL"
        assert not any("ignores" in problem for problem in report["problems"])


def test_a_server_that_ignores_the_adapter_is_named(running: Running, tmp_path: Path) -> None:
    """The base itself, and an adapter that loads well and does nothing: its up projections are zero."""
    raw = running.world.adapters["lora-1"].raw
    silent = shutil.copytree(raw, tmp_path / "silent")
    tensors = load_file(raw / "adapter_model.safetensors")
    save_file(
        {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()},
        silent / "adapter_model.safetensors",
    )
    assert running.server.post("load_lora_adapter", lora_name="silent", lora_path=str(silent))[0] == 200
    for model in ("base", "silent"):
        report = verified(running, raw, model)
        assert report["verdict"] == "FAIL"
        assert "ignores the adapter" in report["problems"][0]
        assert report["log_probabilities"]["from_base"]["max"] < 1e-4
    assert verified(running, silent, "silent")["verdict"] == "INCONCLUSIVE"
    assert running.server.post("unload_lora_adapter", lora_name="silent")[0] == 200


def test_a_name_that_the_server_does_not_offer(running: Running) -> None:
    raw = running.world.adapters["lora-1"].raw
    with pytest.raises(InputError, match="offers no model 'nobody'") as raised:
        verify_server(running.world.base, str(raw), ServedModel(running.server.url, "nobody", KEY))
    assert "base, lora-1, dcft-1, dude-1" in str(raised.value.problems[0].expected)


def test_a_name_that_is_loaded_with_the_first_request(running: Running) -> None:
    assert verified(running, running.world.adapters["dora-2"].raw, "dora-2")["verdict"] == "PASS"
