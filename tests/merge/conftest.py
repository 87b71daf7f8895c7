"""Warnings that third parties attribute to themselves say nothing about us; everything else stays an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in_hub import Hub, running_hub

HERE = Path(__file__).parent
THIRD_PARTY = (r"ignore:::transformers\..*", r"ignore:::peft\..*", r"ignore:::torch\..*")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            for text in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server
