"""`verify --weights-only` of exports: passes what is right, and fails each change to one of its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
from pico_models import save_lora, save_pico

pytest.importorskip("onnxruntime_genai")

from adapter_merge.api.options import VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import AdapterError
from adapter_merge.export.exporting import export_model

pytestmark = pytest.mark.onnx
WEIGHTS = VerifyOptions(weights_only=True)


def export(base: Path, adapters: dict[str, Path], out: Path, **options: str) -> Path:
    export_model(base, adapters, out, check=False, **options)  # type: ignore[arg-type]
    return out


def edit(folder: Path, name: str, change: str) -> None:
    """Change one initialiser of the graph in `folder`."""
    model = ir.load(folder / "model.onnx")
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    if change == "zeroed":
        array[..., :] = 0
    elif change == "scaled":
        array = (array * 1.02).astype(array.dtype)
    else:  # one row of the linear is negated
        array[..., 1] *= -1
    value.const_value = ir.Tensor(array, name=name)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"), [("llama", "fp32"), ("qwen2", "fp32"), ("gemma2", "fp16"), ("phi3", "fp16")]
)
def test_a_merged_export_passes_and_each_change_fails(kind: str, precision: str, tmp_path: Path) -> None:
    base = save_pico(tmp_path / "base", kind)
    adapter, other = save_lora(base, tmp_path / "adapter", 1), save_lora(base, tmp_path / "other", 2)
    out = export(base, {"a": adapter}, tmp_path / "out", precision=precision)
    report = verify(base, adapter, out, WEIGHTS).as_json()
    assert report["passed"], report["problems"]
    assert len(report["layers"]) == 14 if kind != "phi3" else 8
    assert not verify(base, other, out, WEIGHTS).passed
    norm = "model.layers.0.input_layernorm.weight"
    for name, change in [
        ("model.layers.0.attn.qkv_proj.MatMul.weight", "negated"),
        ("model.layers.1.mlp.down_proj.MatMul.weight", "scaled"),
        ("lm_head.MatMul.weight", "zeroed"),
        (norm, "scaled"),
    ]:
        wrong = Path(shutil.copytree(out, tmp_path / "wrong"))
        edit(wrong, name, change)
        assert not verify(base, adapter, wrong, WEIGHTS).passed, (name, change)
        shutil.rmtree(wrong)


@pytest.mark.parametrize("mode", ["switchable", "batched"])
def test_the_factors_of_each_adapter_pass_and_anothers_fail(
    mode: str, pico: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    chosen = {name: adapters[name] for name in ("lora", "dora", "dude")}
    out = export(pico, chosen, tmp_path / "out", mode=mode)
    for name, source in chosen.items():
        report = verify(pico, source, out, WEIGHTS)
        assert report.passed, (name, report.problems)
        assert report.as_json()["notes"] == ["not compared: 2 tensors that the builder computes (cos_cache, sin_cache)"]
    manifest = (out / "adapter_merge.json").read_text()
    swapped = manifest.replace(str(chosen["lora"]), "#").replace(str(chosen["dora"]), str(chosen["lora"]))
    (out / "adapter_merge.json").write_text(swapped.replace("#", str(chosen["dora"])))
    assert not verify(pico, chosen["lora"], out, WEIGHTS).passed
    (out / "adapter_merge.json").write_text(manifest)
    edit(out, "model.layers.0.attn.o_proj.MatMul.weight", "scaled")
    assert "was changed" in verify(pico, chosen["lora"], out, WEIGHTS).problems[0]


def test_an_adapted_embedding_and_head(pico: Path, tmp_path: Path) -> None:
    adapter = save_lora(pico, tmp_path / "adapter", 3, target_modules=["q_proj", "embed_tokens", "lm_head"])
    out = export(pico, {"a": adapter}, tmp_path / "out")
    report = verify(pico, adapter, out, WEIGHTS)
    assert report.passed, report.problems
    edit(out, "model.embed_tokens.weight", "negated")
    assert not verify(pico, adapter, out, WEIGHTS).passed
    with pytest.raises(AdapterError, match="adapter: adapts an embedding, which a graph cannot switch"):
        export(pico, {"a": adapter}, tmp_path / "no", mode="switchable")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_codes_of_quantised_weights_are_the_nearest_to_the_trained_ones(kind: str, tmp_path: Path) -> None:
    base = save_pico(tmp_path / "base", kind)
    adapter, other = save_lora(base, tmp_path / "adapter", 1), save_lora(base, tmp_path / "other", 2)
    out = export(base, {"a": adapter}, tmp_path / "out", precision="int4")
    report = verify(base, adapter, out, WEIGHTS).as_json()
    assert report["passed"], report["problems"]
    assert len(report["layers"]) == 14
    assert not verify(base, other, out, WEIGHTS).passed
    held = ir.load(out / "model.onnx").graph.initializers
    scales = next(name for name in held if "down_proj" in name and "scale" in name)
    codes = next(name for name in held if "o_proj" in name and held[name].const_value.numpy().dtype == "uint8")
    head = next(name for name in held if "lm_head" in name and held[name].const_value.numpy().dtype == "uint8")
    for name, change in ((scales, "scaled"), (codes, "zeroed"), (head, "zeroed")):
        wrong = Path(shutil.copytree(out, tmp_path / "wrong"))
        edit(wrong, name, change)
        assert not verify(base, adapter, wrong, WEIGHTS).passed, (name, change)
        shutil.rmtree(wrong)


def test_a_quantised_export_of_the_base_alone_lacks_the_adapter(
    pico: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A quantised base lies within a step of the merged model too: its codes tell the two apart."""
    plain = export(pico, {}, tmp_path / "plain", precision="int4")
    merged = export(pico, {"lora": adapters["lora"]}, tmp_path / "merged", precision="int4")
    for file in plain.glob("model.onnx*"):
        shutil.copy(file, merged)
    assert not verify(pico, adapters["lora"], merged, WEIGHTS).passed
