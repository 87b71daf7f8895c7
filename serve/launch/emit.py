"""`serve --emit`: the service as YAML for Kubernetes or for Ray Serve LLM.

Paths are those of the cluster, so files are not opened, except adapters whose ranks Ray needs. Kubernetes runs
adapter-merge itself, with a shared folder of adapters of any format. Ray Serve fetches adapters from object storage and
passes them to vLLM unchanged, so they must be factor folders.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapter_merge.cli.options.stated_settings import PATH
from adapter_merge.errors import InputError, MissingDependencyError, Problem, raise_all
from adapter_merge.serve.conversion.served_folder import allowed_rank, check_name
from adapter_merge.serve.conversion.stated_settings import KINDS

from .flags import DRAIN, find_flag_problems, has_option, option
from .process import GRACE

PORT = 8000
ADAPTERS, CACHE, SCRATCH = "/adapters", "/cache", "/scratch"
PRE_STOP = 10  # seconds for the cluster to stop sending requests here, before SIGTERM
REMOTE = ("s3://", "gs://", "abfss://", "azure://")
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,499}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
# Flags of vLLM's server only; all other flags after `--` are engine arguments, also in Ray.
SERVER_FLAGS = ("--host", "--port", "--api-key", "--served-model-name", "--uvicorn-log-level")


@dataclass(frozen=True)
class Service:
    """The service to describe; all paths are those of the cluster."""

    name: str
    base: str
    adapters: tuple[str, ...] = ()  # NAME=ADAPTER
    adapter_dir: str | None = None
    max_active: int | None = None
    stated: tuple[str, ...] = ()  # options of adapters, as on the command line
    vllm_flags: tuple[str, ...] = ()  # vLLM's own flags
    image: str = "adapter-merge-vllm"
    cache_size: str | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)  # Ray: ranks of the adapters that could be opened

    def check(self) -> None:
        """Raise InputError with every problem."""
        problems = find_flag_problems(self.vllm_flags, self.adapter_dir is not None)
        if LABEL.fullmatch(self.name) is None:
            problems.append(Problem(f"--name {self.name}: not a name", "lower-case letters, digits and dashes"))
        for text in self.adapters:
            try:
                name, equals, folder = text.partition("=")
                check_name(name)
                if not equals or not folder:
                    raise InputError(f"{text!r} is not NAME=ADAPTER")
            except InputError as error:
                problems += error.problems
        texts = [self.base, *self.adapters, *self.stated, *self.vllm_flags, self.adapter_dir or ""]
        problems += [Problem(f"{text!r} holds a control character") for text in texts if not text.isprintable()]
        if IMAGE.fullmatch(self.image) is None:
            problems.append(Problem(f"--image {self.image!r}: not an image", "registry/name:tag"))
        raise_all(problems)

    def check_cluster(self) -> None:
        """Raise InputError for paths that a container does not have, and for keys in the manifest."""
        problems = []
        mount = self.adapter_dir or ADAPTERS
        if not mount.startswith("/") or ".." in mount.split("/"):
            problems.append(Problem(f"--adapter-dir {mount}: not a folder of the cluster", "an absolute path"))
        named = {text.partition("=")[0] for text in self.adapters}
        sources = [self.base, *(text.partition("=")[2] for text in self.adapters)]
        for text in self.stated:
            option_name, _, value = text.partition("=")
            if KINDS[option_name.removeprefix("--").replace("-", "_")][0] == PATH:
                owner, mark, adapter_value = value.partition("=")
                sources.append(adapter_value if mark and owner in named else value)
        for source in sources:
            mounted = any(source.startswith(f"{folder.rstrip('/')}/") for folder in (mount, CACHE))
            if not (mounted and ".." not in source.split("/")) and HUB_ID.fullmatch(source) is None:
                problems.append(
                    Problem(
                        f"{source}: a path of this machine, which the container does not have",
                        expected=f"a hub id, or a path under {mount} or {CACHE}",
                        hint=f"copy it to the claim {self.name}-adapters",
                    )
                )
        if has_option(self.vllm_flags, "--api-key"):
            problems.append(
                Problem(
                    "--api-key would be readable in the manifest",
                    hint=f"put it into the secret {self.name} as api-key",
                )
            )
        port = option(self.vllm_flags, "--port")
        if has_option(self.vllm_flags, "--port") and not (port or "").isdigit():
            problems.append(Problem("--port is not a number", got=port))
        raise_all(problems)


def make_kubernetes_manifest(service: Service) -> str:
    """Return a Deployment, a Service and two claims as YAML. Raises InputError with every problem."""
    service.check()
    service.check_cluster()
    name = service.name
    labels = {"app.kubernetes.io/name": name}
    claims = [_claim(f"{name}-adapters", "10Gi"), _claim(f"{name}-models", "100Gi")]
    meta = {"name": name, "labels": labels}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {"metadata": {"labels": labels}, "spec": _pod(service)},
        },
    }
    exposed = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }
    notes = [
        f"vLLM with adapters by name, for kubectl apply -f. The image {service.image} is built from this source:",
        "    FROM vllm/vllm-openai:v0.32.0",
        "    COPY . /src",
        "    RUN pip install --no-cache-dir /src",
        f"Adapters of any format go to the claim {name}-adapters, a folder each: every replica serves them by the",
        "folder's name from its first request on. The claims need a storage class that several nodes can mount.",
        f"An optional secret {name} holds api-key (required of every request to /v1) and hf-token.",
    ]
    return _format_yaml(notes, *claims, deployment, exposed)


def _pod(service: Service) -> dict[str, Any]:
    """Return the pod's specification."""
    gpus = _gpus(service.vllm_flags)
    probe = {"httpGet": {"path": "/health", "port": "http"}}
    environment = {
        "HF_HOME": f"{CACHE}/huggingface",
        "ADAPTER_MERGE_CACHE": f"{SCRATCH}/adapters",
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        "USER": "vllm",
    }
    container = {
        "name": "vllm",
        "image": service.image,
        "command": ["adapter-merge", "serve"],
        "args": _arguments(service),
        # Endpoints are removed while the server still answers; then SIGTERM makes /health fail and requests finish.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP)]}}},
        "env": [
            *({"name": key, "value": value} for key, value in environment.items()),
            *(
                {"name": key, "valueFrom": {"secretKeyRef": {"name": service.name, "key": secret, "optional": True}}}
                for key, secret in (("VLLM_API_KEY", "api-key"), ("HF_TOKEN", "hf-token"))
            ),
        ],
        "ports": [{"name": "http", "containerPort": _port(service.vllm_flags)}],
        # The first start downloads the base model; later, a server that does not answer is restarted.
        "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {**probe, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 1},
        "livenessProbe": {**probe, "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 6},
        "resources": {
            "requests": {"cpu": "4", "memory": "24Gi", "ephemeral-storage": "60Gi"},
            "limits": {"memory": "48Gi", "nvidia.com/gpu": str(gpus)},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "adapters", "mountPath": service.adapter_dir or ADAPTERS, "readOnly": True},
            {"name": "models", "mountPath": CACHE},
            {"name": "scratch", "mountPath": SCRATCH},
            {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": PRE_STOP + _drain_seconds(service.vllm_flags) + GRACE + 5,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "adapters", "persistentVolumeClaim": {"claimName": f"{service.name}-adapters"}},
            {"name": "models", "persistentVolumeClaim": {"claimName": f"{service.name}-models"}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "60Gi"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        ],
    }


def _claim(name: str, size: str) -> dict[str, Any]:
    """Return a volume claim that several nodes can mount."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}},
    }


def _arguments(service: Service) -> list[str]:
    """Return the arguments of `adapter-merge serve` in the container."""
    arguments = [service.base, *service.adapters, "--adapter-dir", service.adapter_dir or ADAPTERS, *service.stated]
    if service.max_active is not None:
        arguments += ["--max-active", str(service.max_active)]
    if service.cache_size is not None:
        arguments += ["--cache-size", service.cache_size]
    arguments.append("--")
    for flag, value in (("--host", "0.0.0.0"), ("--port", str(PORT))):
        if not has_option(service.vllm_flags, flag):
            arguments += [flag, value]
    return arguments + list(service.vllm_flags)


def make_ray_config(service: Service) -> str:
    """Return a configuration for `serve deploy` (Ray Serve LLM) as YAML. Raises InputError with every problem."""
    service.check()
    storage = service.adapter_dir
    if storage is None or not storage.startswith(REMOTE):
        raise InputError(
            "Ray Serve reads adapters from object storage only",
            expected=f"--adapter-dir with one of {', '.join(REMOTE)}",
            got=storage or "none",
            hint="--emit k8s serves a folder; -- --distributed-executor-backend ray needs no configuration",
        )
    storage = storage.rstrip("/")
    active = service.max_active or 16
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": active + 1,  # one spare slot: see row_scale.with_row_scale
        "max_cpu_loras": max(active + 1, 64),
        "max_lora_rank": allowed_rank(max(service.ranks.values(), default=64)),
        **engine_arguments(service.vllm_flags),
    }
    model = {
        "model_loading_config": {
            "model_id": option(service.vllm_flags, "--served-model-name") or service.base,
            "model_source": service.base,
        },
        "engine_kwargs": arguments,
        "lora_config": {"dynamic_lora_loading_path": storage, "max_num_adapters_per_replica": active},
        "placement_group_config": {"bundle_per_worker": {"CPU": 2, "GPU": 1}, "strategy": "PACK"},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    application = {
        "name": service.name,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    notes = [
        "vLLM with adapters by name in Ray Serve LLM: serve deploy FILE on a Ray cluster whose machines have",
        f"ray[llm] and adapter-merge, {_gpus(service.vllm_flags)} GPU for a replica. Adapters must be factor folders:",
        *(f"    {line}" for line in _factoring(service, storage)),
        f"A request asks for the model {model['model_loading_config']['model_id']}:NAME.",
    ]
    return _format_yaml(
        notes, {"proxy_location": "EveryNode", "http_options": {"port": PORT}, "applications": [application]}
    )


def _factoring(service: Service, target: str) -> Iterator[str]:
    """Yield the command that makes each adapter's factor folder, for upload to `target`."""
    named = [(name, folder) for name, _, folder in (text.partition("=") for text in service.adapters)]
    for name, folder in named or [("NAME", "ADAPTER")]:
        command = ["adapter-merge", "factor", service.base, folder, "-o", name]
        for text in service.stated:
            flag, _, value = text.partition("=")
            owner, mark, adapter_value = value.partition("=")
            if not mark or owner == name or owner not in dict(named):
                command += [flag, adapter_value if mark and owner == name else value] if "=" in text else [flag]
        yield f"{shlex.join(command)}    # then copy it to {target}/{name}"


def engine_arguments(vllm_flags: Sequence[str]) -> dict[str, Any]:
    """Return vLLM's engine flags as keyword arguments for Ray Serve. Raises InputError for a word without a flag."""
    values: dict[str, Any] = {}
    flag = ""
    short = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-O": "--optimization-level"}
    for word in vllm_flags:
        if word.startswith("-") and not re.fullmatch(r"-?[\d.]+", word):
            flag, equals, value = word.partition("=")
            flag = short.get(flag, flag)
            values[flag] = _parse_value(value) if equals else True
            if equals:
                flag = ""
        elif not flag:
            raise InputError(f"{word!r} after -- belongs to no flag")
        elif values[flag] is True:
            values[flag] = _parse_value(word)
        else:
            values[flag] = [*(values[flag] if isinstance(values[flag], list) else [values[flag]]), _parse_value(word)]
    engine = {flag: value for flag, value in values.items() if flag.replace("_", "-") not in SERVER_FLAGS}
    return {flag.lstrip("-").replace("-", "_"): value for flag, value in engine.items()}


def _parse_value(text: str) -> Any:
    """Return a flag's value as JSON, or as text where it is not JSON."""
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text


def _gpus(vllm_flags: Sequence[str]) -> int:
    """Return the number of GPUs: tensor parallel size times pipeline parallel size."""
    number = 1
    for names in (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp")):
        value = next((values for flag in names if (values := option(vllm_flags, flag)) is not None), "1")
        number *= int(value) if value.isdigit() else 1
    return number


def _drain_seconds(vllm_flags: Sequence[str]) -> int:
    """Return the seconds in which running requests may finish."""
    return int(option(vllm_flags, "--shutdown-timeout") or DRAIN)


def _port(vllm_flags: Sequence[str]) -> int:
    """Return the port that the server listens on."""
    return int(option(vllm_flags, "--port") or PORT)


def _format_yaml(notes: Sequence[str], *documents: dict[str, Any]) -> str:
    """Return the documents as YAML, with `notes` as comments at the top."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError("--emit needs pyyaml", hint="pip install pyyaml") from error

    class Plain(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    head = "".join(f"# {note}\n" for note in notes)
    return head + str(yaml.dump_all(documents, Dumper=Plain, sort_keys=False, explicit_start=True, width=120))
