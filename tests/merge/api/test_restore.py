"""Every file proved to be what was written, and every byte of the base given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_models import base_tensors, read_model, snapshot, write_base, write_four_shards, write_lora

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, RestoreOptions
from adapter_merge.api.restore import restore
from adapter_merge.errors import FileFormatError, InputError, MismatchError
from adapter_merge.formats.stated_settings import ReadOptions
from adapter_merge.outputs.integrity import check_integrity

pytestmark = pytest.mark.preloaded("torch")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_four_shards(tmp_path)


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
    merge(*pair, tmp_path / "out", MergeOptions(hashes=False))
    for folder in (tmp_path / "out", pair[0]):
        with pytest.raises(InputError, match="there are no hashes to check"):
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
    merge(base, adapter, tmp_path / "out", MergeOptions(dtype=dtype, keep_preimage=True))
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
    restore(tmp_path / "out", tmp_path / "back", RestoreOptions(base=base))
    assert snapshot(tmp_path / "back") == snapshot(base)
    (base / "config.json").write_text("{}")
    with pytest.raises(MismatchError, match=r"config\.json"):
        restore(tmp_path / "out", tmp_path / "other", RestoreOptions(base=base))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["weights", "frames", "missing"])
def test_restore_refuses_what_is_not_the_base(tmp_path: Path, pair: tuple[Path, Path], damage: str) -> None:
    merge(*pair, tmp_path / "out", MergeOptions(keep_preimage=True))
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
        merge(*pair, tmp_path / "out", MergeOptions(part=(number, 2), keep_preimage=True))
    merge(*pair, tmp_path / "out", MergeOptions(finish=True, keep_preimage=True))
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
    merge(base, adapter, tmp_path / "out", MergeOptions(keep_preimage=True))
    assert "lm_head.weight" in read_model(tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(base)


def test_merging_a_merged_model_leaves_the_older_preimage_behind(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "one", MergeOptions(keep_preimage=True))
    again = MergeOptions(keep_preimage=True, reading=ReadOptions(force=True))
    merge(tmp_path / "one", pair[1], tmp_path / "two", again)
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
    program = "from adapter_merge.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
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
    assert "config.json: differs from the recorded file" in done.stderr


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
