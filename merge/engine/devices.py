"""Choice of the device, and torch's settings there: the number of threads, and float32 products without TF32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from adapter_merge.errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """Return the torch device for "auto", "cpu", "cuda" or "cuda:N".

    "auto" is CUDA where there is a CUDA device, else the CPU. Raises InputError for any other name, and for a CUDA
    device that this machine does not have.
    """
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
                f"--device {name}: this machine has no such device",
                expected=f"one of {count} CUDA devices" if count else "a CUDA device and a CUDA build of torch",
                got=f"torch {torch.__version__}",
                hint="use --device cpu; adapter-merge doctor lists the devices",
            )
    return device


_threads_lock = threading.Lock()
_threads: list[int] = []  # torch's number before the first of the running jobs, one entry per running job
_precision_lock = threading.Lock()
_precision: list[object] = []  # the setting before the first of the running jobs, one entry per running job


def _run_in_new_thread(function: Callable[[], object]) -> None:
    """Run `function` in a new thread and wait for its end."""
    thread = threading.Thread(target=function, name="torch threads")
    thread.start()
    thread.join()


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch use one thread for each product inside the `with` block: the engine's workers share the cores.

    The setting belongs to the process, since MKL's does: of several jobs that overlap, the first changes it and the
    last restores it. Threads that used torch before keep their own number for what is not MKL's.
    """
    with _threads_lock:
        _threads.append(_threads[0] if _threads else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _threads_lock:
            torch.set_num_threads(_threads.pop())
            if _threads:  # another job is at work: only the calling thread's own number is restored
                _run_in_new_thread(lambda: torch.set_num_threads(1))


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Make a CUDA device multiply float32 in float32, without TF32, inside the `with` block.

    The setting belongs to the process: of several jobs that overlap, the first changes it and the last restores it.
    """
    if device.type != "cuda":
        yield
        return
    with _precision_lock:
        _precision.append(_precision[0] if _precision else _disable_tf32())
    try:
        yield
    finally:
        with _precision_lock:
            before = _precision.pop()
            if not _precision:
                _restore_tf32(before)


def _disable_tf32() -> object:
    """Switch TF32 off and return the setting before."""
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):  # torch before 2.9
        allowed, settings.allow_tf32 = settings.allow_tf32, False
        return allowed
    # allow_tf32 raises an error in a process that has set fp32_precision, so read fp32_precision.
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    return before


def _restore_tf32(before: object) -> None:
    """Restore the setting that `_disable_tf32` returned."""
    settings = torch.backends.cuda.matmul
    if isinstance(before, bool):
        settings.allow_tf32 = before
        return
    # `before` may have been inherited from the setting of all backends: "none" makes it inherit that again.
    followed = before == getattr(torch.backends, "fp32_precision", None)
    settings.fp32_precision = "none" if followed else str(before)


def choose_devices(name: str) -> list[torch.device]:
    """Return the devices of a merge: all CUDA devices for "cuda" or "auto", else the named one."""
    device = choose_device(name)
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]
