"""What a later run may take over, what it may not wipe, and who may put parts together."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from merge_models import base_tensors, sha256_of, write_base, write_lora
from safetensors.torch import load_file

from adapter_merge.api import merge as merging
from adapter_merge.api.delta import delta
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.engine.execute import FinishedShard
from adapter_merge.errors import OutputError
from adapter_merge.files.locks import locked
from adapter_merge.outputs import resume_journal as journal
from adapter_merge.outputs.integrity import check_integrity
from adapter_merge.outputs.resume_journal import Workplace, write_json_atomically


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = base_tensors(factor=2)
    return write_base(tmp_path / "base", tensors), write_lora(tmp_path / "adapter", tensors)


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.rglob("*.safetensors")}


def fails_after(shards: int, patch: pytest.MonkeyPatch) -> None:
    """Let merges fail once so many shards are finished."""
    real, count = Workplace.record, iter(range(100))

    def record(self: Workplace, shard: FinishedShard) -> None:
        if next(count) >= shards:
            raise OSError(5, "the disk fails")
        real(self, shard)

    patch.setattr(Workplace, "record", record)


# -- parts are never wiped -----------------------------------------------------------------------------------


def test_finishing_with_other_options_wipes_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A forgotten option at --finish must not cost what many machines have made."""
    out = tmp_path / "out"
    for number in (1, 2):
        merge(*pair, out, MergeOptions(part=(number, 2), dtype="float16"))
    made = weights(tmp_path / ".out.partial")
    assert len(made) == 3
    with pytest.raises(OutputError, match="another merge"):
        merge(*pair, out, MergeOptions(finish=True))
    with pytest.raises(OutputError, match="parts of another merge"):  # --shards and --finish both forgotten
        merge(*pair, out)
    with pytest.raises(OutputError, match="parts of another merge"):
        delta(*pair, out)
    assert weights(tmp_path / ".out.partial") == made
    merge(*pair, out, MergeOptions(finish=True, dtype="float16"))
    assert weights(out) == made
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_whole_run_that_fails_over_finished_parts_leaves_them(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(*pair, tmp_path / "out", MergeOptions(part=(1, 3)))
    made = weights(tmp_path / ".out.partial")
    with monkeypatch.context() as patch:
        fails_after(0, patch)
        with pytest.raises(OutputError, match="the finished shards were kept"):
            merge(*pair, tmp_path / "out")
    assert made.items() <= weights(tmp_path / ".out.partial").items()
    merge(*pair, tmp_path / "out")
    check_integrity(tmp_path / "out")


def test_finishing_without_any_part_leaves_nothing_behind(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(OutputError, match="none of its parts"):
        merge(*pair, tmp_path / "out", MergeOptions(finish=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_parts_made_on_cuda_are_put_together_where_there_is_none(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real = merging.execute
        patch.setattr(merging, "choose_devices", lambda name: [torch.device("cuda", 0)])
        patch.setattr(
            merging,
            "execute",
            lambda plan, folder, devices, *rest, **options: real(plan, folder, torch.device("cpu"), *rest, **options),
        )
        for number in (1, 2):
            merge(*pair, tmp_path / "out", MergeOptions(part=(number, 2)))
    content = merge(*pair, tmp_path / "out", MergeOptions(finish=True)).as_json()
    assert content["options"]["device"] == "cuda"
    check_integrity(tmp_path / "out")


# -- parts that meet -----------------------------------------------------------------------------------------


def test_an_entry_of_another_plan_is_not_believed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Two first parts with other options may both find nothing there; only one plan stays."""
    merge(*pair, tmp_path / "out", MergeOptions(part=(1, 2)))
    plan = tmp_path / ".out.partial" / "journal" / "plan.json"
    held = plan.read_text()
    merge(*pair, tmp_path / "else", MergeOptions(part=(1, 2), dtype="float16"))
    plan.write_bytes((tmp_path / ".else.partial" / "journal" / "plan.json").read_bytes())
    with pytest.raises(OutputError, match="is not finished") as raised:
        merge(*pair, tmp_path / "out", MergeOptions(finish=True, dtype="float16"))
    assert len(raised.value.problems) == 3
    plan.write_text(held)


def test_parts_of_another_count_keep_off_each_others_shards(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """1/1 wants what 1/2 is making: it is told so, and nothing of 1/2 is removed."""
    inside = threading.Event()
    done = threading.Event()
    failures: list[BaseException] = []

    def progress(nbytes: int) -> None:
        inside.set()
        done.wait(60)

    def first() -> None:
        try:
            merge(*pair, tmp_path / "out", MergeOptions(part=(1, 2)), progress=progress)
        except BaseException as error:
            failures.append(error)

    running = threading.Thread(target=first)
    running.start()
    try:
        assert inside.wait(60)
        with pytest.raises(OutputError, match="another run"):
            merge(*pair, tmp_path / "out", MergeOptions(part=(1, 1)))
    finally:
        done.set()
        running.join()
    assert failures == []
    merge(*pair, tmp_path / "out", MergeOptions(part=(2, 2)))
    merge(*pair, tmp_path / "out", MergeOptions(finish=True))
    check_integrity(tmp_path / "out")


def test_a_part_waits_for_another_that_is_just_leaving(tmp_path: Path) -> None:
    """Whoever ends holds the lock alone for a moment, to remove its file."""
    file = tmp_path / ".out.lock"
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        leaving = threading.Timer(0.2, lambda: fcntl.flock(stream, fcntl.LOCK_UN))
        leaving.start()
        with locked(tmp_path / "out", shared=True):
            pass
        leaving.join()


def test_a_plan_is_whole_even_when_two_machines_with_one_pid_write_it(tmp_path: Path) -> None:
    """Every container's first process has the same id."""
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(30):
                write_json_atomically(tmp_path / "plan.json", {"number": number, "long": "x" * 200_000})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "plan.json").exists():
            assert len(json.loads((tmp_path / "plan.json").read_text())["long"]) == 200_000
        time.sleep(0.001)
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


# -- what is taken over --------------------------------------------------------------------------------------


def pickled(base: Path) -> Path:
    """The same checkpoint as torch.save files."""
    weight_map = {}
    for file in sorted(base.glob("*.safetensors")):
        name = file.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        content = load_file(file)
        torch.save(content, base / name)
        weight_map.update(dict.fromkeys(content, name))
        file.unlink()
    (base / "model.safetensors.index.json").unlink()
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base


def test_a_pickled_base_that_changed_in_the_middle_is_read_again(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fingerprint of the tensors' ends sees it: the files' own hashes have to."""
    base, adapter = pickled(pair[0]), pair[1]
    with monkeypatch.context() as patch:
        fails_after(2, patch)
        with pytest.raises(OutputError):
            merge(base, adapter, tmp_path / "out", MergeOptions(keep_partial=True, workers=1))
    for file in base.glob("*.bin"):
        content = torch.load(file)
        for tensor in content.values():
            if tensor.numel() > 16384:
                tensor.view(-1)[tensor.numel() // 2] += 1
        torch.save(content, file)
    merge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_head_untied_into_another_shard_follows_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shard holds a copy of a tensor of the first one: both are stale when the first one changes."""
    tensors = base_tensors(factor=4)
    del tensors["lm_head.weight"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_base(tmp_path / "base", tensors, 2, config=config)
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    prefix = "base_model.model.model.embed_tokens"
    adapter = write_lora(
        tmp_path / "adapter",
        tensors,
        extra={f"{prefix}.lora_embedding_A": torch.ones(4, 50), f"{prefix}.lora_embedding_B": torch.ones(hidden, 4)},
        config={"target_modules": ["q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens"]},
    )
    merge(base, adapter, tmp_path / "out", MergeOptions(part=(1, 1)))
    embedding = base / "model-00001-of-00002.safetensors"
    assert "model.embed_tokens.weight" in load_file(embedding)
    merged = load_file(tmp_path / ".out.partial" / "model" / "model-00002-of-00002.safetensors")
    assert torch.equal(merged["lm_head.weight"], tensors["model.embed_tokens.weight"])
    header = int.from_bytes(embedding.read_bytes()[:8], "little")
    start = json.loads(embedding.read_bytes()[8 : 8 + header])["model.embed_tokens.weight"]["data_offsets"][0]
    with embedding.open("r+b") as stream:  # far from the tensor's ends
        stream.seek(8 + header + start + 10_000)
        stream.write(b"\x00\x3f")
    with pytest.raises(OutputError, match="is not finished") as raised:
        merge(base, adapter, tmp_path / "out", MergeOptions(finish=True))
    assert len(raised.value.problems) == 2
    merge(base, adapter, tmp_path / "out", MergeOptions(part=(1, 1)))
    merge(base, adapter, tmp_path / "out", MergeOptions(finish=True))
    merge(base, adapter, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_shard_without_its_preimage_is_made_again(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "out", MergeOptions(part=(1, 1), keep_preimage=True))
    (tmp_path / ".out.partial" / "model" / "preimage" / "model-00001-of-00003.safetensors.bin").unlink()
    with pytest.raises(OutputError, match=r"model-00001-of-00003\.safetensors is not finished"):
        merge(*pair, tmp_path / "out", MergeOptions(finish=True, keep_preimage=True))


@pytest.mark.parametrize("link", ["auto", "hardlink"])
def test_a_killed_run_without_hashes_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors, 3)
    adapter = write_lora(tmp_path / "adapter", tensors, only="layers.0.q_proj")
    with monkeypatch.context() as patch:
        fails_after(2, patch)
        with pytest.raises(OutputError):
            merge(base, adapter, tmp_path / "out", MergeOptions(keep_partial=True, workers=1, hashes=False, link=link))
    assert len(weights(tmp_path / ".out.partial")) > 1
    merge(base, adapter, tmp_path / "out", MergeOptions(hashes=False, link=link))
    merge(base, adapter, tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_the_journal_names_what_a_shard_was_made_from(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base = pickled(pair[0])
    merge(base, pair[1], tmp_path / "out", MergeOptions(part=(1, 1)))
    entry = json.loads((tmp_path / ".out.partial/journal/model-00001-of-00003.safetensors.json").read_text())
    assert entry["others"] == {name: sha256_of(base / name) for name in ["pytorch_model-00001-of-00003.bin"]}
    assert journal.FinishedShard(**entry["shard"]) == replace(
        journal.FinishedShard(**entry["shard"]), source_sha256=None
    )
