"""`verify` of traced exports: passes what is right, and finds a change of any weight, also where logits hardly move."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pico_models import save_encoder, save_encoder_adapter, save_encoder_dcft, save_gpt2, save_lora

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from adapter_merge.api.options import VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.export.checking.weight_proof import verify_weights
from adapter_merge.export.engine.providers import graph_file
from adapter_merge.export.exporting import export_model

pytestmark = pytest.mark.onnx
WEIGHTS = VerifyOptions(weights_only=True)
QUERY = "bert.encoder.layer.0.attention.self.query"
Export = Callable[[str], tuple[Path, Path, Path]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A function from a name to base, adapter and export, each made once."""
    root = tmp_path_factory.mktemp("traced")
    made: dict[str, tuple[Path, Path, Path]] = {}

    def classifier(family: str, mode: str, precision: str = "fp32") -> tuple[Path, Path, Path]:
        base = root / family
        if not base.exists():
            save_encoder(base, family, layers=1)
            save_encoder_adapter(base, root / f"{family}-dora", 1, use_dora=True)
        adapter, out = root / f"{family}-dora", root / f"{family}-{mode}-{precision}"
        if family == "deberta-v2":  # positions of their own
            adapter = save_encoder_dcft(base, root / "dcft", 2)
        export_model(base, {"a": adapter}, out, mode=mode, precision=precision, check=False)
        return base, adapter, out

    def gpt2(mode: str) -> tuple[Path, Path, Path]:
        base, adapter, out = root / "gpt2", root / "gpt2-dora", root / f"gpt2-{mode}"
        if not base.exists():
            save_gpt2(base, layers=1)
            targets = ["c_attn", "c_fc", "c_proj"]
            save_lora(base, adapter, 1, target_modules=targets, fan_in_fan_out=True, use_dora=True)
        export_model(base, {"a": adapter}, out, mode=mode, check=False)
        return base, adapter, out

    def get(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            kind, *settings = name.split()
            made[name] = gpt2(*settings) if kind == "gpt2" else classifier(kind, *settings)
        return made[name]

    return get


def edited(source: Path, folder: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy of the export with one initialiser changed: in its data file at its place, or in the graph's own file."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    file = graph_file(folder)
    model = ir.load(file)
    stored = model.graph.initializers[name].const_value
    assert stored is not None
    old = stored.numpy()
    new = np.ascontiguousarray(change(old.copy()))
    assert new.dtype == old.dtype and not np.array_equal(new, old)
    if isinstance(stored, ir.ExternalTensor):
        with (file.parent / str(stored.location)).open("r+b") as data:
            data.seek(stored.offset or 0)
            data.write(new.tobytes())
    else:
        model.graph.initializers[name].const_value = ir.Tensor(new, name=name)
        ir.save(model, file)
    return folder


def scaled(array: Any) -> Any:
    return (array * 1.02).astype(array.dtype)


def negated_row(array: Any) -> Any:
    array[0] *= -1
    return array


def nudged(array: Any) -> Any:
    """One value, by about a thousandth of the smallest effect of the adapter on it."""
    array.reshape(-1)[-1] += np.asarray(2e-5, array.dtype)
    return array


def one_code(array: Any) -> Any:
    array.reshape(-1)[0] = 1 if array.reshape(-1)[0] < 1 else -1
    return array


CASES = [
    ("bert merged", f"{QUERY}.weight", scaled),
    ("bert merged", f"{QUERY}.bias", nudged),
    ("bert merged", "bert.embeddings.position_embeddings.weight", negated_row),
    ("bert merged", "bert.encoder.layer.0.output.LayerNorm.weight", nudged),
    ("bert merged", "classifier.weight", negated_row),
    ("bert switchable", f"{QUERY}.weight", negated_row),
    ("bert switchable", "bert.encoder.layer.0.output.dense.bias", nudged),
    ("bert switchable", "classifier.bias", nudged),  # the base's head, which the adapter's replaces
    ("bert switchable", f"{QUERY}.out_scale", scaled),  # of no adapter
    ("bert merged int8", f"{QUERY}.weight_quantized", one_code),
    ("bert merged int8", f"{QUERY}.weight_scale", scaled),
    ("gpt2 switchable", "transformer.h.0.mlp.c_fc.weight", scaled),
    ("gpt2 switchable", "transformer.h.0.ln_1.bias", nudged),
    ("gpt2 batched", "transformer.h.0.attn.c_attn.lora_B.weight", scaled),
    ("gpt2 merged", "lm_head.weight", negated_row),
    ("gpt2 merged", "transformer.h.0.attn.c_proj.weight", negated_row),
    ("deberta-v2 switchable", "deberta.encoder.layer.0.attention.self.query_proj.weight", nudged),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES}))
def test_an_export_passes_and_each_change_of_a_weight_fails(name: str, export: Export, tmp_path: Path) -> None:
    base, adapter, out = export(name)
    report = verify(base, adapter, out, WEIGHTS).as_json()
    assert report["passed"], report["problems"]
    assert len(report["layers"]) >= 4 and report["notes"] == []
    if "merged" not in name:
        assert verify_weights(base, None, out)["passed"]
    for case, tensor, change in CASES:
        if case == name:
            wrong = verify(base, adapter, edited(out, tmp_path / "wrong", tensor, change), WEIGHTS)
            assert not wrong.passed, (tensor, change.__name__)


def test_logits_alone_do_not_see_it(export: Export, tmp_path: Path) -> None:
    base, adapter, out = export("bert switchable")
    right = verify(base, adapter, out)
    assert right.passed and len(right.as_json()["layers"]) == 8, right.problems
    bias = f"{QUERY.replace('query', 'key')}.bias"  # it adds the same to every score of a query: softmax takes it away
    wrong = verify(base, adapter, edited(out, tmp_path / "wrong", bias, scaled))
    report = wrong.as_json()
    assert (
        report["logits"]["max_difference"] < 1e-4
        and report["logits"]["greedy_equal"] == report["logits"]["greedy_total"]
    )
    assert not wrong.passed and wrong.problems == (f"{bias} was changed",)


def test_an_adapter_file_and_the_places_of_its_factors(export: Export, tmp_path: Path) -> None:
    base, adapter, out = export("bert switchable")
    wrong = Path(shutil.copytree(out, tmp_path / "wrong"))
    file = str(wrong / "a.onnx_adapter")
    old = ort.AdapterFormat.read_adapter(file)
    values = {name: value.numpy().copy() for name, value in old.get_parameters().items()}
    values[f"{QUERY}.lora_B.weight"] *= 1.001
    new = ort.AdapterFormat()
    new.set_adapter_version(old.get_adapter_version())
    new.set_model_version(old.get_model_version())
    new.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    new.export_adapter(file)
    assert not verify(base, adapter, wrong, WEIGHTS).passed
    shutil.copyfile(out / "a.onnx_adapter", file)
    assert verify(base, adapter, wrong, WEIGHTS).passed
    model = ir.load(graph_file(wrong))  # the factors of query beside a product of another input
    nodes = {node.name: node for node in model.graph}
    nodes[f"/{QUERY}/lora_A/MatMul"].replace_input_with(
        0, nodes["/bert.encoder.layer.0.output.dense/lora_A/MatMul"].inputs[0]
    )
    ir.save(model, graph_file(wrong))
    report = verify(base, adapter, wrong, WEIGHTS)
    assert any("not beside its product" in problem for problem in report.problems)
