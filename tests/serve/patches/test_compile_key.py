"""torch.compile with vLLM's own decorator and cache: a stock process leaves a graph, a process with the plugin follows.

vLLM's CPU platform compiles no model once LoRA is on, so one of vLLM's LoRA layers stands in a module of its own here,
compiled as the CPU platform compiles models without LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

LAYER = """
import os, tempfile
os.environ["VLLM_CACHE_ROOT"], os.environ["VLLM_USE_AOT_COMPILE"] = {root!r}, "1"
import torch
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.linear import ReplicatedLinear
from adapter_merge.serve import plugin
{install}

lora = LoRAConfig(max_lora_rank=8, max_loras=2, max_cpu_loras=2, lora_dtype=torch.float32)
config = VllmConfig(lora_config=lora)
config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
config.compilation_config.backend = "inductor"
config.compilation_config.compile_sizes = []

@support_torch_compile(dynamic_arg_dims={{"x": 0}})
class Model(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        linear = ReplicatedLinear(16, 24, bias=False, params_dtype=torch.float32)
        linear.weight.data.fill_(1 / 16)
        linear.quant_method.process_weights_after_loading(linear)
        self.layer = from_layer(linear, 2, lora, [], None)
        self.layer.set_mapping(PunicaWrapperCPU(64, 16, device="cpu"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]

with set_current_vllm_config(config):
    init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
    initialize_model_parallel(1, 1)
    model = Model(vllm_config=config)
    mapping = LoRAMapping((1, 1, 0, 1), (1, 0), is_prefill=True)
    model.layer.punica_wrapper.update_metadata(mapping, [1, None], 3, 32)
    if hasattr(model.layer, "row_scale"):
        model.layer.row_scale[0].fill_(2)
    with torch.inference_mode():
        print("y:", model(torch.ones(4, 16))[:, 0].tolist())
from vllm.compilation.counter import compilation_counter
print("saved:", compilation_counter.num_aot_artifacts_saved)
"""


def test_a_graph_of_stock_vllm_is_not_the_plugins(run_python: Callable[[str], str], tmp_path: Path) -> None:
    """1.0 from the stock layer; with the plugin 2.0 for the adapter's tokens, and a place of its own for the graph."""
    root = tmp_path / "cache"
    graphs = root / "torch_compile_cache" / "torch_aot_compile"
    stock = run_python(LAYER.format(root=str(root), install="pass"))
    assert "y: [1.0, 1.0, 1.0, 1.0]" in stock
    assert "saved: 1" in stock, "nothing was compiled"
    first = {folder.name for folder in graphs.iterdir()}
    ours = run_python(LAYER.format(root=str(root), install="assert plugin.install() == 'installed'"))
    assert "y: [2.0, 2.0, 1.0, 2.0]" in ours
    assert "saved: 1" in ours
    assert len({folder.name for folder in graphs.iterdir()} - first) == 1
