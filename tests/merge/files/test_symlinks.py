"""Links among the base's side files: an output must not hold what lies elsewhere on the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_models import base_tensors, write_base, write_lora

from adapter_merge.api.merge import merge
from adapter_merge.errors import InputError
from adapter_merge.storage.checkpoint import open_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors(layers=1)
    return write_base(tmp_path / "base", tensors, 1), write_lora(tmp_path / "adapter", tensors)


def test_links_out_of_the_folder_are_refused_all_at_once(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    secret = tmp_path / "secret"
    secret.write_text("the password")
    (base / "notes.txt").symlink_to(secret)
    (base / "templates" / "deep.txt").symlink_to("../../secret")
    (base / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="link to a file outside its folder") as caught:
        merge(base, adapter, tmp_path / "out")
    assert {problem.cause.partition(":")[0] for problem in caught.value.problems} == {
        str(base / "notes.txt"), str(base / "templates" / "deep.txt"), str(base / "passwd")
    }  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_links_to_folders_are_not_followed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (base / "more").symlink_to(tmp_path / "private")
    merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "more").exists()


def test_links_inside_the_folder_and_linked_bases_are_followed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (base / "again.json").symlink_to("tokenizer.json")
    (tmp_path / "name").symlink_to(base)
    merge(tmp_path / "name", adapter, tmp_path / "out")
    copy = tmp_path / "out" / "again.json"
    assert not copy.is_symlink() and copy.read_text() == (base / "tokenizer.json").read_text()


@pytest.mark.parametrize("inside", ["", "checkpoint"])
def test_the_hubs_cache(tmp_path: Path, pair: tuple[Path, Path], inside: str) -> None:
    """snapshots/REVISION/NAME -> ../../blobs/SHA, as huggingface_hub lays it out, and a folder of a repository."""
    base, adapter = pair
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc" / inside
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    assert Path("templates/tool.txt") in open_checkpoint(snapshot).side_files
    merge(snapshot, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "templates" / "tool.txt").read_text() == "nested"
    (snapshot / "extra.txt").symlink_to(blobs.parent.parent / "adapter" / "adapter_config.json")
    with pytest.raises(InputError, match=r"extra\.txt"):
        merge(snapshot, adapter, tmp_path / "again")
