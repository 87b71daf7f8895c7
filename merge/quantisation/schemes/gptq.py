"""GPTQ: codes of 4 or 8 bits packed along in, transposed, with a scale and a zero point per group of inputs.

    qweight  I32 (in bits / 32, out)
    qzeros   I32 (groups, out bits / 32); version 1 (checkpoint_format "gptq") stores zero - 1, version 2 the zero
    scales   F16 or BF16 (groups, out)
    g_idx    I32 (in,): the group of each input; consecutive groups, or with desc_act any order

Arithmetic: GPTQModel 7.7, utils/model_dequant.py, convert_gptq_file: (code - zero) * scale in float32, rounded once to
the requested dtype. Its kernel (nn_modules/qlinear/__init__.py, dequantize_weight) computes in the scale's dtype, in
which code - zero is exact: the result in that dtype is the same. The zero of version 1 is (stored + 1) mod 2^bits
(model_dequant.py, _correct_gptq_v1_qzeros).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapter_merge.errors import FileFormatError
from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.known_settings import Configuration
from adapter_merge.quantisation.packed_weight import PackedWeight, Read, read_part
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.quantisation.stored_codes import unpack_words
from adapter_merge.quantisation.transposed_cache import TransposedCache
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.tensor_io import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GptqWeight(PackedWeight):
    """Weight (out, in) of `bits` bits. Parts: "qweight", "qzeros", "scales", optionally "g_idx".

    The file stores the transpose. The parts of one weight are read whole, transposed and cached.
    """

    bits: int
    grid: ScaleGrid
    zero_offset: int  # added to the stored zero points: 1 in version 1, 0 in version 2
    cache: TransposedCache = field(repr=False, compare=False)

    def rows(self, read: Read, first: int, count: int) -> Tensor:
        words, zeros, scales, groups = self.cache.get(self.name, lambda: self._transpose_parts(read))
        stop, dtype = first + count, TORCH_DTYPES[self.dtype]
        values = unpack_words(words[first:stop], self.bits, self.shape[1]).to(torch.float32)
        zero, scale = zeros[first:stop].float(), scales[first:stop].float()
        if groups.numel():
            values -= zero[:, groups]
            values *= scale[:, groups]
        else:
            self.grid.apply(values, zero, "sub_")
            self.grid.apply(values, scale, "mul_")
        return values.to(dtype)

    def _transpose_parts(self, read: Read) -> tuple[Tensor, ...]:
        """Return the transposed qweight (out, in bits / 32), zero points and scales (out, groups), and the group of
        each input (in,), empty where groups are consecutive.
        """
        words = read_part(read, self.parts["qweight"]).T.contiguous()
        stored = unpack_words(read_part(read, self.parts["qzeros"]), self.bits, self.shape[0])
        zeros = (stored.to(torch.int16) + self.zero_offset) & ((1 << self.bits) - 1)
        return words, zeros.T.contiguous(), read_part(read, self.parts["scales"]).T.contiguous(), self._groups(read)

    def _groups(self, read: Read) -> Tensor:
        """Return the group of each input, int64 (in,); empty where groups are consecutive. Raises FileFormatError."""
        if "g_idx" not in self.parts:
            return torch.empty(0, dtype=torch.int64)
        ref, count = self.parts["g_idx"], self.grid.cells[1]
        groups = read_part(read, ref).long()
        if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise FileFormatError(
                f"{ref.file}: {ref.name} contains groups that have no scale",
                expected=f"0 .. {count - 1}",
                got=f"{int(groups.min())} .. {int(groups.max())}",
            )
        in_order = torch.equal(groups, torch.arange(self.shape[1]) // self.grid.block[1])
        return groups[:0] if in_order else groups


def find_gptq(configuration: Configuration, findings: Findings) -> None:
    """Add every GPTQ weight of a checkpoint to `findings`.

    The shapes of the tensors must agree with the config's bits and group_size. With GPTQModel's `dynamic`, which has
    settings for single modules, bits and group size are taken from the shapes. Raises UnsupportedError where the keys
    format and checkpoint_format differ.
    """
    settings = configuration.settings
    stated = {str(settings[key]).lower() for key in ("checkpoint_format", "format") if settings.get(key)}
    if len(stated) > 1:
        raise configuration.refuse("format", "the same format as checkpoint_format")
    version_1 = stated != {"gptq_v2"}
    cache = TransposedCache()
    per_module = bool(settings.get("dynamic"))
    for name, words in findings.tensors.items():
        if not name.endswith(".qweight"):
            continue
        prefix = name.removesuffix("qweight")
        if words.dtype != "I32" or len(words.shape) != 2 or not all(words.shape):
            findings.add_fault(name, "is not a matrix of packed words", "I32 in two dimensions",
                           f"{words.dtype} {list(words.shape)}")  # fmt: skip
            continue
        scales = findings.tensors.get(f"{prefix}scales")
        zeros = findings.tensors.get(f"{prefix}qzeros")
        rows = words.shape[1]
        bits, group = settings["bits"], settings["group_size"]
        if per_module and scales is not None and zeros is not None and len(zeros.shape) == 2 and scales.shape:
            bits = zeros.shape[1] * 32 // rows if zeros.shape[1] * 32 // rows in (4, 8) else bits
            group = words.shape[0] * 32 // bits // max(1, scales.shape[0])
        columns = words.shape[0] * 32 // bits
        group = columns if group == -1 else group
        if rows % (32 // bits):
            findings.add_fault(name, "its outputs fill no whole words of qzeros", f"a multiple of {32 // bits}",
                           str(rows))  # fmt: skip
            continue
        grid = ScaleGrid((rows, columns), (1, max(1, group)))
        groups, parts = grid.cells[1], {"qweight": words}
        for role, dtypes, shape in (
            ("scales", ("F16", "BF16"), (groups, rows)),
            ("qzeros", ("I32",), (groups, rows * bits // 32)),
            ("g_idx", ("I32", "I64"), (columns,)),
        ):
            ref = findings.find_part(prefix + role, dtypes, [shape], owner=f"{prefix}weight", optional=role == "g_idx")
            if ref is not None:
                parts[role] = ref
            elif role != "g_idx" or prefix + role in findings.tensors:
                break
        else:
            size = "channel" if groups == 1 else f"g{group}"
            findings.add_weight(GptqWeight(f"{prefix}weight", f"gptq int{bits} {size}", (rows, columns), parts,
                                    parts["scales"].dtype, bits, grid, int(version_1), cache))  # fmt: skip
