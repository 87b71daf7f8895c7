"""The check at the end of an export, and the rotary positions that it found wrong, against transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pico_models import save_lora, save_pico

pytest.importorskip("onnxruntime_genai")

from adapter_merge.api.verify import verify
from adapter_merge.cli.main import group
from adapter_merge.errors import MismatchError, UnsupportedError
from adapter_merge.export.building.checks_before_build import Request
from adapter_merge.export.engine.decoder_session import Decoder, run_all
from adapter_merge.export.exporting import export_model
from adapter_merge.export.folder.contents import check_outputs, read_export

pytestmark = pytest.mark.onnx
ORIGINAL = 64
LONG = {"prompt": [(37 * i + 11) % 250 for i in range(ORIGINAL + 30)], "rest": [7 * i % 250 for i in range(6)]}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "dynamic": {"factor": 4.0},
}
Reference = Callable[[Path, "Path | None", list[int]], torch.Tensor]


def save_scaled(folder: Path, kind: str, form: str, family: str = "llama") -> Path:
    """A pico model with scaled rotary positions in its config.json, as transformers 5 (flat) or 4 (scaling) writes."""
    save_pico(folder, family, max_position_embeddings=ORIGINAL)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    settings = {"rope_type": kind, **SCALINGS[kind]}
    if form == "flat":
        config["rope_parameters"] = {**settings, "rope_theta": 5000.0}
    else:
        config |= {"rope_theta": 5000.0, "rope_scaling": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form", "family"),
    [("linear", "scaling", "llama"), ("yarn", "flat", "llama"), ("yarn", "scaling", "qwen2")],
)
def test_scaled_positions_past_the_original_context(
    kind: str, form: str, family: str, tmp_path: Path, reference: Reference
) -> None:
    base = save_scaled(tmp_path / "base", kind, form, family)
    report = export_model(base, {}, tmp_path / "out")
    assert report["parity"]["base"]["past_context"] is True
    assert read_export(tmp_path / "out").parity == report["parity"]
    got = torch.from_numpy(run_all(Decoder(tmp_path / "out", threads=1), None, LONG)).double()
    expected = reference(base, None, LONG["prompt"] + LONG["rest"])
    assert float((got - expected).abs().max()) < 1e-4
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (base / "config.json").write_text(json.dumps(config))
    assert float((reference(base, None, LONG["prompt"] + LONG["rest"]) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("form", ["flat", "scaling"])
def test_what_fixed_tables_cannot_hold_is_refused_before_the_build(form: str, tmp_path: Path) -> None:
    base = save_scaled(tmp_path / "base", "dynamic", form)
    with pytest.raises(UnsupportedError, match="dynamic rotary positions"):
        export_model(base, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_yarn_without_a_factor(tmp_path: Path) -> None:
    base = save_scaled(tmp_path / "base", "yarn", "scaling")
    config = json.loads((base / "config.json").read_text())
    del config["rope_scaling"]["factor"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="without factor"):
        export_model(base, {}, tmp_path / "out")


def test_float32_for_cuda_is_refused_before_the_build(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="computes no KV cache"):
        export_model(pico, {}, tmp_path / "out", device="cuda")


@pytest.mark.slow
def test_an_output_without_a_source_is_found(switchable: Path) -> None:
    import onnx_ir as ir

    model = ir.load(switchable / "model.onnx")
    check_outputs(model, Path("model.onnx"))
    model.graph.outputs[1] = ir.Value(name="present.0.key")
    with pytest.raises(MismatchError, match=r"present\.0\.key"):
        check_outputs(model, Path("model.onnx"))


@pytest.mark.slow
def test_an_export_that_answers_with_another_adapter_is_not_published(
    pico: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Request.factors

    def exchanged(request: Request) -> dict[str, Any]:
        factors = honest(request)
        return {"lora": factors["dude"], "dude": factors["lora"]}

    monkeypatch.setattr(Request, "factors", exchanged)
    said: list[str] = []
    named = {name: adapters[name] for name in ("lora", "dude")}
    with pytest.raises(MismatchError) as caught:
        export_model(pico, named, tmp_path / "out", mode="switchable", say=said.append)
    causes = [problem.cause for problem in caught.value.problems]
    for name in named:
        assert any(f"does not compute {name}: max |dlogit|" in cause for cause in causes)
    assert not any("compute base" in cause for cause in causes)
    assert [line for line in said if line.startswith("checking")] == [
        f"checking {name} against the live model ({index} of 3)" for index, name in enumerate(("base", *named), 1)
    ]
    assert not any(tmp_path.iterdir())


def test_no_check_on_the_command_line(pico: Path, tmp_path: Path) -> None:
    lora = save_lora(pico, tmp_path / "lora", 7)
    result = CliRunner().invoke(
        group, ["export", str(pico), f"a={lora}", "-o", str(tmp_path / "out"), "--no-check", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"] == {}
    assert "checking" not in result.stderr


@pytest.mark.slow
def test_verify_stays_within_a_short_context(tmp_path: Path) -> None:
    base = save_pico(tmp_path / "base", "llama", max_position_embeddings=64)
    adapter = save_lora(base, tmp_path / "adapter", 1)
    export_model(base, {"a": adapter}, tmp_path / "out")
    report = verify(base, adapter, tmp_path / "out").as_json()
    assert report["passed"], report["problems"]
    assert report["tokens"] == 64
