"""Pooling of sentence encoders: sentence-transformers' files in every form, and the vectors against the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_merge.errors import FileFormatError, UnsupportedError
from adapter_merge.export.graph.pooling import Pooling, pool, read_pooling, write_modules

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules.pooling."


def files(folder: Path, kinds: list[str], settings: dict[str, Any]) -> Path:
    entries = [
        {"idx": at, "name": str(at), "path": f"{at}_x" if at else "", "type": kind} for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_x").mkdir(exist_ok=True)
    (folder / "1_x" / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("kinds", "settings", "expected"),
    [
        ([OLD + "Transformer", OLD + "Pooling"], {"pooling_mode_mean_tokens": True}, Pooling("mean", False)),
        (
            [OLD + "Transformer", NEW + "Pooling", OLD + "Normalize"],
            {"pooling_mode": "lasttoken"},
            Pooling("last", True),
        ),
        (
            [OLD + "Transformer", OLD + "Pooling"],
            {"pooling_mode": ["cls"], "include_prompt": True},
            Pooling("cls", False),
        ),
    ],
)
def test_the_files_of_sentence_transformers(
    kinds: list[str], settings: dict[str, Any], expected: Pooling, tmp_path: Path
) -> None:
    assert read_pooling(tmp_path) is None
    assert read_pooling(files(tmp_path, kinds, settings)) == expected
    (tmp_path / "out").mkdir()
    write_modules(tmp_path / "out", expected, 64)
    assert read_pooling(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("kinds", "settings", "match"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "modules are not supported"),
        (["Transformer"], {}, "modules are not supported"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "pooling is not",
        ),
        (["Transformer", "Pooling"], {"pooling_mode": ["mean", "max"]}, "pooling is not"),
        (["Transformer", "Pooling"], {"pooling_mode": "weightedmean"}, "pooling is not"),
        (["Transformer", "Pooling"], {"pooling_mode": "mean", "include_prompt": False}, "without prompts"),
        (["Transformer", "Pooling"], {}, "pooling is not"),
    ],
)
def test_what_is_not_known_is_refused(kinds: list[str], settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_pooling(files(tmp_path, kinds, settings))
    assert match in str(caught.value)
    (tmp_path / "modules.json").write_text('{"type": 1}')
    with pytest.raises(FileFormatError, match="not a list of modules"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "last"])
def test_vectors(mode: str, normalised: bool) -> None:
    """Padding on either side, holes, and a text of one token."""
    hidden = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)) - 3.0
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]])
    got = pool(hidden, mask, Pooling(mode, normalised))
    for states, valid, vector in zip(hidden.double(), mask, got, strict=True):
        tokens = states[valid == 1]
        expected = {"mean": tokens.mean(0), "max": tokens.amax(0), "cls": tokens[0], "last": tokens[-1]}[mode]
        if normalised:
            expected = expected / expected.norm()
        assert torch.allclose(vector.double(), expected, atol=1e-6)
