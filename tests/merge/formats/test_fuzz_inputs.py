"""A small run of every fuzzer, with a fresh seed each time; long ones: `python benchmarks/fuzz.py --cases 1000000`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_folders import fuzz

from adapter_merge.combine.recipe import read_recipe
from adapter_merge.errors import AdapterMergeError

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
def test_fresh_cases_of_everything_that_is_read() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--cases", "3000"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if " cases of seed " in line]
    assert len(lines) == 7 and all("refused" in line or "cache" in line or "headers" in line for line in lines)


@pytest.mark.parametrize("number", [1882, 2275, 2951])
def test_adapters_that_fuzzing_found(number: int) -> None:
    """A base's name that is a number or a list, in folders of our own formats."""
    found: list[str] = []
    fuzz(1, seed=7, start=number, report=found.append)
    assert not found


@pytest.mark.parametrize(
    "text",
    ['{"adapters": [{"path": "%s"}]}' % ("a" * 5000), '{"adapters": [{"path": "a", "name": "\\ud800"}]}',
     '{"adapters": [{"path": "\\ud800"}]}', '{"adapters": [{"path": "a", "name": "a\\nb"}]}',
     '{"adapters": [{"path": "a"}], "base": "%s"}' % ("a/" * 3000)],
)  # fmt: skip
def test_recipes_that_fuzzing_found(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(AdapterMergeError):
        read_recipe(file)


def test_null_is_not_stated(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"density": null, "gamma": null, "base": null, "adapters": [{"path": "a", "name": "a"}]}')
    assert read_recipe(file).settings.density == 1.0
