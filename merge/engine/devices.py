"""Where the arithmetic runs, and that float32 products are float32 there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adapter_merge.errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """The torch device for auto, cpu, cuda or cuda:N. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: unknown", expected="auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: not supported", expected="auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {name}: not there",
                expected=f"one of {count} CUDA devices" if count else "a CUDA device and a CUDA build of torch",
                got=f"torch {torch.__version__}",
                hint="--device cpu, or adapter-merge doctor",
            )
    return device


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside, a CUDA device multiplies float32 in float32, whatever TF32 setting the process has; it is put back."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):  # torch before 2.9
        allowed, settings.allow_tf32 = settings.allow_tf32, False
        try:
            yield
        finally:
            settings.allow_tf32 = allowed
        return
    # The old setting cannot be read where a process has used the new one. What it says may be that of all backends:
    # put back as "none", so that it goes on following them.
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = "none" if before == getattr(torch.backends, "fp32_precision", None) else before
