"""Adapters of experts as vLLM reads them: one module per expert, exact against PEFT's merged model, or refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.factor import factor
from adapter_merge.errors import UnsupportedError
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.expert_layout import MIXED_FORMAT
from adapter_merge.serve.conversion.served_folder import Converter, Served
from adapter_merge.serve.launch.plan import make_plan

peft = pytest.importorskip("peft", reason="PEFT makes the adapter (extra verify)")
transformers = pytest.importorskip("transformers", reason="transformers makes the model (extra verify)")

EXPERTS, INNER, HIDDEN = 4, 24, 16
COMMON = {
    "vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any, str, tuple[str, str, str]]] = {
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**COMMON, intermediate_size=INNER, num_local_experts=EXPERTS),
        "block_sparse_moe",
        ("w1", "w3", "w2"),
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(**COMMON, moe_intermediate_size=INNER, num_experts=EXPERTS, head_dim=8),
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


def trained(folder: Path, family: str, parameters: list[str], **config: Any) -> tuple[Path, Path, dict[str, Tensor]]:
    """(base, adapter, the parameters of the model that PEFT has merged), with random factors."""
    torch.manual_seed(0)
    kind, settings, _, _ = FAMILIES[family]
    model = kind(settings).float()
    lora = peft.LoraConfig(r=2, lora_alpha=6, target_parameters=parameters, **{"target_modules": [], **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and transformers, about what is meant here
        model.save_pretrained(folder / "base")
        adapted = peft.get_peft_model(model, lora)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.3)
        adapted.save_pretrained(folder / "adapter")
        merged = adapted.merge_and_unload()
    return folder / "base", folder / "adapter", {name: weight.detach() for name, weight in merged.named_parameters()}


def served_weights(base: Path, served: Served) -> dict[str, Tensor]:
    """W0 + B A of every module in the served folder, by the base's names, in float64."""
    weights = load_file(base / "model.safetensors")
    factors = load_file(served.folder / "adapter_model.safetensors")
    config = json.loads((served.folder / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (config["r"], config["rank_pattern"])  # a scale of 1
    for key in factors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            name = stem.removeprefix("base_model.model.") + ".weight"
            product = factors[f"{stem}.lora_B.weight"].double() @ factors[key].double()
            weights[name] = weights[name].double() + product
    return weights


@pytest.mark.parametrize("form", ["as trained", "factors"])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"]])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_experts_are_exact(tmp_path: Path, family: str, parameters: list[str], form: str) -> None:
    """Every expert's three projections are there, with one rank; other modules keep theirs."""
    base, adapter, merged = trained(tmp_path, family, parameters, target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    if form == "factors":
        factor(base, adapter, tmp_path / "factors")
        adapter = tmp_path / "factors"
    served = Converter(base, Cache(tmp_path / "cache")).obtain(adapter)
    assert served.targets == ("experts", "q_proj")
    _, _, owner, (gate, up, down) = FAMILIES[family]
    weights = served_weights(base, served)
    ranks = set()
    factors = load_file(served.folder / "adapter_model.safetensors")
    for layer in range(2):
        experts = (
            merged[f"model.layers.{layer}.mlp.experts.gate_up_proj"],
            merged[f"model.layers.{layer}.mlp.experts.down_proj"],
        )
        for expert in range(EXPERTS):
            stem = f"model.layers.{layer}.{owner}.experts.{expert}"
            expected = {gate: experts[0][expert, :INNER], up: experts[0][expert, INNER:], down: experts[1][expert]}
            for name, weight in expected.items():
                ranks.add(factors[f"base_model.model.{stem}.{name}.lora_A.weight"].shape[0])
                torch.testing.assert_close(weights[f"{stem}.{name}.weight"], weight.double(), rtol=1e-5, atol=1e-6)
        query = f"model.layers.{layer}.self_attn.q_proj.weight"
        torch.testing.assert_close(weights[query], merged[query].double(), rtol=1e-5, atol=1e-6)
    assert ranks == {2}
    assert served.rank == 3


def test_a_projection_of_one_expert(tmp_path: Path) -> None:
    """As transformers 4 and PEFT trained it: vLLM needs the others of the layer too, which are zeros."""
    base, _, _ = trained(tmp_path, "mixtral", ["down_proj"])
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    adapter = tmp_path / "single"
    adapter.mkdir()
    a, b = torch.rand(2, HIDDEN), torch.rand(INNER, 2)
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["w1"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    served = Converter(base, Cache(tmp_path / "cache")).obtain(adapter)
    before, after = load_file(base / "model.safetensors"), served_weights(base, served)
    changed = f"{stem.removeprefix('base_model.model.')}.weight"
    assert [name for name in before if not torch.equal(before[name].double(), after[name].double())] == [changed]
    expected = before[changed].double() + 3 * (b.double() @ a.double())
    torch.testing.assert_close(after[changed], expected, rtol=1e-5, atol=1e-6)
    assert len(load_file(served.folder / "adapter_model.safetensors")) == 2 * 3 * EXPERTS


def test_routers_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, "qwen3_moe", ["gate.weight", "gate_up_proj", "down_proj"])
    with pytest.raises(UnsupportedError, match="a bare parameter"):
        Converter(base, Cache(tmp_path / "cache")).outline(adapter)


def test_stacked_experts_of_the_base_are_refused(tmp_path: Path) -> None:
    """A base in the layout of transformers' model: its checkpoint does not tell what vLLM calls an expert."""
    base, adapter, _ = trained(tmp_path, "qwen3_moe", ["gate_up_proj", "down_proj"])
    model = FAMILIES["qwen3_moe"][0].from_pretrained(base)
    save_file({name: weight.detach().clone() for name, weight in model.named_parameters()}, base / "model.safetensors")
    with pytest.raises(UnsupportedError, match="stores them stacked"):
        Converter(base, Cache(tmp_path / "cache")).outline(adapter)


def test_row_scales_beside_experts_are_refused(tmp_path: Path) -> None:
    """DoRA of single experts, as transformers 4 and PEFT trained them."""
    base, _, _ = trained(tmp_path, "mixtral", ["down_proj"])
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    adapter = tmp_path / "dora"
    adapter.mkdir()
    weight = load_file(base / "model.safetensors")[f"{stem.removeprefix('base_model.model.')}.weight"]
    tensors = {
        "lora_A.weight": torch.rand(2, HIDDEN) * 0.01,
        "lora_B.weight": torch.rand(INNER, 2) * 0.01,
        "lora_magnitude_vector": weight.norm(dim=1) * 1.01,
    }
    save_file({f"{stem}.{name}": value for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True, "target_modules": ["w1"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="plain LoRA alone"):
        Converter(base, Cache(tmp_path / "cache")).outline(adapter)


@pytest.mark.vllm
@pytest.mark.parametrize("loading", [False, True])
def test_the_command_line_of_vllm(tmp_path: Path, loading: bool) -> None:
    """Experts are targets only where an adapter has some: their slots take memory in every layer."""
    base, adapter, _ = trained(tmp_path, "qwen3_moe", ["gate_up_proj", "down_proj"])
    folder = tmp_path / "adapters"
    folder.mkdir()
    cache = Cache(tmp_path / "cache")
    if not loading:
        command = make_plan(str(base), [f"a={adapter}"], cache=cache).command()
        assert targets(command) == ["experts"]
    else:
        assert MIXED_FORMAT not in make_plan(str(base), [], adapter_dir=folder, cache=cache).command()
        adapter.rename(folder / "a")
        command = make_plan(str(base), [], adapter_dir=folder, cache=cache).command()
        assert {"q_proj", "experts"} <= {*targets(command)}
    assert MIXED_FORMAT in command


def targets(command: list[str]) -> list[str]:
    """The values of --lora-target-modules."""
    values = command[command.index("--lora-target-modules") + 1 :]
    return values[: next(place for place, value in enumerate(values) if value.startswith("--"))]
