"""What the engine writes: values against float64, layout, hashes, figures, whatever the number of workers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from merge_models import base_tensors, expected, read_model, sha256_of, write_base, write_lora
from safetensors.torch import load_file

from adapter_merge.api.delta import delta
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.engine import chunked_file as chunks
from adapter_merge.engine.chunked_file import BUFFERED_BYTES, CHUNK_BYTES
from adapter_merge.engine.execute import execute
from adapter_merge.engine.lanes import CPU_BLOCK_BYTES
from adapter_merge.engine.plan import plan_merge
from adapter_merge.errors import NumericsError
from adapter_merge.storage.safetensors_header import read_header

CPU = torch.device("cpu")


def assert_once_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """`found` is `exact` (float64) rounded once, but where float32 accumulation lies across a rounding boundary."""
    once = exact.to(found.dtype)
    differs = found != once
    assert float(differs.double().mean()) < 2e-3
    # One step of the dtype; where W0 and dW nearly cancel, the step is smaller than a float32 sum's own error.
    neighbour = torch.finfo(found.dtype).eps * exact.abs()[differs] + torch.finfo(torch.float32).eps
    assert bool(((found.double() - exact).abs()[differs] <= neighbour).all())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_is_the_formula_rounded_once(tmp_path: Path, dora: bool, dtype: torch.dtype) -> None:
    tensors = base_tensors(dtype=dtype)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=dora)
    merge(base, adapter, tmp_path / "out")
    found = read_model(tmp_path / "out")
    exact = expected(tensors, adapter)
    assert set(found) == set(tensors)
    assert len(exact) == 12
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype
        if name not in exact:
            assert torch.equal(tensor, tensors[name])
        elif dtype == torch.float32:
            torch.testing.assert_close(tensor.double(), exact[name], rtol=2e-6, atol=2e-7)
        else:
            assert_once_rounded(tensor, exact[name])


def test_the_output_is_laid_out_as_the_input(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    merge(base, write_lora(tmp_path / "adapter", tensors), tmp_path / "out")
    for file in sorted(base.glob("*.safetensors")):
        before, after = read_header(file), read_header(tmp_path / "out" / file.name)
        assert file.read_bytes()[: before.data_start] == (tmp_path / "out" / file.name).read_bytes()[: after.data_start]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_own.py", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "out" / "templates" / "tool.txt").read_text() == "nested"


def test_the_manifest_holds_the_hash_of_every_input_and_output_file(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)
    content = merge(base, adapter, tmp_path / "out").as_json()
    written = json.loads((tmp_path / "out" / "adapter_merge.json").read_text())
    assert written == json.loads(json.dumps(content)) | {"seal": written["seal"]}
    for folder, files in (
        (tmp_path / "out", content["files"]),
        (base, content["base"]["files"]),
        (adapter, content["adapters"][0]["files"]),
    ):
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert set(files) == present - {"adapter_merge.json"}
        for name, sha in files.items():
            assert sha256_of(folder / name) == sha


@pytest.mark.slow
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shards", [1, 2])
def test_large_files_are_the_same_however_they_are_made(
    tmp_path: Path, shards: int, workers: int, direct: bool
) -> None:
    tensors = base_tensors(layers=2, factor=16)  # many blocks, several chunks
    base = write_base(tmp_path / "base", tensors, shards)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    assert max(shard.nbytes for shard in plan.shards) > 2 * CHUNK_BYTES
    (tmp_path / "out").mkdir()
    seen: list[int] = []
    finished = execute(plan, tmp_path / "out", CPU, workers, seen.append, direct=direct)
    exact = expected(tensors, adapter)
    found = read_model(tmp_path / "out")
    for name, tensor in tensors.items():
        if name in exact:
            assert_once_rounded(found[name], exact[name])
        else:
            assert torch.equal(found[name], tensor)
    for shard in plan.shards:
        entry = finished[shard.file]
        assert entry.sha256 == sha256_of(tmp_path / "out" / shard.file)
        assert shard.source is not None
        assert entry.source_sha256 == sha256_of(shard.source)
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())


def test_figures_are_what_they_say(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, scale=0.02)  # small enough for bf16 to lose some
    layers = merge(base, adapter, tmp_path / "out").as_json()["layers"]
    found, exact = read_model(tmp_path / "out"), expected(tensors, adapter)
    assert set(layers) == set(exact)
    for name, figures in layers.items():
        before, after, stored = tensors[name].double(), exact[name], found[name].double()
        delta = after - before
        unchanged = stored == before
        assert figures["sampled"] == 1.0
        assert figures["relative_delta"] == pytest.approx(float(delta.norm() / before.norm()), rel=1e-4)
        assert figures["rounding"] == pytest.approx(float((stored - after).norm() / delta.norm()), rel=1e-3)
        assert figures["changed"] == pytest.approx(1 - float(unchanged.double().mean()), abs=1e-6)
        assert figures["lost"] == pytest.approx(float(delta[unchanged].abs().sum() / delta.abs().sum()), rel=1e-3)
        assert 0 < figures["lost"] < 1


def test_large_weights_are_sampled_and_say_so(tmp_path: Path) -> None:
    tensors = base_tensors(layers=1, factor=11)
    base = write_base(tmp_path / "base", tensors, 1)
    layers = merge(base, write_lora(tmp_path / "adapter", tensors), tmp_path / "out").as_json()["layers"]
    sampled = {name.split(".")[-2]: figures["sampled"] for name, figures in layers.items()}
    assert {name.split(".")[-2] for name in layers if tensors[name].numel() * 4 <= CPU_BLOCK_BYTES} == {"k_proj"}
    assert sampled.pop("k_proj") == 1.0
    assert all(0 < share < 0.5 for share in sampled.values())


def test_a_delta_that_rounding_swallows_is_reported(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, scale=1e-3)
    (warning,) = merge(base, adapter, tmp_path / "out").as_json()["warnings"]
    assert "12 of 12 weights" in warning
    assert "--dtype float32" in warning
    assert merge(base, adapter, tmp_path / "wide", MergeOptions(dtype="float32")).as_json()["warnings"] == []


def test_dtype_is_for_every_float_tensor_and_the_config(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)
    merge(base, adapter, tmp_path / "out", MergeOptions(dtype="float32"))
    found, exact = read_model(tmp_path / "out"), expected(tensors, adapter)
    assert found.pop("model.counter").dtype == torch.int64
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), exact.get(name, tensors[name].double()), rtol=2e-6, atol=2e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_float64_weights_are_computed_in_float64(tmp_path: Path) -> None:
    tensors = base_tensors(dtype=torch.float64)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)
    merge(base, adapter, tmp_path / "out")
    found = read_model(tmp_path / "out")
    for name, exact in expected(tensors, adapter).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-12, atol=1e-13)


def test_replaced_tensors_are_the_adapters_and_the_base_is_hashed_all_the_same(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    head = torch.randn(50, 64)
    adapter = write_lora(
        tmp_path / "adapter",
        tensors,
        extra={"base_model.model.lm_head.weight": head},
        config={"modules_to_save": ["lm_head"]},
    )
    content = merge(base, adapter, tmp_path / "out").as_json()
    assert torch.equal(read_model(tmp_path / "out")["lm_head.weight"], head.bfloat16())
    for file in base.glob("*.safetensors"):
        assert content["base"]["files"][file.name] == sha256_of(file)


def test_a_file_ends_after_the_bytes_that_are_only_read(tmp_path: Path) -> None:
    """The replacement may be on the disk before the base's bytes, which it replaces, are recorded."""
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors, shards=1)
    head = torch.randn(50, 64, dtype=torch.bfloat16)
    adapter = write_lora(
        tmp_path / "adapter",
        tensors,
        extra={"base_model.model.lm_head.weight": head},
        config={"modules_to_save": ["lm_head"]},
    )
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    (tmp_path / "out").mkdir()
    order: list[str] = []

    class Slow:
        def record(self, shard: object, job: object, first: int, before: torch.Tensor, after: object) -> None:
            if after is None:
                time.sleep(0.5)
                order.append("recorded")

    execute(plan, tmp_path / "out", CPU, 2, recorder=Slow(), on_shard=lambda shard: order.append("finished"))
    assert order == ["recorded", "finished"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_never_written(tmp_path: Path, value: float) -> None:
    tensors = base_tensors()
    tensors["model.layers.1.up_proj.weight"][7, 3] = value
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)
    with pytest.raises(NumericsError, match=r"layers\.1\.up_proj"):
        merge(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_value_beyond_the_output_dtype_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors["model.layers.0.q_proj.weight"][0, 0] = 1e6
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)
    with pytest.raises(NumericsError, match="--dtype bfloat16"):
        merge(base, adapter, tmp_path / "out", MergeOptions(dtype="float16"))
    merge(base, adapter, tmp_path / "wide", MergeOptions(dtype="float32"))


def test_delta_is_the_difference(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    content = delta(base, adapter, tmp_path / "out").as_json()
    found = load_file(tmp_path / "out" / "delta.safetensors")
    exact = expected(tensors, adapter)
    assert set(found) == set(exact)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), exact[name] - tensors[name].double(), rtol=1e-4, atol=1e-6)
    assert content["files"]["delta.safetensors"] == sha256_of(tmp_path / "out" / "delta.safetensors")


def test_without_hashes_the_values_are_the_same(tmp_path: Path) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)
    content = merge(base, adapter, tmp_path / "out", MergeOptions(hashes=False)).as_json()
    merge(base, adapter, tmp_path / "hashed")
    assert "files" not in content
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "hashed" / file.name).read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak memory of a merge, less what the interpreter has once torch is imported, by the kernel's own count.

    Anonymous memory alone: how much of torch's own files is resident differs from run to run.
    """
    program = """
import re, sys, threading, time, torch
from pathlib import Path
from adapter_merge.api.merge import merge
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
bare, peak, done = held(), 0.0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
merge(*sys.argv[1:4])
done.set()
watcher.join()
print(peak - bare)
"""
    grown = []
    for factor in (8, 32):  # 3 MB and 45 MB of weights, one of them 26 MB
        tensors = base_tensors(layers=1, factor=factor)
        base = write_base(tmp_path / f"base{factor}", tensors, 1)
        adapter = write_lora(tmp_path / f"adapter{factor}", tensors, dora=True)
        arguments = [base, adapter, tmp_path / f"out{factor}"]
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        grown.append(float(done.stdout))
    assert max(grown) < 100
    assert grown[1] - grown[0] < 15, grown


@pytest.mark.preloaded("torch")
def test_merging_imports_neither_transformers_nor_peft(tmp_path: Path) -> None:
    tensors = base_tensors(layers=1)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    program = f"""
import sys
from adapter_merge.api.delta import delta
from adapter_merge.api.merge import merge
merge({str(base)!r}, {str(adapter)!r}, {str(tmp_path / "out")!r})
delta({str(base)!r}, {str(adapter)!r}, {str(tmp_path / "delta")!r})
print(sorted({{"transformers", "peft", "onnx", "vllm", "matplotlib", "scipy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("how", ["never direct", "refused when opened", "refused when written"])
def test_a_file_system_without_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Files of several chunks, each written in several pieces."""
    tensors = base_tensors(factor=8)
    bound = open_pair(write_base(tmp_path / "base", tensors), write_lora(tmp_path / "adapter", tensors))
    plan = plan_merge(bound.base, (bound,))
    for name in ("direct", "buffered"):
        (tmp_path / name).mkdir()
    wanted = execute(plan, tmp_path / "direct", CPU, 2)
    largest: dict[bool, int] = {True: 0, False: 0}
    real_open, real_pwrite = os.open, os.pwrite

    def opened(path: str, flags: int, mode: int = 0o777) -> int:
        if how == "refused when opened" and flags & chunks.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes")
        return real_open(path, flags, mode)

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & chunks.O_DIRECT)
        largest[direct] = max(largest[direct], len(data))
        if direct and how == "refused when written":
            raise OSError(errno.EINVAL, "no direct writes")
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", pwrite)
    found = execute(plan, tmp_path / "buffered", CPU, 2, direct=how != "never direct")
    assert {name: shard.sha256 for name, shard in found.items()} == {n: shard.sha256 for n, shard in wanted.items()}
    for name, shard in found.items():
        assert sha256_of(tmp_path / "buffered" / name) == shard.sha256
    assert max(shard.nbytes for shard in plan.shards) > CHUNK_BYTES
    assert largest[False] == BUFFERED_BYTES
    assert how == "refused when written" or largest[True] == 0
