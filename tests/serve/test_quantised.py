"""Adapters on quantised bases: served as on the dense model that the base's numbers mean.

vLLM computes in bfloat16 here, as its kernels for four bits on a CPU do: log-probabilities are about as far from
float64's as those of the base without an adapter, and far less than what an adapter changes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from quantised import KINDS, quantise
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained import ALL, MAKERS, Adapter, make_base, module_names, normal
from world import RunEngine, prompts

from adapter_merge.errors import AdapterMergeError
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter
from adapter_merge.serve.conversion.stated_settings import Stated

pytestmark = pytest.mark.filterwarnings("ignore")

RESIDUAL = Stated({"base_kind": "residual"})
SCALE = 2.0


def make_residual(plain: Path, folder: Path) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """(W0 - s B0 A0 in place of W0, B0 and A0 by module): what PiSSA and DuDe train beside, before it is quantised."""
    shutil.copytree(plain, folder)
    weights = load_file(plain / "model.safetensors")
    initial = {}
    for module in module_names(ALL):
        left, values, right = torch.linalg.svd(weights[f"{module}.weight"].double(), full_matrices=False)
        root = (values[:8] / SCALE).sqrt()
        b, a = left[:, :8] * root, root[:, None] * right[:8]
        initial[module] = (b, a)
        weights[f"{module}.weight"] -= (SCALE * b @ a).float()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder, initial


def make_trained(
    folder: Path, dense: dict[str, Tensor], initial: dict[str, tuple[Tensor, Tensor]], scaled: bool
) -> Adapter:
    """PiSSA, or scaled DuDe as PEFT saves it, whose factors have moved away from B0 and A0."""
    generator = torch.Generator().manual_seed(int(scaled))
    adapter = Adapter(folder.name, folder)
    raw = {}
    for module, (b0, a0) in initial.items():
        weight = dense[f"{module}.weight"]
        b, a = (part + 0.1 * part.std() * normal(generator, *part.shape) for part in (b0, a0))
        b, a = b.float().double(), a.float().double()
        whole = weight + SCALE * b @ a
        raw |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        if scaled:
            start = (weight + SCALE * b0 @ a0).norm(dim=1)
            magnitude = (start * (1 + 0.05 * normal(generator, start.shape[0]))).float().double()
            raw[f"{module}.lora_magnitude_vector"] = magnitude
            whole = (magnitude / whole.norm(dim=1))[:, None] * whole
        adapter.merged[f"{module}.weight"] = whole
    adapter.write_raw(raw, peft_type="LORA", r=8, lora_alpha=8 * SCALE, use_dora=scaled, init_lora_weights="pissa")
    return adapter


@pytest.mark.vllm
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(run_engine: RunEngine, tmp_path: Path, kind: str) -> None:
    plain = make_base(tmp_path / "plain", "llama")
    residual, initial = make_residual(plain, tmp_path / "residual")
    base, dense = quantise(residual, tmp_path / "base", kind)
    oracle = Oracle(plain, dense)
    generator = torch.Generator().manual_seed(7)
    adapters = {name: MAKERS[name](name, tmp_path / name, dense, generator) for name in ("lora", "dcft", "dora")}
    adapters |= {name: make_trained(tmp_path / name, dense, initial, name == "dude") for name in ("pissa", "dude")}
    made = Converter(base, Cache(tmp_path / "cache"))
    folders = {
        name: made.obtain(adapter.raw, RESIDUAL if name in ("pissa", "dude") else None).folder
        for name, adapter in adapters.items()
    }
    several = prompts(3, 10)
    batch = [{"adapter": name, "prompt": prompt, "count": 1} for prompt in several for name in (None, *adapters)]
    engine = {"dtype": "bfloat16", "max_loras": 2, "max_cpu_loras": 5, "max_lora_rank": 16}
    (answers,) = run_engine(base, folders, [batch], engine)["answers"]
    off: dict[str | None, float] = {}
    changed: dict[str, float] = {}
    for request, answer in zip(batch, answers, strict=True):
        name, prompt = request["adapter"], request["prompt"]
        wanted = log_probabilities(oracle, {} if name is None else adapters[name].merged, prompt)
        stock = log_probabilities(oracle, {}, prompt)
        (token,), (value,) = answer["tokens"], answer["logprobs"]
        off[name] = max(off.get(name, 0), abs(value - float(wanted[token])), float(wanted.max() - wanted[token]))
        if name is not None:
            changed[name] = max(changed.get(name, 0), float((wanted - stock).abs().mean()))
    for name in adapters:
        assert off[name] < 0.1, off
        assert changed[name] > 0.3, changed


def log_probabilities(oracle: Oracle, merged: dict[str, Tensor], prompt: list[int]) -> Tensor:
    oracle.model.load_state_dict({**oracle.weights, **merged})
    with torch.inference_mode():
        found: Tensor = oracle.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    return found


def test_a_residual_that_was_not_quantised_is_refused(tmp_path: Path) -> None:
    """PiSSA and DuDe subtract before the base is quantised: a quantised original is not what they were trained on."""
    plain = make_base(tmp_path / "plain", "llama")
    base, dense = quantise(plain, tmp_path / "base", "pack-quantized")
    adapter = MAKERS["dude"]("dude", tmp_path / "dude", dense, torch.Generator().manual_seed(7))
    with pytest.raises(AdapterMergeError, match="on a residual base, and the weights of this base are quantised"):
        Converter(base, Cache(tmp_path / "cache")).obtain(adapter.raw)
