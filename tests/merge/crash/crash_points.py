"""Stops or fails commands at every system call on their files, and checks what they leave.

    python tests/merge/crash/crash_points.py merge overwrite delta --actions kill tear lost fail unreadable

kill        SIGKILL instead of system call i, for every i that changes a file
tear        SIGKILL in the middle of a write, with half of its bytes written
lost        SIGKILL, and then the loss of power: what was written since a file's last fsync is gone
fail        call i fails: ENOSPC, EIO and EACCES by turns
unreadable  the i-th opening or reading of a file fails: EIO, EACCES, ESTALE and ENOMEM by turns

After each, the inputs are as they were, the output is absent or whole (or the old one where it is replaced), an error
names a file and is no bug, and the same command, run again, gives the same bytes and leaves nothing beside them. The
children are forked from one process with everything imported, and system_calls.c counts their calls.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHANGES, READS = 1, 2
NOTHING, KILL, TEAR, FAIL = range(4)
FAILURES = (errno.ENOSPC, errno.EIO, errno.EACCES)
READ_FAILURES = (errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOMEM)
ACTIONS = ("kill", "tear", "lost", "fail", "unreadable")


@dataclass(frozen=True)
class Scenario:
    """A command line; `prepare` makes its inputs in a folder and returns the arguments."""

    prepare: Callable[[Path], list[str]]
    output: str = "out"
    replaces: bool = False  # the output is there before, and may stay


def build_library(folder: Path) -> Path:
    library = folder / "system_calls.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(HERE / "system_calls.c"), "-ldl"], check=True)
    return library


# -- scenarios -----------------------------------------------------------------------------------------------


def _pair(work: Path) -> tuple[str, str]:
    from merge_models import base_tensors, write_base, write_lora

    tensors = base_tensors(layers=1)
    base = write_base(work / "base", tensors, 2)
    adapter = write_lora(work / "adapter", tensors, dora=True)
    return str(base), str(adapter)


def _merge(*options: str) -> Callable[[Path], list[str]]:
    def prepare(work: Path) -> list[str]:
        return ["merge", *_pair(work), "-o", str(work / "out"), *options]

    return prepare


def _overwrite(work: Path) -> list[str]:
    base, adapter = _pair(work)
    _run(["merge", base, adapter, "-o", str(work / "out"), "--dtype", "float32"])
    return ["merge", base, adapter, "-o", str(work / "out"), "--overwrite"]


def _restore(work: Path) -> list[str]:
    base, adapter = _pair(work)
    _run(["merge", base, adapter, "-o", str(work / "merged"), "--keep-preimage"])
    shutil.rmtree(work / "base")
    return ["restore", str(work / "merged"), "-o", str(work / "out")]


def _extract(work: Path) -> list[str]:
    base, adapter = _pair(work)
    _run(["merge", base, adapter, "-o", str(work / "tuned"), "--dtype", "float32"])
    return ["extract", base, str(work / "tuned"), "-o", str(work / "out"), "--rank", "4"]


def _attest(work: Path) -> list[str]:
    base, adapter = _pair(work)
    _run(["merge", base, adapter, "-o", str(work / "merged")])
    return ["attest", str(work / "merged"), "-o", str(work / "out")]


def _report(work: Path) -> list[str]:
    base, adapter = _pair(work)
    return ["report", adapter, "--base", base, "-o", str(work / "out")]


def _gguf(work: Path) -> list[str]:
    from merge_models import base_tensors, write_base, write_lora

    parts = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "up_proj": "mlp.up_proj",
             "down_proj": "mlp.down_proj", "norm": "input_layernorm"}  # fmt: skip
    tensors = {}
    for name, tensor in base_tensors(layers=1).items():
        part = name.split(".")[-2]
        tensors[name.replace(part, parts.get(part, part)) if ".layers." in name else name] = tensor
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = write_base(work / "base", tensors, 1, config | {"architectures": ["LlamaForCausalLM"]})
    adapter = write_lora(work / "adapter", tensors)
    return ["factor", str(base), str(adapter), "-o", str(work / "out"), "--format", "gguf"]


def _hardlink(work: Path) -> list[str]:
    from merge_models import write_four_shards

    base, adapter = write_four_shards(work)
    return ["merge", str(base), str(adapter), "-o", str(work / "out"), "--link", "hardlink"]


def _finish(work: Path) -> list[str]:
    base, adapter = _pair(work)
    for part in ("1/2", "2/2"):
        _run(["merge", base, adapter, "-o", str(work / "out"), "--shards", part])
    return ["merge", base, adapter, "-o", str(work / "out"), "--finish"]


SCENARIOS = {
    "merge": Scenario(_merge()),
    "merge hardlink": Scenario(_hardlink),
    "merge keep-preimage": Scenario(_merge("--keep-preimage")),
    "merge overwrite": Scenario(_overwrite, replaces=True),
    "merge finish": Scenario(_finish),
    "delta": Scenario(lambda work: ["delta", *_pair(work), "-o", str(work / "out")]),
    "factor": Scenario(lambda work: ["factor", *_pair(work), "-o", str(work / "out")]),
    "factor gguf": Scenario(_gguf),
    "convert": Scenario(lambda work: ["convert", _pair(work)[1], "-o", str(work / "out")]),
    "extract": Scenario(_extract),
    "restore": Scenario(_restore),
    "attest": Scenario(_attest),
    "report": Scenario(_report),
}  # fmt: skip


# -- one run -------------------------------------------------------------------------------------------------


def _run(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command line in a child; (exit status, stdout, stderr)."""
    return _child(arguments, lambda: None)


def _child(arguments: list[str], begin: Callable[[], None]) -> tuple[int, str, str]:
    out, err = os.memfd_create("out"), os.memfd_create("err")
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.argv = ["adapter-merge", *arguments, "--json"]
            from adapter_merge.cli.main import main

            begin()
            main()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 98
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for fd in (out, err):
        texts.append(os.pread(fd, 1 << 20, 0).decode("utf-8", "replace"))
        os.close(fd)
    return code, texts[0], texts[1]


def content_of(path: Path) -> dict[str, bytes]:
    """Every file below `path` with its bytes; times and durations in our own files do not count."""
    if path.is_file():
        return {".": path.read_bytes()}
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            found[file.relative_to(path).as_posix()] = file.read_bytes()
    return found


def same_output(path: Path, reference: dict[str, bytes]) -> bool:
    """Equal weights, and the same names: texts name the time, and frames of a pre-image have no fixed order."""
    mine = content_of(path)
    plain = (".safetensors", ".gguf", ".onnx", ".data")
    return mine.keys() == reference.keys() and all(
        mine[name] == data for name, data in reference.items() if name.endswith(plain)
    )


def lose_unsynced(log: Path) -> int:
    """Empty every file whose last write came after its last fsync, under the name that it has now; their number."""
    dirty: set[str] = set()

    def moved(path: str, source: str, target: str) -> str:
        return target + path[len(source) :] if path == source or path.startswith(source + "/") else path

    for line in log.read_text(errors="surrogateescape").splitlines()[:-1]:  # the last call was not done
        name, first, second = line.split("\t")
        if name in ("write", "pwrite", "pwritev", "writev", "ftruncate", "fallocate", "open"):
            dirty.add(first)
        elif name == "fsync":
            dirty.discard(first)
        elif name == "rename":
            dirty = {moved(path, first, second) for path in dirty}
        elif name == "exchange":
            dirty = {
                moved(path, first, second) if moved(path, first, second) != path else moved(path, second, first)
                for path in dirty
            }
    lost = 0
    for path in dirty:
        file = Path(path)
        if file.is_file() and file.stat().st_nlink == 1:
            os.truncate(file, 0)
            lost += 1
    return lost


class Campaign:
    """Every crash point of one scenario."""

    def __init__(self, name: str, work: Path, library: ctypes.CDLL) -> None:
        self.name, self.scenario, self.work, self.library = name, SCENARIOS[name], work, library
        self.origin, self.place, self.log = work / "origin", work / "place", work / "log"
        self.place.mkdir(parents=True)
        arguments = self.scenario.prepare(self.place)
        self.arguments = arguments
        shutil.copytree(self.place, self.origin, symlinks=True)
        self.inputs = content_of(self.origin)
        self.output = self.place / self.scenario.output
        self.old = content_of(self.output) if self.scenario.replaces else {}
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        code, out, err = self.execute(CHANGES, 0, NOTHING)
        if code != 0:
            raise SystemExit(f"{name} fails by itself: {err or out}")
        self.new = content_of(self.output)
        self.calls = self.read_log()
        self.reset()
        self.execute(READS, 0, NOTHING)
        self.reads = self.read_log()

    def read_log(self) -> list[list[str]]:
        return [line.split("\t") for line in self.log.read_text(errors="surrogateescape").splitlines()]

    def reset(self) -> None:
        shutil.rmtree(self.place)
        shutil.copytree(self.origin, self.place, symlinks=True)

    def execute(self, kind: int, at: int, action: int, error: int = 0) -> tuple[int, str, str]:
        self.log.unlink(missing_ok=True)

        def begin() -> None:
            self.library.begin(os.fsencode(self.place), kind, ctypes.c_long(at), action, error, os.fsencode(self.log))

        return _child(self.arguments, begin)

    def points(self, action: str) -> list[int]:
        if action == "unreadable":
            return list(range(1, len(self.reads) + 1))
        numbers = range(1, len(self.calls) + 1)
        return [n for n in numbers if action != "tear" or "write" in self.calls[n - 1][0]]

    def crash(self, action: str, at: int) -> None:
        self.reset()
        reads = action == "unreadable"
        failures = READ_FAILURES if reads else FAILURES
        error = failures[at % len(failures)] if action in ("fail", "unreadable") else 0
        done = {"kill": KILL, "tear": TEAR, "lost": KILL}.get(action, FAIL)
        code, out, err = self.execute(READS if reads else CHANGES, at, done, error)
        call = (self.read_log() or [["nothing", "", ""]])[-1] if error == 0 else self._call(at)
        self.counts[action] += 1
        label = f"{self.name}: {action} {errno.errorcode.get(error, '')} at {at}, {' '.join(call)}"

        def fault(what: str) -> None:
            self.faults.append(f"{label}: {what}")
            print(self.faults[-1], flush=True)

        if error:
            if code not in (0, 1):
                fault(f"exit status {code}: {err[-300:]}")
            elif code == 1:
                self.counts["reported"] += 1
                problem = json.loads(out or "{}").get("error", {})
                if problem.get("kind") == "Bug" or "bug of" in err or "Traceback" in err:
                    fault(f"a bug: {err[-400:]}")
                elif "/" not in f"{problem.get('cause')}{problem.get('got')}":
                    fault(f"names no file: {err[-300:]}")
        elif code == -signal.SIGKILL:
            if action == "lost":
                self.counts["files emptied"] += lose_unsynced(self.log)
        elif code != 0:
            fault(f"exit status {code}: {err[-300:]}")
        self.check_state(fault)
        if error and code == 1:
            left = [path.name for path in self.place.iterdir() if path.name.startswith(".")]
            if left and "finish" not in self.name:
                fault(f"left {left}")
        if self.is_new(self.output) and not self.scenario.replaces:
            code, out, err = _run(self.arguments)  # refused, and cleans up what is dead
            if code != 1 or "exists already" not in err:
                fault(f"a second run on a finished output: {code} {err[-300:]}")
        else:
            code, out, err = _run(self.arguments)
            if code != 0:
                fault(f"run again: {code} {err[-300:]}")
        if not self.is_new(self.output):
            fault("run again, it gives another output")
        left = [path.name for path in self.place.iterdir() if path.name.startswith(".")]
        if left:
            fault(f"left after the next run: {left}")

    def _call(self, at: int) -> list[str]:
        log = self.read_log()
        return log[at - 1] if len(log) >= at else ["nothing", "", ""]

    def is_new(self, output: Path) -> bool:
        return output.exists() and same_output(output, self.new)

    def check_state(self, fault: Callable[[str], None]) -> None:
        from adapter_merge.outputs.integrity import check_integrity

        now = content_of(self.place)
        for name, data in self.inputs.items():
            inside = name == self.scenario.output or name.startswith(
                (f"{self.scenario.output}/", f".{self.scenario.output}.")
            )
            if not inside and now.get(name) != data:
                fault(f"the input {name} has changed")
        if not self.output.exists():
            if self.scenario.replaces and not (self.place / f".{self.scenario.output}.old").exists():
                fault("the old output is gone")
            return
        if self.is_new(self.output):
            self.counts["new output"] += 1
        elif self.scenario.replaces and same_output(self.output, self.old):
            self.counts["old output"] += 1
        else:
            fault("a partial output")
        if self.output.is_dir() and "adapter_merge.json" in self.new:  # a restored base has none
            try:
                check_integrity(self.output)
            except Exception as error:
                fault(f"the output is not whole: {error}")


def _import_everything() -> None:
    import adapter_merge.api.convert
    import adapter_merge.api.delta
    import adapter_merge.api.extract
    import adapter_merge.api.factor
    import adapter_merge.api.merge
    import adapter_merge.api.restore
    import adapter_merge.cli.attest
    import adapter_merge.cli.convert
    import adapter_merge.cli.delta
    import adapter_merge.cli.extract
    import adapter_merge.cli.factor
    import adapter_merge.cli.merge
    import adapter_merge.cli.report
    import adapter_merge.cli.restore
    import adapter_merge.outputs.attestation
    import adapter_merge.reporting.report
    import adapter_merge.reporting.report_page  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS])
    parser.add_argument("--actions", nargs="+", default=list(ACTIONS), choices=ACTIONS)
    parser.add_argument("--every", type=int, default=1, help="only every n-th point")
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="crash-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    library = os.environ.get("LD_PRELOAD")
    if library is None:
        os.environ["LD_PRELOAD"] = str(build_library(work))
        os.environ["CRASH_WORK"] = str(work)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    shutil.rmtree(work)
    work = Path(os.environ["CRASH_WORK"])
    sys.path.insert(0, str(HERE.parent))
    import torch

    torch.set_num_threads(1)
    _import_everything()
    faults: list[str] = []
    table: dict[str, Any] = {}
    try:
        for name in arguments.scenarios or SCENARIOS:
            campaign = Campaign(name, work / name.replace(" ", "-"), ctypes.CDLL(library))
            for action in arguments.actions:
                for at in campaign.points(action)[arguments.first :: arguments.every]:
                    campaign.crash(action, at)
            faults += campaign.faults
            calls = Counter(call[0] for call in campaign.calls)
            table[name] = {
                "calls": dict(calls),
                "reads": len(campaign.reads),
                **campaign.counts,
                "faults": len(campaign.faults),
            }
            print(json.dumps({name: table[name]}), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(table))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
