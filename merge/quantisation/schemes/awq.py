"""AWQ of version "gemm": 4-bit codes packed along out, with a scale and a zero point per group of inputs.

    qweight  I32 (in, out / 8), the nibbles of a word in the order 0 2 4 6 1 3 5 7 of the outputs
    qzeros   I32 (in / group, out / 8), in the same order
    scales   F16 (in / group, out)

Arithmetic: AutoAWQ 0.2.9, utils/packing_utils.py, dequantize_gemm: (code - zero) * scale in the scale's dtype. The same
values come from compressed-tensors 0.20 (entrypoints/convert/converters/autoawq.py) and from GPTQModel 7.7's kernel
(nn_modules/qlinear/torch_awq.py). GPTQModel 7.7's utils/model_dequant.py, convert_awq_file, does not apply the nibble
order; its result is another matrix than that of its own kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.known_settings import Configuration
from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.quantisation.transposed_cache import TransposedCache
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.tensor_io import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place, from the low bits, of outputs 0 .. 7 of a word


@dataclass(frozen=True)
class AwqWeight(PackedWeight):
    """Weight (out, in). Parts: "qweight", "qzeros", "scales".

    The file stores the transpose. The parts of one weight are read whole, transposed and cached.
    """

    grid: ScaleGrid
    cache: TransposedCache = field(repr=False, compare=False)

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        words, zeros, scales = self.cache.get(self.name, lambda: self._transpose_parts(read))
        values = _outputs(words, first, count).to(torch.float32)
        self.grid.apply(values, _outputs(zeros, first, count).to(torch.float32), "sub_")
        self.grid.apply(values, scales[first : first + count].float(), "mul_")
        return values.to(TORCH_DTYPES[self.dtype])

    def _transpose_parts(self, read: Read) -> tuple[Tensor, ...]:
        """Return the transposed qweight (out / 8, in), qzeros (out / 8, groups) and scales (out, groups)."""
        turned = [read_part(read, self.parts[role]).T.contiguous() for role in ("qweight", "qzeros", "scales")]
        return tuple(turned)


def _outputs(words: Tensor, first: int, count: int) -> Tensor:
    """Unpack outputs first .. first + count of `words` (out / 8, n): codes, int32 (count, n)."""
    output = torch.arange(first, first + count, device=words.device)
    shifts = torch.tensor(NIBBLES, dtype=torch.int32, device=words.device)[output % 8] * 4
    return (words[output // 8] >> shifts[:, None]) & 15


def find_awq(configuration: Configuration, findings: Findings) -> None:
    """Add every AWQ weight of a checkpoint to `findings`."""
    group, cache = configuration.settings["group_size"], TransposedCache()
    for name, words in findings.tensors.items():
        if not name.endswith(".qweight"):
            continue
        prefix = name.removesuffix("qweight")
        if words.dtype != "I32" or len(words.shape) != 2 or not all(words.shape):
            findings.add_fault(name, "is not a matrix of packed words", "I32 in two dimensions",
                           f"{words.dtype} {list(words.shape)}")  # fmt: skip
            continue
        columns, rows = words.shape[0], words.shape[1] * 8
        size = columns if group == -1 else group
        if columns % size:
            findings.add_fault(name, "group_size does not divide its inputs", f"a divisor of {columns}", str(size))
            continue
        grid = ScaleGrid((rows, columns), (1, size))
        scales = findings.find_part(
            f"{prefix}scales", ("F16", "BF16"), [(grid.cells[1], rows)], owner=f"{prefix}weight"
        )
        zeros = findings.find_part(f"{prefix}qzeros", ("I32",), [(grid.cells[1], rows // 8)], owner=f"{prefix}weight")
        if scales is not None and zeros is not None:
            parts = {"qweight": words, "qzeros": zeros, "scales": scales}
            dense, scheme = f"{prefix}weight", f"awq int4 g{size}"
            findings.add_weight(AwqWeight(dense, scheme, (rows, columns), parts, scales.dtype, grid, cache))
