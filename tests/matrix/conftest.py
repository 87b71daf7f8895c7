"""The matrix takes its models and adapters from the tests of merge and of export."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("merge", "merge/formats", "export")]

THIRD_PARTY = (
    r"ignore:::transformers\..*",
    r"ignore:::peft\..*",
    r"ignore:::torch\..*",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for text in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(text))
