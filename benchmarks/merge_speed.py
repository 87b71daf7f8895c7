"""How fast a merge is against `cp` of the same files and against PEFT, and how much memory it takes.

    python benchmarks/merge_speed.py SCRATCH                          all methods, TinyLlama-1.1B's shapes, 5 rounds
    python benchmarks/merge_speed.py SCRATCH --peft --repeat 1        PEFT's merge_and_unload beside it (slow)
    python benchmarks/merge_speed.py SCRATCH --growth 0.1b 1.1b 8b    peak memory by size of the model

Every round runs `cp` and each merge in turn, so that a ratio is one of neighbours in time; medians of the rounds are
printed. What is measured:

    cp          wall time of `cp` of the weights into the page cache
    cp+sync     the same until the bytes are on the disk, which is where a merge's bytes are when it ends
    stage       from the finished plan to fsynced files: read, compute, write; without hashes
    stage+hash  the same with sha256 of every input and output byte, the default
    process     `adapter-merge merge` from start to end: imports, checks, hashes of everything, manifest
    cpu         user + system seconds of the stage: what is left of the comparison on a machine that others use too
    vram        the most that torch's allocator held of the device during stage+hash
    rss         peak of the whole process (VmHWM), and what a process that only imports torch has

The disk's speed bounds the stage (it does not write into the page cache): where the disk is slow, `cp` looks fast
because it has not finished yet; compare with cp+sync there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("lora", "dora", "dude", "dcft")

PEAK = """
def peak():
    # Not ru_maxrss: that is handed down from the process that started this one.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""

STAGE = """
import json, os, sys, time
from pathlib import Path
import torch
from adapter_merge.engine.execute import execute
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.engine.plan import plan_merge
base, adapter, output, hashing = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "hash"
device, workers = torch.device(sys.argv[5]), int(sys.argv[6]) or None
bound = open_pair(base, adapter)
plan = plan_merge(bound.base, (bound,))
output.mkdir()
if device.type == "cuda":
    torch.zeros(1, device=device)  # the driver's own start belongs to the process, not to the stage
before, started = os.times(), time.perf_counter()
execute(plan, output, device, workers, hashing=hashing)
wall, after = time.perf_counter() - started, os.times()
print(json.dumps({
    "wall": wall,
    "cpu": after.user + after.system - before.user - before.system,
    "rss": peak(),
    "vram": torch.cuda.max_memory_reserved() if device.type == "cuda" else 0,
}))
"""

PROCESS = """
import json, sys
from adapter_merge.cli.main import main
sys.argv[1:] = ["merge", *sys.argv[1:3], "-o", *sys.argv[3:], "-q"]
try:
    main()
except SystemExit as leave:
    assert not leave.code
    print(json.dumps({"rss": peak()}))
"""

BARE = """
import json, torch
print(json.dumps({"rss": peak()}))
"""

PEFT = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").to(sys.argv[4])
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
print(json.dumps({"rss": peak()}))
"""


class Where(NamedTuple):
    device: str
    workers: int  # 0: the engine's own number


def python(program: str, *arguments: object) -> dict[str, Any]:
    """Run `program` in a fresh interpreter; its last line's JSON and its wall time."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"process": time.perf_counter() - started} | found


def clear(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def warm(files: list[Path]) -> None:
    """Have the input in the page cache, and nothing left to write."""
    os.sync()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)


def cool(files: list[Path]) -> None:
    """Have the input out of the page cache."""
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def copy(files: list[Path], folder: Path) -> tuple[float, float]:
    """Seconds of cp, and of cp and sync."""
    clear(folder).mkdir()
    started = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(folder)], check=True)
    copied = time.perf_counter() - started
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return copied, time.perf_counter() - started


def rounds(scratch: Path, size: str, methods: list[str], repeat: int, cold: bool, where: Where) -> None:
    base, out = scratch / size / "base", scratch / "out"
    files = sorted(base.glob("*.safetensors"))
    prepare = cool if cold else warm
    total = sum(file.stat().st_size for file in files)
    print(
        f"{size}: {total / 1e9:.2f} GB, {len(files)} shards, {len(os.sched_getaffinity(0))} cores, {where.device}, "
        f"cache {'cold' if cold else 'warm'}"
    )
    print(
        "method   cp  cp+sync  stage  /cp  stage+hash  /cp  cpu  cpu+hash  process  rss MB  vram MB  load", flush=True
    )
    for method in methods:
        found: list[dict[str, float]] = []
        for _ in range(repeat):
            prepare(files)
            cp, synced = copy(files, out)
            clear(out)
            row = {"cp": cp, "sync": synced}
            for kind in ("plain", "hash"):
                prepare(files)
                stage = python(STAGE, base, scratch / size / method, out, kind, where.device, where.workers)
                clear(out)
                row |= {kind: stage["wall"], f"{kind}_cpu": stage["cpu"], f"{kind}_ratio": stage["wall"] / cp}
            prepare(files)
            whole = python(PROCESS, base, scratch / size / method, out, "--device", where.device)
            clear(out)
            found.append(row | {"process": whole["process"], "rss": whole["rss"] / 1e6, "vram": stage["vram"] / 1e6})
        median = {key: statistics.median(row[key] for row in found) for key in found[0]}
        print(
            f"{method:6} {median['cp']:5.2f} {median['sync']:7.2f} {median['plain']:7.2f} {median['plain_ratio']:5.2f}"
            f" {median['hash']:9.2f} {median['hash_ratio']:6.2f} {median['plain_cpu']:5.2f} {median['hash_cpu']:7.2f}"
            f" {median['process']:9.2f} {median['rss']:7.0f} {median['vram']:8.0f} {os.getloadavg()[0]:6.1f}",
            flush=True,
        )
    print(f"bare import torch: {python(BARE)['rss'] / 1e6:.0f} MB")


def against_peft(scratch: Path, size: str, methods: list[str], repeat: int, device: str) -> None:
    base, out = scratch / size / "base", scratch / "out"
    files = sorted(base.glob("*.safetensors"))
    print("method  process  PEFT  ratio  no hashes  ratio  PEFT rss MB")
    for method in (name for name in methods if name in ("lora", "dora", "dude")):
        # PEFT knows DuDe on its residual base as DoRA: the same arithmetic.
        adapter = scratch / size / ("dora" if method == "dude" else method)
        ours, plain, theirs, memory = [], [], [], 0.0
        for _ in range(repeat):
            warm(files)
            ours.append(python(PROCESS, base, scratch / size / method, out, "--device", device)["process"])
            clear(out)
            warm(files)
            options = ("--device", device, "--no-hashes")
            plain.append(python(PROCESS, base, scratch / size / method, out, *options)["process"])
            clear(out)
            warm(files)
            peft = python(PEFT, base, adapter, out, device)
            clear(out)
            theirs.append(peft["process"])
            memory = max(memory, peft["rss"] / 1e6)
        mine, bare, other = map(statistics.median, (ours, plain, theirs))
        print(
            f"{method:6} {mine:8.2f} {other:6.1f} {other / mine:6.1f} {bare:8.2f} {other / bare:6.1f} {memory:8.0f}",
            flush=True,
        )


def growth(scratch: Path, sizes: list[str], method: str, device: str) -> None:
    bare = python(BARE)["rss"] / 1e6
    print(f"bare import torch: {bare:.0f} MB")
    print("size  GB  cp s  cp+sync s  process s  rss MB  above torch MB  adapter MB  load")
    for size in sizes:
        base, adapter = scratch / size / "base", scratch / size / method
        cp, synced = copy(sorted(base.glob("*.safetensors")), scratch / "out")
        done = python(PROCESS, base, adapter, clear(scratch / "out"), "--device", device)
        clear(scratch / "out")
        total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        held = sum(file.stat().st_size for file in adapter.iterdir()) / 1e6
        rss = done["rss"] / 1e6
        print(
            f"{size:5} {total / 1e9:5.2f} {cp:6.1f} {synced:6.1f} {done['process']:8.1f} {rss:8.0f} {rss - bare:8.0f}"
            f" {held:8.0f} {os.getloadavg()[0]:8.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure; some times the model's size")
    parser.add_argument("--size", default="1.1b", choices=["0.1b", "1.1b", "8b"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the input from the page cache before each run")
    parser.add_argument("--peft", action="store_true", help="compare whole processes with PEFT")
    parser.add_argument("--growth", nargs="+", metavar="SIZE", help="peak memory of these sizes, with the first method")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N, for PEFT as well")
    parser.add_argument("--workers", type=int, default=0, help="of the stages; 0 is what a merge takes by itself")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

    from synthetic import write_adapter, write_checkpoint

    for size in arguments.growth or [arguments.size]:
        write_checkpoint(arguments.scratch / size / "base", size)
        for method in arguments.methods[: 1 if arguments.growth else None]:
            write_adapter(arguments.scratch / size / method, size, method)
    if arguments.growth:
        growth(arguments.scratch, arguments.growth, arguments.methods[0], arguments.device)
    elif arguments.peft:
        against_peft(arguments.scratch, arguments.size, arguments.methods, arguments.repeat, arguments.device)
    else:
        where = Where(arguments.device, arguments.workers)
        rounds(arguments.scratch, arguments.size, arguments.methods, arguments.repeat, arguments.cold, where)


if __name__ == "__main__":
    main()
