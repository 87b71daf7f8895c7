"""Runs of the whole command in this process: errors, exit code and both streams, as a shell sees them."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz_folders import base_model, seeds

from adapter_merge.cli.main import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def run(*arguments: object) -> Done:
    """Run adapter-merge with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        patch.setattr(sys, "argv", ["adapter-merge", *map(str, arguments)])
        main()
    return Done(int(left.value.code or 0), out.getvalue(), err.getvalue())


def make_models(folder: Path, *kinds: str) -> Path:
    """A base and adapters of these kinds in `folder`."""
    base_model(folder / "base")
    for kind in kinds:
        (folder / kind).mkdir()
        for file, data in seeds()[kind].items():
            (folder / kind / file).write_bytes(data)
    return folder
