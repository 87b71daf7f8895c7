"""A process that has imported vLLM and forks for every job: the imports take 9 s, an engine of a tiny model 3.

Each fork is as fresh as a process of its own: no plugin is loaded and no engine made before it. A job is a line of
JSON on stdin: {"environment": {...}, "log": file for stdout and stderr, "code": Python to run}, or instead of the
code {"engine": a job of engine.py, "out": file}. The answer is its exit code, a line on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def preload() -> None:
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.lora.model_manager
    import vllm.lora.request
    import vllm.lora.worker_manager
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401


def run(job: dict[str, Any]) -> int:
    """In the fork: 0, or 1 with a traceback in the log."""
    os.environ.update(job["environment"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(number, target)
    try:
        if "code" in job:
            exec(compile(job["code"], "job", "exec"), {"__name__": "__main__"})
        else:
            from engine import answer

            answer(job["engine"], job["out"])
    except SystemExit as leave:
        return int(leave.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout, from its import on
    preload()
    for line in iter(sys.stdin.buffer.readline, b""):
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            return run(job)  # out of main, so that what vLLM registered for the end of a process runs
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
