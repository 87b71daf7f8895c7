"""The graphs in plain onnxruntime, without our code: padding on any side, windows, adapter numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_models import save_lora, save_pico

pytest.importorskip("onnxruntime_genai")
import onnxruntime

from adapter_merge.export.adding import add_adapters
from adapter_merge.export.modes.batched import export_batched
from adapter_merge.export.modes.merged import export_merged

pytestmark = pytest.mark.onnx
Reference = Callable[[Path, Path | None, list[int]], torch.Tensor]
LENGTHS = (40, 6, 23)
STEPS = 4
WIDTH = max(LENGTHS)


def open_graph(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options)


def padded(side: str) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    random = np.random.default_rng(5)
    rows = [random.integers(5, 250, length).tolist() for length in LENGTHS]
    ids = np.full((len(rows), WIDTH), 300, np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        count = len(tokens)
        places = {
            "left": np.arange(WIDTH - count, WIDTH),
            "right": np.arange(count),
            "holes": np.sort(random.choice(WIDTH, count, replace=False)),
        }[side]
        ids[row, places] = tokens
        mask[row, places] = 1
    return ids, mask, rows


def run(session: Any, ids: np.ndarray, mask: np.ndarray, extra: dict[str, Any]) -> tuple[list[Any], list[list[int]]]:
    """Logits of every row's own tokens, and the greedy tokens, of a loop that feeds the outputs back."""
    names = [value.name for value in session.get_outputs()]
    batch, rows = len(ids), range(len(ids))
    state = {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    found: list[Any] = [[] for _ in rows]
    greedy: list[list[int]] = [[] for _ in rows]
    fresh = mask
    for _ in range(STEPS):
        feeds = {"input_ids": ids, "attention_mask": mask, **state, **extra}
        out = dict(zip(names, session.run(None, feeds), strict=True))
        for row in rows:
            found[row].append(out["logits"][row][fresh[row] == 1])
            greedy[row].append(int(found[row][-1][-1].argmax()))
        state = {name: out[name.replace("past_key_values", "present")] for name in state}
        ids = np.array([[tokens[-1]] for tokens in greedy])
        fresh = np.ones((batch, 1), np.int64)
        mask = np.concatenate([mask, fresh], 1)
    return [np.concatenate(part) for part in found], greedy


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_on_any_side_is_right(
    pico: Path, adapters: dict[str, Path], batched: Path, reference: Reference, side: str
) -> None:
    """A batch of three lengths, its rows with dcft, the base and lora, against each row alone in PEFT."""
    ids, mask, rows = padded(side)
    found, greedy = run(open_graph(batched), ids, mask, {"adapter_ids": np.array([2, 0, 1])})
    for row, name in enumerate(("dcft", None, "lora")):
        tokens = rows[row] + greedy[row][:-1]
        expected = reference(pico, adapters[name] if name else None, tokens).numpy()
        assert np.abs(found[row] - expected).max() < 1e-4


def test_switchable_graph_takes_left_padding(
    pico: Path, adapters: dict[str, Path], switchable: Path, reference: Reference
) -> None:
    ids, mask, rows = padded("left")
    file = onnxruntime.AdapterFormat.read_adapter(str(switchable / "dora.onnx_adapter"))
    tensors = {name: value.numpy() for name, value in file.get_parameters().items()}
    for name, extra in (("dora", tensors), (None, {})):
        found, greedy = run(open_graph(switchable), ids, mask, extra)
        for row, tokens in enumerate(rows):
            expected = reference(pico, adapters[name] if name else None, tokens + greedy[row][:-1]).numpy()
            assert np.abs(found[row] - expected).max() < 1e-4


@pytest.mark.slow
def test_batched_graph_of_sliding_windows_takes_padding(reference: Reference, tmp_path: Path) -> None:
    """Rows shorter and longer than the window of 32."""
    base = save_pico(tmp_path / "base", "gemma3")
    lora = save_lora(base, tmp_path / "lora", 7)
    export_batched(base, {"lora": lora}, tmp_path / "export")
    ids, mask, rows = padded("left")
    found, greedy = run(open_graph(tmp_path / "export"), ids, mask, {"adapter_ids": np.array([1, 0, 1])})
    for row, adapter in enumerate((lora, None, lora)):
        expected = reference(base, adapter, rows[row] + greedy[row][:-1]).numpy()
        assert np.abs(found[row] - expected).max() < 1e-4


@pytest.mark.parametrize("number", [-1, 3, -3, 2**40])
def test_an_unknown_adapter_number_fails(batched: Path, number: int) -> None:
    ids, mask, _ = padded("left")
    session = open_graph(batched)
    with pytest.raises(Exception, match="adapter_ids must be between 0 and 2"):
        run(session, ids, mask, {"adapter_ids": np.array([0, 1, number])})
    run(session, ids, mask, {"adapter_ids": np.array([0, 1, 2])})


def test_an_added_adapter_has_the_next_number(
    pico: Path, adapters: dict[str, Path], batched: Path, reference: Reference, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(batched, folder)
    add_adapters(folder, {"dora": adapters["dora"]}, check=False)
    ids, mask, rows = padded("left")
    session = open_graph(folder)
    found, greedy = run(session, ids, mask, {"adapter_ids": np.array([3, 3, 3])})
    for row, tokens in enumerate(rows):
        expected = reference(pico, adapters["dora"], tokens + greedy[row][:-1]).numpy()
        assert np.abs(found[row] - expected).max() < 1e-4
    with pytest.raises(Exception, match="adapter_ids must be between 0 and 3"):
        run(session, ids, mask, {"adapter_ids": np.array([4, 0, 0])})


def test_genai_refuses_a_batched_export(batched: Path) -> None:
    """It ignores adapter_ids, and would answer as the base."""
    import onnxruntime_genai

    with pytest.raises(Exception, match=r"genai_config\.json"):
        onnxruntime_genai.Model(str(batched))
    assert json.loads((batched / "decoder_config.json").read_text())["model"]["context_length"] == 512


def test_short_texts_of_a_sliding_window_in_our_loop(reference: Reference, tmp_path: Path) -> None:
    """onnxruntime wants a cache of at least the window, also for a text that is shorter."""
    from adapter_merge.export.engine.decoder_session import Decoder

    base = save_pico(tmp_path / "base", "mistral-window")
    export_merged(base, {}, tmp_path / "export")
    decoder = Decoder(tmp_path / "export")
    tokens = [5, 60, 7, 80, 9]
    logits = decoder.step(decoder.start(len(tokens)), np.asarray([tokens]))[0]
    assert np.abs(logits - reference(base, None, tokens).numpy()).max() < 1e-4
