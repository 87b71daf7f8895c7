"""Nothing lost, nothing half-written: kills, full disks, locks, interrupts, split runs, restored bases."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapter_merge.merge import merging
from adapter_merge.merge.engine import FinishedShard, execute
from adapter_merge.merge.errors import FileFormatError, InputError, MismatchError, OutputError
from adapter_merge.merge.inputs import open_pair
from adapter_merge.merge.integrity import check_integrity
from adapter_merge.merge.journal import Workplace
from adapter_merge.merge.links import LINKS, can_link, link_file
from adapter_merge.merge.locks import locked
from adapter_merge.merge.merging import merge
from adapter_merge.merge.plan import plan_merge
from adapter_merge.merge.restore import restore
from merge_models import base_tensors, read_model, sha256_of, snapshot, write_base, write_lora

HERE = Path(__file__).parent


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base in four shards and an adapter that leaves the last one alone."""
    tensors = base_tensors()
    untouched = {name: tensors.pop(name) for name in ("model.embed_tokens.weight", "lm_head.weight", "model.counter")}
    base = write_base(tmp_path / "base", tensors | untouched, 1)
    (base / "model.safetensors").unlink()
    split = dict(tensors)
    parts = [dict(list(split.items())[number::3]) for number in range(3)] + [untouched]
    from safetensors.torch import save_file

    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00004.safetensors"
        save_file(part, base / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base, write_lora(tmp_path / "adapter", tensors)


@pytest.fixture
def left(tmp_path: Path) -> Iterator[None]:
    """At the end nothing but whole folders stands in tmp_path."""
    yield
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def driver(*arguments: object, timeout: float = 300) -> dict[str, int]:
    """Run faults.py, which kills and starves real merges, and return what it counted."""
    done = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), *map(str, arguments)], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.safetensors")}


# -- kills ---------------------------------------------------------------------------------------------------


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """Whatever the moment, the output is not there or whole; reruns get to the same bytes."""
    kills = int(os.environ.get("ADAPTER_MERGE_KILLS", "50"))
    tensors = base_tensors(layers=6, factor=6)
    base = write_base(tmp_path / "base", tensors, 6)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    merge(base, adapter, tmp_path / "whole")
    counted = driver("kill", base, adapter, tmp_path / "out", tmp_path / "whole", kills, timeout=60 + 6 * kills)
    assert counted["killed"] >= kills
    assert counted["resumed"] > 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    check_integrity(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_kill_while_an_output_is_replaced(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """With --overwrite the old or the new model stands there at any moment."""
    base, adapter = pair
    merge(base, adapter, tmp_path / "old", dtype="float32")
    merge(base, adapter, tmp_path / "new")
    merge(base, adapter, tmp_path / "out", dtype="float32")
    counted = driver("replace", base, adapter, tmp_path / "out", tmp_path / "old", tmp_path / "new", 15)
    assert counted["killed"] >= 15


# -- faults --------------------------------------------------------------------------------------------------


def test_file_size_limit(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    counted = driver("limit", *pair, tmp_path / "out", 20_000)
    assert counted == {"code": 1}
    assert not (tmp_path / "out").exists()


def test_full_disk(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A real file system of 256 KiB, and a check for room that was passed before the disk filled up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mount.stderr.strip()}")
    try:
        counted = driver("full", *pair, disk / "out")
        assert counted == {"code": 1}
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_too_small_a_disk_is_found_before_anything_is_written(
    tmp_path: Path, pair: tuple[Path, Path], left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="too small"):
        merge(*pair, tmp_path / "out")


def test_a_shard_that_ends_too_early_is_found_before_and_during_the_merge(
    tmp_path: Path, pair: tuple[Path, Path], left: None
) -> None:
    base, adapter = pair
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    victim = base / "model-00002-of-00004.safetensors"
    with victim.open("r+b") as stream:
        stream.truncate(victim.stat().st_size - 1000)
    (tmp_path / "direct").mkdir()
    with pytest.raises(FileFormatError, match="model-00002"):
        execute(plan, tmp_path / "direct", torch.device("cpu"), 2)
    with pytest.raises(FileFormatError, match="model-00002"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SLOW_DISK = """
import time
from adapter_merge.merge import chunks, cli
write = chunks.ChunkedFile._write
chunks.ChunkedFile._write = lambda self, chunk: (time.sleep(0.05), write(self, chunk))
cli.main()
"""


def test_interrupt_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = base_tensors(layers=4, factor=24)
    base = write_base(tmp_path / "base", tensors, 4)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    arguments = ["-c", SLOW_DISK, "merge", base, adapter, "-o", tmp_path / "out"]
    running = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while running.poll() is None and not list(tmp_path.glob(".out.partial/model/*")):
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_unreadable_base_is_reported(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    base, adapter = pair
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    victim = base / "model-00001-of-00004.safetensors"
    victim.unlink()
    (tmp_path / "direct").mkdir()
    with pytest.raises(FileFormatError, match="cannot be read"):
        execute(plan, tmp_path / "direct", torch.device("cpu"), 2)


# -- locks, modes --------------------------------------------------------------------------------------------


def test_two_runs_on_one_output_exclude_each_other(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="another run"):
        merge(*pair, tmp_path / "out")
    merge(*pair, tmp_path / "out")


def test_many_runs_at_once_make_one_output(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    counted = driver("race", *pair, tmp_path / "out", 6)
    assert counted["done"] == 1
    assert counted["refused"] == 5
    check_integrity(tmp_path / "out")


def test_an_output_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merging.workplace

    def late(output: Path, *arguments: object, **options: object) -> object:
        output.mkdir()
        (output / "precious").write_text("mine")
        return real(output, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "workplace", late)
    with pytest.raises(OutputError, match="exists already"):
        merge(*pair, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_foreign_folders_and_inputs_are_never_replaced(tmp_path: Path, pair: tuple[Path, Path], left: None) -> None:
    base, adapter = pair
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="not written by adapter-merge"):
        merge(base, adapter, tmp_path / "own", overwrite=True)
    before = snapshot(base)
    for output in (base, adapter, tmp_path):
        with pytest.raises(OutputError):
            merge(base, adapter, output, overwrite=True)
    assert snapshot(base) == before


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_modes_follow_the_umask(
    tmp_path: Path, pair: tuple[Path, Path], mask: int, file_mode: int, folder_mode: int
) -> None:
    old = os.umask(mask)
    try:
        merge(*pair, tmp_path / "out", keep_preimage=True)
    finally:
        os.umask(old)
    out = tmp_path / "out"
    for path in (out, *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path


# -- resuming and splitting ----------------------------------------------------------------------------------


def stopped_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Make the next merge fail once so many shards are finished."""
    real = Workplace.record
    count = iter(range(100))

    def record(self: Workplace, shard: FinishedShard) -> None:
        if next(count) >= shards:
            raise OSError(5, "the disk fails")
        real(self, shard)

    monkeypatch.setattr(Workplace, "record", record)


def resumed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that later merges compute."""
    made: list[str] = []
    real = execute

    def watched(*arguments: object, **options: object) -> object:
        made.extend(shard.file for shard in options["shards"])  # type: ignore[attr-defined]
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "execute", watched)
    return made


def test_a_failed_run_leaves_its_shards_only_when_asked(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for keep in (False, True):
        with monkeypatch.context() as patch:
            stopped_after(patch, 2)
            with pytest.raises(OutputError, match="the disk fails"):
                merge(*pair, tmp_path / "out", keep_partial=keep, workers=1)
        assert (tmp_path / ".out.partial").exists() is keep
    made = resumed(monkeypatch)
    merge(*pair, tmp_path / "out")
    assert len(made) == 2
    merge(*pair, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    first, second = (
        json.loads((tmp_path / name / "adapter_merge.json").read_text())["layers"] for name in ("out", "whole")
    )
    assert first == second


@pytest.mark.parametrize("change", ["output", "base", "adapter", "options", "version"])
def test_what_was_finished_is_taken_over_only_when_all_is_the_same(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    base, adapter = pair
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(OutputError):
            merge(base, adapter, tmp_path / "out", keep_partial=True, workers=1)
    finished = sorted(path.stem for path in (tmp_path / ".out.partial" / "journal").glob("model*.json"))
    assert len(finished) == 2
    options: dict[str, str] = {}
    expected = 4
    if change == "output":
        file = tmp_path / ".out.partial" / "model" / finished[0]
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        expected = 3
    elif change == "base":  # a byte in the middle, which no fingerprint of the ends sees, and the old time
        file = base / finished[0]
        times = file.stat()
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        expected = 3
    elif change == "adapter":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9.0}))
    elif change == "options":
        options = {"dtype": "float16"}
    else:
        plan = tmp_path / ".out.partial" / "journal" / "plan.json"
        held = json.loads(plan.read_text())
        held["versions"]["torch"] = "0.1"
        plan.write_text(json.dumps(held))
    made = resumed(monkeypatch)
    merge(base, adapter, tmp_path / "out", **options)
    assert len(made) == expected
    merge(base, adapter, tmp_path / "whole", **options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_parts_and_finish_make_what_one_run_makes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "whole")
    made = [set(merge(*pair, tmp_path / "out", part=(number, 3))["files"]) for number in (3, 1, 2)]
    assert not (tmp_path / "out").exists()
    assert sum(len(files) for files in made) == len(set.union(*made)) == 4
    merge(*pair, tmp_path / "out", finish=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert set(snapshot(tmp_path / "out")) == set(snapshot(tmp_path / "whole"))
    check_integrity(tmp_path / "out", inputs=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_finish_names_what_is_missing_and_keeps_what_is_there(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", part=(1, 2))
    with pytest.raises(OutputError, match="is not finished") as raised:
        merge(*pair, tmp_path / "out", finish=True)
    assert len(raised.value.problems) == 2
    with pytest.raises(OutputError, match="another merge"):
        merge(*pair, tmp_path / "out", part=(2, 2), dtype="float16")
    merge(*pair, tmp_path / "out", part=(2, 2))
    damaged = next((tmp_path / ".out.partial" / "model").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(OutputError, match=damaged.name):
        merge(*pair, tmp_path / "out", finish=True)
    for part in ((1, 2), (2, 2)):
        merge(*pair, tmp_path / "out", part=part)
    merge(*pair, tmp_path / "out", finish=True)
    check_integrity(tmp_path / "out")


def test_parts_run_at_the_same_time(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    counted = driver("parts", *pair, tmp_path / "out", 4)
    assert counted == {"done": 4}
    merge(*pair, tmp_path / "out", finish=True)
    merge(*pair, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_a_part_that_does_not_exist(tmp_path: Path, pair: tuple[Path, Path], part: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="no such part"):
        merge(*pair, tmp_path / "out", part=part)


# -- links ---------------------------------------------------------------------------------------------------


def test_hard_links_share_untouched_shards_only(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, _ = pair
    merge(*pair, tmp_path / "out", link="hardlink")
    merge(*pair, tmp_path / "copied", link="copy")
    shared = [path.name for path in sorted((tmp_path / "out").glob("*.safetensors")) if path.samefile(base / path.name)]
    assert shared == ["model-00004-of-00004.safetensors"]
    assert weights(tmp_path / "out") == weights(tmp_path / "copied")
    check_integrity(tmp_path / "out", inputs=True)


def test_linked_shards_need_no_space(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = pair
    untouched = (base / "model-00004-of-00004.safetensors").stat().st_size
    whole = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=whole - untouched))
    with pytest.raises(OutputError, match="the disk is too small"):
        merge(*pair, tmp_path / "out", link="copy")
    merge(*pair, tmp_path / "out", link="hardlink")
    assert (tmp_path / "out" / "model-00004-of-00004.safetensors").samefile(base / "model-00004-of-00004.safetensors")


def test_whether_a_link_would_take_is_seen_without_leaving_anything(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    source, probe = pair[0] / "config.json", tmp_path / "probe"
    before = sorted(tmp_path.iterdir())
    found = {link: can_link(source, tmp_path, link) for link in LINKS}
    assert sorted(tmp_path.iterdir()) == before
    assert not found["copy"] and found["hardlink"]
    assert found["auto"] == found["reflink"] == link_file(source, probe, "auto")


def test_reflinks_where_the_file_system_has_them_and_a_clear_error_elsewhere(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    probe = tmp_path / "probe"
    try:
        link_file(pair[0] / "config.json", probe, "reflink")
    except OutputError:
        with pytest.raises(OutputError, match="--link auto"):
            merge(*pair, tmp_path / "out", link="reflink")
        merge(*pair, tmp_path / "out", link="auto")
    else:
        merge(*pair, tmp_path / "out", link="reflink")
    assert not (pair[0] / "model-00004-of-00004.safetensors").samefile(
        tmp_path / "out" / "model-00004-of-00004.safetensors"
    )
    check_integrity(tmp_path / "out", inputs=True)


# -- proof and way back --------------------------------------------------------------------------------------


def test_integrity_names_every_file_that_is_not_what_was_written(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out")
    out = tmp_path / "out"
    found = check_integrity(out, inputs=True)
    assert found.files == len(snapshot(out)) - 1
    assert found.inputs > 0
    assert found.moved == ()
    shard = out / "model-00001-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    (out / "tokenizer.json").unlink()
    (out / "surprise.py").write_text("import os")
    with pytest.raises(FileFormatError) as raised:
        check_integrity(out)
    text = str(raised.value)
    assert len(raised.value.problems) == 3
    for name in ("model-00001-of-00004.safetensors", "tokenizer.json", "surprise.py"):
        assert name in text


def test_integrity_needs_a_manifest_with_hashes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", hashes=False)
    for folder in (tmp_path / "out", pair[0]):
        with pytest.raises(InputError, match="nothing to prove"):
            check_integrity(folder)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("dora", [False, True])
def test_restore_from_the_preimage_gives_every_byte_of_the_base(tmp_path: Path, dora: bool, dtype: str | None) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(
        tmp_path / "adapter",
        tensors,
        dora=dora,
        extra={"base_model.model.lm_head.weight": torch.randn(50, 64)},
        config={"modules_to_save": ["lm_head"]},
    )
    merge(base, adapter, tmp_path / "out", dtype=dtype, keep_preimage=True)
    before = snapshot(base)
    (tmp_path / "base").rename(tmp_path / "gone")
    restore(tmp_path / "out", tmp_path / "back")
    assert snapshot(tmp_path / "back") == before
    check_integrity(tmp_path / "out")


def test_restore_from_the_base_proves_it_first(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    merge(base, adapter, tmp_path / "out")
    with pytest.raises(InputError, match="no pre-image"):
        restore(tmp_path / "out", tmp_path / "back")
    restore(tmp_path / "out", tmp_path / "back", base)
    assert snapshot(tmp_path / "back") == snapshot(base)
    (base / "config.json").write_text("{}")
    with pytest.raises(MismatchError, match=r"config\.json"):
        restore(tmp_path / "out", tmp_path / "other", base)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["weights", "frames", "missing"])
def test_restore_refuses_what_is_not_the_base(tmp_path: Path, pair: tuple[Path, Path], damage: str) -> None:
    merge(*pair, tmp_path / "out", keep_preimage=True)
    out = tmp_path / "out"
    file = out / "model-00001-of-00004.safetensors"
    if damage == "frames":
        file = out / "preimage" / "model-00001-of-00004.safetensors.bin"
    if damage == "missing":
        (out / "preimage" / "model-00001-of-00004.safetensors.json").unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-7] ^= 4
        file.write_bytes(data)
    with pytest.raises(FileFormatError):
        restore(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_preimage_survives_a_killed_and_a_split_run(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for number in (1, 2):
        merge(*pair, tmp_path / "out", part=(number, 2), keep_preimage=True)
    merge(*pair, tmp_path / "out", finish=True, keep_preimage=True)
    restore(tmp_path / "out", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(pair[0])


@pytest.mark.parametrize("head", [False, True])
def test_restore_of_an_untied_model(tmp_path: Path, head: bool) -> None:
    """The output's head is made of the base's embeddings, which stand in the pre-image once."""
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_base(tmp_path / "base", tensors, 1, config=config)
    a, b = torch.randn(4, 50) * 0.1, torch.randn(64, 4) * 0.1
    extra = {
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
    }
    targets = ["q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens"]
    if head:
        extra["base_model.model.lm_head.lora_A.weight"] = b.T.contiguous()
        extra["base_model.model.lm_head.lora_B.weight"] = a.T.contiguous() * 2
        targets.append("lm_head")
    adapter = write_lora(tmp_path / "adapter", tensors, extra=extra, config={"target_modules": targets})
    merge(base, adapter, tmp_path / "out", keep_preimage=True)
    assert "lm_head.weight" in read_model(tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(base)


def test_merging_a_merged_model_leaves_the_older_preimage_behind(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "one", keep_preimage=True)
    merge(tmp_path / "one", pair[1], tmp_path / "two", keep_preimage=True)
    restore(tmp_path / "two", tmp_path / "back")
    restored, one = snapshot(tmp_path / "back"), snapshot(tmp_path / "one")
    assert restored == {name: sha for name, sha in one.items() if not name.startswith("preimage/")}


# -- tied weights --------------------------------------------------------------------------------------------


def test_an_adapted_embedding_unties_the_head(tmp_path: Path) -> None:
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_base(tmp_path / "base", tensors, config=config)
    adapter = write_lora(tmp_path / "adapter", tensors, only="layers.")
    merge(base, adapter, tmp_path / "tied")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in read_model(tmp_path / "tied")

    embedding = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, 50, generator=generator) * 0.1, torch.randn(64, 4, generator=generator) * 0.1
    prefix = "base_model.model.model.embed_tokens"
    adapter = write_lora(
        tmp_path / "embedding",
        tensors,
        extra={f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b},
        config={"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens"]},
    )
    merge(base, adapter, tmp_path / "untied")
    found = read_model(tmp_path / "untied")
    assert torch.equal(found["lm_head.weight"], embedding)
    changed = embedding.double() + 2.0 * (b.double() @ a.double()).T
    torch.testing.assert_close(found["model.embed_tokens.weight"].double(), changed, rtol=2**-8, atol=1e-6)
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "untied" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


# -- the command line ----------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = "from adapter_merge.merge.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)


def test_split_verify_and_restore_on_the_command_line(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    for part in ("1/2", "2/2"):
        done = command("merge", *pair, "-o", out, "--shards", part, "--keep-preimage", "--link", "copy")
        assert done.returncode == 0, done.stderr
        assert f"part {part}" in done.stdout
    assert not out.exists()
    done = command("merge", *pair, "-o", out, "--finish", "--keep-preimage", "--vram", "512M")
    assert done.returncode == 0, done.stderr
    done = command("verify", out, "--inputs", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    done = command("restore", out, "-o", back)
    assert done.returncode == 0, done.stderr
    assert snapshot(back) == snapshot(pair[0])
    (out / "config.json").write_text("{}")
    done = command("verify", out)
    assert done.returncode == 1
    assert "config.json: is not what was recorded" in done.stderr


@pytest.mark.parametrize("arguments", [["--shards", "3/2"], ["--shards", "x"], ["--vram", "much"]])
def test_bad_options_are_usage_errors(tmp_path: Path, pair: tuple[Path, Path], arguments: list[str]) -> None:
    done = command("merge", *pair, "-o", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert arguments[1] in done.stderr


def test_options_that_exclude_each_other_are_reported_together(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    done = command(
        "merge", *pair, "-o", tmp_path / "out", "--no-hashes", "--finish", "--shards", "1/2", "--keep-preimage"
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 3
