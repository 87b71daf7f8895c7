"""MyTransformers' variants, against the steps of its own layers (init_lora_weights, _compute_lora_weight) written out.

The frozen residual is made in the training dtype with torch's own casts, as there; what the trained factors add to it
is computed in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_bases import llama, quiet
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.api.convert import convert
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import AdapterError, AdapterMergeError, MismatchError, UnsupportedError
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.stated_settings import ReadOptions

MODULES = [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("self_attn.q_proj", "mlp.down_proj")]
RANK, SCALER = 3, 7.0  # s = 7 / 3: scaling by it rounds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What its argument parser writes beside the variant's flag, in part.
ARGUMENTS = {
    "lora_rank": RANK,
    "lora_scaler": SCALER,
    "use_lora": True,
    "use_hira": False,
    "use_vera": None,
    "relora_steps": None,
    "pissa_n_iters": 1,
    "milora_n_iters": 1,
    "replace_modules": ["q_proj", "down_proj"],
    "weight_b_init_method": None,
    "sinelora_freq": 600,
    "lr": 1e-4,
    "wandb": False,
}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return llama(tmp_path_factory.mktemp(request.param) / "base", dtype=DTYPES[request.param])


def initial(weight: Tensor, variant: str, scale: float) -> tuple[Tensor, Tensor]:
    """weight_a (r, in) and weight_b (out, r) as the variant starts with, float32."""
    if variant == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:RANK], q[:, :RANK]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    kept = slice(-RANK, None) if variant == "milora" else slice(None, RANK)
    root = (s[kept] / scale).sqrt()
    return torch.diag(root) @ vh[kept], u[:, kept] @ torch.diag(root)


def trained(base: Path, folder: Path, variant: str, training: str, wide: bool, whole: bool) -> dict[str, Tensor]:
    """A checkpoint of its trainer in `folder`, and W' (out, in) of every adapted module in float64."""
    torch.manual_seed(11)
    state, dtype = load_file(base / "model.safetensors"), DTYPES[training]
    own = torch.float32 if wide else dtype  # _get_lora_dtype
    scale = SCALER / RANK**0.5 if variant == "rslora" else SCALER / RANK
    saved, expected = {}, {}
    for module in MODULES:
        weight = state[f"{module}.weight"].to(dtype)
        a, b = torch.randn(RANK, weight.shape[1]) * 0.1, torch.zeros(weight.shape[0], RANK)
        frozen = weight
        if variant in ("pissa", "olora", "milora", "dude"):
            a, b = initial(weight.float(), variant, scale)
            product = scale * torch.matmul(b.to(own).double(), a.to(own).double()).to(own)
            frozen = (weight.float() - product.to(dtype).float()).to(dtype)
        step = 0.02 if variant == "olora" else 0.1  # its first factors are small: Q has orthonormal columns
        a, b = ((factor + step * torch.randn(factor.shape)).to(own) for factor in (a, b))
        value = frozen.double() + scale * b.double() @ a.double()
        if variant in ("dora", "dude"):
            magnitude = (weight.double().norm(dim=1) * (1 + 0.1 * torch.rand(weight.shape[0]))).to(own)
            saved[f"{module}.origin_magnitude"] = magnitude
            value *= (magnitude.double() / value.norm(dim=1))[:, None]
        saved[f"{module}.weight_a"], saved[f"{module}.weight_b"] = a.contiguous(), b.contiguous()
        if whole:
            saved[f"{module}.weight"] = frozen
        expected[module] = value
    folder.mkdir()
    torch.save(saved, folder / "final.ckpt")
    arguments = ARGUMENTS | {"default_dtype": training, "run_lora_in_fp32": wide}
    arguments |= {f"use_{variant}": True} if variant != "lora" else {}
    (folder / "config.json").write_text(json.dumps(arguments))
    return expected


def error_in_ulps(got: Tensor, exact: Tensor) -> float:
    """The largest error of `got`, in units of its own rounding."""
    size = torch.maximum(exact.abs(), exact.abs().mean())
    return float(((got.double() - exact).abs() / (torch.finfo(got.dtype).eps * size)).max())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "olora", "milora", "dude"])
@pytest.mark.parametrize(("training", "wide"), [("fp32", False), ("bf16", False), ("bf16", True), ("fp16", False)])
def test_a_variant_without_its_frozen_weights(
    base: Path, tmp_path: Path, variant: str, training: str, wide: bool
) -> None:
    """Every weight is one rounding of what the layers computed; the safe folder merges to the same bytes."""
    expected = trained(base, tmp_path / "a", variant, training, wide, whole=False)
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    after, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    plain = variant in ("lora", "rslora", "dora")
    for module, value in expected.items():
        key = f"{module}.weight"
        if plain and before[key].dtype != DTYPES[training]:
            continue  # merged into the base as it is stored, not as it was loaded for training
        assert float((value - before[key].double()).norm()) > 0.1
        assert error_in_ulps(after[key], value) < (64 if after[key].dtype == torch.float32 else 0.51), key
    convert(tmp_path / "a", tmp_path / "safe", ConvertOptions(base=base))
    merge(base, tmp_path / "safe", tmp_path / "again", MergeOptions(device="cpu"))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in after.items())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rslora", "olora", "milora"])
def test_verify_runs_the_variant(base: Path, tmp_path: Path, variant: str) -> None:
    training = "bf16" if "bf16" in str(base) else "fp32"
    trained(base, tmp_path / "a", variant, training, False, whole=False)
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    report = verify(base, tmp_path / "a", tmp_path / "out", VerifyOptions(generated=2)).as_json()
    assert report["passed"], report["problems"]


@pytest.mark.parametrize("variant", ["olora", "milora"])
def test_a_variant_with_its_frozen_weights(base: Path, tmp_path: Path, variant: str) -> None:
    training = "bf16" if "bf16" in str(base) else "fp32"
    expected = trained(base, tmp_path / "a", variant, training, False, whole=True)
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    for module, value in expected.items():
        kept = after[f"{module}.weight"]
        assert error_in_ulps(kept, value) < (64 if kept.dtype == torch.float32 else 0.51), module


def edited(base: Path, folder: Path, variant: str = "lora", **changes: Any) -> Path:
    trained(base, folder, variant, "fp32", False, whole=False)
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "lost"}))
    return folder


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"use_hira": True}, "hira"),
        ({"use_sinelora": True}, "sinelora"),
        ({"use_vera": True}, "vera"),
        ({"use_qlora": True}, "quantise to fp4"),
        ({"use_qlora": True, "use_dude": True}, "quantise to fp4"),
        ({"relora_steps": 100}, "ReLoRA"),
        ({"train_pi": 4}, "interpolated"),
        ({"partial_ckpt_path": "/somewhere"}, "another checkpoint"),
        ({"use_next_lora": True}, "use_next_lora"),
        ({"lora_temperature": 0}, "lora_temperature = 0"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(base: Path, tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    adapter = edited(base, tmp_path / "a", **changes)
    with pytest.raises(UnsupportedError, match=names):
        merge(base, adapter, tmp_path / "no", MergeOptions(device="cpu"))
    assert not (tmp_path / "no").exists()


def test_its_qlora_quantises_to_fp4() -> None:
    """The steps of common/lora_modules/qlora.py, quantize_base_layer: why there is no plain nf4 to state."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="NF4", device="cpu")
    layer.weight = bnb.nn.Params4bit(data=torch.randn(32, 64).bfloat16(), requires_grad=False)
    layer.to("cpu")
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("fp4", True, 64)


def test_two_variants_are_one_too_many(base: Path, tmp_path: Path) -> None:
    adapter = edited(base, tmp_path / "a", "pissa", use_rslora=True)
    with pytest.raises(AdapterError, match="names 2 variants"):
        open_adapter(adapter)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dude"])
def test_without_its_training_arguments_the_variant_is_unknown(
    base: Path, tmp_path: Path, variant: str, empty: bool
) -> None:
    """A stated alpha says nothing of the variant: rsLoRA and HiRA hold the tensors of a LoRA."""
    adapter = edited(base, tmp_path / "a", variant)
    (adapter / "config.json").unlink()
    if empty:
        (adapter / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="the variant is named only"):
        merge(base, adapter, tmp_path / "no", MergeOptions(device="cpu", reading=ReadOptions(alpha=SCALER)))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("rank", ["8", 8.0, True, 0])
def test_a_rank_that_is_no_whole_number_is_refused(base: Path, tmp_path: Path, rank: object) -> None:
    """It would otherwise not be held against the factors' own."""
    with pytest.raises(AdapterError, match="lora_rank is wrong"):
        open_adapter(edited(base, tmp_path / "a", lora_rank=rank))


def test_an_unknown_argument_that_is_off_is_said(base: Path, tmp_path: Path) -> None:
    adapter = open_adapter(edited(base, tmp_path / "a", use_next_lora=False, next_rate=None))
    assert any("next_rate, use_next_lora" in note for note in adapter.notes)


def test_positions_of_another_model(base: Path, tmp_path: Path) -> None:
    adapter = edited(base, tmp_path / "a", rope_theta=123.0)
    with pytest.raises(AdapterMergeError, match="rope_theta is not the base's"):
        merge(base, adapter, tmp_path / "no", MergeOptions(device="cpu"))


def test_a_magnitude_that_the_variant_has_not(base: Path, tmp_path: Path) -> None:
    adapter = edited(base, tmp_path / "a", "dora", use_dora=False)
    with pytest.raises(AdapterError, match="has a magnitude"):
        open_adapter(adapter)


@pytest.mark.parametrize("variant", ["milora", "pissa"])
def test_a_randomised_decomposition_is_refused(base: Path, tmp_path: Path, variant: str) -> None:
    adapter = edited(base, tmp_path / "a", variant, pissa_n_iters=8, milora_n_iters=8)
    with pytest.raises((AdapterError, UnsupportedError, MismatchError), match="randomised"):
        merge(base, adapter, tmp_path / "no", MergeOptions(device="cpu"))


def test_the_training_dtype_must_be_known(base: Path, tmp_path: Path) -> None:
    """run_lora_in_fp32 keeps the factors in float32 whatever the frozen weights are: nothing else tells."""
    adapter = edited(base, tmp_path / "a", "pissa", run_lora_in_fp32=True, default_dtype="lost")
    with pytest.raises(AdapterError, match="dtype of its residual is unknown"):
        open_adapter(adapter)
    module = open_adapter(adapter, ReadOptions(residual_dtype="bfloat16")).modules[0]
    assert module.initial.dtype == "BF16" and module.initial.product == "F32"  # type: ignore[attr-defined]
