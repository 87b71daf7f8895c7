"""Tensors of a folder as its files hold them, and new values for them: safetensors, pickles, ONNX graphs and adapters.

Nothing here asks what reads the files: every floating-point tensor of every file is found, whoever looks at it or not.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ONNX_DTYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}  # TensorProto.DataType


@dataclass(frozen=True)
class Place:
    """One floating-point tensor in one file."""

    file: str  # path in the folder
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def tensors_in(folder: Path) -> dict[Place, Tensor]:
    """Every floating-point tensor in every file below `folder`, a copy each."""
    found: dict[Place, Tensor] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for name, value in _tensors_of(path):
            found[Place(path.relative_to(folder).as_posix(), name, tuple(value.shape), value.dtype)] = value
    return found


def write_tensor(folder: Path, place: Place, value: Tensor) -> None:
    """Put `value` (of the place's shape and dtype) where the file holds the tensor; nothing else in it changes."""
    assert tuple(value.shape) == place.shape and value.dtype == place.dtype
    path = folder / place.file
    if path.suffix == ".safetensors":
        dtype, start, _ = _safetensors_places(path)[place.name]
        assert DTYPES[dtype[0]] == place.dtype
        _overwrite(path, start, value)
    elif path.suffix in (".bin", ".ckpt", ".pt"):
        state = torch.load(path, weights_only=True)
        state[place.name] = value
        torch.save(state, path)
    elif path.suffix == ".onnx":
        _write_initializer(path, place.name, value)
    elif path.suffix == ".onnx_adapter":
        _write_onnx_adapter(path, {place.name: value})
    else:
        raise AssertionError(f"{path}: holds no tensors")


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        for name, ((dtype, shape), start, stop) in _safetensors_places(path).items():
            if dtype in DTYPES and stop > start:
                yield name, _from_bytes(content[start:stop], DTYPES[dtype], shape)
    elif path.suffix in (".bin", ".ckpt", ".pt") and zipfile.is_zipfile(path):
        for name, value in torch.load(path, weights_only=True).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                yield name, value.clone()
    elif path.suffix == ".onnx":
        yield from _initializers(path)
    elif path.suffix == ".onnx_adapter":
        import onnxruntime

        for name, value in onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters().items():
            if value.data_type() == "tensor(float)":
                yield name, torch.from_numpy(value.numpy().copy())


def _safetensors_places(path: Path) -> dict[str, tuple[tuple[str, tuple[int, ...]], int, int]]:
    """name -> ((dtype, shape), first byte, end), from the file's header."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {
        name: ((entry["dtype"], tuple(entry["shape"])), *(8 + size + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


def _initializers(path: Path) -> Iterator[tuple[str, Tensor]]:
    import onnx

    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        dtype, shape = ONNX_DTYPES.get(tensor.data_type), tuple(tensor.dims)
        if dtype is None or 0 in shape:
            continue
        if tensor.external_data:
            file, start, size = _external(path, tensor)
            with file.open("rb") as stream:
                stream.seek(start)
                yield tensor.name, _from_bytes(stream.read(size), dtype, shape)
        elif tensor.raw_data:
            yield tensor.name, _from_bytes(tensor.raw_data, dtype, shape)
        else:
            yield tensor.name, torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))


def _write_initializer(path: Path, name: str, value: Tensor) -> None:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    if tensor.external_data:
        file, start, _ = _external(path, tensor)
        _overwrite(file, start, value)
        return
    for field in ("float_data", "double_data", "int32_data"):
        tensor.ClearField(field)
    tensor.raw_data = _to_bytes(value)
    path.write_bytes(model.SerializeToString())


def _external(path: Path, tensor: Any) -> tuple[Path, int, int]:
    said = {entry.key: entry.value for entry in tensor.external_data}
    return path.parent / said["location"], int(said.get("offset", 0)), int(said["length"])


def _write_onnx_adapter(path: Path, changed: dict[str, Tensor]) -> None:
    import onnxruntime

    old = onnxruntime.AdapterFormat.read_adapter(str(path))
    values = dict(old.get_parameters())
    kept = {name: np.ascontiguousarray(value.numpy()) for name, value in changed.items()}
    values |= {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in kept.items()}
    new = onnxruntime.AdapterFormat()
    new.set_adapter_version(old.get_adapter_version())
    new.set_model_version(old.get_model_version())
    new.set_parameters(values)
    beside = path.with_name("changed.tmp")
    new.export_adapter(str(beside))
    beside.replace(path)


def _overwrite(path: Path, start: int, value: Tensor) -> None:
    if path.stat().st_nlink > 1:  # a hard link: the original must stay as it is
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    with path.open("r+b") as stream:
        stream.seek(start)
        stream.write(_to_bytes(value))


def _from_bytes(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape).clone()


def _to_bytes(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
