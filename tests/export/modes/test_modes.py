"""Merged and batched exports, and every precision."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pico_models import save_lora, save_pico

pytest.importorskip("onnxruntime_genai")

from adapter_merge.api.options import MergeOptions
from adapter_merge.errors import AdapterMergeError, InputError, OutputError
from adapter_merge.export.adding import add_adapters
from adapter_merge.export.checking.verification import verify_onnx
from adapter_merge.export.engine.decoder_session import Decoder, run_all
from adapter_merge.export.engine.providers import open_session
from adapter_merge.export.folder.contents import read_export
from adapter_merge.export.modes import batched as batched_export
from adapter_merge.export.modes.batched import export_batched
from adapter_merge.export.modes.merged import export_merged
from adapter_merge.export.modes.switchable import export_switchable

pytestmark = pytest.mark.onnx
NAMES = ("lora", "rslora", "dora", "dude", "dcft")
TOKENS = {"prompt": [(37 * i + 11) % 250 for i in range(40)], "rest": [7 * i % 250 for i in range(20)]}
ALL = TOKENS["prompt"] + TOKENS["rest"]
BAR = 1e-4

Reference = Callable[[Path, Path | None, list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def batched(pico: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("batched") / "export"
    export_batched(pico, {name: adapters[name] for name in NAMES}, output)
    return output


def written(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written, and not when it is read."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def difference(logits: np.ndarray, expected: torch.Tensor) -> float:
    return float((torch.from_numpy(logits).double() - expected).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dude", "dcft"])
def test_merged(pico: Path, adapters: dict[str, Path], reference: Reference, tmp_path: Path, name: str) -> None:
    report = export_merged(pico, {name: adapters[name]}, tmp_path / "out")
    assert report["mode"] == "merged"
    got = run_all(Decoder(tmp_path / "out", threads=1), None, TOKENS)
    assert difference(got, reference(pico, adapters[name], ALL)) < BAR
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "merged").exists()
    assert read_export(tmp_path / "out").adapters[name]["sha256"]


@pytest.mark.slow
def test_merged_combines_as_merge_does(pico: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from adapter_merge.api.merge import merge
    from adapter_merge.cli.main import group
    from adapter_merge.combine.delta_ops import Settings
    from adapter_merge.combine.recipe import Ingredient, make_recipe

    named = [f"{name}={adapters[name]}" for name in ("lora", "dcft")]
    options = ["--weight", "lora=0.7", "--combine", "ties", "--density", "0.5"]
    command = ["export", str(pico), *named, *options, "-o", str(tmp_path / "ties")]
    assert CliRunner().invoke(group, command).exit_code == 0
    export_merged(pico, {name: adapters[name] for name in ("lora", "dcft")}, tmp_path / "sum")
    weights = {"ties": (0.7, Settings("ties", 0.5)), "sum": (1.0, Settings())}
    for name, (weight, settings) in weights.items():
        items = [Ingredient("lora", str(adapters["lora"]), weight), Ingredient("dcft", str(adapters["dcft"]))]
        merge(
            pico, make_recipe(items, settings), tmp_path / f"{name}-merged", MergeOptions(device="cpu", dtype="float32")
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged").double().eval()
        with torch.no_grad():
            expected = model(torch.tensor([ALL])).logits[0]
        assert difference(run_all(Decoder(tmp_path / name, threads=1), None, TOKENS), expected) < BAR
        assert set(read_export(tmp_path / name).adapters) == {"lora", "dcft"}
    assert read_export(tmp_path / "ties").options["combination"]["method"] == "ties"
    with pytest.raises(InputError, match="it contains a merged combination"):
        verify_onnx(pico, adapters["lora"], tmp_path / "ties")
    refused = CliRunner().invoke(group, [*command[:-1], str(tmp_path / "no"), "--mode", "switchable"])
    assert isinstance(refused.exception, InputError)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_adapters_are_added_to_a_batched_export(
    pico: Path, adapters: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """Of a wider rank, on other linears and with row scales: the stacks grow, the base's weights stay."""
    folder = tmp_path / "out"
    export_batched(pico, {"lora": adapters["lora"]}, folder)
    weights = written(folder / "model.onnx.data")
    rows: list[str | None] = [None, "lora"]
    for name in ("rslora", "dude", "dcft"):
        add_adapters(folder, {name: adapters[name]})
        rows.append(name)
        decoder = Decoder(folder, threads=1)
        cache = decoder.start(len(ALL), rows)
        logits = decoder.step(cache, np.tile(np.asarray([ALL]), (len(rows), 1)))
        for row, wanted in enumerate(rows):
            assert difference(logits[row], reference(pico, adapters[wanted] if wanted else None, ALL)) < BAR
    assert written(folder / "model.onnx.data") == weights
    assert len(list(folder.glob("adapters*.onnx.data"))) == 1
    assert [entry["id"] for entry in read_export(folder).adapters.values()] == [1, 2, 3, 4]
    with pytest.raises(OutputError, match="dcft"):
        add_adapters(folder, {"dcft": adapters["dora"]})
    add_adapters(folder, {"lora": adapters["dora"]}, overwrite=True)
    got = run_all(Decoder(folder, threads=1), "lora", TOKENS)
    assert difference(got, reference(pico, adapters["dora"], ALL)) < BAR


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_addition_leaves_an_export_that_answers(
    pico: Path,
    adapters: dict[str, Path],
    batched: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
) -> None:
    """Before the new graph has its name the old stacks are read, after it the new ones."""
    folder = tmp_path / "out"
    shutil.copytree(batched, folder)
    name = next(iter(read_export(folder).adapters))
    real = batched_export.save_graph

    def interrupted(model: Any, file: Path) -> None:
        if late:
            real(model, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batched_export, "save_graph", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add_adapters(folder, {"late": adapters["dora"]})
    got = run_all(Decoder(folder, threads=1), name, TOKENS)
    assert difference(got, reference(pico, adapters[name], ALL)) < BAR


def test_an_adapter_that_does_not_fit_leaves_a_batched_export_as_it_was(
    pico: Path, batched: Path, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in batched.iterdir()}
    other = save_pico(tmp_path / "other", "llama", hidden_size=32)
    wrong = save_lora(other, tmp_path / "wrong", 1)
    with pytest.raises(AdapterMergeError):
        add_adapters(batched, {"wrong": wrong})
    assert {path.name: path.stat().st_mtime_ns for path in batched.iterdir()} == before


def test_every_row_of_a_batch_has_its_own_adapter(
    batched: Path, pico: Path, adapters: dict[str, Path], reference: Reference
) -> None:
    rows = [None, *NAMES, "lora"]
    prompts = np.array([[(31 * i + 7 * row) % 250 for i in range(24)] for row in range(len(rows))])
    decoder = Decoder(batched, threads=1)
    cache = decoder.start(30, rows)
    logits = [decoder.step(cache, prompts)]
    logits += [decoder.step(cache, np.full((len(rows), 1), 50 + step)) for step in range(6)]
    together = np.concatenate(logits, axis=1)
    for row, name in enumerate(rows):
        tokens = [*map(int, prompts[row]), *range(50, 56)]
        expected = reference(pico, adapters[name] if name else None, tokens)
        assert difference(together[row], expected) < BAR


def test_without_numbers_every_row_is_the_base(batched: Path, pico: Path, reference: Reference) -> None:
    session = open_session(batched / "model.onnx")
    ids = np.tile(np.asarray([TOKENS["prompt"]]), (2, 1))
    past = [value for value in session.get_inputs() if value.name.startswith("past")]
    feeds = {value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32) for value in past}
    logits = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **feeds})[0]
    for row in range(2):
        assert difference(logits[row], reference(pico, None, TOKENS["prompt"])) < BAR


def test_unknown_adapters_and_mixed_batches_are_refused(batched: Path, switchable: Path) -> None:
    with pytest.raises(InputError, match="no adapter named 'nobody'"):
        Decoder(batched).start(8, ["lora", "nobody"])
    decoder = Decoder(switchable)
    with pytest.raises(InputError, match="no adapter named 'nobody'"):
        decoder.start(8, "nobody")
    with pytest.raises(InputError, match="one batch cannot have several adapters"):
        decoder.start(8, ["lora", None])


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bar"), [("fp16", 0.05), ("int4", None)])
def test_other_precisions(
    pico: Path, adapters: dict[str, Path], reference: Reference, tmp_path: Path, precision: str, bar: float | None
) -> None:
    export_switchable(pico, {"dude": adapters["dude"]}, tmp_path / "s", precision=precision)
    decoder = Decoder(tmp_path / "s", threads=1)
    base, adapted = (run_all(decoder, name, TOKENS) for name in (None, "dude"))
    if bar is not None:
        assert difference(base, reference(pico, None, ALL)) < bar
        assert difference(adapted, reference(pico, adapters["dude"], ALL)) < bar
        return
    # int4: the adapter over the quantised base moves the logits as the adapter over the float base does
    quantised = torch.from_numpy(adapted - base).double()
    exact = reference(pico, adapters["dude"], ALL) - reference(pico, None, ALL)
    cosine = float((quantised * exact).sum() / quantised.norm() / exact.norm())
    assert cosine > 0.9
    assert difference(base, reference(pico, None, ALL)) > 1e-3  # it is quantised


@pytest.mark.slow
def test_merging_comes_before_quantising(pico: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    import onnx_ir as ir

    from adapter_merge.api.merge import merge
    from adapter_merge.export.building.decoder import build_decoder

    export_merged(pico, {"dora": adapters["dora"]}, tmp_path / "ours", precision="int4")
    merge(pico, adapters["dora"], tmp_path / "checkpoint", MergeOptions(dtype="float32", device="cpu"))
    (tmp_path / "plain").mkdir()
    build_decoder(tmp_path / "checkpoint", tmp_path / "plain", "int4")
    ours = ir.load(tmp_path / "ours" / "model.onnx").graph.initializers
    plain = ir.load(tmp_path / "plain" / "model.onnx").graph.initializers
    quantised = [name for name in plain if "_Q4" in name or "scales" in name]
    assert quantised
    for name in plain:
        assert ours[name].const_value.tobytes() == plain[name].const_value.tobytes()


STOCK_BUILDER = """
import json, sys
from onnxruntime_genai.models import builder
arguments, options = json.loads(sys.argv[1])
builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))
"""


@pytest.mark.parametrize("tied", [False, True])
def test_int4_is_what_the_builder_makes_of_the_whole_graph(pico: Path, tmp_path: Path, tied: bool) -> None:
    """Quantised one weight at a time: the same nodes, names, attributes and bytes as the builder's own int4."""
    import onnx

    from adapter_merge.export.building.decoder import ACCURACY_LEVEL, BLOCK_SIZE, build_decoder

    base = tmp_path / "base"
    shutil.copytree(pico, base)
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "ours").mkdir()
    build_decoder(base, tmp_path / "ours", "int4")
    options = ["hf_token=false", "fuse_mlp_gate_up=true"]
    options += [f"int4_block_size={BLOCK_SIZE}", f"int4_accuracy_level={ACCURACY_LEVEL}"]
    arguments = [str(base), str(base), str(tmp_path / "stock"), "int4", "cpu", str(tmp_path / "cache")]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK_BUILDER, json.dumps([arguments, options])],
        check=True,
        capture_output=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"} | {"HF_HUB_OFFLINE": "1"},
    )

    def content(folder: Path) -> tuple[list[object], dict[str, object], list[str]]:
        graph = onnx.load(folder / "model.onnx").graph
        nodes = [
            (
                node.name,
                node.domain,
                node.op_type,
                list(node.input),
                list(node.output),
                sorted(found.SerializeToString() for found in node.attribute),
            )
            for node in graph.node
        ]
        tensors = {
            tensor.name: (tensor.data_type, list(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes())
            for tensor in graph.initializer
        }
        return sorted(nodes), tensors, [value.name for value in (*graph.input, *graph.output)]

    ours, stock = content(tmp_path / "ours"), content(tmp_path / "stock")
    assert sum(node[2] == "MatMulNBits" for node in ours[0]) == 2 * 4 + 1  # type: ignore[index]
    assert ours == stock


COUNTING = """
import json, sys
from adapter_merge.export.building import builder_process
from onnxruntime_genai.models import builder
owner = next(one for one in builder.LlamaModel.__mro__ if "to_nbits" in vars(one))
real, sizes = owner.to_nbits, []

def counted(self):
    sizes.append(sum(value.const_value is not None for value in self.model.graph.initializers.values()))
    return real(self)

owner.to_nbits = counted
builder_process.main()
print("sizes", json.dumps(sizes))
"""


def test_int4_never_quantises_more_than_one_weight_at_once(pico: Path, tmp_path: Path) -> None:
    """The builder's own code gets graphs of one weight: its memory does not grow with the model."""
    job = {
        "checkpoint": str(pico),
        "output": str(tmp_path / "out"),
        "precision": "int4",
        "provider": "cpu",
        "cache": str(tmp_path / "cache"),
        "options": ["hf_token=false", "fuse_mlp_gate_up=true"],
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNTING, json.dumps(job)],
        check=True,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"} | {"HF_HUB_OFFLINE": "1"},
    )
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("sizes")]
    assert json.loads(said.removeprefix("sizes")) == [1] * (2 * 4 + 1)
