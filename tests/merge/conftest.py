"""Warnings that third parties attribute to themselves say nothing about us; everything else stays an error."""

from __future__ import annotations

import pytest

THIRD_PARTY = (r"ignore:::transformers\..*", r"ignore:::peft\..*", r"ignore:::torch\..*")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "merge":
            for text in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(text))
