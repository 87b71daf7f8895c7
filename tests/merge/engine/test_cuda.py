"""The real thing on a CUDA device: PEFT's live forward, float64, the same bits every time, memory within bounds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pico
import pytest
import torch
from combination_oracle import expected as definition
from combination_oracle import recipe
from merge_models import base_tensors, expected, read_model, write_base, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.delta import delta
from adapter_merge.api.extract import extract
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import DeltaOptions, ExtractOptions, FactorOptions, MergeOptions
from adapter_merge.api.restore import restore
from adapter_merge.engine import cuda_memory
from adapter_merge.errors import InputError, NumericsError

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and a CUDA build of torch")
    yield


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Weights of up to 3200 x 1024: blocks cross the output's chunks, and a lane has several in flight."""
    return base_tensors(layers=2, factor=16)


@pytest.fixture
def base(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", tensors)


def same_files(one: Path, two: Path) -> bool:
    files = sorted(one.glob("*.safetensors"))
    return bool(files) and all(file.read_bytes() == (two / file.name).read_bytes() for file in files)


# -- right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", pico.METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_and_factored_logits_equal_the_live_peft_model(kind: str, method: str, tmp_path: Path) -> None:
    model = pico.pico_model(kind)
    base = pico.save_base(model, tmp_path / "base")
    live = pico.peft_adapter(model, kind, tmp_path / "adapter", **pico.METHODS[method])
    want = pico.logits(live)
    content = merge(base, tmp_path / "adapter", tmp_path / "merged", MergeOptions(device="cuda")).as_json()
    assert content["options"]["device"].startswith("cuda")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(pico.logits(merged), want, rtol=0, atol=1e-4)
    factor(base, tmp_path / "adapter", tmp_path / "factors", FactorOptions(device="cuda"))
    plain = type(model).from_pretrained(base).eval()
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "factors").eval()
    torch.testing.assert_close(pico.logits(loaded), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_dcft_equals_its_formula(kind: str, tmp_path: Path) -> None:
    model = pico.dcft_model(kind)
    want = pico.logits(model)
    checkpoint = pico.save_dcft_checkpoint(model, tmp_path / "checkpoint")
    merge(None, checkpoint, tmp_path / "merged", MergeOptions(device="cuda"))
    merged = type(pico.pico_model(kind)).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(pico.logits(merged), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_large_weights_are_rounded_once(dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = base_tensors(layers=2, dtype=dtype, factor=16)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=dora)
    merge(base, adapter, tmp_path / "out", MergeOptions(device="cuda"))
    found, exact = read_model(tmp_path / "out"), expected(tensors, adapter)
    for name, tensor in tensors.items():
        if name not in exact:
            assert torch.equal(found[name], tensor)
            continue
        error = float((found[name].double() - exact[name]).norm() / exact[name].norm())
        if dtype.itemsize == 2:
            assert float((found[name] != exact[name].to(dtype)).double().mean()) < 2e-3
            assert error < torch.finfo(dtype).eps
        else:
            assert error < (1e-6 if dtype == torch.float32 else 1e-13)


SETTINGS = {
    "old": "torch.set_float32_matmul_precision('high')",
    "older": "torch.backends.cuda.matmul.allow_tf32 = True",
    "new": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_is_not_for_merges(setting: str, tmp_path: Path) -> None:
    """A process that allows TF32, in whatever way, gets float32 all the same, and keeps its setting."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this device has no TF32")
    if setting == "new" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 has this setting")
    tensors = base_tensors(layers=1, dtype=torch.float32, factor=8)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, scale=1.0)
    program = f"""
import sys, torch
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
{SETTINGS[setting]}
one = torch.rand(256, 256, device="cuda")
rough = one @ one
merge(*sys.argv[1:4], device="cuda")
factor(*sys.argv[1:3], sys.argv[4], device="cuda", rank=3)
assert torch.equal(one @ one, rough)
assert not torch.allclose(rough.double(), one.double() @ one.double(), rtol=1e-6)
"""
    folders = [base, adapter, tmp_path / "out", tmp_path / "factors"]
    subprocess.run([sys.executable, "-c", program, *map(str, folders)], check=True)
    found = read_model(tmp_path / "out")
    for name, exact in expected(tensors, adapter).items():
        assert float((found[name].double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_deltas(base: Path, tensors: dict[str, Tensor], tmp_path: Path, dora: bool) -> None:
    adapter = write_lora(tmp_path / "adapter", tensors, dora=dora)
    delta(base, adapter, tmp_path / "delta", DeltaOptions(device="cuda"))
    found = load_file(tmp_path / "delta" / "delta.safetensors")
    exact = expected(tensors, adapter)
    assert found.keys() == exact.keys()
    for name, weight in exact.items():
        want = weight - tensors[name].double()
        assert float((found[name].double() - want).norm() / want.norm()) < 1e-6


def test_limited_rank_factors_are_the_best_of_their_rank(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True, only="layers.0")
    factor(base, adapter, tmp_path / "factors", FactorOptions(rank=8, device="cuda"))
    content = load_file(tmp_path / "factors" / "adapter_model.safetensors")
    for name, weight in expected(tensors, adapter).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        want = (weight - tensors[name].double()).cuda()
        a, b = (content[f"{module}.lora_{side}.weight"].double().cuda() for side in "AB")
        best = float(torch.linalg.svdvals(want)[8:].norm())
        assert float((b @ a - want).norm()) <= 1.01 * best


def test_what_was_extracted_is_what_was_merged(tmp_path: Path) -> None:
    tensors = base_tensors(layers=1, dtype=torch.float32, factor=16)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)
    merge(base, adapter, tmp_path / "merged", MergeOptions(device="cuda"))
    extract(base, tmp_path / "merged", tmp_path / "again", ExtractOptions(rank=4, device="cuda"))
    content = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for name, weight in expected(tensors, adapter).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        want = weight - tensors[name].double()
        product = content[f"{module}.lora_B.weight"].double() @ content[f"{module}.lora_A.weight"].double()
        assert float((product - want).norm() / want.norm()) < 1e-4


COMBINED = {"a": 0.7, "b": 0.4, "c": -0.3}


def three(tensors: dict[str, Tensor], folder: Path) -> dict[str, Path]:
    """A LoRA of one layer, a DoRA of the other, and a smaller LoRA of both."""
    return {
        "a": write_lora(folder / "a", tensors, only="layers.0"),
        "b": write_lora(folder / "b", tensors, only="layers.1", dora=True),
        "c": write_lora(folder / "c", tensors, scale=0.05),
    }


@pytest.mark.parametrize("method", ["linear", "magnitude-prune", "ties", "breadcrumbs"])
def test_combinations_are_their_definition(method: str, base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    density, gamma = (1.0, 0.0) if method == "linear" else (0.4, 0.05 if method == "breadcrumbs" else 0.0)
    adapters = three(tensors, tmp_path)
    made = recipe(adapters, COMBINED, method=method, density=density, gamma=gamma)
    merge(base, made, tmp_path / "out", MergeOptions(device="cuda", dtype="float32"))
    found, exact = read_model(tmp_path / "out"), {name: expected(tensors, path) for name, path in adapters.items()}
    for name, tensor in tensors.items():
        parts = [adapter for adapter in COMBINED if name in exact[adapter]]
        if not parts:
            assert torch.equal(found[name].to(tensor.dtype), tensor)
            continue
        deltas = [exact[adapter][name] - tensor.double() for adapter in parts]
        want = definition(method, deltas, [COMBINED[adapter] for adapter in parts], density, gamma)
        wrong = (found[name].double() - tensor.double() - want).abs() > 1e-5
        # Two sizes next to the threshold may change places between float32 and float64.
        assert int(wrong.sum()) <= (0 if method == "linear" else 2 * len(parts)), name


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_the_device_drops_the_elements_that_the_cpu_drops(
    method: str, base: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """Random numbers belong to adapter and tensor; what is done with them is tested against PEFT on the CPU."""
    made = recipe(three(tensors, tmp_path), COMBINED, method=method, density=0.4)
    for device in ("cpu", "cuda"):
        merge(base, made, tmp_path / f"out-{device}", MergeOptions(device=device, dtype="float32"))
    one, two = read_model(tmp_path / "out-cpu"), read_model(tmp_path / "out-cuda")
    for name, weight in one.items():
        if weight.is_floating_point():
            torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)
            kept = (weight != tensors[name]).double().mean()
            assert float(kept) == 0 or 0.3 < float(kept) < 0.7


# -- the same, and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_every_run_writes_the_same_bits(base: Path, tensors: dict[str, Tensor], tmp_path: Path, dora: bool) -> None:
    """Copies, kernels and workers that run into each other would show as bits that change."""
    adapter = write_lora(tmp_path / "adapter", tensors, dora=dora)
    merge(base, adapter, tmp_path / "first", MergeOptions(device="cuda", workers=1))
    for number in range(8):
        merge(base, adapter, tmp_path / "again", MergeOptions(device="cuda", workers=1 + number, overwrite=True))
        assert same_files(tmp_path / "first", tmp_path / "again")


def test_the_original_comes_back(base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    merge(base, adapter, tmp_path / "out", MergeOptions(device="cuda", keep_preimage=True))
    restore(tmp_path / "out", tmp_path / "back")
    assert same_files(base, tmp_path / "back")


def test_parts_are_put_together(base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", tensors)
    merge(base, adapter, tmp_path / "whole", MergeOptions(device="cuda"))
    for number in (1, 2):
        merge(base, adapter, tmp_path / "parts", MergeOptions(device="cuda", part=(number, 2)))
    merge(base, adapter, tmp_path / "parts", MergeOptions(device="cuda", finish=True))
    assert same_files(tmp_path / "whole", tmp_path / "parts")


# -- memory, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("vram", [96 << 20, 256 << 20])
@pytest.mark.parametrize("combined", [False, True])
def test_device_memory_stays_within_what_is_given(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path, vram: int, combined: bool
) -> None:
    adapter: Any = write_lora(tmp_path / "adapter", tensors, dora=True)
    if combined:
        adapters = {"a": adapter, "b": write_lora(tmp_path / "b", tensors)}
        adapter = recipe(adapters, {"a": 0.5, "b": 0.5}, method="ties", density=0.5)
    cuda_memory.free_cublas_workspaces()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    merge(base, adapter, tmp_path / "out", MergeOptions(device="cuda:0", vram=vram))
    assert 0 < torch.cuda.max_memory_allocated() - held <= vram
    assert torch.cuda.memory_allocated() == held, "all of it is given back"


def test_too_little_memory_is_said_at_once(base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", tensors)
    with pytest.raises(InputError, match="--vram"):
        merge(base, adapter, tmp_path / "out", MergeOptions(device="cuda", vram=1 << 20))
    assert not (tmp_path / "out").exists()


def test_a_row_without_direction_is_refused(tmp_path: Path) -> None:
    tensors = base_tensors(layers=1)
    name = "model.layers.0.q_proj"
    tensors[f"{name}.weight"][3] = 0
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    file = adapter / "adapter_model.safetensors"
    content = load_file(file)
    content[f"base_model.model.{name}.lora_B.weight"][3] = 0
    save_file(content, file)
    with pytest.raises(NumericsError, match="q_proj"):
        merge(base, adapter, tmp_path / "out", MergeOptions(device="cuda"))
    assert not (tmp_path / "out").exists()


def test_values_beyond_the_dtype_are_refused(base: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "adapter", tensors, alpha=1e9)
    with pytest.raises(NumericsError, match="infinity"):
        merge(base, adapter, tmp_path / "out", MergeOptions(device="cuda", dtype="float16"))
    assert not (tmp_path / "out").exists()
