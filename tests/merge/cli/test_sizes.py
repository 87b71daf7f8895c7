"""Sizes on the command line: a number and its unit."""

from __future__ import annotations

import click
import pytest

from adapter_merge.cli.options.values import SIZE


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GB", 50 * 10**9), ("1.5 mb", 1_500_000), ("123B", 123), ("4GiB", 4 << 30), ("512M", 512 * 10**6)],
)
def test_a_size_has_a_unit(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "many", "5 XB", "-1GB", "5", "1e9", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="unit"):
        SIZE.convert(text, None, None)
