"""The cache of served folders: one maker, nothing half-written, a bound, and no removal of what is in use."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adapter_merge.errors import InputError, OutputError
from adapter_merge.serve.cli.cache import cache as cache_commands
from adapter_merge.serve.conversion.cache import Cache, Entry, Lease, compute_key

KEYS = [compute_key({"number": number}) for number in range(6)]


def maker(nbytes: int = 1000, made: list[str] | None = None) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        if made is not None:
            made.append(folder.name)
        folder.mkdir()
        (folder / "weights").write_bytes(os.urandom(nbytes))
        return {"adapter": "there", "base": "that"}

    return make


def test_made_once_and_found_again(tmp_path: Path) -> None:
    made: list[str] = []
    cache = Cache(tmp_path / "cache")
    first = cache.obtain(KEYS[0], maker(made=made))
    second = cache.obtain(KEYS[0], maker(made=made))
    assert len(made) == 1
    assert first.folder == second.folder == tmp_path / "cache" / KEYS[0]
    (entry,) = cache.entries()
    assert (entry.key, entry.adapter, entry.base, entry.in_use) == (KEYS[0], "there", "that", True)
    first.release()
    assert cache.entries()[0].in_use
    second.release()
    assert not cache.entries()[0].in_use


def test_a_failing_maker_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def make(folder: Path) -> dict[str, Any]:
        folder.mkdir()
        (folder / "half").write_bytes(b"1")
        raise InputError("no")

    with pytest.raises(InputError):
        cache.obtain(KEYS[0], make)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
    assert cache.obtain(KEYS[0], maker()).folder.is_dir()


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.obtain(KEYS[0], maker()) as lease:
        file = lease.folder / "weights"
    file.write_bytes(b"short")
    made: list[str] = []
    with cache.obtain(KEYS[0], maker(made=made)) as lease:
        assert (lease.folder / "weights").stat().st_size == 1000
    assert len(made) == 1


@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "another process"])
def test_a_changed_byte_is_found_at_the_next_use(tmp_path: Path, fresh: bool) -> None:
    """Same size, other bytes: never served; `verify` names the file before."""
    cache = Cache(tmp_path)
    with cache.obtain(KEYS[0], maker()) as lease:
        file = lease.folder / "weights"
    cache.obtain(KEYS[1], maker()).release()
    assert cache.verify() == []
    whole = bytearray(file.read_bytes())
    whole[500] ^= 1
    file.write_bytes(whole)
    ((entry, problems),) = cache.verify()
    assert entry.key == KEYS[0]
    assert len(problems) == 1
    assert "weights: expected sha256" in problems[0]
    made: list[str] = []
    user = Cache(tmp_path) if fresh else cache
    assert user.lease(file.parent) is None
    with user.obtain(KEYS[0], maker(made=made)):
        assert file.read_bytes() != bytes(whole)
    assert len(made) == 1
    assert cache.verify() == []


def test_verify_names_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in KEYS[:3]:
        cache.obtain(key, maker()).release()
    (tmp_path / KEYS[0] / "weights").unlink()
    (tmp_path / KEYS[1] / "more").write_bytes(b"1")
    (tmp_path / KEYS[2] / "entry.json").write_text("{}")
    told = {entry.key: problems for entry, problems in cache.verify()}
    assert told[KEYS[0]] == ["weights is missing"]
    assert told[KEYS[1]] == ["more does not belong to the entry"]
    assert "entry.json cannot be read" in told[KEYS[2]][0]


def test_the_command_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache verify`: exit code 0, then 1 with the file's name."""
    monkeypatch.setenv("ADAPTER_MERGE_CACHE", str(tmp_path))
    with Cache(tmp_path).obtain(KEYS[0], maker()) as lease:
        file = lease.folder / "weights"
    whole = CliRunner().invoke(cache_commands, ["verify"])
    assert (whole.exit_code, whole.stdout) == (0, "")
    file.write_bytes(bytes(1000))
    found = CliRunner().invoke(cache_commands, ["verify", "--json"])
    assert found.exit_code == 1
    (row,) = json.loads(found.stdout)["damaged"]
    assert row["key"] == KEYS[0]
    assert "weights: expected sha256" in row["problems"][0]


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".partial-{KEYS[0]}" / "folder").mkdir(parents=True)
    (tmp_path / f".partial-{KEYS[0]}" / "folder" / "weights").write_bytes(b"half")
    cache = Cache(tmp_path)
    with cache.obtain(KEYS[0], maker()) as lease:
        assert (lease.folder / "weights").stat().st_size == 1000
    (tmp_path / f".partial-{KEYS[1]}").mkdir()
    cache.clear()
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10**9)
    for number, key in enumerate(KEYS[:4]):
        cache.obtain(key, maker()).release()
        os.utime(tmp_path / f"{key}.lock", (number, number))
    cache.obtain(KEYS[0], maker()).release()  # used again: now the newest
    cache.max_bytes = sum(entry.nbytes for entry in cache.entries()[2:])
    removed = cache.evict()
    assert [entry.key for entry in removed] == [KEYS[1], KEYS[2]]
    assert {entry.key for entry in cache.entries()} == {KEYS[3], KEYS[0]}


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1)
    held = cache.obtain(KEYS[0], maker())
    free = cache.obtain(KEYS[1], maker())
    free.release()
    cache.evict()
    assert held.folder.is_dir()
    assert not free.folder.exists()
    removed, kept = cache.clear()
    assert (len(removed), len(kept)) == (0, 1)
    held.release()
    removed, kept = cache.clear()
    assert (len(removed), len(kept)) == (1, 0)
    assert list(tmp_path.iterdir()) == []


def _obtain(root: Path, log: Path, start: Any) -> None:
    def make(folder: Path) -> dict[str, Any]:
        with log.open("a") as stream:
            stream.write("made\n")
        time.sleep(0.3)
        return maker()(folder)  # type: ignore[no-any-return]

    start.wait()
    with Cache(root).obtain(KEYS[0], make) as lease:
        assert (lease.folder / "weights").stat().st_size == 1000


def test_many_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    workers = [context.Process(target=_obtain, args=(tmp_path / "cache", tmp_path / "log", start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def _hold_and_die(root: Path, ready: Any) -> None:
    with Cache(root).obtain(KEYS[0], maker()):
        ready.set()
        time.sleep(60)


def test_a_killed_server_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    worker = context.Process(target=_hold_and_die, args=(tmp_path, ready))
    worker.start()
    assert ready.wait(60)
    cache = Cache(tmp_path)
    assert cache.clear()[1] != []
    worker.kill()
    worker.join()
    assert cache.clear() == ([], []) or cache.entries() == []
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_nobody_refers_to_is_given_up(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    lease: Lease | None = cache.obtain(KEYS[0], maker())
    assert cache.entries()[0].in_use
    assert lease is not None
    lease = None
    assert not cache.entries()[0].in_use


def test_an_eviction_that_fails_keeps_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Cache) -> list[Entry]:
        raise OutputError("no")

    monkeypatch.setattr(Cache, "evict", fail)
    with pytest.raises(OutputError) as caught:
        Cache(tmp_path).obtain(KEYS[0], maker())
    assert not Cache(tmp_path).entries()[0].in_use, caught  # the error is still there, and with it its frames


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cache cannot be used"):
        Cache(tmp_path / "file" / "cache").obtain(KEYS[0], maker())
