"""FP8 checkpoints of DeepSeek, transformers, AutoFP8 and fbgemm: the names and shapes of weights and scales.

    quant_method "fp8"         weight + weight_scale_inv on blocks of weight_block_size, or one scale where that is
                               null; AutoFP8 names its one scale weight_scale. Stacks: <parameter>_scale_inv.
    quant_method "fbgemm_fp8"  weight + weight_scale (out, 1)

Scales of activations (input_scale, activation_scale, input_scale_ub) and of the key-value cache are not read.
"""

from __future__ import annotations

import math

from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.known_settings import Configuration
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.storage.safetensors_header import TensorRef

from .scaled import ScaledWeight

SCALE_DTYPES = ("F32", "BF16", "F16")
BLOCK_SCALE_DTYPES = (*SCALE_DTYPES, "F8_E8M0", "U8")


def find_fp8(configuration: Configuration, findings: Findings) -> None:
    """Add every FP8 weight of a checkpoint of method "fp8" or "fbgemm_fp8" to `findings`."""
    block = configuration.settings.get("weight_block_size")
    for name, ref in findings.tensors.items():
        if ref.dtype != "F8_E4M3":
            continue
        if len(ref.shape) < 2 or not all(ref.shape):
            findings.add_fault(
                name, "is an FP8 weight, but not a matrix", "two dimensions or more", str(list(ref.shape))
            )
        elif configuration.method == "fbgemm_fp8":
            add_scaled(findings, ref, f"{name}_scale", (1, ref.shape[-1]), "fp8 row")
        elif block is not None and f"{name}_scale_inv" in findings.tensors:
            words = f"fp8 block {block[0]}x{block[1]}"
            add_scaled(findings, ref, f"{name}_scale_inv", (block[0], block[1]), words)
        else:
            scale = f"{name}_scale" if f"{name}_scale" in findings.tensors else f"{name}_scale_inv"
            add_scaled(findings, ref, scale, (ref.shape[-2], ref.shape[-1]), "fp8 tensor")


def add_scaled(
    findings: Findings,
    weight: TensorRef,
    scale_name: str,
    block: tuple[int, int],
    scheme: str,
    *,
    zero_point: str | None = None,
    dtypes: tuple[str, ...] = BLOCK_SCALE_DTYPES,
) -> None:
    """Add one FP8 or INT8 weight with a scale per `block`, or record its faults."""
    grid = ScaleGrid(weight.shape, block)
    cells = (*weight.shape[:-2], *grid.cells)
    shapes = [cells]
    if grid.cells[1] == 1:
        shapes.append(cells[:-1])
    if math.prod(cells) == 1:
        shapes += [(), (1,)]
    parts = {"weight": weight}
    for role, name, allowed in (("scale", scale_name, dtypes), ("zero_point", zero_point, ("I8",))):
        if name is None:
            continue
        ref = findings.find_part(name, allowed, shapes, owner=weight.name)
        if ref is None:
            return
        parts[role] = ref
    dtype = parts["scale"].dtype if parts["scale"].dtype in SCALE_DTYPES else "BF16"
    findings.add_weight(ScaledWeight(weight.name, scheme, weight.shape, parts, dtype, grid))
