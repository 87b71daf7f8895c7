"""Where the arithmetic runs, and that float32 products are float32 there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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


_threads_lock = threading.Lock()
_precision_lock = threading.Lock()
_precision: list[object] = []  # what the first of the running jobs found, once for each of them


def set_own_threads(count: int) -> None:
    """Have torch use `count` threads for products of the calling thread; other threads keep their number.

    torch.set_num_threads also sets the number that threads begin with which have not used torch yet. That is put back
    by a thread of our own, so that jobs that overlap in one process neither see nor restore each other's setting.
    """
    with _threads_lock:
        found: list[int] = []
        _in_new_thread(lambda: found.append(torch.get_num_threads()))
        torch.set_num_threads(count)
        _in_new_thread(lambda: torch.set_num_threads(found[0]))


def _in_new_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function, name="torch threads")
    thread.start()
    thread.join()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread for the calling thread's products."""
    with _threads_lock:
        before = torch.get_num_threads()
    set_own_threads(1)
    try:
        yield
    finally:
        set_own_threads(before)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside, a CUDA device multiplies float32 in float32, whatever TF32 setting the process has.

    The setting is the process's: the first of several jobs that overlap changes it, the last one puts it back.
    """
    if device.type != "cuda":
        yield
        return
    with _precision_lock:
        _precision.append(_precision[0] if _precision else _exact())
    try:
        yield
    finally:
        with _precision_lock:
            before = _precision.pop()
            if not _precision:
                _put_back(before)


def _exact() -> object:
    """Switch TF32 off; what was set before."""
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):  # torch before 2.9
        allowed, settings.allow_tf32 = settings.allow_tf32, False
        return allowed
    # The old setting cannot be read where a process has used the new one.
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    return before


def _put_back(before: object) -> None:
    settings = torch.backends.cuda.matmul
    if isinstance(before, bool):
        settings.allow_tf32 = before
        return
    # What was read may be the setting of all backends: put back as "none", so that it goes on following them.
    followed = before == getattr(torch.backends, "fp32_precision", None)
    settings.fp32_precision = "none" if followed else str(before)
