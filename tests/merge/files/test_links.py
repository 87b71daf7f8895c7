"""Shards that no adapter touches are shared with the base where that is asked for, and count for no space."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from merge_models import shard_hashes, write_four_shards

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.errors import OutputError
from adapter_merge.files.links import LINKS, can_link, link_file
from adapter_merge.outputs.integrity import check_integrity


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_four_shards(tmp_path)


def test_hard_links_share_untouched_shards_only(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, _ = pair
    merge(*pair, tmp_path / "out", MergeOptions(link="hardlink"))
    merge(*pair, tmp_path / "copied", MergeOptions(link="copy"))
    shared = [path.name for path in sorted((tmp_path / "out").glob("*.safetensors")) if path.samefile(base / path.name)]
    assert shared == ["model-00004-of-00004.safetensors"]
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "copied")
    check_integrity(tmp_path / "out", inputs=True)


def test_linked_shards_need_no_space(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = pair
    untouched = (base / "model-00004-of-00004.safetensors").stat().st_size
    whole = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=whole - untouched))
    with pytest.raises(OutputError, match="the disk is too small"):
        merge(*pair, tmp_path / "out", MergeOptions(link="copy"))
    merge(*pair, tmp_path / "out", MergeOptions(link="hardlink"))
    assert (tmp_path / "out" / "model-00004-of-00004.safetensors").samefile(base / "model-00004-of-00004.safetensors")


def test_whether_a_link_would_take_is_seen_without_leaving_anything(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    source, probe = pair[0] / "config.json", tmp_path / "probe"
    before = sorted(tmp_path.iterdir())
    found = {link: can_link(source, tmp_path, link) for link in LINKS}
    assert sorted(tmp_path.iterdir()) == before
    assert not found["copy"] and found["hardlink"]
    assert found["auto"] == found["reflink"] == link_file(source, probe, "auto")


def test_reflinks_where_the_file_system_has_them_and_a_clear_error_elsewhere(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    probe = tmp_path / "probe"
    try:
        link_file(pair[0] / "config.json", probe, "reflink")
    except OutputError:
        with pytest.raises(OutputError, match="--link auto"):
            merge(*pair, tmp_path / "out", MergeOptions(link="reflink"))
        merge(*pair, tmp_path / "out", MergeOptions(link="auto"))
    else:
        merge(*pair, tmp_path / "out", MergeOptions(link="reflink"))
    assert not (pair[0] / "model-00004-of-00004.safetensors").samefile(
        tmp_path / "out" / "model-00004-of-00004.safetensors"
    )
    check_integrity(tmp_path / "out", inputs=True)
