"""More than one machine, as far as one machine can show it: the schemas of what is emitted, and vLLM's Ray executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from engine import vllm_environment
from test_parity import check, requests_of
from world import World

from adapter_merge.serve.cli.serve import serve

HERE = Path(__file__).parents[1]

pytestmark = pytest.mark.cluster


def emitted(*arguments: str) -> list[dict[str, Any]]:
    shown = CliRunner().invoke(serve, list(arguments), catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return list(yaml.safe_load_all(shown.stdout))


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_the_manifest_is_what_kubernetes_takes(version: str) -> None:
    """Every document against Kubernetes' own schema, unknown fields refused; a wrong one is noticed."""
    import kubernetes_validate

    flags = ("--", "--tensor-parallel-size", "2")
    documents = emitted("org/base", "a=org/a", "--alpha", "a=16", "--max-active", "4", "--emit", "k8s", *flags)
    assert len(documents) == 4
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    documents[2]["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerport"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents[2], version, strict=True)


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
@pytest.mark.parametrize("name", ["parts", "finish"])
def test_kubernetes_takes_the_merge_in_parts(name: str, version: str) -> None:
    import kubernetes_validate

    file = HERE.parents[1] / "examples" / f"kubernetes_{name}.yaml"
    kubernetes_validate.validate(yaml.safe_load(file.read_text()), version, strict=True)


def test_ray_serve_takes_its_configuration(qwen2: World, tmp_path: Path) -> None:
    """Ray Serve's own models, LLMConfig among them, in a process of its own (Ray sets up its logging)."""
    raw = qwen2.adapters["dude-1"].raw
    flags = ("--", "--pipeline-parallel-size", "2")
    (config,) = emitted(str(qwen2.base), f"a={raw}", "--adapter-dir", "gs://b/a", "--emit", "ray", *flags)
    code = """
import json, sys
from ray.serve.schema import ServeDeploySchema
from ray.serve.llm import LLMConfig
config = json.load(sys.stdin)
(application,) = ServeDeploySchema.model_validate(config).applications
(model,) = application.args["llm_configs"]
checked = LLMConfig.model_validate(model)
from vllm.engine.arg_utils import AsyncEngineArgs
AsyncEngineArgs(model=checked.model_loading_config.model_source, **checked.engine_kwargs)
print("ranks", checked.engine_kwargs["max_lora_rank"], checked.lora_config.dynamic_lora_loading_path)
model["lora_config"]["dynamic_lora_loading_path"] = "/a/folder"
try:
    LLMConfig.model_validate(model)
except ValueError:
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(config), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "ranks 16 gs://b/a" in done.stdout
    assert "refused" in done.stdout


def test_two_workers_under_ray(qwen2: World, tmp_path: Path) -> None:
    """vLLM's Ray executor, two tensor-parallel workers in actors: each loads the plugin, and every token is exact."""
    batch = requests_of([None, *qwen2.adapters])
    paths = [str(HERE / "ray_cpu"), *filter(None, [os.environ.get("PYTHONPATH")])]
    engine = {
        "model": str(qwen2.base),
        "max_loras": 8,
        "max_lora_rank": 16,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "ray",
    }
    adapters = {name: str(folder) for name, folder in qwen2.folders().items()}
    job = {"engine": engine, "adapters": adapters, "batches": [batch], "offline": False}
    done = subprocess.run(
        [sys.executable, str(HERE / "engine.py"), str(tmp_path / "answers.json")],
        input=json.dumps(job),
        env=vllm_environment(PYTHONPATH=os.pathsep.join(paths), RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "RayWorkerProc" in done.stdout + done.stderr
    result = json.loads((tmp_path / "answers.json").read_text())
    assert result["plugin"] == "installed"
    check(qwen2, batch, result["answers"][0])
