"""Names of adapters and names in checkpoints, over many families of models: hub names, run-time names, old and new.

The oracle is PEFT's live model on the base as transformers loads it; the merged folder is loaded by transformers too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import MIXTURES, VISION_MODELS, inputs, mixture, vision
from pico_bases import quiet, randomise
from safetensors.torch import load_file, save_file

from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.binding.bind import bind
from adapter_merge.errors import MismatchError
from adapter_merge.formats.detection import open_adapter
from adapter_merge.storage.checkpoint import open_checkpoint
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_io import read_tensor

peft = pytest.importorskip("peft", reason="PEFT is the oracle (extra verify)")
transformers = pytest.importorskip("transformers", reason="transformers makes and loads the models (extra verify)")

SAVED = {  # what is trained whole beside the LoRA: the part between vision and language, and heads
    "llava": ["multi_modal_projector", "lm_head"],
    "llava, tied": ["multi_modal_projector", "lm_head"],
    "llava_next": ["multi_modal_projector"],
    "mistral3": ["multi_modal_projector", "lm_head"],
    "paligemma": ["multi_modal_projector"],
    "gemma3": ["multi_modal_projector", "lm_head"],
    "qwen2_vl": ["merger", "lm_head"],
    "qwen2_5_vl": ["merger", "lm_head"],
    "qwen3_vl_moe": ["visual.merger"],
    "qwen3_vl_moe, square": ["visual.merger"],
    "nomic_bert": None,
    "vit": ["classifier"],
    "clip": ["visual_projection"],
}
TARGETS = {
    "vit": r".*\.(q_proj|v_proj|fc1)",
    "qwen2_vl": r".*\.(q_proj|down_proj|attn\.qkv|mlp\.fc1)",
    "qwen2_5_vl": r".*\.(q_proj|down_proj|attn\.qkv)",
    "qwen3_vl_moe": r".*\.(q_proj|attn\.qkv)",
    "qwen3_vl_moe, square": r".*\.(q_proj|attn\.qkv)",
    "nomic_bert": r".*\.(q_proj|v_proj|up_proj|down_proj)",
}
PARAMETERS = {"qwen3_vl_moe": ["gate_up_proj", "down_proj"], "qwen3_vl_moe, square": ["gate_up_proj", "down_proj"]}
BOTH_PARTS = r".*\.(q_proj|v_proj|fc1|down_proj)"
OLD = {  # the model's names in transformers 5 -> those under which transformers 4 trained
    "llava": [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."),
              ("model.multi_modal_projector.", "multi_modal_projector."), ("lm_head", "language_model.lm_head")],
    "gemma3": [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."),
               ("model.multi_modal_projector.", "multi_modal_projector.")],
    "qwen2_vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
    "qwen2_5_vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
}  # fmt: skip
TOLERANCE = 5e-5  # float32 logits of size 5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("base")
            made[name] = mixture(name, folder) if name in MIXTURES else vision(name, folder)
        return made[name]

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in `folder`, without a tensor missing or left over."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    with quiet():
        model, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def logits(model: Any, name: str) -> torch.Tensor:
    given = inputs(name)
    kind = next(model.parameters()).dtype
    given = {key: value.to(kind) if value.is_floating_point() else value for key, value in given.items()}
    with torch.no_grad(), quiet():
        out = model(**given)
    return out.logits if "logits" in out else torch.cat([out.image_embeds.flatten(), out.text_embeds.flatten()])


def train(base: Path, folder: Path, name: str, **options: Any) -> torch.Tensor:
    """A PEFT adapter with random values on `base`, saved to `folder`; the logits of the live model."""
    with quiet():
        model = load(base)
        live = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))
        randomise(live, 0.1)
        live.eval()
        before = logits(load(base), name)
        expected = logits(live, name)
        live.save_pretrained(folder)
    assert (expected - before).abs().max() > 100 * TOLERANCE, "the adapter must move the logits"
    return expected


def worst(output: Path, expected: torch.Tensor, name: str) -> float:
    return float((logits(load(output), name) - expected).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_on_a_mixture_of_experts(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT saves bare names of parameters then, which belong to the experts and the router alone."""
    base = bases(name)
    # dt_proj: Jamba reads its weight past the adapter. router: PEFT's wrapper does not pass PhiMoE's tuple through.
    options = {"jamba": {"exclude_modules": ["dt_proj"]}, "phimoe": {"target_modules": ["q_proj"]}}.get(name, {})
    expected = train(base, tmp_path / "a", name, **{"target_modules": "all-linear", **options})
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert worst(tmp_path / "out", expected, name) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION_MODELS)
def test_adapter_on_vision_and_language(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases(name)
    targets = TARGETS.get(name, BOTH_PARTS)
    expected = train(base, tmp_path / "a", name, target_modules=targets, target_parameters=PARAMETERS.get(name),
                     modules_to_save=SAVED[name])  # fmt: skip
    report = inspect(tmp_path / "a", base).as_json()
    assert not report["problems"], report["problems"]
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert worst(tmp_path / "out", expected, name) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("layout", ["hub", "run-time"])
def test_adapter_trained_under_old_names(name: str, layout: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """An adapter of transformers 4 on the layout of the hub, and on what save_original_format=False writes."""
    base = bases(name)
    expected = train(base, tmp_path / "a", name, target_modules=TARGETS.get(name, BOTH_PARTS),
                     modules_to_save=SAVED[name])  # fmt: skip
    file = tmp_path / "a" / "adapter_model.safetensors"
    renamed = {}
    for key, value in load_file(file).items():
        path = key.removeprefix("base_model.model.")
        for new, old in OLD[name]:
            if path.startswith(new):
                path = old + path[len(new) :]
                break
        renamed[f"base_model.model.{path}"] = value
    assert renamed.keys() != load_file(file).keys()
    save_file(renamed, file, {"format": "pt"})
    if layout == "run-time":
        with quiet():
            load(base).save_pretrained(tmp_path / "base", save_original_format=False)
        base = tmp_path / "base"
    merge(base, tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert worst(tmp_path / "out", expected, name) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"target_modules": ["q_proj", "lm_head"]}),
        ("llava, tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("llava, tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("gemma3", {"target_modules": ["q_proj", "lm_head"]}),
        ("llava", {"target_modules": r".*\.(q_proj|fc1)", "use_dora": True}),
        ("nomic_bert", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate", "mlp.experts"]}),
        ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_heads_magnitudes_and_parts(
    name: str, options: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = train(bases(name), tmp_path / "a", name, **options)
    merge(bases(name), tmp_path / "a", tmp_path / "out", MergeOptions(device="cpu"))
    assert worst(tmp_path / "out", expected, name) < TOLERANCE


def test_without_transformers_both_parts_are_refused(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prefix does for neither part; nothing may be written under a name that no loader reads."""
    train(bases("llava"), tmp_path / "both", "llava", target_modules=BOTH_PARTS)
    train(bases("llava"), tmp_path / "saved", "llava", target_modules=r".*language_model.*\.q_proj",
          modules_to_save=["multi_modal_projector"])  # fmt: skip
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    for folder in ("both", "saved"):
        problems = inspect(tmp_path / folder, bases("llava")).as_json()["problems"]
        assert any("transformers" in str(problem["hint"]) for problem in problems)
        with pytest.raises(MismatchError):
            merge(bases("llava"), tmp_path / folder, tmp_path / "out", MergeOptions(device="cpu"))


@pytest.mark.slow
@pytest.mark.preloaded("torch")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_inspect_of_literal_names_imports_no_transformers(
    name: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    train(bases(name), tmp_path / "a", name, target_modules="all-linear")
    code = (
        "import sys; from adapter_merge.api.inspect import inspect;"
        f"report = inspect({str(tmp_path / 'a')!r}, {str(bases(name))!r}).as_json();"
        "assert not report['problems'], report; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_factors_of_experts_are_read_once(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """B holds the experts as its fastest dimension: one expert's part lies all over it."""
    train(bases("qwen3_moe"), tmp_path / "a", "qwen3_moe", target_modules=[], target_parameters=["gate_up_proj"])
    bound = bind(open_adapter(tmp_path / "a"), open_checkpoint(bases("qwen3_moe")))
    read: list[TensorRef] = []

    def counting(ref: TensorRef) -> torch.Tensor:
        read.append(ref)
        return read_tensor(ref)

    def unread() -> torch.Tensor:
        raise AssertionError("a LoRA reads no base weight")

    for module in bound.modules:
        module.module.form(counting, unread, torch.float32)
    assert len(bound.modules) == 2 * 4 * 2  # layers, experts, gate and up
    assert sum(ref.nbytes for ref in read) <= 2 * sum(ref.nbytes for ref in bound.adapter.refs)
