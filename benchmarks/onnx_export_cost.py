"""Time and memory of ONNX exports, for checkpoints with the shapes of SmolLM2-135M and TinyLlama-1.1B.

    python benchmarks/onnx_export_cost.py --tokenizer FOLDER [--work FOLDER] [--size 0.1b --size 1.1b]

Random bf16 weights (synthetic.py). The memory is that of the command and its children together, sampled every
50 ms: anonymous pages, which must fit, and file pages, which the system may drop (the memory-mapped base).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from synthetic import write_adapter, write_checkpoint

RUNS = {
    "0.1b": (("switchable", "fp32"), ("merged", "fp32"), ("merged", "int4")),
    "1.1b": (("switchable", "fp32"), ("merged", "fp32"), ("merged", "int4")),
}


def tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    except OSError:
        pass
    return found


def memory(pid: int) -> tuple[int, int]:
    """(anonymous, file) bytes of the process tree."""
    anonymous = mapped = 0
    for one in tree(pid):
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
            anonymous += int(lines["RssAnon"].split()[0]) * 1024
            mapped += int(lines["RssFile"].split()[0]) * 1024
        except (OSError, KeyError):
            continue
    return anonymous, mapped


def measure(command: list[str]) -> dict[str, float]:
    """Seconds and peaks of one command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = [0, 0]
    while process.poll() is None:
        peaks = [max(pair) for pair in zip(peaks, memory(process.pid), strict=True)]
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_anonymous_gb": round(peaks[0] / 1e9, 2),
        "peak_file_gb": round(peaks[1] / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("onnx-export-cost"))
    parser.add_argument("--size", action="append", choices=tuple(RUNS))
    options = parser.parse_args()
    for size in options.size or RUNS:
        base = options.work / size
        write_checkpoint(base, size)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(options.tokenizer / name, base / name)
        adapter = options.work / f"{size}-dcft"
        write_adapter(adapter, size, "dcft")
        for mode, precision in RUNS[size]:
            output = options.work / f"{size}-{mode}-{precision}"
            command = [str(Path(sys.executable).with_name("adapter-merge")), "export", str(base), f"dcft={adapter}"]
            command += ["-o", str(output), "--mode", mode, "--precision", precision, "--quiet"]
            figures = measure(command)
            gigabytes = sum(path.stat().st_size for path in output.iterdir()) / 1e9
            report = {"size": size, "mode": mode, "precision": precision, **figures, "export_gb": round(gigabytes, 2)}
            print(json.dumps(report), flush=True)
            shutil.rmtree(output)


if __name__ == "__main__":
    main()
