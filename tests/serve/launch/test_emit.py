"""`serve --emit`: what is printed for Kubernetes and Ray, held against itself and against our own command line.

test_cluster.py holds it against their schemas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from world import World

from adapter_merge.errors import InputError
from adapter_merge.serve.cli.serve import serve
from adapter_merge.serve.launch.emit import engine_arguments

yaml = pytest.importorskip("yaml")

FLAGS = ("--", "--tensor-parallel-size", "2", "--max-model-len=4096", "--enable-prefix-caching")


def emitted(*arguments: str) -> list[dict[str, Any]]:
    shown = CliRunner().invoke(serve, list(arguments), catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return list(yaml.safe_load_all(shown.stdout))


def manifest(*more: str) -> dict[str, dict[str, Any]]:
    documents = emitted("org/base", "sql=org/dcft", "--alpha", "sql=32", "--emit", "k8s", "--name", "chat", *more)
    return {f"{each['kind']} {each['metadata']['name']}": each for each in documents}


def test_the_manifest_hangs_together() -> None:
    found = manifest("--image", "registry/vllm:1", *FLAGS)
    assert set(found) == {
        "PersistentVolumeClaim chat-adapters",
        "PersistentVolumeClaim chat-models",
        "Deployment chat",
        "Service chat",
    }
    spec = found["Deployment chat"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == found["Service chat"]["spec"]["selector"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry/vllm:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if len(volume) == 2
              and "persistentVolumeClaim" in volume}  # fmt: skip
    assert {f"PersistentVolumeClaim {claim}" for claim in claims} < set(found)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000}
    assert int(container["lifecycle"]["preStop"]["exec"]["command"][1]) > 5, "longer than a readiness check takes"
    assert pod["terminationGracePeriodSeconds"] >= 10 + 30 + 30
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert found["Service chat"]["spec"]["ports"][0]["targetPort"] == "http"
    # Nothing may be written but where a volume is: every path in the environment lies in one.
    mounts = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    paths = [entry["value"] for entry in container["env"] if entry.get("value", "").startswith("/")]
    assert len(paths) >= 4
    assert all(any(Path(path).is_relative_to(mount) for mount in mounts) for path in paths)


def test_the_time_to_end_follows_the_time_to_drain() -> None:
    spec = manifest("--shutdown-timeout", "300")["Deployment chat"]["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] >= 10 + 300 + 30
    assert "--shutdown-timeout=300" in spec["containers"][0]["args"]


@pytest.mark.parametrize("name", ["null", "true", "on", "y", "no"])
def test_names_that_yaml_would_read_as_something_else(name: str) -> None:
    documents = emitted("org/base", f"{name}=org/dcft", "--emit", "k8s", "--name", name)
    assert documents[2]["metadata"]["name"] == name
    assert documents[2]["spec"]["template"]["spec"]["containers"][0]["args"][1] == f"{name}=org/dcft"


@pytest.mark.vllm
def test_the_container_runs_a_command_that_we_know(qwen2: World, tmp_path: Path) -> None:
    """The arguments, with this machine's paths in place of the cluster's, make the plan that they promise."""
    (container,) = manifest(*FLAGS)["Deployment chat"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["adapter-merge", "serve"]
    here = {
        "org/base": str(qwen2.base),
        "sql=org/dcft": f"sql={qwen2.adapters['dcft-1'].raw}",
        "/adapters": str(tmp_path),
    }
    arguments = [here.get(argument, argument) for argument in container["args"]]
    cut = arguments.index("--")
    shown = CliRunner().invoke(serve, [*arguments[:cut], "--dry-run", *arguments[cut:]], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "--tensor-parallel-size 2 --max-model-len=4096" in shown.stdout
    assert "--host 0.0.0.0 --port 8000" in shown.stdout
    assert "sql: DCFT" in shown.stdout


def test_ray_serve(qwen2: World) -> None:
    """Ranks from the adapters that are at hand, engine flags as keyword arguments, adapters from object storage."""
    raws = [f"{name}={qwen2.adapters[name].raw}" for name in ("lora-1", "dude-1")]
    flags = (*FLAGS, "--port", "9000", "--served-model-name", "tiny")
    (config,) = emitted(str(qwen2.base), *raws, "--adapter-dir", "s3://bucket/a/", "--emit", "ray", *flags)
    (application,) = config["applications"]
    (model,) = application["args"]["llm_configs"]
    assert model["model_loading_config"] == {"model_id": "tiny", "model_source": str(qwen2.base)}
    assert model["engine_kwargs"] == {
        "enable_lora": True,
        "max_loras": 17,
        "max_cpu_loras": 64,
        "max_lora_rank": 16,
        "tensor_parallel_size": 2,
        "max_model_len": 4096,
        "enable_prefix_caching": True,
    }
    assert model["lora_config"]["dynamic_lora_loading_path"] == "s3://bucket/a"


def test_how_to_make_what_ray_fetches(qwen2: World) -> None:
    """The commands in the head carry what was stated of each adapter, and of no other."""
    raws = [f"{name}={qwen2.adapters['dcft-1'].raw}" for name in ("a", "b")]
    options = ["--adapter-dir", "s3://bucket", "--alpha", "a=32", "--ranknum", "b=8", "--emit", "ray"]
    shown = CliRunner().invoke(serve, [str(qwen2.base), *raws, *options], catch_exceptions=False)
    first, second = (line for line in shown.stdout.splitlines() if "adapter-merge factor" in line)
    assert first.endswith("-o a --alpha 32    # then copy it to s3://bucket/a")
    assert second.endswith("-o b --ranknum 8    # then copy it to s3://bucket/b")


def test_engine_arguments() -> None:
    found = engine_arguments(["-tp", "2", "--a-list", "x", "y", "--flag", "--number=-1", "--json", '{"a": 1}'])
    expected = {"tensor_parallel_size": 2, "a_list": ["x", "y"], "flag": True, "number": -1, "json": {"a": 1}}
    assert found == expected
    with pytest.raises(InputError, match="belongs to no flag"):
        engine_arguments(["stray"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["base", "--emit", "k8s", "--name", "Not_a_name"], "not a name"),
        (["base", "bad/name=x", "--emit", "k8s"], "cannot name an adapter"),
        (["base", "no-equals", "--emit", "k8s"], "not NAME=ADAPTER"),
        (["base", "a==org/x", "--emit", "k8s"], "path of this machine"),
        (["base", "a=./here", "--emit", "k8s"], "path of this machine"),
        (["base", "a=/home/me/dude", "--emit", "k8s"], "path of this machine"),
        (["base", "a=/adapters/../etc", "--emit", "k8s"], "path of this machine"),
        (["/data/base", "--emit", "k8s"], "path of this machine"),
        (["base", "a=org/x", "--magnitudes", "/home/m", "--emit", "k8s"], "path of this machine"),
        (["base", "--adapter-dir", "here", "--emit", "k8s"], "not a folder of the cluster"),
        (["base", "--emit", "k8s", "--image", "x\n---\nkind: Pod"], "not an image"),
        (["base", "--emit", "k8s", "--image", "x #y"], "not an image"),
        (["base\nx", "--emit", "k8s"], "control character"),
        (["base", "--emit", "k8s", "--api-key", "x"], "readable in the manifest"),
        (["base", "--emit", "k8s", "--", "--lora-modules", "x"], "set by adapter-merge"),
        (["base", "--emit", "ray"], "object storage only"),
        (["base", "--emit", "ray", "--adapter-dir", "./here"], "object storage only"),
    ],
)
def test_what_is_refused(arguments: list[str], word: str) -> None:
    with pytest.raises(InputError, match=word):
        CliRunner().invoke(serve, arguments, catch_exceptions=False)
