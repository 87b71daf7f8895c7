"""Journal of a merge, so that a killed or split one resumes: one entry per finished file, whose hash is checked again.

    .OUT.partial/
      model/            the output so far
      journal/          plan.json: the merge in progress; <file>.json: hashes and figures of a finished file
      split             exists while parts are made, so that no run removes the parts of other machines

An entry is written (and synced) after its file is on the disk. A rerun keeps a file when the plan is the same and when
the hashes of the file, and of all base files that it was made from, are those of the entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_merge.engine.execute import FinishedShard
from adapter_merge.engine.plan import MergePlan, ShardPlan
from adapter_merge.engine.weight_change import WeightChange
from adapter_merge.errors import InputError, OutputError, Problem, raise_all
from adapter_merge.files.hashing import file_sha256, hash_files
from adapter_merge.files.locks import locked
from adapter_merge.storage.checkpoint import read_json

from .leftovers import JOURNAL, MODEL, SPLIT, recover, remove, staging_folder, wipe
from .staging import check_output, close_to_others, disk_errors, open_to_readers, publish, sync_folder

PLAN = "plan.json"
MergePart = tuple[int, int]  # i of n, counted from 1


class Workplace:
    """Staging folder of one merge, with its journal."""

    def __init__(self, staging: Path, plan: MergePlan, readers: int) -> None:
        self.staging, self.plan, self.readers = staging, plan, readers
        self.folder = staging / MODEL
        self.journal = staging / JOURNAL
        self.identity: dict[str, Any] = {}  # base, adapter and options of the merge, set by `workplace`
        self._hashes: dict[Path, str] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> str:
        """The kind of device that computes this merge, or has computed its parts."""
        return str(self.identity["device"])

    @property
    def _key(self) -> str:
        """The hash of the identity, stored in every entry, so that entries of other options are not used."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def other_sources(self, shard: ShardPlan) -> list[Path]:
        """Return the base files of `shard` beside its source: pickles, and the shards of tied weights."""
        base = {*self.plan.base.files} - {shard.source}
        refs = [ref for job in shard.jobs for ref in (job.source, job.original) if ref is not None]
        read = {file for ref in refs for file in ref.files}
        return sorted(base & read)

    def _hash(self, file: Path) -> str:
        with self._lock:
            if file not in self._hashes:
                self._hashes[file] = file_sha256(file)
            return self._hashes[file]

    def record(self, shard: FinishedShard) -> None:
        """Write the journal entry of a finished file that is on the disk."""
        sync_folder(self.folder)  # so that the file's name is on the disk too
        others = {}
        if shard.sha256 is not None:
            plan = next(plan for plan in self.plan.shards if plan.file == shard.file)
            others = {file.name: self._hash(file) for file in self.other_sources(plan)}
        write_json_atomically(
            self.journal / f"{shard.file}.json", {"plan": self._key, "others": others, "shard": asdict(shard)}
        )

    def entries(self) -> dict[str, tuple[FinishedShard, dict[str, str]]]:
        """Read the entries of this merge, unchecked: finished files, and sha256 of the other base files of each."""
        entries = {}
        for file in sorted(self.journal.glob("*.json")):
            if file.name != PLAN:
                content = read_json(file)
                if content.get("plan") != self._key:
                    continue
                fields = content["shard"]
                figures = {name: WeightChange(**values) for name, values in fields.pop("figures").items()}
                shard = FinishedShard(figures=figures, **fields)
                entries[shard.file] = shard, content["others"]
        return entries

    def check_finished(
        self, shards: Iterable[ShardPlan], companions: Callable[[str], list[Path]]
    ) -> dict[str, FinishedShard]:
        """Hash the finished files among `shards` again and return those that match; other files are removed.

        companions: returns further files that belong to an output file, by its name.
        """
        entries = self.entries()
        claims: dict[str, dict[Path, str | None]] = {}
        plans = {plan.file: plan for plan in shards}
        for file, plan in plans.items():
            if file not in entries or not all(path.is_file() for path in (self.folder / file, *companions(file))):
                continue
            entry, others = entries[file]
            if entry.sha256 is None:  # written without hashes: it cannot be checked
                continue
            claims[file] = {self.folder / file: entry.sha256}
            if plan.source is not None:
                claims[file][plan.source] = entry.source_sha256
            claims[file] |= {path: others.get(path.name) for path in self.other_sources(plan)}
        hashes = hash_files(path for claim in claims.values() for path in claim)
        finished = {}
        for file in plans:
            if file in claims and all(hashes[path] == sha for path, sha in claims[file].items()):
                finished[file] = entries[file][0]
                continue
            remove(self.journal / f"{file}.json")
            remove(self.folder / file)
            for companion in companions(file):
                remove(companion)
        return finished


@contextmanager
def workplace(
    output: Path,
    overwrite: bool,
    identity: dict[str, Any],
    plan: MergePlan,
    readers: int,
    *,
    part: MergePart | None = None,
    finishing: bool = False,
    keep: bool = False,
) -> Iterator[Workplace]:
    """Provide the folder to build `output` in, with the finished files of an earlier run of the same `identity`.

    readers: the mode bits that the output may have (InputSnapshot.readers). part: this run writes one part of the
    output, and the folder stays for the other parts. finishing: this run joins the parts, on any device. keep: the
    folder stays when this run fails. The folder also stays after a kill, and where it holds parts of a split merge. The
    caller publishes it. A folder of another merge is removed, unless it holds parts, which other machines may have
    computed. Raises OutputError.
    """
    check_output(output, overwrite)
    place = Workplace(staging_folder(output), plan, readers)
    split = place.staging / SPLIT
    is_kept = keep or finishing or part is not None or split.exists()
    left = "the finished shards were kept: run the same merge again to resume" if is_kept else "nothing was left behind"
    with locked(output, shared=part is not None), disk_errors(output, left), ExitStack() as stack:
        if part is None:
            recover(output)
        check_output(output, overwrite)
        done = False
        try:
            _adopt(place, output, identity, part is not None, finishing)
            for shard in () if part is None else shards_of_part(plan.shards, part):
                stack.enter_context(
                    locked(place.staging / shard.file)
                )  # parts of different splits (1/2 and 1/3) may write the same shard
            yield place
            done = True
        finally:
            if part is None and (done or not (keep or finishing or split.exists())):
                remove(place.staging)


def publish_workplace(place: Workplace, output: Path, overwrite: bool) -> None:
    """Rename the finished model to `output`, with the permissions of its inputs."""
    open_to_readers(place.folder, place.readers, stat.S_IMODE(place.folder.stat().st_mode))
    publish(place.folder, output, overwrite)


def _adopt(place: Workplace, output: Path, identity: dict[str, Any], shared: bool, finishing: bool) -> None:
    """Use the folder of an earlier run with the same identity, or create a new one. Raises OutputError."""
    if place.staging.is_symlink():  # nothing is written through it
        remove(place.staging)
    file = place.journal / PLAN
    plan = json.loads(json.dumps(identity))
    existing = read_json(file) if file.is_file() else None
    if finishing:
        if existing is None:
            raise OutputError(f"{output}: none of its parts was written", hint="run every --shards part first")
        plan["device"] = existing.get("device")  # joining the parts computes nothing
    if existing != plan:
        if existing is not None and (shared or finishing):
            differing = sorted(key for key in {*existing, *plan} if existing.get(key) != plan.get(key))
            raise OutputError(
                f"{output}: parts of another merge exist already",
                expected="the same base, adapter and options for every part, and for --finish",
                got=f"other {', '.join(differing)}",
                hint=f"finish or remove {place.staging}",
            )
        if not shared:
            wipe(place.staging)
        place.staging.mkdir(exist_ok=True)
        close_to_others(place.staging, place.readers)
        place.journal.mkdir(exist_ok=True)
        write_json_atomically(file, plan)
        if shared and read_json(file) != plan:  # another first part wrote the plan at the same time
            raise OutputError(f"{output}: parts of another merge exist already")
    if shared:
        (place.staging / SPLIT).touch()
    place.identity = plan
    # A run that was killed after publishing and before removing the journal leaves only the journal.
    place.folder.mkdir(exist_ok=True)


def shards_of_part(shards: Sequence[ShardPlan], part: MergePart) -> list[ShardPlan]:
    """Return the shards of part i of n: largest shards first, each assigned to the part with the fewest bytes."""
    number, count = part
    if not 1 <= number <= count:
        raise InputError(f"--shards {number}/{count}: no such part", expected="i/n with 1 <= i <= n")
    sizes = [0] * count
    selected = []
    for shard in sorted(shards, key=lambda shard: (-shard.nbytes, shard.file)):
        least = min(range(count), key=lambda share: sizes[share])
        sizes[least] += shard.nbytes
        if least == number - 1:
            selected.append(shard)
    return selected


def check_complete(shards: Sequence[ShardPlan], finished: Iterable[str], output: Path) -> None:
    """Raise OutputError with every shard that no part has finished."""
    done = set(finished)
    raise_all(
        [
            Problem(f"{output}: {shard.file} is not finished", hint="run the --shards part that writes it again")
            for shard in shards
            if shard.file not in done
        ],
        OutputError,
    )


def write_json_atomically(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically (a temporary file, then a rename), and sync it."""
    partial = file.with_name(f".{file.name}.{os.urandom(8).hex()}")  # pids are the same in every container
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
    sync_folder(file.parent)
