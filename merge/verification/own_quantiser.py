"""transformers' quantiser for a quantised base, which dequantises the stored tensors while it loads them.

The models that `verify` runs should not depend on the readers that made the artefact. Where transformers can load the
base on a CPU, transformers and the library of the scheme dequantise the weights: compressed-tensors, bitsandbytes, or
transformers' own code for FP8 and MXFP4. Elsewhere this package's readers dequantise them, and `quantiser_note` says
why.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from adapter_merge.binding.trained_base import is_simulated
from adapter_merge.quantisation.dense_view import packed_weights
from adapter_merge.quantisation.known_settings import Configuration, read_configuration
from adapter_merge.quantisation.packed_weight import PackedWeight
from adapter_merge.quantisation.schemes.bitsandbytes import Bitsandbytes4Weight
from adapter_merge.storage.checkpoint import Checkpoint

from .live_adapter import quiet_libraries

Quantiser: TypeAlias = Any  # transformers.quantizers.HfQuantizer
# The methods whose weights transformers dequantises on a CPU, and the packages that it needs for that.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "fp8": ("accelerate",),
    "mxfp4": ("accelerate",),
}
# The stored parts of a weight that transformers reads (`serialized_names` of its quantisers).
PARTS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("weight", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_packed",
                           "weight_shape"),
    "fp8": ("weight", "weight_scale_inv"),
}  # fmt: skip


def own_quantiser(base: Checkpoint) -> Quantiser | None:
    """Return a new quantiser of transformers for a quantised base; None where transformers cannot dequantise it.

    The quantiser is for one model, which it changes. Its conversions dequantise the weights; `dense_value` dequantises
    those of bitsandbytes, which stay packed.
    """
    if base.stored is None:
        return None
    configuration = read_configuration(base.stored)
    if configuration is None or _obstacle(configuration, base) is not None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = dict(configuration.settings) | {"quant_method": configuration.method}
    if configuration.method != "bitsandbytes":
        settings["dequantize"] = True
    with quiet_libraries():
        quantiser: Quantiser = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantiser.validate_environment(device_map={"": "cpu"})
    return quantiser


def quantiser_note(base: Checkpoint) -> str:
    """Return a sentence that says what dequantises the weights of the models that run on a quantised base."""
    assert base.stored is not None
    configuration = read_configuration(base.stored)
    if is_simulated(base):
        return (
            "models run on the weights that --trained-on states, and adapter-merge quantises by bitsandbytes' formulas"
        )
    if configuration is None:
        return "models run on the base's weights as the gguf package dequantises them"
    obstacle = _obstacle(configuration, base)
    if obstacle is not None:
        return f"models run on the base's weights as adapter-merge dequantises them: {obstacle}"
    package = PACKAGES[configuration.method][0]
    library = "" if package == "accelerate" else f" and {package.replace('_', '-')} {version(package)}"
    return (
        f"models run on the base's weights as transformers {version('transformers')}{library} dequantise them, "
        "not as adapter-merge does"
    )


@torch.no_grad()
def dense_value(module: nn.Module, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a loaded parameter of `module` in `dtype`; bitsandbytes dequantises those that it stores packed."""
    if type(value).__name__ not in ("Params4bit", "Int8Params"):
        return value.detach()
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    dense: Tensor = dequantize_bnb_weight(value, getattr(module, "state", None))
    return dense.detach().to(dtype)


def _obstacle(configuration: Configuration, base: Checkpoint) -> str | None:
    """Return why transformers cannot dequantise the weights of `base` on a CPU; None where it can."""
    method = configuration.method
    if method not in PACKAGES:
        return f"transformers cannot load {method} on a CPU"
    missing = [name for name in PACKAGES[method] if find_spec(name) is None]
    if missing:
        return f"transformers needs {' and '.join(missing)} for {method}"
    from transformers.quantizers import HfQuantizer

    if not hasattr(HfQuantizer, "get_load_operations"):
        return f"transformers {version('transformers')} can only dequantise whole models"
    weights = packed_weights(base)
    for name, weight in weights.items():
        for part in weight.parts.values():
            kind = part.name.rpartition(".")[2]
            if kind not in PARTS.get(method, (kind,)):
                return f"transformers does not read {kind} of {method} ({name})"
    if method == "compressed-tensors":
        return _compressed_obstacle(configuration, weights)
    if method == "bitsandbytes":
        return _bitsandbytes_obstacle(weights)
    return _fp8_obstacle(configuration, weights) if method == "fp8" else None


def _compressed_obstacle(configuration: Configuration, weights: Mapping[str, PackedWeight]) -> str | None:
    if len(configuration.settings["config_groups"]) > 1:
        return "transformers dequantises all layers by one of several config_groups"
    for name, weight in weights.items():
        if ".experts." in name and not any(part.name.endswith(".weight_shape") for part in weight.parts.values()):
            return f"transformers rounds the weights of experts differently from compressed-tensors ({name})"
    return None


def _bitsandbytes_obstacle(weights: Mapping[str, PackedWeight]) -> str | None:
    for name, weight in weights.items():
        if isinstance(weight, Bitsandbytes4Weight) and weight.shape[-1] % weight.block:
            return f"bitsandbytes' CPU kernel starts a new block in each row, and the format does not ({name})"
    return None


def _fp8_obstacle(configuration: Configuration, weights: Mapping[str, PackedWeight]) -> str | None:
    block = configuration.settings.get("weight_block_size")
    for name, weight in weights.items():
        if block is not None and any(size % step for size, step in zip(weight.shape[-2:], block, strict=True)):
            return f"transformers' FP8 divides a weight whose last block is smaller into other blocks ({name})"
    return None
