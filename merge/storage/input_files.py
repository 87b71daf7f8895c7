"""Descriptors of open input files, with reads whose errors name the file."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from adapter_merge.errors import FileFormatError

from .computed_tensor import ComputedRef
from .safetensors_header import TensorRef
from .tensor_io import pread_into


class Sources:
    """The descriptors of the files that are read, each opened once."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(
        self,
        ref: TensorRef,
        first: int,
        buffer: Tensor,  # (n,) uint8 on the CPU
    ) -> None:
        """Fill `buffer` from byte `first` of the tensor. Raises FileFormatError for a short or unreadable file."""
        if isinstance(ref, ComputedRef):
            ref.read_into(self.read_bytes, first, buffer)
            return
        try:
            pread_into(self._open(ref.file), buffer.numpy().data, ref.start + first, str(ref.file))
        except OSError as error:  # as an error of the input, not of the output's disk
            raise FileFormatError(
                f"{ref.file}: cannot be read ({error.strerror or error})", hint="the file was moved, or its disk fails"
            ) from error

    def read_ahead(self, ref: TensorRef) -> None:
        """Ask the kernel to read a stored tensor's bytes into the page cache now, before `read` asks for them.

        Threads that read several tensors of one file in turn defeat the kernel's own guess of what is read next.
        """
        if not isinstance(ref, ComputedRef):
            with suppress(OSError):  # advice only; `read` reports what is wrong with the file
                os.posix_fadvise(self._open(ref.file), ref.start, ref.nbytes, os.POSIX_FADV_WILLNEED)

    def _open(self, file: Path) -> int:
        """Return the descriptor of `file`, opened at the first call."""
        with self._lock:
            fd = self._fds.get(file)
            if fd is None:
                fd = self._fds[file] = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return fd

    def read_bytes(self, ref: TensorRef, first: int, stop: int) -> Tensor:
        """Return bytes first .. stop of the tensor, uint8 (n,)."""
        raw = torch.empty(stop - first, dtype=torch.uint8)
        self.read(ref, first, raw)
        return raw

    def close(self) -> None:
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()
