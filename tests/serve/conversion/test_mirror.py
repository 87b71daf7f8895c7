"""An adapter folder on object storage, copied for a server and renewed: a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_in_s3 import BUCKET, Relay, put
from world import World

from adapter_merge.errors import InputError
from adapter_merge.serve.conversion.mirror import Mirror

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_new_changed_and_removed_adapters(relay: Relay, qwen2: World) -> None:
    for name in ("lora-1", "dude-1"):
        put(qwen2.adapters[name].raw, f"adapters/{name}")
    mirror = Mirror(f"s3://{BUCKET}/adapters")
    assert mirror.update() == ["dude-1", "lora-1"]
    for name in ("lora-1", "dude-1"):
        assert content(mirror.folder / name) == content(qwen2.adapters[name].raw)
    before = relay.bytes
    assert mirror.update() == []
    assert relay.bytes - before < 50_000
    put(qwen2.adapters["lora-2"].raw, "adapters/lora-1")
    put(qwen2.adapters["dcft-1"].raw, "adapters/dcft-1")
    import boto3

    client = boto3.client("s3")
    for item in client.list_objects_v2(Bucket=BUCKET, Prefix="adapters/dude-1/")["Contents"]:
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    assert mirror.update() == ["dcft-1", "lora-1", "dude-1"]
    assert content(mirror.folder / "lora-1") == content(qwen2.adapters["lora-2"].raw)
    assert sorted(path.name for path in mirror.folder.iterdir() if path.is_dir()) == ["dcft-1", "lora-1"]


def test_a_failure_leaves_what_is_there(relay: Relay, qwen2: World) -> None:
    put(qwen2.adapters["lora-1"].raw, "adapters/lora-1")
    mirror = Mirror(f"s3://{BUCKET}/adapters")
    mirror.update()
    relay.stop = -1
    with pytest.raises(InputError, match="cannot be read"):
        mirror.update()
    assert content(mirror.folder / "lora-1") == content(qwen2.adapters["lora-1"].raw)
