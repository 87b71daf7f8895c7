"""Values of other types in the JSON files that are read: refused by their key, all at once, before anything is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merge_models import base_tensors, write_base, write_lora

from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, RestoreOptions
from adapter_merge.api.restore import restore
from adapter_merge.errors import AdapterMergeError, FileFormatError
from adapter_merge.files.json_types import COUNT, FLAG, NUMBER, TEXT, TEXTS, Each, Stated, check_types
from adapter_merge.outputs.attestation import attest
from adapter_merge.outputs.integrity import check_integrity
from adapter_merge.outputs.manifest_seal import sealed

WEIRD: tuple[Any, ...] = (True, 0, -1, 2.5, "", "x\ny", [], [1], {}, {"a": 1}, [[]], 10**40, "a" * 5000)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors(layers=1)
    return write_base(tmp_path / "base", tensors, 2), write_lora(tmp_path / "adapter", tensors)


def paths(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a JSON document, of long objects and lists the first two only."""
    inner = list(value.items())[:20] if isinstance(value, dict) else []
    inner += list(enumerate(value[:2])) if isinstance(value, list) else []
    return [place, *(found for key, item in inner for found in paths(item, (*place, key)))]


def replaced(value: Any, place: tuple[Any, ...], item: Any) -> Any:
    if not place:
        return item
    copy = json.loads(json.dumps(value))
    target = copy
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = item
    return copy


def test_each_wrong_value_is_named(tmp_path: Path) -> None:
    schema = {"a": TEXT, "b": COUNT, "c": {"d": FLAG}, "e": Each(TEXT), "f": Each(NUMBER, listed=True), "g": TEXTS,
              "h": Stated(TEXT), "i": NUMBER, "j": COUNT}  # fmt: skip
    content = {"a": 1, "b": True, "c": {"d": 0}, "e": {"x": None}, "f": [1, "2"], "g": ["a", 1], "i": float("inf")}
    with pytest.raises(FileFormatError) as caught:
        check_types(content, schema, tmp_path)
    named = [problem.cause.removeprefix(f"{tmp_path}: ").partition(" ")[0] for problem in caught.value.problems]
    assert named == ["a", "b", "c.d", "e.x", "f.1", "g", "h", "i"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("architectures", True), ("architectures", [1]), ("model_type", 3), ("tie_word_embeddings", "no"),
     ("_name_or_path", ["a"]), ("num_hidden_layers", -1), ("text_config", {"model_type": {}}), ("dtype", 1)],
)  # fmt: skip
def test_the_config_of_a_base(key: str, value: object, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(FileFormatError, match=rf"config\.json: {key}.*is not"):
        merge(base, adapter, tmp_path / "out")
    (problem,) = inspect(adapter, base).problems
    assert key in problem


def _merged(tmp_path: Path, out: Path) -> list[Callable[[], object]]:
    return [
        lambda: check_integrity(tmp_path / "merged"),
        lambda: attest(tmp_path / "merged"),
        lambda: restore(tmp_path / "merged", out),
        lambda: restore(tmp_path / "merged", out, RestoreOptions(base=tmp_path / "base")),
        lambda: merge(tmp_path / "merged", tmp_path / "adapter", out, MergeOptions(dry_run=True)),
        lambda: inspect(tmp_path / "merged"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_merge.json", "preimage/model-00001-of-00002.safetensors.json"])
def test_any_value_in_what_we_wrote(name: str, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Sealed again, as someone who means it would do: refused, or without effect; never another error."""
    merge(*pair, tmp_path / "merged", MergeOptions(keep_preimage=True))
    file = tmp_path / "merged" / name
    content = json.loads(file.read_text())
    refused = 0
    for number, place in enumerate(paths(content)):
        for item in WEIRD[number % 3 :: 3]:
            changed = replaced(content, place, item)
            if name == "adapter_merge.json" and isinstance(changed, dict):
                changed = sealed(changed)
            file.write_text(json.dumps(changed))
            for turn, job in enumerate(_merged(tmp_path, tmp_path / f"out-{number}")):
                if (number + turn) % 3 == 0:
                    try:
                        job()
                    except AdapterMergeError:
                        refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "frame", [[0, 1, 10**40, [1, 1], True], [0, 1, 0, [10**15, 1], False], [10**30, 1, 0, [1], True]]
)
def test_frames_outside_the_preimage(frame: list[Any], tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Nothing is read there, and no memory taken for it."""
    merge(*pair, tmp_path / "merged", MergeOptions(keep_preimage=True))
    file = tmp_path / "merged" / "preimage" / "model-00001-of-00002.safetensors.json"
    content = json.loads(file.read_text())
    content["frames"][next(iter(content["frames"]))][0] = frame
    file.write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=r"frame|gap"):
        restore(tmp_path / "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
