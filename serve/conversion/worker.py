"""The process that converts adapters for a server: python -m adapter_merge.serve.conversion.worker SETTINGS

SETTINGS and everything else is JSON, a line each:

    on stdin    an adapter's path, then an empty line when the answer was taken: the entry is held until then
    on stdout   {"ready": true} at the start, then per adapter {"folder", "seconds"}, or {"error": class, "problems"}

See processes.py, which starts it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterMergeError

from .bounds import bound_memory, end_with, give_way
from .cache import Cache
from .served import Converter

OUT_OF_MEMORY = "MemoryError"


def answer(converter: Converter, adapter: str) -> tuple[dict[str, Any], Any]:
    """(the line to send, the served folder with its hold or None)."""
    try:
        served = converter.obtain(adapter)
    except AdapterMergeError as error:
        return {"error": type(error).__name__, "problems": [astuple(problem) for problem in error.problems]}, None
    except MemoryError:
        return {"error": OUT_OF_MEMORY, "problems": []}, None
    except Exception as error:
        # torch has no class of its own for memory that it does not get on a CPU.
        kind = OUT_OF_MEMORY if "can't allocate memory" in str(error) else type(error).__name__
        return {"error": kind, "problems": [[str(error), None, None, None]]}, None
    return {"folder": str(served.folder), "seconds": served.seconds}, served


def main() -> None:
    settings = json.loads(sys.argv[1])
    end_with(settings["parent"], signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to the server's log
    give_way()
    import adapter_merge.api.factor  # noqa: F401

    bound_memory(settings["memory"])
    converter = Converter(settings["base"], Cache(Path(settings["cache"]), settings["max_bytes"]))

    def send(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    send({"ready": True})
    for line in sys.stdin:
        found, served = answer(converter, json.loads(line))
        send(found)
        sys.stdin.readline()
        if served is not None:
            served.release()


if __name__ == "__main__":
    main()
