"""Warnings that third parties attribute to themselves say nothing about us; everything else stays an error."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
THIRD_PARTY = (r"ignore:::transformers\..*", r"ignore:::peft\..*", r"ignore:::torch\..*")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            for text in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(text))
