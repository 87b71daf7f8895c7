"""Detection of quantised weights: from a checkpoint's config and headers to one PackedWeight per dense name."""

from __future__ import annotations

import re

from adapter_merge.errors import FileFormatError, UnsupportedError
from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.known_settings import Configuration, read_configuration
from adapter_merge.quantisation.packed import Packed
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES

# How names end that only quantised checkpoints have.
QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_global_scale|weight_zero_point|weight_g_idx"
    r"|weight_shape|SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map)"
    r"|weight\.quant_state\.bitsandbytes__\w+)$|_(blocks|scales|scale_inv)$"
)
# Scales of activations and of the key-value cache: they vanish with the config that names them.
ACTIVATION_NAMES = re.compile(
    r"\.(input_scale|activation_scale|input_scale_ub|input_global_scale|output_scale|[kvq]_scale|kv_scale"
    r"|[kvq]_zero_point|input_zero_point|output_zero_point)$"
)
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
QUANTISED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0")


def find_packed(base: Checkpoint) -> Packed:
    """Return the quantised weights of `base`; none where all its tensors are plain.

    Reads headers, configs and, for schemes that state shapes in tensors, a few bytes per weight. Raises
    UnsupportedError for a scheme that is not known, and FileFormatError with everything in which the tensors and the
    config contradict each other.
    """
    marked = [name for name, ref in base.tensors.items()
              if QUANTISED_NAMES.search(name) or ref.dtype in QUANTISED_DTYPES]  # fmt: skip
    if not marked:
        return Packed({}, frozenset())
    configuration = read_configuration(base)
    if configuration is None:
        if all(base.tensors[name].dtype in FLOAT_DTYPES for name in marked):
            return Packed({}, frozenset())  # plain tensors whose names happen to end so
        raise FileFormatError(
            f"{base.folder}: quantised weights, and config.json has no quantization_config that says how",
            expected="quantization_config with quant_method",
            got=", ".join(marked[:3]),
            hint="take config.json from where the weights came from",
        )
    _refuse_turned(base, configuration)
    findings = Findings(base.tensors)
    _search(configuration, findings)
    _find_leftovers(findings, marked)
    findings.require_sound()
    findings.side.update(name for name in base.tensors if ACTIVATION_NAMES.search(name))
    return Packed(findings.weights, frozenset(findings.side), configuration.notes())


def _refuse_turned(base: Checkpoint, configuration: Configuration) -> None:
    """Raise UnsupportedError for models of Conv1D layers, whose quantised weights are the dense ones transposed."""
    if base.config.get("model_type") in CONV1D_MODELS:
        raise UnsupportedError(
            f"{configuration.where}: quantised weights of a model whose layers are Conv1D",
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


def _find_leftovers(findings: Findings, marked: list[str]) -> None:
    """Note the quantised tensors that no weight has taken, unless their own weight is at fault already."""
    faulty = {_module(name) for name in findings.faulty()}
    for name in marked:
        if name in findings.weights or name in findings.side or ACTIVATION_NAMES.search(name):
            continue
        if _module(name) not in faulty:
            findings.fault(name, "belongs to no quantised weight that the config describes")


def _module(name: str) -> str:
    """Return the name of the module, or of the stacked parameter, that a tensor belongs to."""
    return QUANTISED_NAMES.sub("", name).removesuffix(".weight")
