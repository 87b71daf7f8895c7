"""Switchable exports: one graph, every adapter, against PEFT and the DCFT forward in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_models import save_lora, save_pico

pytest.importorskip("onnxruntime_genai")

from adapter_merge.api.factor import factor
from adapter_merge.errors import (
    AdapterMergeError,
    FileFormatError,
    MismatchError,
    MissingDependencyError,
    OutputError,
    UnsupportedError,
)
from adapter_merge.export.adding import add_adapters
from adapter_merge.export.engine.decoder_session import LINE, Decoder, pack_in_graph_order, run_all
from adapter_merge.export.engine.providers import check_packages, open_session
from adapter_merge.export.exporting import export_model
from adapter_merge.export.folder.contents import folder_layout, read_export
from adapter_merge.export.graph.adapter_file import load_tensors, match_factors, write_adapter
from adapter_merge.export.graph.adapter_source import factors_of
from adapter_merge.export.graph.factor_folder import Factors, LinearFactors
from adapter_merge.export.modes.switchable import export_switchable

pytestmark = pytest.mark.onnx
TOKENS = {
    "prompt": [int(t) for t in (np.arange(40) * 37 + 11) % 250],
    "rest": [int(t) for t in np.arange(20) * 7 % 250],
}
BAR = 1e-4

Reference = Callable[[Path, "Path | None", list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def folder(switchable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a test here adds an adapter to it."""
    return Path(shutil.copytree(switchable, tmp_path_factory.mktemp("copy") / "export"))


def written(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written, and not when it is read."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def difference(logits: Any, expected: torch.Tensor) -> float:
    return float((torch.from_numpy(logits).double() - expected).abs().max())


@pytest.mark.parametrize("name", [None, "lora", "rslora", "dora", "dcft"])
def test_logits_of_every_adapter(
    folder: Path, pico: Path, adapters: dict[str, Path], reference: Reference, name: str | None
) -> None:
    tokens = TOKENS["prompt"] + TOKENS["rest"]
    expected = reference(pico, adapters[name] if name else None, tokens)
    got = run_all(Decoder(folder, threads=1), name, TOKENS)
    assert difference(got, expected) < BAR
    if name:
        base = reference(pico, None, tokens)
        assert float((expected - base).abs().max()) > 0.05  # an adapter that does nothing would prove nothing


def test_no_adapter_is_the_base_bit_for_bit(folder: Path, pico: Path, tmp_path: Path) -> None:
    from adapter_merge.export.building.decoder import build_decoder
    from adapter_merge.export.engine.providers import open_session

    build_decoder(pico, tmp_path, "fp32", "cpu")
    tokens = np.asarray([TOKENS["prompt"]])
    feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for layer in range(2):
        for kind in ("key", "value"):
            feeds[f"past_key_values.{layer}.{kind}"] = np.zeros((1, 2, 0, 16), np.float32)
    plain = open_session(tmp_path / "model.onnx").run(["logits"], feeds)[0]
    switchable = open_session(folder / "model.onnx").run(["logits"], feeds)[0]
    np.testing.assert_array_equal(plain, switchable)


def test_add_an_adapter_later_and_switch_to_and_fro(
    folder: Path, pico: Path, adapters: dict[str, Path], reference: Reference
) -> None:
    graph = (folder / "model.onnx").read_bytes()
    data = written(folder / "model.onnx.data")
    add_adapters(folder, {"later": adapters["dude"]})
    assert (folder / "model.onnx").read_bytes() == graph
    assert written(folder / "model.onnx.data") == data
    assert read_export(folder).adapters["later"]["file"] == "later.onnx_adapter"
    tokens = TOKENS["prompt"] + TOKENS["rest"]
    decoder = Decoder(folder, threads=1)
    first = run_all(decoder, "later", TOKENS)
    between = run_all(decoder, "lora", TOKENS)
    again = run_all(decoder, "later", TOKENS)
    base = run_all(decoder, None, TOKENS)
    assert difference(first, reference(pico, adapters["dude"], tokens)) < BAR
    assert difference(between, reference(pico, adapters["lora"], tokens)) < BAR
    assert difference(base, reference(pico, None, tokens)) < BAR
    np.testing.assert_array_equal(first, again)


def test_onnxruntime_genai_runs_graph_and_adapters_as_they_are(
    folder: Path, pico: Path, adapters: dict[str, Path], reference: Reference
) -> None:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    loaded = og.Adapters(model)
    for name in ("lora", "dora", "dcft"):
        loaded.load(str(folder / f"{name}.onnx_adapter"), name)
    for name in ("dora", "lora", "dcft", None, "dora"):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=64, do_sample=False)
        generator = og.Generator(model, parameters)
        if name:
            generator.set_active_adapter(loaded, name)
        generator.append_tokens(TOKENS["prompt"])
        logits = torch.from_numpy(generator.get_output("logits")[0].copy()).double()
        expected = reference(pico, adapters[name] if name else None, TOKENS["prompt"])
        assert float((logits[-1] - expected[-1]).abs().max()) < BAR


def test_onnxruntime_runs_a_plain_run_with_an_active_adapter(
    folder: Path, pico: Path, adapters: dict[str, Path], reference: Reference
) -> None:
    import onnxruntime

    session = open_session(folder / "model.onnx")
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(folder / "dora.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    tokens = np.asarray([TOKENS["prompt"]])
    feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for layer in range(2):
        for kind in ("key", "value"):
            feeds[f"past_key_values.{layer}.{kind}"] = np.zeros((1, 2, 0, 16), np.float32)
    logits = session.run(["logits"], feeds, options)[0][0]
    assert difference(logits, reference(pico, adapters["dora"], TOKENS["prompt"])) < BAR


@pytest.mark.parametrize("name", ["lora", "dora", "dcft"])
def test_an_adapters_tensors_are_laid_out_in_the_graphs_order_and_unchanged(folder: Path, name: str) -> None:
    layout = folder_layout(folder)
    stored = load_tensors(folder / f"{name}.onnx_adapter", layout)
    placed = pack_in_graph_order(stored, layout)
    assert placed.keys() == stored.keys()
    for key, value in stored.items():
        assert np.array_equal(placed[key].numpy(), value.numpy())
    read = [key for target in layout.targets for key in (target.down_name, target.up_name, target.scale_name)]
    places = [placed[key].data_ptr() for key in read if key in placed]
    assert len(places) >= 8
    assert places == sorted(places)
    assert {place % LINE for place in places} == {0}


def test_folder_holds_the_base_once(folder: Path, pico: Path) -> None:
    weights = (pico / "model.safetensors").stat().st_size
    rotary = 2 * 512 * 8 * 4  # cos and sin, which transformers computes
    assert (folder / "model.onnx.data").stat().st_size < weights + rotary
    assert (folder / "model.onnx").stat().st_size < 200_000


class TestBadInput:
    def test_adapter_file_of_another_export(self, folder: Path, pico: Path, tmp_path: Path) -> None:
        other = save_pico(tmp_path / "other", "llama", seed=9)
        lora = save_lora(other, tmp_path / "lora", 9)
        layout = folder_layout(folder)
        foreign = replace(layout, base="0" * 64)
        write_adapter(factors_of(other, lora), foreign, tmp_path / "x.onnx_adapter")
        with pytest.raises(MismatchError, match="another export"):
            load_tensors(tmp_path / "x.onnx_adapter", layout)

    def test_not_an_adapter_file(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "x.onnx_adapter").write_bytes(b"nothing of the kind")
        with pytest.raises(FileFormatError, match="not an ONNX Runtime adapter"):
            load_tensors(tmp_path / "x.onnx_adapter", folder_layout(folder))

    def test_base_of_another_export(self, folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
        other = save_pico(tmp_path / "other", "llama", seed=9)
        with pytest.raises(MismatchError, match="not the base of"):
            add_adapters(folder, {"n": adapters["lora"]}, base=other)
        assert not (folder / "n.onnx_adapter").exists()

    @pytest.mark.parametrize("mode", ["merged", "switchable", "batched"])
    def test_base_that_the_adapter_was_not_trained_on(
        self, mode: str, pico: Path, adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        """Told by the magnitudes of a DoRA, and by what a folder of factors names as its base."""
        other = save_pico(tmp_path / "other", "llama", seed=9)
        factor(pico, adapters["lora"], tmp_path / "factors")
        for adapter, cause in ((adapters["dora"], "not trained on this base"), (tmp_path / "factors", "another base")):
            with pytest.raises(MismatchError, match=cause):
                export_model(other, {"a": adapter}, tmp_path / "out", mode=mode, dry_run=True)
            report = export_model(other, {"a": adapter}, tmp_path / "out", mode=mode, dry_run=True, force=True)
            assert cause in report["adapters"]["a"]["contradictions"][0]
            export_model(pico, {"a": adapter}, tmp_path / "out", mode=mode, dry_run=True)

    def test_adapter_name_that_is_taken(self, folder: Path, adapters: dict[str, Path]) -> None:
        with pytest.raises(OutputError, match="lora"):
            add_adapters(folder, {"lora": adapters["dora"]})

    def test_rank_and_shape_and_module_problems_are_all_named(self, folder: Path, pico: Path) -> None:
        def factors(out: int, inner: int) -> LinearFactors:
            return LinearFactors(np.zeros((2, inner), np.float32), np.zeros((out, 2), np.float32))

        wrong = Factors(
            pico,
            {"model.layers.0.self_attn.q_proj": factors(65, 64), "model.layers.7.self_attn.q_proj": factors(64, 64)},
            {"model.norm.weight": np.zeros(64, np.float32)},
        )
        with pytest.raises(MismatchError) as caught:
            match_factors(wrong, folder_layout(folder))
        causes = " ".join(problem.cause for problem in caught.value.problems)
        assert len(caught.value.problems) == 3
        for part in ("another shape", "layers.7", "model.norm.weight"):
            assert part in causes

    def test_missing_and_short_weights_file(self, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        data = copy / "model.onnx.data"
        with data.open("r+b") as stream:
            stream.truncate(1000)
        with pytest.raises(FileFormatError, match="too short"):
            Decoder(copy)
        data.unlink()
        with pytest.raises(FileFormatError, match="is missing"):
            Decoder(copy)

    def test_unsupported_architecture_is_named_before_the_build(self, tmp_path: Path) -> None:
        folder = save_pico(tmp_path / "base", "llama")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
        with pytest.raises(UnsupportedError, match="MambaForCausalLM"):
            export_switchable(folder, {}, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]

    def test_output_that_exists(self, folder: Path, pico: Path) -> None:
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(OutputError, match="exists already"):
            export_switchable(pico, {}, folder)
        assert sorted(path.name for path in folder.iterdir()) == before

    def test_failing_build_leaves_nothing(self, pico: Path, tmp_path: Path) -> None:
        base = tmp_path / "base"
        shutil.copytree(pico, base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"hidden_act": "tanh"}))  # the builder has no such one
        with pytest.raises(AdapterMergeError, match="model builder"):
            export_switchable(base, {}, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]

    def test_cuda_that_is_not_there(self, folder: Path) -> None:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has CUDA")
        with pytest.raises(MissingDependencyError, match="no CUDA provider"):
            Decoder(folder, device="cuda")

    def test_two_onnxruntime_packages(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("onnxruntime", "onnxruntime_gpu"):
            info = tmp_path / f"{name}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(MissingDependencyError, match="more than one onnxruntime"):
            check_packages()

    def test_bf16_on_the_cpu(self, pico: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="bf16"):
            export_switchable(pico, {}, tmp_path / "out", precision="bf16")
