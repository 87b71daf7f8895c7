"""Reader of torch.save files without torch and without running code: the locations of their tensors.

torch.save stores tensors uncompressed in a zip archive, and their names, shapes and locations in a pickle. The pickle
is read as a table (pickle_machine.py) and every storage is compared with its zip record (torch_zip.py), so that the
engine streams such a file like a safetensors file. A file that torch.load(weights_only=True) would read differently, or
not at all, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import FileFormatError
from adapter_merge.files.input_errors import reading

from .pickle_allow_list import DamagedPickle, ForbiddenPickle, PickledStorage, PickledTensor, UnsupportedPickle
from .pickle_machine import read_pickle_table
from .safetensors_header import ITEM_BYTES, TensorRef
from .torch_zip import TorchZip, read_torch_zip

WRAPPERS = ("model_state_dict", "state_dict", "module", "model")
# Tensors may share a storage (tied weights, views): limit of their total size relative to that of the file.
MAX_GROWTH = 16
ALWAYS_ALLOWED_BYTES = 64 << 20


def read_pickle(file: Path) -> dict[str, TensorRef]:
    """Return the tensors of a torch.save file by name. A state dict under a usual wrapper key is unwrapped.

    Raises FileFormatError for the pre-1.6 format, for anything that is not tensors, for a pickle that would run code,
    and for sparse, quantised, conjugated, negated and meta tensors.
    """
    with reading(file), file.open("rb") as stream:
        archive = read_torch_zip(file, stream)
    try:
        content, storages = read_pickle_table(archive.pickle)
    except ForbiddenPickle as error:
        raise FileFormatError(
            f"{file}: refused, loading it could run code",
            expected="a state dict: tensors only",
            got=f"the name {error}",
            hint="ask its author for a safetensors file, or for a plain state dict",
        ) from error
    except UnsupportedPickle as error:
        raise FileFormatError(
            f"{file}: cannot be read in place: it holds {error}",
            expected="dense tensors of plain dtypes",
            hint="load it with torch and save the plain tensors again",
        ) from error
    except DamagedPickle as error:
        raise FileFormatError(
            f"{file}: its pickle cannot be read: {error}",
            expected="a file that torch.save wrote",
            hint="the file is damaged: download it again",
        ) from error
    _check_storages(archive, storages)
    tensors = _find_state_dict(file, content)
    _check_growth(file, archive, tensors)
    return {name: _locate(archive, name, tensor) for name, tensor in tensors.items()}


def _find_state_dict(file: Path, content: Any) -> Mapping[str, PickledTensor]:
    """Return the tensors by name. Raises FileFormatError where the file is not one flat state dict."""
    if not isinstance(content, Mapping):
        raise FileFormatError(f"{file}: not a state dict", got=type(content).__name__)
    inner = {key: content[key] for key in WRAPPERS if _holds_tensors(content.get(key))}
    if len(inner) > 1:
        raise FileFormatError(
            f"{file}: holds several state dicts",
            expected="one of them",
            got=", ".join(inner),
            hint="save only one of them",
        )
    if inner:
        outside = [name for name, value in content.items() if type(value) is PickledTensor and "." in str(name)]
        if outside:
            raise _outside_error(file, outside, f"one complete state dict under {next(iter(inner))!r}")
        (content,) = inner.values()
    nested = [name for name, value in content.items() if _holds_named_tensors(name, value)]
    if nested:
        raise _outside_error(file, nested, "every tensor by its full name in one flat dict")
    tensors = {name: value for name, value in content.items() if type(value) is PickledTensor}
    if not tensors:
        raise FileFormatError(f"{file}: holds no tensors", got=", ".join(repr(key)[:40] for key in list(content)[:5]))
    unnamed = [name for name in tensors if type(name) is not str]
    if unnamed:
        raise FileFormatError(
            f"{file}: has tensors under keys that are not strings",
            expected="strings",
            got=repr(unnamed[0]),
            hint="save it again with the tensors' names",
        )
    numbers = [name for name, value in content.items() if type(value) in (int, float) and "." in str(name)]
    if numbers:
        raise FileFormatError(
            f"{file}: holds a number where a module's tensor belongs",
            expected="a tensor",
            got=f"{numbers[0]!r}: {content[numbers[0]]}",
            hint="save it again as torch.tensor(...)",
        )
    return tensors


def _holds_named_tensors(name: object, value: object) -> bool:
    """Return True for a dict or list in a state dict that holds tensors of modules, whose names have a dot."""
    if isinstance(value, Mapping):
        return any(type(item) is PickledTensor and "." in f"{name}{key}" for key, item in value.items())
    return isinstance(value, list | tuple) and "." in str(name) and any(type(item) is PickledTensor for item in value)


def _outside_error(file: Path, names: list[Any], expected: str) -> FileFormatError:
    return FileFormatError(
        f"{file}: holds tensors outside its state dict, which would be lost",
        expected=expected,
        got=", ".join(repr(name)[:80] for name in names[:5]),
        hint="save only one flat state dict",
    )


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(type(item) is PickledTensor for item in value.values())


def _check_growth(file: Path, archive: TorchZip, tensors: Mapping[str, PickledTensor]) -> None:
    """Raise FileFormatError where the tensors share storages so that they are much larger than the file."""
    stored = sum(record.nbytes for record in archive.records.values())
    named = sum(tensor.numel * ITEM_BYTES[tensor.dtype] for tensor in tensors.values())
    limit = max(MAX_GROWTH * stored, ALWAYS_ALLOWED_BYTES)
    if named > limit:
        raise FileFormatError(
            f"{file}: its tensors are much larger than the file, since they share storages",
            expected=f"at most {limit} bytes",
            got=f"{named} bytes",
            hint="save it again after .clone() of every tensor",
        )


def _check_storages(archive: TorchZip, storages: Iterable[PickledStorage]) -> None:
    """Raise FileFormatError for a storage whose size differs from that of its record in the archive."""
    for storage in storages:
        record = archive.records.get(f"data/{storage.key}")
        need = storage.numel * ITEM_BYTES[storage.dtype]
        if record is None or record.nbytes != need:
            raise FileFormatError(
                f"{archive.file}: storage {storage.key[:40]!r} of its pickle is not the archive's",
                expected=f"{need} bytes in record data/{storage.key[:40]}",
                got="no such record" if record is None else f"{record.nbytes} bytes",
                hint="the file is damaged: download it again",
            )


def _locate(archive: TorchZip, name: str, tensor: PickledTensor) -> TensorRef:
    if not tensor.is_contiguous:
        raise FileFormatError(
            f"{archive.file}: tensor {name!r} cannot be read in place",
            expected="elements in row-major order, without gaps",
            got=f"shape {tensor.shape}, strides {tensor.strides}",
            hint="save it again after .contiguous()",
        )
    item = ITEM_BYTES[tensor.dtype]
    start = archive.records[f"data/{tensor.storage.key}"].start + tensor.offset * item
    return TensorRef(name, archive.file, tensor.dtype, tensor.shape, start, start + tensor.numel * item)
