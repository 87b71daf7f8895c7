"""What `verify` costs beside the merge that it proves: seconds and peak memory, by the model's size.

    python benchmarks/verify_cost.py SCRATCH                              SmolLM2-135M's and TinyLlama-1.1B's shapes
    python benchmarks/verify_cost.py SCRATCH --sizes 8b --tokens 4        Llama-3-8B's shapes: 32 GB of disk

For each size a merge, `verify --weights-only`, and `verify` with logits (4 prompts of 16 random tokens, since the
model has no tokenizer, each followed by the tokens that the live adapter chooses), each in a process of its own.
Peak memory is the process's VmHWM, beside that of one that only imports torch.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from merge_speed import BARE, PROCESS, clear, python
from synthetic import METHODS, SIZES, write_adapter, write_checkpoint

VERIFY = """
import json, sys
from adapter_merge.cli.main import main
sys.argv[1:] = ["verify", *sys.argv[1:], "-q"]
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
    print(json.dumps({"rss": peak()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure; two times the model's size")
    parser.add_argument("--sizes", nargs="+", default=["0.1b", "1.1b"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=METHODS)
    parser.add_argument("--tokens", type=int, default=4, help="that the live adapter chooses after each prompt")
    parser.add_argument("--no-logits", action="store_true", help="compare the weights only")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    bare = python(BARE)["rss"] / 1e6
    print(f"bare import torch: {bare:.0f} MB")
    print("size  method  merge s  MB  weights s  /merge  MB above torch  logits s  /merge  MB above torch  load")
    for size in arguments.sizes:
        base = arguments.scratch / size / "base"
        write_checkpoint(base, size)
        for method in arguments.methods:
            adapter, out = arguments.scratch / size / method, arguments.scratch / "out"
            write_adapter(adapter, size, method)
            merged = python(PROCESS, base, adapter, clear(out))
            weights = python(VERIFY, base, adapter, out, "--weights-only")
            row = f"{size:5} {method:6} {merged['process']:8.1f} {merged['rss'] / 1e6:4.0f}"
            for done in (
                (weights,)
                if arguments.no_logits
                else (
                    weights,
                    python(VERIFY, base, adapter, out, "--tokens", arguments.tokens),
                )
            ):
                ratio = done["process"] / merged["process"]
                row += f" {done['process']:9.1f} {ratio:6.1f} {done['rss'] / 1e6 - bare:8.0f}"
            print(f"{row} {os.getloadavg()[0]:6.1f}", flush=True)
            clear(out)


if __name__ == "__main__":
    main()
