"""ModelOpt checkpoints (quant_method "modelopt"): NVFP4, and FP8 with one scale per weight.

NVFP4  weight U8 (out, in / 2); weight_scale F8_E4M3 (out, in / 16); weight_scale_2 F32, one factor for all scales
FP8    weight F8_E4M3; weight_scale F32, one value
"""

from __future__ import annotations

from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.known_settings import Configuration
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.storage.safetensors_header import TensorRef

from .fp8_layout import SCALE_DTYPES, add_scaled
from .nvfp4 import GROUP, Nvfp4Weight


def find_modelopt(configuration: Configuration, findings: Findings) -> None:
    """Add every quantised weight of a ModelOpt checkpoint to `findings`."""
    algorithm = configuration.settings["quant_algo"]
    mixed = algorithm == "MIXED_PRECISION"
    for name, ref in findings.tensors.items():
        if f"{name}_scale_2" in findings.tensors and (mixed or algorithm.endswith("NVFP4")):
            _add_nvfp4(findings, name, ref)
        elif ref.dtype == "F8_E4M3" and name.endswith(".weight") and (mixed or algorithm == "FP8"):
            if len(ref.shape) != 2 or not all(ref.shape):
                findings.add_fault(name, "is an FP8 weight, but not a matrix", "two dimensions", str(list(ref.shape)))
                continue
            whole = ref.shape[0], ref.shape[1]
            add_scaled(findings, ref, f"{name}_scale", whole, "fp8 tensor", dtypes=SCALE_DTYPES)


def _add_nvfp4(findings: Findings, name: str, ref: TensorRef) -> None:
    shape = (ref.shape[0], 2 * ref.shape[1]) if len(ref.shape) == 2 else (0, 0)
    if ref.dtype != "U8" or not all(shape) or shape[1] % GROUP:
        findings.add_fault(name, "is not a matrix of packed FP4 codes", f"U8, {GROUP // 2} bytes for a group",
                       f"{ref.dtype} {list(ref.shape)}")  # fmt: skip
        return
    grid = ScaleGrid(shape, (1, GROUP))
    scale = findings.find_part(f"{name}_scale", ("F8_E4M3",), [grid.cells], owner=name)
    overall = findings.find_part(f"{name}_scale_2", ("F32",), [(), (1,)], owner=name)
    if scale is not None and overall is not None:
        parts = {"packed": ref, "scale": scale, "global_scale": overall}
        findings.add_weight(Nvfp4Weight(name, "nvfp4", shape, parts, "BF16", grid, divides=False))
