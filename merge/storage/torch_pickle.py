"""torch.save files without trusting them: weights_only, and only the places of the tensors are taken.

Under FakeTensorMode torch.load allocates nothing and records where each storage lies in the zip archive, which
stores tensors uncompressed. A pickle is thereby read like a safetensors header (torch.serialization,
`_checkpoint_offset`), and the engine streams it the same way.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import FileFormatError

from .lazy_torch import torch
from .safetensors_header import TensorRef
from .tensor_io import dtype_names

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("model_state_dict", "state_dict", "module", "model")


def read_pickle(file: Path) -> dict[str, TensorRef]:
    """The tensors of a torch.save file, by name. Nested state dicts under a usual wrapper key are unwrapped.

    Raises FileFormatError for the pre-1.6 format, for anything that is not tensors, and for a pickle
    that would run code.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        is_zip = zipfile.is_zipfile(file)
    except Exception:  # a damaged central directory
        is_zip = False
    if not is_zip:
        raise FileFormatError(
            f"{file}: not a torch zip file",
            expected="torch.save's zip format (torch 1.6 and newer)",
            hint="the file is truncated, or older than torch 1.6: load and save it again with a newer torch",
        )
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")
            content = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise FileFormatError(
            f"{file}: refused, loading it could run code",
            expected="a state dict: tensors only",
            got=reason,
            hint="ask its author for a safetensors file, or for a plain state dict",
        ) from error
    except Exception as error:  # torch raises many kinds for damaged archives
        raise FileFormatError(f"{file}: cannot be read ({type(error).__name__}: {error})") from error
    return {name: _ref(file, name, tensor) for name, tensor in _state_dict(file, content).items()}


def _state_dict(file: Path, content: Any) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
                content = inner
                break
    if not isinstance(content, Mapping):
        raise FileFormatError(f"{file}: not a state dict", got=type(content).__name__)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise FileFormatError(f"{file}: holds no tensors", got=", ".join(map(str, list(content)[:5])) or "nothing")
    return tensors


def _ref(file: Path, name: str, tensor: Tensor) -> TensorRef:
    dtype = dtype_names().get(tensor.dtype)
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise FileFormatError(f"{file}: the place of tensor {name!r} is unknown", hint="use torch 2.7 or newer")
    if dtype is None or not tensor.is_contiguous():
        raise FileFormatError(
            f"{file}: tensor {name!r} cannot be read in place",
            expected="a contiguous tensor of a plain dtype",
            got=f"{tensor.dtype}, strides {tuple(tensor.stride())}",
            hint="save it again after .contiguous()",
        )
    start += tensor.storage_offset() * tensor.element_size()
    return TensorRef(name, file, dtype, tuple(tensor.shape), start, start + tensor.numel() * tensor.element_size())
