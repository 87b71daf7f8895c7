"""Module paths that differ by one leading component, as transformers' classes with and without a head name them."""

from __future__ import annotations

import pytest

from adapter_merge.storage.module_paths import is_same_module, match_module_paths

HEADED = "bert.encoder.layer.0.query"
BODY = "encoder.layer.0.query"


@pytest.mark.parametrize(
    ("path", "name", "same"),
    [
        (BODY, BODY, True),
        (HEADED, BODY, True),
        (BODY, HEADED, True),
        (f"model.{HEADED}", BODY, False),  # two components
        ("layer.0.query", "layer.1.query", False),
        ("my_encoder.layer.0.query", BODY, False),  # a component, not a part of its text
    ],
)
def test_one_leading_component_is_the_same_module(path: str, name: str, same: bool) -> None:
    assert is_same_module(path, name) == same


def test_a_name_matches_the_equal_path_before_shorter_and_longer_ones() -> None:
    paths = [BODY, HEADED, "layer.0.query"]
    assert match_module_paths([BODY], paths) == {BODY: BODY}
    assert match_module_paths([BODY], paths[1:]) == {BODY: "layer.0.query"}
    assert match_module_paths([BODY], [HEADED]) == {BODY: HEADED}


def test_a_name_that_fits_two_longer_paths_has_no_match() -> None:
    paths = [HEADED, f"decoder.{BODY}"]
    assert match_module_paths([BODY, HEADED], paths) == {HEADED: HEADED}
