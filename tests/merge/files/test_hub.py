"""Hub ids: which files of a repository are downloaded, over HTTP from a server that answers as the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_hub import Hub, hub_environment

from adapter_merge.errors import InputError
from adapter_merge.files.hub import select_files
from adapter_merge.storage.checkpoint import HUB_ID

pytestmark = pytest.mark.preloaded("torch")
MODEL = {
    "config.json", "tokenizer.json", "README.md", "modeling_x.py", "images/logo.png",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
}  # fmt: skip
UNREAD = {
    "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tf_model.h5",
    "original/consolidated.00.pth", "onnx/model.onnx", "onnx/model.onnx_data", "model.Q4_K_M.gguf", ".gitattributes",
    "flax_model.msgpack", "openvino/model.bin",
}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "inside", "wanted"),
    [
        (MODEL | UNREAD, "", MODEL),
        ({"config.json", "pytorch_model.bin", "rust_model.ot"}, "", {"config.json", "pytorch_model.bin"}),
        ({"model.safetensors", "model.fp16.safetensors"}, "", {"model.safetensors"}),
        (
            {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "row_scale.safetensors"},
            "",
            {"adapter_config.json", "adapter_model.safetensors", "row_scale.safetensors"},
        ),
        ({"adapter_config.json", "adapter_model.bin"}, "", {"adapter_config.json", "adapter_model.bin"}),
        ({"lora.safetensors", "sample.jpg"}, "", {"lora.safetensors", "sample.jpg"}),
        ({"README.md", "m.gguf"}, "", {"README.md", "m.gguf"}),
        (
            {
                "model_index.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors",
                "whole.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.bin",
                "text_encoder/model.safetensors",
                "text_encoder/pytorch_model.bin",
                "text_encoder/config.json",
            },
            "",
            {
                "model_index.json",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors",
                "whole.safetensors",
                "text_encoder/model.safetensors",
                "text_encoder/config.json",
            },
        ),
        (
            {"README.md", "a/adapter_config.json", "a/adapter_model.safetensors", "b/adapter_model.safetensors"},
            "a/",
            {"a/adapter_config.json", "a/adapter_model.safetensors"},
        ),
        (
            {"README.md", "a/adapter_config.json", "a/adapter_model.safetensors", "b/adapter_config.json"},
            "",
            {"README.md", "a/adapter_config.json", "b/adapter_config.json"},
        ),
    ],
)
def test_only_what_is_read_is_wanted(files: set[str], inside: str, wanted: set[str]) -> None:
    assert set(select_files(sorted(files), inside)) == wanted


def test_several_gguf_files_are_listed() -> None:
    with pytest.raises(InputError, match="several GGUF models") as caught:
        select_files(["a-Q4_K_M.gguf", "a-Q8_0.gguf", "README.md"])
    assert caught.value.problems[0].got == "a-Q4_K_M.gguf, a-Q8_0.gguf"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("gpt2", ("gpt2", None, None)),
        ("gpt2@main", ("gpt2", None, "main")),
        ("org/name@v1/x", ("org/name", None, "v1/x")),
        ("org/name/checkpoint-500@main", ("org/name", "checkpoint-500", "main")),
        ("org/name/a/b_c", ("org/name", "a/b_c", None)),
    ],
)
def test_a_hub_id_has_a_folder_and_a_revision(text: str, parts: tuple[str | None, ...]) -> None:
    match = HUB_ID.fullmatch(text)
    assert match is not None
    assert (match["repo"], match["inside"], match["revision"]) == parts


@pytest.mark.parametrize(
    "text", ["./name", "name.safetensors", "../x/y", "org/name/../x", "org//name", "/org/name", "org/name/.git"]
)
def test_what_is_no_hub_id_is_not_asked_for(text: str) -> None:
    assert HUB_ID.fullmatch(text) is None


RUN = """
import json, sys
from adapter_merge.errors import AdapterMergeError
from adapter_merge.formats.detection import open_adapter
from adapter_merge.storage.checkpoint import resolve
try:
    print(json.dumps([str({"resolve": resolve, "open": open_adapter}[sys.argv[1]](sys.argv[2])), ""]))
except AdapterMergeError as error:
    print(json.dumps(["", str(error)]))
"""


def fetch(hub: Hub | str, home: Path, name: str, job: str = "resolve") -> tuple[str, str]:
    """Resolve or open a hub id in a process of its own that knows `hub` alone: the result and the error."""
    environment = {**os.environ, **hub_environment(hub if isinstance(hub, str) else hub.url, home)}
    run = subprocess.run(
        [sys.executable, "-c", RUN, job, name], env=environment, capture_output=True, text=True, check=True, cwd=home
    )
    result, error = json.loads(run.stdout.splitlines()[-1])
    return result, error


def files_under(folder: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_model_is_downloaded_without_its_other_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files["org/model"] = {name: name.encode() for name in sorted(MODEL | UNREAD)}
    folder, error = fetch(hub, tmp_path, "org/model")
    assert not error
    assert files_under(folder) == MODEL
    assert set(hub.sent) == MODEL
    gone = fetch("http://127.0.0.1:9", tmp_path, "org/model")  # no connection: what the cache holds
    assert gone == (folder, "")
    assert "could not be downloaded" in fetch("http://127.0.0.1:9", tmp_path, "org/other")[1]


def test_an_adapter_in_a_folder_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files["org/runs"] = {
        "README.md": b"#",
        **{f"checkpoint-{step}/adapter_config.json": b'{"r": %d}' % step for step in (500, 1000)},
        **{f"checkpoint-{step}/adapter_model.safetensors": b"%d" % step for step in (500, 1000)},
        "checkpoint-1000/optimizer.pt": b"large",
    }
    _, error = fetch(hub, tmp_path, "org/runs", "open")
    assert "org/runs: holds 2 adapters" in error
    assert "checkpoint-500, checkpoint-1000" in error
    assert "hint: org/runs/checkpoint-1000" in error
    assert set(hub.sent) == {name for name in hub.files["org/runs"] if name.endswith(("config.json", "README.md"))}
    folder, error = fetch(hub, tmp_path, "org/runs/checkpoint-1000")
    assert not error
    assert "adapter_model.safetensors" in files_under(folder)
    assert "checkpoint-1000/optimizer.pt" not in hub.sent
    assert "checkpoint-500/adapter_model.safetensors" not in hub.sent
    assert "has no folder checkpoint-7" in fetch(hub, tmp_path, "org/runs/checkpoint-7")[1]


def test_a_repository_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    _, error = fetch(hub, tmp_path, "org/nothing")
    assert "org/nothing: no such folder, and it could not be downloaded" in error
