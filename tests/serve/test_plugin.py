"""The plugin's edges: slots that change hands, prefix cache, parallelism, refusals, and vLLMs unknown to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_parity import COUNT, check, requests_of
from world import RunEngine, World, prompts

pytestmark = pytest.mark.vllm


def test_eviction_with_every_slot_in_use(qwen2: World, run_engine: RunEngine) -> None:
    """Two slots for eight adapters and the base: each slot's scales must change hands with its A and B.

    Without the spare slot that the plugin adds, vLLM's CPU kernels give base requests the last slot's adapter.
    """
    names: list[str | None] = [None, *qwen2.adapters, None, "dude-1", "lora-1", None, "dora-2", "dcft-2"]
    batch = requests_of(names)
    result = run_engine(qwen2.base, qwen2.folders(), [batch], {"max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": 16})
    check(qwen2, batch, result["answers"][0])


def test_prefix_cache_keeps_adapters_apart(qwen2: World, run_engine: RunEngine) -> None:
    """One long prompt for all, twice: the second time from the cache, and each still its own."""
    (prompt,) = prompts(1, 300)
    names: list[str | None] = [None, "dude-1", "dora-1", "lora-1"]
    batch = [{"adapter": name, "prompt": prompt, "count": COUNT} for name in names]
    result = run_engine(
        qwen2.base,
        qwen2.folders("dude-1", "dora-1", "lora-1"),
        [batch, batch],
        {"max_loras": 3, "max_lora_rank": 16, "enable_prefix_caching": True},
    )
    for answers in result["answers"]:
        check(qwen2, batch, answers)
    assert all(answer["cached"] > 0 for answer in result["answers"][1])


@pytest.mark.parametrize("sharded", [False, True])
def test_tensor_parallel(qwen2: World, run_engine: RunEngine, sharded: bool) -> None:
    """Two ranks: scales are cut as B is, except in row-parallel layers, whose outputs are partial sums."""
    names: list[str | None] = [None, *qwen2.adapters]
    batch = requests_of(names)
    result = run_engine(
        qwen2.base,
        qwen2.folders(),
        [batch],
        {
            "max_loras": 8,
            "max_lora_rank": 16,
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
            "fully_sharded_loras": sharded,
        },
    )
    check(qwen2, batch, result["answers"][0])


def test_pipeline_parallel(qwen2: World, run_engine: RunEngine) -> None:
    """Two stages of one layer each: every stage takes the scales of its own layers and passes over the others'."""
    names: list[str | None] = [None, *qwen2.adapters]
    batch = requests_of(names)
    result = run_engine(
        qwen2.base,
        qwen2.folders(),
        [batch, [{"load": "dude-2"}], batch],
        {
            "max_loras": 8,
            "max_lora_rank": 16,
            "pipeline_parallel_size": 2,
            "distributed_executor_backend": "mp",
        },
    )
    check(qwen2, batch, result["answers"][0])
    check(qwen2, batch, result["answers"][2])


def test_plain_folders_need_no_plugin(qwen2: World, run_engine: RunEngine) -> None:
    """LoRA and DCFT in a stock vLLM; DoRA and DuDe are refused there, never served without their scales."""
    plain = ["lora-1", "lora-2", "dcft-1", "dcft-2"]
    names: list[str | None] = [None, *plain]
    batch = requests_of(names)
    result = run_engine(
        qwen2.base,
        qwen2.folders(),
        [batch, [{"load": "dude-1"}], [{"load": "dora-2"}], [{"load": "lora-1"}], batch],
        {"max_loras": 5, "max_lora_rank": 16},  # one slot more than adapters, see the README
        {"VLLM_PLUGINS": ""},
    )
    assert result["plugin"] == "off"
    check(qwen2, batch, result["answers"][0])
    assert "DoRA" in result["answers"][1]["error"]
    assert "DoRA" in result["answers"][2]["error"]
    assert result["answers"][3] == "loaded"
    check(qwen2, batch, result["answers"][4])


def spoiled(world: World, name: str, folder: Path, how: str) -> Path:
    """A copy of an adapter's folder with one thing wrong."""
    shutil.copytree(world.adapters[name].folder, folder)
    scales = load_file(folder / "row_scale.safetensors")
    key = next(iter(scales))
    if how == "scale lost":
        scales.pop(key)
    elif how == "scale short":
        scales[key] = scales[key][:-1].clone()
    elif how == "scale not finite":
        scales[key][3] = float("nan")
    elif how == "scale of a stranger":
        scales["base_model.model.model.layers.9.mlp.up_proj.row_scale"] = scales[key].clone()
    elif how == "file cut":
        whole = (folder / "row_scale.safetensors").read_bytes()
        (folder / "row_scale.safetensors").write_bytes(whole[: len(whole) // 2])
        return folder
    elif how == "scales gone":
        (folder / "row_scale.safetensors").unlink()
        return folder
    elif how == "says plain":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
        return folder
    save_file(scales, folder / "row_scale.safetensors")
    return folder


def test_bad_folders_are_refused_and_the_engine_lives(qwen2: World, run_engine: RunEngine, tmp_path: Path) -> None:
    """Whatever is wrong with the scales is found before the adapter is registered."""
    words = {
        "scale lost": "has no row scale",
        "scale short": "expected",
        "scale not finite": "NaN",
        "scale of a stranger": "no lora_A",
        "file cut": "",
        "scales gone": "DoRA",
        "says plain": "use_dora",
    }
    folders = {how: spoiled(qwen2, "dude-1", tmp_path / how.replace(" ", "-"), how) for how in words}
    batch = requests_of([None, "dude-1"])
    result = run_engine(
        qwen2.base,
        {**folders, **qwen2.folders("dude-1")},
        [*([{"load": how}] for how in words), batch],
        {"max_loras": 2, "max_lora_rank": 16},
    )
    for (how, word), answer in zip(words.items(), result["answers"][:-1], strict=True):
        assert isinstance(answer, dict), f"{how}: accepted"
        assert word in answer["error"], f"{how}: {answer['error']}"
    check(qwen2, batch, result["answers"][-1])


def test_weights_that_no_layer_takes_are_refused(qwen2: World, run_engine: RunEngine) -> None:
    """A narrow --lora-target-modules would silently drop a part of the adapter: refused instead."""
    batch = requests_of([None])
    result = run_engine(
        qwen2.base,
        qwen2.folders("dude-2", "dcft-1"),
        [[{"load": "dude-2"}], [{"load": "dcft-1"}], batch],
        {"max_loras": 2, "max_lora_rank": 16, "lora_target_modules": ["qkv_proj", "o_proj"]},
    )
    assert "no layer uses" in result["answers"][0]["error"]
    assert "no layer uses" in result["answers"][1]["error"]
    check(qwen2, batch, result["answers"][2])


def test_every_symbol_is_where_it_was(run_python: Callable[[str], str]) -> None:
    """Fails when the installed vLLM has moved something that the plugin needs: look at symbols.py then."""
    out = run_python(
        "from adapter_merge.serve import plugin\nfrom adapter_merge.serve.patches import symbols\n"
        "print('missing:', symbols.find_missing(), 'native:', symbols.native_dora())\n"
        "print('state:', plugin.install())\n"
    )
    assert "missing: [] native: False" in out
    assert "state: installed" in out


@pytest.mark.parametrize(
    "damage",
    [
        "import vllm.lora.utils as u; del u._all_lora_classes",
        "import vllm.lora.layers as l; del l.RowParallelLinearWithShardedLoRA",
        "import vllm.lora.layers as l; l.ReplicatedLinearWithLoRA.apply = lambda self, x: x",
        "m.LoRAModelManager.activate_adapter = lambda self, i: True",
        "from vllm.lora.lora_model import LoRAModel as x; x.from_local_checkpoint = classmethod(lambda c, d: 0)",
        "from vllm.lora.peft_helper import PEFTHelper as h; del h.from_local_dir",
    ],
)
def test_unknown_vllm_is_left_alone(run_python: Callable[[str], str], damage: str) -> None:
    """With one name moved nothing is patched, and the log says what is missing and what follows."""
    out = run_python(
        "import vllm.lora.model_manager as m\n"
        f"{damage}\n"
        "before = (m.LoRAModelManager._add_adapter, m.from_layer.__globals__.get('_all_lora_classes'))\n"
        "from adapter_merge.serve import plugin\n"
        "plugin.register()\n"
        "print('state:', plugin.state)\n"
        "after = (m.LoRAModelManager._add_adapter, m.from_layer.__globals__.get('_all_lora_classes'))\n"
        "print('same:', before == after)\n"
    )
    assert "state: unknown" in out
    assert "same: True" in out
    assert "does not support this vLLM" in out
    assert "will be refused" in out


def test_native_dora_is_left_to_vllm(run_python: Callable[[str], str]) -> None:
    """A vLLM whose own checks accept use_dora keeps all of its own."""
    out = run_python(
        "from vllm.lora.peft_helper import PEFTHelper as h\n"
        "h._validate_features = lambda self: []\n"
        "import vllm.lora.utils as u\n"
        "from adapter_merge.serve import plugin\n"
        "plugin.register()\n"
        "print('state:', plugin.state, any('RowScaled' in c.__name__ for c in u._all_lora_classes))\n"
    )
    assert "state: native False" in out


def test_the_key_of_compiled_graphs_knows_the_plugin(run_python: Callable[[str], str]) -> None:
    """vLLM's own key, over its whole configuration: another with the plugin, and the same in each process with it."""
    code = (
        "from vllm.config import VllmConfig\n"
        "from vllm.config.lora import LoRAConfig\n"
        "from adapter_merge.serve import plugin\n"
        "{install}\n"
        "config = VllmConfig(lora_config=LoRAConfig(max_lora_rank=8, max_cpu_loras=1, lora_dtype='float16'))\n"
        "print('key:', config.compute_hash(), config.lora_config.compute_hash())\n"
    )
    keys = [
        next(line for line in run_python(code.format(install=install)).splitlines() if line.startswith("key:"))
        for install in ("pass", "plugin.install()", "plugin.install()")
    ]
    stock, first, second = (key.split() for key in keys)
    assert first == second
    assert stock[1] != first[1]
    assert stock[2] != first[2]
