"""Start of a build in a child process, and the transfer of its error to the parent as one line.

The line names the first cause, without stack frames, and without temporary folders that no longer exist.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterMergeError

MARK = "adapter-merge failed: "


def run_module(
    module: str,
    job: Mapping[str, Any],
    folder: Path,
    failed: str,
    made: Path,
    names: Mapping[str, str],  # path -> what an error calls it
) -> None:
    """Run `python -m module JOB` in `folder`. Raises AdapterMergeError(`failed`) unless it succeeds and writes `made`.

    The child uses no network and does not inherit the parent's PYTHONWARNINGS.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONWARNINGS", None)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0 and made.is_file():
        return
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    marked = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    text = str((marked or lines or [f"exit code {result.returncode}"])[-1])
    for path, name in names.items():
        text = text.replace(path, name)
    hint = "a SIGKILL means too little memory" if result.returncode < 0 else None
    raise AdapterMergeError(failed, got=text, hint=hint)


def reporting(main: Callable[[], None]) -> None:
    """Run `main` in the child; print the first cause of an error and exit with 1."""
    try:
        main()
    except Exception as error:
        print(MARK + json.dumps(first_cause(error)), file=sys.stderr)
        raise SystemExit(1) from None


def first_cause(error: BaseException) -> str:
    """Return one line that describes the first error in the chain of causes."""
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None:
            break
        error = earlier
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if isinstance(error, KeyError):
        return f"{text} is missing in the configuration or the weights"
    if isinstance(error, ZeroDivisionError):
        return "division by zero: a size in the configuration is 0, or too large for another size"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
