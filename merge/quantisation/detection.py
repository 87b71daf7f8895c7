"""Detection of quantised weights: one PackedWeight per weight, from a checkpoint's config and headers."""

from __future__ import annotations

import re

from adapter_merge.errors import FileFormatError, UnsupportedError
from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.known_settings import Configuration, read_configuration
from adapter_merge.quantisation.quantised_weights import QuantisedWeights
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES

# Endings of tensor names that only quantised checkpoints have.
QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_global_scale|weight_zero_point|weight_g_idx"
    r"|weight_shape|SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map)"
    r"|weight\.quant_state\.bitsandbytes__\w+)$|_(blocks|scales|scale_inv)$"
)
# Scales of activations and of the key-value cache. A dense checkpoint has neither them nor the config that uses them.
ACTIVATION_NAMES = re.compile(
    r"\.(input_scale|activation_scale|input_scale_ub|input_global_scale|output_scale|[kvq]_scale|kv_scale"
    r"|[kvq]_zero_point|input_zero_point|output_zero_point)$"
)
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
QUANTISED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0")


def find_quantised_weights(base: Checkpoint) -> QuantisedWeights:
    """Return the quantised weights of `base`; none where no tensor is quantised.

    Reads headers, configs and, for schemes that store shapes in tensors, a few bytes per weight. Raises
    UnsupportedError for an unknown scheme, and FileFormatError with every contradiction between tensors and config.
    """
    marked = [name for name, ref in base.tensors.items()
              if QUANTISED_NAMES.search(name) or ref.dtype in QUANTISED_DTYPES]  # fmt: skip
    if not marked:
        return QuantisedWeights({}, frozenset())
    configuration = read_configuration(base)
    if configuration is None:
        if all(base.tensors[name].dtype in FLOAT_DTYPES for name in marked):
            return QuantisedWeights({}, frozenset())  # float tensors whose names have such an ending by chance
        raise FileFormatError(
            f"{base.folder}: the weights are quantised, but config.json has no quantization_config",
            expected="a quantization_config with quant_method",
            got=", ".join(marked[:3]),
            hint="use the config.json that belongs to the weights",
        )
    _refuse_conv1d(base, configuration)
    findings = Findings(base.tensors)
    _search(configuration, findings)
    _add_unused_tensors(findings, marked)
    findings.raise_faults()
    findings.side.update(name for name in base.tensors if ACTIVATION_NAMES.search(name))
    return QuantisedWeights(findings.weights, frozenset(findings.side), configuration.notes())


def _refuse_conv1d(base: Checkpoint, configuration: Configuration) -> None:
    """Raise UnsupportedError for models with Conv1D layers: quantisers store their weights (in, out) transposed."""
    if base.config.get("model_type") in CONV1D_MODELS:
        raise UnsupportedError(
            f"{configuration.where}: quantised weights of a model with Conv1D layers are not supported",
            expected="weights (out, in): quantisers store those of Conv1D, (in, out), transposed",
            got=f"model_type {base.config['model_type']!r}",
            hint="use the unquantised model as the base",
        )


def _search(configuration: Configuration, findings: Findings) -> None:
    method = configuration.method
    if method in ("fp8", "fbgemm_fp8"):
        from adapter_merge.quantisation.schemes.fp8_layout import find_fp8

        find_fp8(configuration, findings)
    elif method == "compressed-tensors":
        from adapter_merge.quantisation.schemes.compressed_tensors import find_compressed_tensors

        find_compressed_tensors(configuration, findings)
    elif method == "bitsandbytes":
        from adapter_merge.quantisation.schemes.bitsandbytes import find_bitsandbytes

        find_bitsandbytes(findings)
    elif method == "gptq":
        from adapter_merge.quantisation.schemes.gptq import find_gptq

        find_gptq(configuration, findings)
    elif method == "awq":
        from adapter_merge.quantisation.schemes.awq import find_awq

        find_awq(configuration, findings)
    elif method == "modelopt":
        from adapter_merge.quantisation.schemes.modelopt import find_modelopt

        find_modelopt(configuration, findings)
    else:
        from adapter_merge.quantisation.schemes.mxfp4 import find_mxfp4

        find_mxfp4(findings)


def _add_unused_tensors(findings: Findings, marked: list[str]) -> None:
    """Add a fault for each quantised tensor that no weight uses, unless its weight has a fault already."""
    faulty = {_module(name) for name in findings.faulty_names()}
    for name in marked:
        if name in findings.weights or name in findings.side or ACTIVATION_NAMES.search(name):
            continue
        if _module(name) not in faulty:
            findings.add_fault(name, "belongs to no quantised weight that the config describes")


def _module(name: str) -> str:
    """Return the name of the module, or of the stacked parameter, that a tensor belongs to."""
    return QUANTISED_NAMES.sub("", name).removesuffix(".weight")
