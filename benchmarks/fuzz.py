"""The fuzzers of everything that is read: python benchmarks/fuzz.py --cases 20000 --seed 0 [--targets bases ...]

adapters   folders and files of every format -> merge, convert, factor          (tests/merge/fuzz_folders.py)
pickles    torch.save files, compared with torch.load(weights_only=True)        (tests/merge/pickle_files.py)
headers    of safetensors files, compared with the safetensors library
bases      config, index, headers, shards, pickles, float8 scales; compared with the formula in float64
outputs    manifests, pre-images and files of merged models -> verify, attest, restore, inspect, merge
recipes    compared with the weighted sum in float64
cache      entries of the serving cache

A case must end as AdapterMergeError with nothing written, or right by the other reader, within 10 s and 1 GB. The cases
run in children, 250 at a time, so that a crash of the process is one more thing that is found. Without --seed a
fresh one is taken and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapter_merge.errors import FileFormatError

TESTS = Path(__file__).parents[1] / "tests" / "merge"
sys.path[:0] = [str(TESTS), str(TESTS / "storage")]

import fuzz_folders  # type: ignore[import-not-found]  # noqa: E402
import fuzz_inputs  # type: ignore[import-not-found]  # noqa: E402
import pickle_files  # type: ignore[import-not-found]  # noqa: E402
import test_safetensors_header as headers  # type: ignore[import-not-found]  # noqa: E402

CHUNK, SECONDS, MEMORY = 250, 10, 1 << 30
FINE = ("refused", "passed", "merged", "equal")
# The cost of a case differs by a factor of a thousand: these many of each in 1,000.
SHARES = {"headers": 700, "pickles": 200, "cache": 40, "adapters": 20, "bases": 20, "outputs": 10, "recipes": 10}
Case = Callable[[int, int, Path], tuple[str, str]]


def adapters(work: Path) -> Case:
    import peft  # type: ignore[import-not-found]  # noqa: F401  # some cases use it, and its import takes seconds
    import torch.distributed.tensor  # noqa: F401

    base, originals = fuzz_folders.base_model(work / "base"), fuzz_folders.seeds()

    def case(number: int, seed: int, place: Path) -> tuple[str, str]:
        place.mkdir(exist_ok=True)
        _, name, outcome, detail = fuzz_folders.run_case(number, seed, originals, base, place)
        return outcome, f"{name}: {detail}"

    return case


def pickles(work: Path) -> Case:
    originals = pickle_files.seeds()

    def case(number: int, seed: int, place: Path) -> tuple[str, str]:
        place.mkdir(exist_ok=True)
        pick = random.Random(f"{seed}/{number}")
        (place / "case.bin").write_bytes(pickle_files.change(pick.choice(originals), pick))
        try:
            pickle_files.check_equal(place / "case.bin")
        except FileFormatError as error:
            return "refused", str(error)
        return "equal", ""

    return case


def header_cases(work: Path) -> Case:
    def case(number: int, seed: int, place: Path) -> tuple[str, str]:
        place.mkdir(exist_ok=True)
        header = headers.changed(random.Random(f"{seed}-{number}"))
        file = headers.file_of(place, header)
        ours, theirs = headers.we_accept(file), headers.library_accepts(file)
        if ours == theirs:
            return "equal", ""
        stricter = theirs and any(text in headers.reason(file) for text in headers.STRICTER_REASONS)
        return ("refused", "") if stricter else ("another verdict than the library's", header)

    return case


def others(name: str) -> Callable[[Path], Case]:
    def make(work: Path) -> Case:
        target = fuzz_inputs.TARGETS[name](work)

        def case(number: int, seed: int, place: Path) -> tuple[str, str]:
            outcome: tuple[str, str] = fuzz_inputs.run_case(target, number, seed, place)
            return outcome

        return case

    return make


TARGETS: dict[str, Callable[[Path], Case]] = {"adapters": adapters, "pickles": pickles, "headers": header_cases}
TARGETS |= {name: others(name) for name in fuzz_inputs.TARGETS}


def run_chunk(case: Case, numbers: range, seed: int, place: Path, report: Path) -> None:
    """Run the cases, and write outcomes and faults to `report` after each."""

    def ring(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        report.write_text(json.dumps([dict(outcomes), faults, number]))
        signal.alarm(SECONDS)
        try:
            outcome, detail = case(number, seed, place / "case")
        except TimeoutError:
            outcome, detail = "hung", ""
        except Exception:
            outcome, detail = "another error", traceback.format_exc()
        finally:
            signal.alarm(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (peak - memory) * 1024 > MEMORY:
            outcome, detail = "too much memory", f"{(peak - memory) / 1e6:.1f} GB"
        memory = peak
        outcomes[outcome] += 1
        if outcome not in FINE:
            faults.append(f"case {number} of seed {seed}: {outcome}: {detail[-1500:]}")
    report.write_text(json.dumps([dict(outcomes), faults, None]))


def run_target(name: str, cases: int, seed: int, start: int = 0) -> tuple[Counter[str], list[str]]:
    """Run `cases` of one target in children; (outcomes, faults)."""
    memory = Path("/dev/shm")
    work = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    try:
        (work / "seeds").mkdir()
        case = TARGETS[name](work / "seeds")
        report = work / "report"
        for first in range(start, start + cases, CHUNK):
            pid = os.fork()
            if pid == 0:
                run_chunk(case, range(first, min(first + CHUNK, start + cases)), seed, work, report)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            found, wrong, number = json.loads(report.read_text())
            outcomes.update(found)
            faults += wrong
            if status != 0:
                outcomes["crash"] += 1
                faults.append(f"case {number} of seed {seed}: the process ended with {status}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return outcomes, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=20_000, help="of all targets together, by their cost")
    parser.add_argument("--each", type=int, help="of each target, instead")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    bad = 0
    for name in arguments.targets:
        cases = arguments.each or max(1, arguments.cases * SHARES[name] // 1000)
        began = time.perf_counter()
        outcomes, faults = run_target(name, cases, seed, arguments.start)
        took = time.perf_counter() - began
        print(
            f"{name:<9} {sum(outcomes.values()):>7} cases of seed {seed} in {took:.0f} s: {dict(outcomes)}", flush=True
        )
        for text in faults:
            print(text)
        bad += len(faults)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
