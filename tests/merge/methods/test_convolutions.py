"""Adapters of convolutions: merged weights against PEFT's live, unmerged model, and LyCORIS' formulas written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, FactorOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.binding import convolutions
from adapter_merge.binding.convolutions import _difference
from adapter_merge.combine.combination_settings import Settings
from adapter_merge.combine.recipe import Ingredient, make_recipe
from adapter_merge.errors import AdapterError, InputError, MismatchError, UnsupportedError
from adapter_merge.outputs.manifest import read_manifest

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")
t = pytest.importorskip("transformers")

CONVOLUTIONS = r".*(convolution|conv\d|projection|conv_1x1|conv_3x3)$"


def resnet() -> Any:
    """Convolutions of 1 x 1, 3 x 3 and 7 x 7, with strides."""
    config = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="bottleneck", num_labels=3
    )
    return t.ResNetForImageClassification(config)


def regnet() -> Any:
    """Grouped convolutions, of 4 channels each."""
    config = t.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=3)
    return t.RegNetForImageClassification(config)


def whisper() -> Any:
    """A stem of two Conv1d, and linear layers."""
    config = t.WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=12,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    return t.WhisperForConditionalGeneration(config)


MODELS = {"resnet": resnet, "regnet": regnet, "whisper": whisper}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def outputs(kind: str, model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    if kind == "whisper":
        features = torch.randn(2, 8, 24, generator=generator)
        ids = torch.randint(3, 60, (2, 5), generator=generator)
        return model(input_features=features, decoder_input_ids=ids).logits.double()
    return model(pixel_values=torch.randn(2, 3, 32, 32, generator=generator)).logits.double()


STEM = ["conv1", "conv2", "q_proj"]
CASES: dict[str, tuple[str, Any]] = {
    "LoRA": ("resnet", lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=CONVOLUTIONS)),
    "rsLoRA with patterns": (
        "resnet",
        lambda: peft.LoraConfig(
            r=4, target_modules=CONVOLUTIONS, use_rslora=True, rank_pattern={r"layers\.1\..*convolution": 2},
            modules_to_save=["classifier.1"],
        ),
    ),
    "DoRA": ("resnet", lambda: peft.LoraConfig(r=4, target_modules=CONVOLUTIONS, use_dora=True)),
    "LoRA, Conv1d": ("whisper", lambda: peft.LoraConfig(r=4, target_modules=STEM)),
    "LoRA with biases, Conv1d": (
        "whisper", lambda: peft.LoraConfig(r=4, target_modules=["conv1", "conv2"], lora_bias=True)
    ),
    "DoRA, Conv1d": ("whisper", lambda: peft.LoraConfig(r=4, target_modules=STEM, use_dora=True)),
    "LoHa": ("resnet", lambda: peft.LoHaConfig(r=3, target_modules=CONVOLUTIONS)),
    "LoHa with cores": (
        "resnet", lambda: peft.LoHaConfig(r=3, target_modules=CONVOLUTIONS, use_effective_conv2d=True)
    ),
    "LoHa, grouped": ("regnet", lambda: peft.LoHaConfig(r=3, target_modules=CONVOLUTIONS)),
    "LoHa with cores, grouped": (
        "regnet", lambda: peft.LoHaConfig(r=3, target_modules=CONVOLUTIONS, use_effective_conv2d=True)
    ),
    "LoHa with cores, Conv1d": (
        "whisper", lambda: peft.LoHaConfig(r=3, target_modules=STEM, use_effective_conv2d=True)
    ),
    "LoKr": ("resnet", lambda: peft.LoKrConfig(r=2, target_modules=CONVOLUTIONS)),
    "LoKr, both decomposed": ("resnet", lambda: peft.LoKrConfig(r=1, target_modules=CONVOLUTIONS, decompose_both=True)),
    "LoKr with cores": (
        "resnet", lambda: peft.LoKrConfig(r=1, target_modules=CONVOLUTIONS, use_effective_conv2d=True)
    ),
    "LoKr, grouped": ("regnet", lambda: peft.LoKrConfig(r=1, target_modules=CONVOLUTIONS)),
}  # fmt: skip


def trained(kind: str, config: Any, folder: Path) -> tuple[Path, Path, Any]:
    model_of(kind).save_pretrained(folder / "base")
    torch.manual_seed(1)
    live = peft.get_peft_model(model_of(kind), config)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.02 if "magnitude" in name else 0.2) * torch.randn_like(parameter))
    live.save_pretrained(folder / "adapter")
    for module in live.modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, torch.nn.Conv1d):
            module.stride = inner.stride  # Whisper reads it, and PEFT's layer lacks it
    return folder / "base", folder / "adapter", live.eval()


def check_factors(kind: str, base: Path, adapter: Path, folder: Path, wanted: Tensor) -> None:
    """PEFT loads the factors as a LoRA (or DoRA) of convolutions, with the outputs of the adapter."""
    factor(base, adapter, folder)
    again = peft.PeftModel.from_pretrained(model_of(kind), folder).eval()
    for module in again.modules():
        if isinstance(getattr(module, "base_layer", None), torch.nn.Conv1d):
            module.stride = module.base_layer.stride
    assert (outputs(kind, again) - wanted).abs().max() < 2e-5 * wanted.abs().max().clamp_min(1)


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_the_live_model(tmp_path: Path, case: str) -> None:
    kind, config = CASES[case]
    base, adapter, live = trained(kind, config(), tmp_path)
    merge(base, adapter, tmp_path / "merged")
    merged = type(model_of(kind)).from_pretrained(tmp_path / "merged").eval()
    wanted = outputs(kind, live)
    assert (wanted - outputs(kind, model_of(kind))).abs().max() > 1e-3
    assert (outputs(kind, merged) - wanted).abs().max() < 2e-5 * wanted.abs().max().clamp_min(1)
    assert verify(base, adapter, tmp_path / "merged", VerifyOptions(weights_only=True)).passed
    plain, found = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: (v.shape, v.dtype) for name, v in plain.items()} == {n: (v.shape, v.dtype) for n, v in found.items()}
    delta(base, adapter, tmp_path / "delta")
    if "grouped" in case or "biases" in case:
        with pytest.raises(
            UnsupportedError, match=r"has no (LoRA|low-rank) factors: (the convolution has|a trained bias)"
        ):
            factor(base, adapter, tmp_path / "factors")
    else:
        check_factors(kind, base, adapter, tmp_path / "factors", wanted)
    for name, change in load_file(tmp_path / "delta" / "delta.safetensors").items():
        torch.testing.assert_close(plain[name] + change, found[name], atol=2e-6, rtol=1e-5)


def test_a_changed_kernel_fails_the_proof(tmp_path: Path) -> None:
    base, adapter, _ = trained("resnet", CASES["LoHa with cores"][1](), tmp_path)
    merge(base, adapter, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].dim() * 1000 + tensors[key].shape[-1] if tensors[key].dim() else 0)
    tensors[name] = tensors[name].flip(-1)
    save_file(tensors, file, metadata={"format": "pt"})
    assert not verify(base, adapter, tmp_path / "merged", VerifyOptions(weights_only=True)).passed


def test_lora_of_a_grouped_convolution_is_no_weight(tmp_path: Path) -> None:
    base, adapter, live = trained("regnet", peft.LoraConfig(r=4, target_modules=CONVOLUTIONS), tmp_path)
    with pytest.raises(AdapterError, match="grouped convolution reads all input channels"):
        merge(base, adapter, tmp_path / "merged")
    with pytest.raises(NotImplementedError, match="groups"):
        live.merge_and_unload()


def test_lokr_of_a_conv1d_by_a_full_matrix_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained("whisper", peft.LoKrConfig(r=8, target_modules=["conv2"]), tmp_path)
    with pytest.raises(UnsupportedError, match="Conv1d by a full lokr_w2"):
        merge(base, adapter, tmp_path / "merged")


def informer() -> Any:
    """A convolution between encoder layers that pads circularly."""
    config = t.InformerConfig(
        prediction_length=4, context_length=12, d_model=8, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, lags_sequence=[1],
    )  # fmt: skip
    return t.InformerForPrediction(config)


def bit() -> Any:
    """Convolutions that standardise their weight in their forward."""
    config = t.BitConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_groups=2, num_labels=3)
    return t.BitForImageClassification(config)


def convolution_differs(live: Any, name: str) -> float:
    """How far one convolution of PEFT's live model is from PEFT's own merge of it, as a share of the update."""
    layer = live.base_model.model.get_submodule(name)
    inner = layer.get_base_layer()
    x = torch.randn(1, inner.in_channels, *(9 for _ in inner.kernel_size), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        unmerged, plain = layer(x), inner(x)
        layer.merge()
        return float((layer(x) - unmerged).norm() / (unmerged - plain).norm())


@pytest.mark.parametrize(
    ("make", "target", "reason"),
    [(informer, r".*downConv", "pads in the mode circular"), (bit, r".*layers\.0\.conv2", "a forward of its own")],
)
@pytest.mark.parametrize("method", ["LoRA", "LoHa"])
def test_a_layer_that_computes_otherwise_than_pefts_update_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, target: str, reason: str, method: str
) -> None:
    monkeypatch.setitem(MODELS, "other", make)
    settings = {"r": 2, "target_modules": target}
    config = peft.LoraConfig(**settings) if method == "LoRA" else peft.LoHaConfig(**settings)
    base, adapter, live = trained("other", config, tmp_path)
    for write in (merge, delta, factor):
        with pytest.raises(UnsupportedError, match=reason):
            write(base, adapter, tmp_path / "out")
    name = next(name for name, module in live.base_model.model.named_modules() if hasattr(module, "base_layer"))
    assert convolution_differs(live, name) > 0.01, "PEFT's merge is the live layer: nothing to refuse"


def test_a_dilated_convolution_of_pefts_lora_is_told() -> None:
    plain = torch.nn.Conv1d(4, 4, 3, dilation=2, padding="same")
    live = peft.get_peft_model(torch.nn.Sequential(plain), peft.LoraConfig(r=2, target_modules=["0"]))
    torch.nn.init.normal_(live.base_model.model[0].lora_B["default"].weight)
    assert convolution_differs(live, "0") > 0.1
    assert "dilated" in str(_difference(plain, True))
    assert _difference(plain, False) is None
    assert _difference(torch.nn.Conv1d(4, 4, 1, dilation=2), True) is None


def squeezebert() -> Any:
    """A text model whose projections are Conv1d of width 1, some grouped."""
    config = t.SqueezeBertConfig(
        vocab_size=60, hidden_size=16, embedding_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, q_groups=2, k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=4,
        output_groups=4, num_labels=3,
    )  # fmt: skip
    return t.SqueezeBertForSequenceClassification(config)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "LoHa"])
def test_live_convolutions_and_logits_of_a_text_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(MODELS, "squeezebert", squeezebert)
    plain = {"r": 2, "target_modules": r".*(key|value)"}
    config = {
        "LoRA": lambda: peft.LoraConfig(**plain),
        "DoRA": lambda: peft.LoraConfig(**plain, use_dora=True),
        "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=r".*(query|key|value)"),
    }[method]()
    base, adapter, _ = trained("squeezebert", config, tmp_path)
    merge(base, adapter, tmp_path / "merged")
    assert verify(base, adapter, tmp_path / "merged").passed
    delta(base, adapter, tmp_path / "delta")
    assert verify(base, adapter, tmp_path / "delta").passed
    both = make_recipe([Ingredient(name, str(adapter), 0.5) for name in "ab"], Settings())
    merge(base, both, tmp_path / "both")
    assert verify(base, both, tmp_path / "both").passed
    if method in ("LoRA", "DoRA"):
        factor(base, adapter, tmp_path / "factors", FactorOptions(end_to_end=True))
        assert verify(base, adapter, tmp_path / "factors").passed
        figures = read_manifest(tmp_path / "factors")["certificate"]["end_to_end"]
        assert figures["max_dlogit"] < 1e-5 < figures["effect"]


def test_logits_of_an_image_model_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained("resnet", CASES["LoRA"][1](), tmp_path)
    merge(base, adapter, tmp_path / "merged")
    with pytest.raises(UnsupportedError, match="this model takes other inputs"):
        verify(base, adapter, tmp_path / "merged")
    with pytest.raises(UnsupportedError, match="this model takes other inputs"):
        factor(base, adapter, tmp_path / "factors", FactorOptions(end_to_end=True))
    assert not (tmp_path / "factors").exists()


def test_another_base_is_told_by_its_convolutions(tmp_path: Path) -> None:
    base, adapter, _ = trained("resnet", CASES["LoRA"][1](), tmp_path)
    convert(adapter, tmp_path / "safe", ConvertOptions(base=base))
    file = base / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if tensors[name].dim() == 4:
            tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="another base"):
        merge(base, tmp_path / "safe", tmp_path / "merged")


def test_factors_of_loha_and_lokr_need_the_base(tmp_path: Path) -> None:
    for case in ("LoHa", "LoKr with cores"):
        (tmp_path / case).mkdir()
        _, adapter, _ = trained("resnet", CASES[case][1](), tmp_path / case)
        with pytest.raises(InputError, match="cannot be written without the base"):
            factor(None, adapter, tmp_path / "factors")


def test_groups_need_the_models_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = trained("resnet", CASES["LoHa"][1](), tmp_path)
    monkeypatch.setattr(convolutions, "list_transformers_names", lambda *_: ([], "transformers 5 is not installed"))
    with pytest.raises(UnsupportedError, match="unknown whether this convolution is grouped"):
        factor(base, adapter, tmp_path / "factors")
    content = merge(base, adapter, tmp_path / "merged").as_json()
    assert "dilation and padding of its convolutions were not compared" in json.dumps(content)


def test_another_kernel_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained("resnet", peft.LoraConfig(r=4, target_modules=CONVOLUTIONS), tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.shape[2:] == (3, 3):
            tensors[name] = tensor.reshape(*tensor.shape[:2], 9, 1)
    save_file(tensors, file)
    with pytest.raises(MismatchError, match="shape is not the weight's"):
        merge(base, adapter, tmp_path / "merged")


def kohya_file(file: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LyCORIS file: LoRA, LoCon with lora_mid, LoKr, LoHa, DoRA on a convolution each; returns the merged weights."""
    torch.manual_seed(6)
    tensors, wanted, kinds = {}, dict(base), ("lora", "mid", "lokr", "loha", "dora")
    names = [name for name, weight in base.items() if weight.dim() == 4]
    for number, name in enumerate(names):
        weight = base[name].double()
        out, inner, *kernel = weight.shape
        r, kind, flat = 2, kinds[number % len(kinds)], "lycoris_" + name.removesuffix(".weight").replace(".", "_")
        alpha = torch.tensor(3.0)
        if kind in ("lora", "dora"):
            parts = {"lora_down.weight": torch.randn(r, inner, *kernel), "lora_up.weight": torch.randn(out, r, 1, 1)}
            change = torch.einsum("or,rikl->oikl", parts["lora_up.weight"][:, :, 0, 0], parts["lora_down.weight"])
        elif kind == "mid":
            parts = {
                "lora_down.weight": torch.randn(r, inner, 1, 1), "lora_mid.weight": torch.randn(r, r, *kernel),
                "lora_up.weight": torch.randn(out, r, 1, 1),
            }  # fmt: skip
            up, down = parts["lora_up.weight"][:, :, 0, 0], parts["lora_down.weight"][:, :, 0, 0]
            change = torch.einsum("ijkl,oi,jn->onkl", parts["lora_mid.weight"], up, down)
        elif kind == "lokr":
            core, wa, wb = torch.randn(r, r, *kernel), torch.randn(r, out // 2), torch.randn(r, inner)
            parts = {"lokr_w1": torch.randn(2, 1), "lokr_t2": core, "lokr_w2_a": wa, "lokr_w2_b": wb}
            change = torch.kron(parts["lokr_w1"][:, :, None, None], torch.einsum("ijkl,io,jn->onkl", core, wa, wb))
        else:
            parts = {f"hada_w{i}_a": torch.randn(out, r) for i in (1, 2)}
            parts |= {f"hada_w{i}_b": torch.randn(r, inner * kernel[0] * kernel[1]) for i in (1, 2)}
            change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
            change = change.reshape(weight.shape)
        after = weight + 0.02 * change.double() * 3 / r
        first = next(key for key in parts if key.endswith(("up.weight", "lokr_w1", "w1_a")))
        parts[first] = parts[first] * 0.02
        if kind == "dora":
            norm = weight.float().flatten(1).norm(dim=1)
            parts["dora_scale"] = (norm * (1 + 0.1 * torch.rand(out)))[:, None, None, None]
            after = after / after.flatten(1).norm(dim=1)[:, None, None, None] * parts["dora_scale"].double()
        tensors |= {f"{flat}.{role}": part.contiguous() for role, part in {**parts, "alpha": alpha}.items()}
        wanted[name] = after
    save_file(tensors, file)
    return wanted


@pytest.mark.parametrize("converted", [False, True])
def test_lycoris_file(tmp_path: Path, converted: bool) -> None:
    model_of("resnet").save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    wanted = kohya_file(tmp_path / "file.safetensors", base)
    adapter = tmp_path / "file.safetensors"
    if converted:
        convert(adapter, tmp_path / "converted", ConvertOptions(base=tmp_path / "base"))
        adapter = tmp_path / "converted"
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert sum(not torch.equal(found[name], base[name]) for name in base) == len(wanted) - sum(
        torch.equal(wanted[name], base[name]) for name in base
    )
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name].double(), weight.double(), atol=2e-6, rtol=2e-6)
