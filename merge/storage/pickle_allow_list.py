"""Allow list of the names in a torch.save pickle: storages, tensors and the functions that rebuild them.

Nothing is imported and no object of another class is created: each function on the list has a counterpart here that
checks the pickle's arguments and returns a table entry (torch/_utils.py: _rebuild_tensor_v2, _rebuild_parameter,
...; torch/serialization.py: persistent ids). Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .safetensors_header import ITEM_BYTES, MAX_DIMENSIONS

# torch's storage classes and dtypes -> safetensors names (the README of safetensors, "Format")
STORAGE_DTYPES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64", "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
TENSOR_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL", "torch.complex64": "C64", "torch.uint16": "U16", "torch.uint32": "U32",
    "torch.uint64": "U64", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "mtia", "xla", "meta")
# Tensors that torch can save but whose bytes are not simply the elements of one storage.
UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch.ComplexDoubleStorage": "a complex128 tensor",
    "torch.QInt8Storage": "a quantised tensor",
    "torch.QUInt8Storage": "a quantised tensor",
    "torch.QInt32Storage": "a quantised tensor",
    "torch.QUInt4x2Storage": "a quantised tensor",
    "torch.QUInt2x4Storage": "a quantised tensor",
}


class DamagedPickle(ValueError):
    """Raised for opcodes that torch.save does not write."""


class ForbiddenPickle(ValueError):
    """Raised for a function or class that is not on the list: loading it could run code."""


class UnsupportedPickle(ValueError):
    """Raised for a known kind of tensor that cannot be read from the file in place."""


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """Elements 0 .. numel of the archive's record data/`key`."""

    key: str
    dtype: str  # safetensors name; "U8" for untyped storages, whose numel counts bytes
    numel: int
    is_untyped: bool


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage; element (i, j, ...) is at offset + i * stride[0] + j * stride[1] + ..."""

    storage: PickledStorage
    dtype: str
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """The number of storage elements from the view's first to its last."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """True when the elements are in row-major order without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and step != expected:
                return 0 in self.shape
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a function or class."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """A placeholder for a value that no tensor depends on: a device, a set, a complex number."""

    kind: str


class OrderedItems(dict[Any, Any]):
    """A dict that accepts attributes (a state dict's _metadata)."""


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_sizes(value: object) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS or not all(is_size(size) for size in value):
        raise DamagedPickle(f"a shape or stride that is not up to {MAX_DIMENSIONS} sizes")
    return value


def _view(storage: object, dtype: str, offset: object, shape: object, strides: object) -> PickledTensor:
    """Return a view after checking that it is inside its storage; shape () is a scalar."""
    sizes, steps = _check_sizes(shape), _check_sizes(strides)
    if type(storage) is not PickledStorage or type(offset) is not int or offset < 0 or len(sizes) != len(steps):
        raise DamagedPickle("a tensor without storage, offset, shape and strides")
    tensor = PickledTensor(storage, dtype, offset, sizes, steps)
    if 0 in sizes:  # torch lets an empty view begin anywhere
        return PickledTensor(storage, dtype, 0, sizes, steps)
    excess = (offset + tensor.span) * ITEM_BYTES[dtype] - storage.numel * ITEM_BYTES[storage.dtype]
    if excess > 0:
        raise DamagedPickle(f"a tensor that ends {excess} bytes after its storage")
    return tensor


def _check_plain(requires_grad: object, hooks: object, metadata: object) -> None:
    if type(requires_grad) is not bool or type(hooks) is not OrderedItems or hooks:
        raise DamagedPickle("a tensor with hooks")
    if metadata is None:
        return
    if type(metadata) is not dict or any(type(value) is not bool for value in metadata.values()):
        raise UnsupportedPickle("a tensor with unknown metadata")
    if metadata.get("neg"):
        raise UnsupportedPickle("a tensor with the negative bit (save it again after .resolve_neg())")
    if metadata.get("conj"):
        raise UnsupportedPickle("a tensor with the conjugate bit (save it again after .resolve_conj())")
    if metadata.keys() - {"neg", "conj"}:
        raise UnsupportedPickle("a tensor with unknown metadata")


def _rebuild_tensor(storage: Any, offset: object, shape: object, strides: object) -> PickledTensor:
    return _view(storage, storage.dtype if type(storage) is PickledStorage else "", offset, shape, strides)


def _rebuild_tensor_v2(
    storage: Any, offset: object, shape: object, strides: object, grad: object, hooks: object, metadata: object = None
) -> PickledTensor:
    _check_plain(grad, hooks, metadata)
    return _check_grad(_rebuild_tensor(storage, offset, shape, strides), grad)


def _rebuild_tensor_v3(
    storage: Any,
    offset: object,
    shape: object,
    strides: object,
    grad: object,
    hooks: object,
    dtype: Any,
    metadata: object = None,
) -> PickledTensor:
    """Rebuild a tensor whose dtype has no storage class, from an untyped storage and the dtype."""
    _check_plain(grad, hooks, metadata)
    if grad:  # torch.save writes it, and torch.load fails on it
        raise UnsupportedPickle("a float8 or unsigned tensor that requires grad (save it again after .detach())")
    if type(storage) is not PickledStorage or not storage.is_untyped or type(dtype) is not Global:
        raise DamagedPickle("a tensor of a dtype without an untyped storage")
    return _view(storage, TENSOR_DTYPES[dtype.name], offset, shape, strides)


def _check_grad(tensor: PickledTensor, grad: object) -> PickledTensor:
    if grad and not tensor.dtype.startswith(("F", "BF", "C")):  # torch.load fails on it
        raise DamagedPickle(f"a tensor of {tensor.dtype} that requires grad")
    return tensor


def _rebuild_parameter(tensor: object, grad: object, hooks: object, state: object = None) -> PickledTensor:
    """Rebuild a parameter; `state` holds attributes set on it, which do not affect its values."""
    if type(tensor) is not PickledTensor:
        raise DamagedPickle("a parameter without a tensor")
    _check_plain(grad, hooks, None)
    return _check_grad(tensor, grad)


def _rebuild_with_attributes(function: Any, kind: Any, arguments: Any, state: object) -> PickledTensor:
    """Rebuild a plain tensor or parameter with attributes set on it; subclasses are refused by name."""
    allowed: dict[str, Callable[..., PickledTensor]] = {
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
    }
    if kind not in (Global("torch.Tensor"), Global("torch.nn.parameter.Parameter")) or type(arguments) is not tuple:
        raise DamagedPickle("a tensor of an unknown class")
    return allowed[function.name](*arguments)


def _ordered_dict() -> OrderedItems:
    return OrderedItems()


def _device(kind: object, index: object = None) -> Opaque:
    if type(kind) is not str or kind not in DEVICES or not (index is None or is_size(index)):
        raise DamagedPickle("an unknown device")
    return Opaque("torch.device")


def _opaque(kind: str) -> Callable[..., Opaque]:
    return lambda *arguments: Opaque(kind)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_with_attributes,
    # Values other than tensors, of training or an optimizer. In a pickle of protocol 2, builtins is __builtin__.
    "torch.Size": _opaque("torch.Size"),
    "torch.device": _device,
    "collections.Counter": _opaque("Counter"),
    "_codecs.encode": _opaque("bytes"),
    "__builtin__.set": _opaque("set"),
    "__builtin__.complex": _opaque("complex"),
    "__builtin__.bytearray": _opaque("bytearray"),
}
VALUES = ("torch.Tensor", "torch.nn.parameter.Parameter")
