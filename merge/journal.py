"""What a killed or split merge has finished: one small file per output file, believed only after it was proved again.

    .OUT.partial/
      model/            the output, growing
      journal/          plan.json: what is being made; <file>.json: hashes and figures of a finished file

An entry is written (and synced) after its file is on the disk. A rerun takes a file over when the plan is the same one
and when the file, and the base's file that it was made from, hash to what the entry says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .checkpoint import read_json
from .engine import FinishedShard
from .errors import InputError, OutputError, Problem, raise_all
from .figures import TensorFigures
from .hashing import hash_files
from .locks import locked
from .output import check_output, disk_errors, publish, remove, staging_folder, sync_folder
from .plan import ShardPlan

PLAN = "plan.json"
Part = tuple[int, int]  # i of n, counted from 1


class Workplace:
    """The staging folder of one merge, with its journal."""

    def __init__(self, staging: Path) -> None:
        self.staging = staging
        self.folder = staging / "model"
        self.journal = staging / "journal"

    def record(self, shard: FinishedShard) -> None:
        """Note a file that is on the disk."""
        sync_folder(self.folder)  # its name as well
        write_whole(self.journal / f"{shard.file}.json", asdict(shard))

    def entries(self) -> dict[str, FinishedShard]:
        """What the journal says, unproved."""
        found = {}
        for file in sorted(self.journal.glob("*.json")):
            if file.name != PLAN:
                content = read_json(file)
                figures = {name: TensorFigures(**values) for name, values in content.pop("figures").items()}
                shard = FinishedShard(figures=figures, **content)
                found[shard.file] = shard
        return found

    def proved(self, shards: Iterable[ShardPlan], companions: Callable[[str], list[Path]]) -> dict[str, FinishedShard]:
        """The finished ones of `shards`, hashed again; what is not finished, or is not what it was, is removed.

        companions: other files that belong to an output file, by its name.
        """
        entries = self.entries()
        plans = {plan.file: plan for plan in shards}
        outputs = {file: self.folder / file for file in plans if file in entries and (self.folder / file).is_file()}
        sources = {file: plan.source for file in outputs if (plan := plans[file]).source is not None}
        hashes = hash_files([*outputs.values(), *sources.values()])
        found = {}
        for file in plans:
            entry = entries.get(file)
            if entry is not None and file in outputs and entry.sha256 == hashes[outputs[file]]:
                source = sources.get(file)
                if source is None or entry.source_sha256 == hashes[source]:
                    found[file] = entry
                    continue
            remove(self.journal / f"{file}.json")
            remove(self.folder / file)
            for companion in companions(file):
                remove(companion)
        return found


@contextmanager
def workplace(
    output: Path, overwrite: bool, identity: dict[str, Any], part: Part | None = None, keep: bool = False
) -> Iterator[Workplace]:
    """The place to build `output` in, with what an earlier run of the same `identity` has left there.

    part: this run makes one part of the output; the place stays for the others. keep: it stays when this run fails.
    A killed run leaves it in any case. The caller publishes; a place with other content is wiped, but for a part,
    which could wipe the work of others. Raises OutputError.
    """
    check_output(output, overwrite)
    left = "the finished shards stay: run it again to go on" if keep or part is not None else "nothing was left behind"
    with locked(output, shared=part is not None), disk_errors(output, left):
        check_output(output, overwrite)
        place = Workplace(staging_folder(output))
        done = False
        try:
            _adopt(place, output, identity, part is not None)
            if part is None:
                yield place
            else:
                with locked(place.staging / f"part-{part[0]}-of-{part[1]}"):
                    yield place
            done = True
        finally:
            if part is None and (done or not keep):
                remove(place.staging)


def finish(place: Workplace, output: Path) -> None:
    """The finished model takes its name; the journal goes."""
    publish(place.folder, output)


def _adopt(place: Workplace, output: Path, identity: dict[str, Any], shared: bool) -> None:
    file = place.journal / PLAN
    wanted = json.loads(json.dumps(identity))
    held = read_json(file) if file.is_file() else None
    if held != wanted:
        if held is not None and shared:
            differing = sorted(key for key in {*held, *wanted} if held.get(key) != wanted.get(key))
            raise OutputError(
                f"{output}: parts of another merge are there already",
                expected="the same base, adapter and options for every part",
                got=f"other {', '.join(differing)}",
                hint=f"finish or remove {place.staging}",
            )
        if not shared:
            remove(place.staging)
        place.journal.mkdir(parents=True, exist_ok=True)
        write_whole(file, wanted)
        if shared and read_json(file) != wanted:  # two first parts met
            raise OutputError(f"{output}: parts of another merge are there already")
    # A run killed between its last two steps, the output's name and the journal's end, leaves a journal alone.
    place.folder.mkdir(exist_ok=True)


def shards_of_part(shards: Sequence[ShardPlan], part: Part) -> list[ShardPlan]:
    """The i-th of n shares of about the same size: largest first, each to the share that has the least."""
    number, count = part
    if not 1 <= number <= count:
        raise InputError(f"--shards {number}/{count}: there is no such part", expected="i/n with 1 <= i <= n")
    sizes = [0] * count
    mine = []
    for shard in sorted(shards, key=lambda shard: (-shard.nbytes, shard.file)):
        least = min(range(count), key=lambda share: sizes[share])
        sizes[least] += shard.nbytes
        if least == number - 1:
            mine.append(shard)
    return mine


def check_complete(shards: Sequence[ShardPlan], finished: Iterable[str], output: Path) -> None:
    """Raise OutputError naming every shard that no part has finished."""
    done = set(finished)
    raise_all(
        [
            Problem(f"{output}: {shard.file} is not finished", hint="run the --shards part that makes it (again)")
            for shard in shards
            if shard.file not in done
        ],
        OutputError,
    )


def write_whole(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is whole or not there, and sync it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
    sync_folder(file.parent)
