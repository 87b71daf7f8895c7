"""Merged models and factors against the unmerged forward, by PEFT and by the DCFT formula, for every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.formats.stated_settings import ReadOptions

TOLERANCE = 1e-4


def load(folder: Path, kind: str) -> Any:
    """The model in `folder`, loaded by transformers alone."""
    return type(pico.pico_model(kind)).from_pretrained(folder, dtype="auto").eval()


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.isfinite(got).all()
    assert float((got - want).abs().max()) <= TOLERANCE
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("method", pico.METHODS)
@pytest.mark.parametrize("kind", pico.ARCHITECTURES)
def test_merged_and_factored_logits_equal_the_live_peft_model(kind: str, method: str, tmp_path: Path) -> None:
    model = pico.pico_model(kind)
    before = pico.logits(model)
    base = pico.save_base(model, tmp_path / "base")
    live = pico.peft_adapter(model, kind, tmp_path / "adapter", **pico.METHODS[method])
    want = pico.logits(live)
    assert float((before - want).abs().max()) > 0.05, "an adapter without an effect would prove nothing"

    merge(base, tmp_path / "adapter", tmp_path / "merged")
    check(pico.logits(load(tmp_path / "merged", kind)), want)

    factor(base, tmp_path / "adapter", tmp_path / "factors")
    loaded = peft.PeftModel.from_pretrained(load(base, kind), tmp_path / "factors").eval()
    check(pico.logits(loaded), want)


@pytest.mark.parametrize("method", ["pissa", "dude"])
def test_the_residual_base_is_found_out(method: str, tmp_path: Path) -> None:
    model = pico.pico_model("llama")
    live = pico.peft_adapter(model, "llama", tmp_path / "adapter", **pico.METHODS[method])
    want = pico.logits(live)
    for layer in live.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.lora_A.clear(), layer.lora_B.clear()
    residual = live.unload()
    base = pico.save_base(residual, tmp_path / "residual")
    content = merge(base, tmp_path / "adapter", tmp_path / "merged").as_json()
    assert content["adapters"][0]["base_kind"] == "residual"
    check(pico.logits(load(tmp_path / "merged", "llama")), want)


def test_evidence_looks_at_small_weights_that_are_wide_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is read whole for it: of every part of the model the smallest, but none that the factors nearly fill."""
    model = pico.pico_model("llama")  # k and v are 24 x 48, q and o 48 x 48, the others 96 x 48
    base = pico.save_base(model, tmp_path / "base")
    for rank in (2, 4, 16):
        pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / f"r{rank}", r=rank, **pico.METHODS["dude"])
    seen: list[tuple[int, ...]] = []

    def evidence(weight: torch.Tensor, *factors: object) -> float:
        seen.append(tuple(weight.shape))
        return 1.0

    monkeypatch.setattr("adapter_merge.binding.base_kind.measure_base_evidence", evidence)
    for rank, smallest in ((2, (24, 48)), (4, (48, 48)), (16, (48, 48))):
        seen.clear()
        open_pair(base, tmp_path / f"r{rank}")
        assert len(seen) == 6
        assert min(seen) == smallest


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert", "roberta"])
def test_dcft_checkpoint_equals_its_formula(kind: str, rank: int, tmp_path: Path) -> None:
    model = pico.dcft_model(kind, rank=rank)
    want = pico.logits(model)
    checkpoint = pico.save_dcft_checkpoint(model, tmp_path / "checkpoint")
    merge(None, checkpoint, tmp_path / "merged")
    check(pico.logits(load(tmp_path / "merged", kind)), want)
    # transformers alone loads the checkpoint as an un-adapted model: our result must not be that one
    assert float((pico.logits(pico.pico_model(kind)) - want).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_dcft_goes_every_way_to_the_same_model(kind: str, tmp_path: Path) -> None:
    model = pico.dcft_model(kind)
    want = pico.logits(model)
    plain = pico.pico_model(kind)
    if kind == "bert":  # a base of its own, with a fresh head
        with torch.no_grad():
            plain.classifier.weight.normal_()
    base = pico.save_base(plain, tmp_path / "base")
    checkpoint = pico.save_dcft_checkpoint(model, tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    check(pico.logits(load(tmp_path / "merged", kind)), want)
    merge(base, checkpoint, tmp_path / "merged2")
    check(pico.logits(load(tmp_path / "merged2", kind)), want)

    factor(None, tmp_path / "adapter", tmp_path / "factors")
    loaded = peft.PeftModel.from_pretrained(load(base, kind), tmp_path / "factors").eval()
    check(pico.logits(loaded), want)

    delta(base, tmp_path / "adapter", tmp_path / "delta")
    for name, tensor in load_file(tmp_path / "delta" / "delta.safetensors").items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(tensor, layer.delta().T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["lora", "dora", "dude"])
def test_bf16_merge_is_peft_s_to_the_bit_or_the_correct_rounding(method: str, tmp_path: Path) -> None:
    """Where a bit differs from merge_and_unload (safe_merge=False), the float64 result decides, and for us."""
    model = pico.pico_model("llama", torch.bfloat16)
    base = pico.save_base(model, tmp_path / "base")
    live = pico.peft_adapter(model, "llama", tmp_path / "adapter", **pico.METHODS[method])
    # PEFT folds alpha / r in after the product; 6 / 4 is exact in float32, so both see the same factors.
    exact = {}
    for name, layer in live.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            weight = layer.get_base_layer().weight.double()
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            after = weight + layer.scaling["default"] * (b @ a)
            if method != "lora":
                m = layer.lora_magnitude_vector["default"].weight.double()
                after *= (m / after.norm(dim=1))[:, None]
            exact[name.removeprefix("base_model.model.") + ".weight"] = after
    want = live.merge_and_unload().state_dict()
    reading = ReadOptions(residual_dtype="bfloat16") if method == "dude" else None
    merge(base, tmp_path / "adapter", tmp_path / "merged", MergeOptions(reading=reading))
    got = load(tmp_path / "merged", "llama").state_dict()
    differing = 0
    for name, tensor in want.items():
        different = got[name] != tensor
        if name not in exact:
            assert not different.any(), name
            continue
        differing += int(different.sum())
        ours = (got[name].double() - exact[name]).abs()[different]
        theirs = (tensor.double() - exact[name]).abs()[different]
        # Ties of the rounding, up to float32 accumulation: nobody is closer by more than 2^-14 of the distance.
        assert bool((ours <= theirs * (1 + 2**-14)).all() or (ours - theirs).abs().max() <= 2e-7), name
    assert differing <= 0.0005 * sum(tensor.numel() for tensor in exact.values())


@pytest.mark.slow
@pytest.mark.parametrize("artefact", ["merged", "factors", "delta", "adapter"])
@pytest.mark.parametrize("method", ["dude", "dcft"])
def test_verify_passes_what_is_equal_and_fails_what_is_not(method: str, artefact: str, tmp_path: Path) -> None:
    base = pico.save_base(pico.pico_model("qwen2"), tmp_path / "base")
    if method == "dcft":
        adapter = tmp_path / "adapter"
        convert(pico.save_dcft_checkpoint(pico.dcft_model("qwen2"), tmp_path / "checkpoint"), adapter)
    else:
        pico.peft_adapter(pico.pico_model("qwen2"), "qwen2", tmp_path / "peft", **pico.METHODS["dude"])
        adapter = tmp_path / "peft"
    out = tmp_path / "out"
    jobs: dict[str, Any] = {"merged": merge, "factors": factor, "delta": delta}
    if artefact == "adapter":
        convert(adapter, out, ConvertOptions(base=base))
    else:
        jobs[artefact](base, adapter, out)
    report = verify(base, adapter, out, VerifyOptions(generated=8)).as_json()
    assert report["passed"], report["problems"]
    assert report["logits"]["max_difference"] <= TOLERANCE
    assert report["logits"]["greedy_equal"] == report["logits"]["greedy_total"]

    file = next(path for path in sorted(out.glob("*.safetensors")) if "row_scale" not in path.name)
    data = bytearray(file.read_bytes())
    data[-2:] = b"\x41\x41"  # the last element of the last tensor becomes another number
    file.write_bytes(data)
    assert not verify(base, adapter, out, VerifyOptions(generated=8)).as_json()["passed"]


def test_a_half_precision_dcft_checkpoint_equals_its_formula(tmp_path: Path) -> None:
    """Each merged weight is one rounding of what the layer, in float64, adds to the stored bfloat16 weight."""
    model = pico.dcft_model("llama", rank=2, dtype=torch.bfloat16)
    checkpoint = pico.save_dcft_checkpoint(model, tmp_path / "checkpoint")
    merge(None, checkpoint, tmp_path / "merged")
    merged = load(tmp_path / "merged", "llama").state_dict()
    wide = model.double()
    for name, layer in wide.named_modules():
        if isinstance(layer, pico.DcftLinear):
            exact = layer.plain.weight + layer.delta().T
            wrong = merged[f"{name}.weight"] != exact.to(torch.bfloat16)
            assert float(wrong.float().mean()) < 0.001, name
            torch.testing.assert_close(merged[f"{name}.weight"].double(), exact, rtol=2**-8, atol=1e-6)
    report = verify(None, checkpoint, tmp_path / "merged", VerifyOptions(generated=4)).as_json()
    assert report["passed"], report["problems"]


def test_verify_does_not_trust_our_own_algebra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that merge and weight check share shows against the live forward, also in half precision."""
    import adapter_merge.methods.dcft as dcft

    honest = dcft.dcft_factors
    checkpoint = pico.save_dcft_checkpoint(pico.dcft_model("llama"), tmp_path / "checkpoint")

    def shrunk(*args: Any) -> Any:
        up, down = honest(*args)
        return up * 1.001, down

    monkeypatch.setattr(dcft, "dcft_factors", shrunk)
    merge(None, checkpoint, tmp_path / "merged", MergeOptions(dtype="bfloat16"))
    report = verify(None, checkpoint, tmp_path / "merged", VerifyOptions(generated=4)).as_json()
    assert not report["passed"] and "beyond one rounding" in report["problems"][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dude_on_a_half_precision_base_is_peft_s_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = pico.save_base(pico.pico_model("gpt2", dtype), tmp_path / "base")
    pico.peft_adapter(pico.pico_model("gpt2", dtype), "gpt2", tmp_path / "adapter", **pico.METHODS["dude"])
    reading = ReadOptions(residual_dtype=str(dtype).removeprefix("torch."))
    merge(base, tmp_path / "adapter", tmp_path / "merged", MergeOptions(reading=reading))
    options = VerifyOptions(generated=4, reading=reading)
    report = verify(base, tmp_path / "adapter", tmp_path / "merged", options).as_json()
    assert report["passed"], report["problems"]
    content = factor(base, tmp_path / "adapter", tmp_path / "factors", FactorOptions(reading=reading)).as_json()
    assert content["exact"] == (dtype == torch.float32) and bool(content.get("warnings")) == (not content["exact"])


def test_a_converted_head_of_several_layers_loads_in_peft(tmp_path: Path) -> None:
    base = pico.save_base(pico.pico_model("roberta"), tmp_path / "base")
    live = pico.peft_adapter(pico.pico_model("roberta"), "roberta", tmp_path / "peft", **pico.METHODS["dude"])
    convert(tmp_path / "peft", tmp_path / "adapter", ConvertOptions(base=base))
    factor(base, tmp_path / "adapter", tmp_path / "factors")
    loaded = peft.PeftModel.from_pretrained(load(base, "roberta"), tmp_path / "factors").eval()
    check(pico.logits(loaded), pico.logits(live))
    tensors = load_file(tmp_path / "factors" / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("out_proj.bias"))
    tensors[name] += 0.5
    save_file(tensors, tmp_path / "factors" / "adapter_model.safetensors", {"format": "pt"})
    assert not verify(base, tmp_path / "adapter", tmp_path / "factors", VerifyOptions(weights_only=True)).as_json()[
        "passed"
    ]


@pytest.mark.parametrize("method", ["lora", "dude"])
def test_verify_holds_half_precision_to_one_rounding(method: str, tmp_path: Path) -> None:
    base = pico.save_base(pico.pico_model("llama"), tmp_path / "base")
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter", **pico.METHODS[method])
    out = tmp_path / "out"
    merge(base, tmp_path / "adapter", out, MergeOptions(dtype="bfloat16"))
    assert verify(base, tmp_path / "adapter", out, VerifyOptions(weights_only=True)).as_json()["passed"]

    file = next(path for path in sorted(out.glob("*.safetensors")) if any("q_proj" in name for name in load_file(path)))
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    flat = tensors[name].view(torch.int16).reshape(-1)
    largest = int(tensors[name].float().abs().argmax())
    flat[largest] += 1  # one ulp
    save_file(tensors, file, {"format": "pt"})
    report = verify(base, tmp_path / "adapter", out, VerifyOptions(weights_only=True)).as_json()
    assert not report["passed"] and "BF16" in report["problems"][0]
