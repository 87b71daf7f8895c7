"""Opening of an export with onnxruntime-genai on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError

from .providers import check_external_data, check_packages, parse_device, providers


def open_genai(folder: Path, device: str) -> Any:
    """Open the export in `folder` on `device` (cpu, cuda or cuda:N); return an onnxruntime_genai.Model.

    Raises MissingDependencyError without onnxruntime-genai, InputError where the model does not run on `device`.
    """
    check_packages("onnxruntime_genai")
    import onnxruntime_genai as og

    check_external_data(folder / "model.onnx")
    config = og.Config(str(folder))
    config.clear_providers()
    kind, index = parse_device(device)
    if kind == "cuda":
        providers(device)  # raises MissingDependencyError without a CUDA provider
        config.append_provider("cuda")
        config.set_provider_option("cuda", "device_id", str(index))
    model = og.Model(config)
    if kind == "cuda" and "cuda" not in str(model.device_type).lower():
        raise InputError(f"onnxruntime-genai opened the model on {model.device_type}", expected=device)
    return model
