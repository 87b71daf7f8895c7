"""The process that converts adapters for a server: python -m adapter_merge.serve.conversion.worker SETTINGS

SETTINGS is a JSON object. The protocol is one line of JSON per message:

    stdin     an adapter's path; then an empty line when the parent has opened the folder, which is locked until then
    stdout    {"ready": true} at the start, then per adapter {"folder", "seconds"}, or {"error": class, "problems"}

processes.py starts this process.
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

from .cache import Cache
from .process_limits import die_with_parent, limit_memory, lower_priority
from .served_folder import Converter

OUT_OF_MEMORY = "MemoryError"


def answer(converter: Converter, adapter: str) -> tuple[dict[str, Any], Any]:
    """Convert `adapter`; return the message to send, and the served folder with its lease (None after an error)."""
    try:
        served = converter.obtain(adapter)
    except AdapterMergeError as error:
        return {"error": type(error).__name__, "problems": [astuple(problem) for problem in error.problems]}, None
    except MemoryError:
        return {"error": OUT_OF_MEMORY, "problems": []}, None
    except Exception as error:
        # torch raises a plain RuntimeError when it cannot allocate memory on a CPU.
        kind = OUT_OF_MEMORY if "can't allocate memory" in str(error) else type(error).__name__
        return {"error": kind, "problems": [[str(error), None, None, None]]}, None
    return {"folder": str(served.folder), "seconds": served.seconds}, served


def main() -> None:
    """Answer messages until the parent closes stdin."""
    settings = json.loads(sys.argv[1])
    die_with_parent(settings["parent"], signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries goes to the server's log, not into the protocol
    lower_priority()
    import adapter_merge.api.factor  # noqa: F401

    limit_memory(settings["memory"])
    converter = Converter(settings["base"], Cache(Path(settings["cache"]), settings["max_bytes"]))

    def send(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    send({"ready": True})
    for line in sys.stdin:
        message, served = answer(converter, json.loads(line))
        send(message)
        sys.stdin.readline()
        if served is not None:
            served.release()


if __name__ == "__main__":
    main()
