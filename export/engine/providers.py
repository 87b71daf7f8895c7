"""The installed onnxruntime: its package, its providers, and sessions on the requested device.

The packages onnxruntime and onnxruntime-gpu install the same folder: each overwrites the other's files, removing one
breaks the other, and pip check does not report it. A session that cannot use CUDA logs a line and runs on the CPU. This
module raises an error in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapter_merge.errors import FileFormatError, InputError, MissingDependencyError, Problem, raise_all
from adapter_merge.files.installation import install_command

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
QUIET = 3  # errors only: onnxruntime warns once for every optional input of a graph


def installed_packages(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return those of the distributions `names` that are installed, with their versions."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def check_packages(*modules: str) -> None:
    """Raise MissingDependencyError unless exactly one onnxruntime and all of `modules` are installed."""
    problems = []
    packages = installed_packages()
    if len(packages) > 1:
        names = " ".join(packages)
        problems.append(
            Problem(
                "more than one onnxruntime package is installed: they overwrite each other's files",
                expected="onnxruntime or onnxruntime-gpu, not both",
                got=", ".join(f"{name} {number}" for name, number in packages.items()),
                hint=f"pip uninstall -y {names}, then install one of them again",
            )
        )
    wanted = dict.fromkeys(("onnxruntime", *modules))
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        problems.append(
            Problem(
                f"ONNX needs {', '.join(missing)}",
                hint=f"{install_command('onnx')} (or [onnx-gpu] for CUDA)",
            )
        )
    raise_all(problems, MissingDependencyError)


def check_runnable(precision: str) -> None:
    """Raise MissingDependencyError when no provider of this onnxruntime runs an export of `precision`."""
    import onnxruntime

    if precision == "bf16" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            "a bf16 export cannot be checked here: this onnxruntime has no CUDA provider",
            hint="export with --no-check, and run adapter-merge verify on a machine with CUDA",
        )


def parse_device(device: str) -> tuple[str, int]:
    """Return ("cpu" | "cuda", index) of "cpu", "cuda" or "cuda:N". Raises InputError."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise InputError(f"unknown device {device!r}", expected="cpu, cuda or cuda:N")
    return kind, int(index or 0)


def providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """Return execution providers with their options for `device`; the CPU comes last and computes shapes.

    CUDA computes float32 without TF32. Its arena grows by the requested size, because doubling it for one more adapter
    would waste memory. Its copies run on the compute stream, so that a bound output is complete when a run returns.
    Raises MissingDependencyError when this onnxruntime has no such provider.
    """
    import onnxruntime

    kind, index = parse_device(device)
    cpu: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
    if kind == "cpu":
        return cpu
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise MissingDependencyError(
            f"this onnxruntime has no CUDA provider, which {device} needs",
            expected="CUDAExecutionProvider",
            got=", ".join(available),
            hint=f"pip uninstall -y onnxruntime onnxruntime-genai && {install_command('onnx-gpu')}",
        )
    options = {
        "device_id": str(index),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }
    return [("CUDAExecutionProvider", options), *cpu]


def graph_file(folder: Path) -> Path:
    """Return the file of the graph in `folder`: model.onnx, or onnx/model*.onnx of an encoder."""
    encoders = sorted((folder / "onnx").glob("model*.onnx"))
    return encoders[0] if len(encoders) == 1 and not (folder / "model.onnx").is_file() else folder / "model.onnx"


def check_external_data(model_file: Path) -> None:
    """Raise FileFormatError unless every external data file of `model_file` exists and is long enough."""
    import onnx_ir as ir

    if not model_file.is_file():
        raise InputError(f"{model_file}: no such file", expected="an ONNX model")
    try:
        model = ir.load(model_file)
    except Exception as error:  # protobuf raises exceptions of its own
        raise FileFormatError(f"{model_file}: not an ONNX model ({error})") from error
    needed: dict[Path, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            file = model_file.parent / tensor.location
            stop = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
            needed[file] = max(needed.get(file, 0), stop)
    problems = []
    for file, size in needed.items():
        hint = "copy the whole export folder, or export again"
        if not file.is_file():
            problems.append(Problem(f"{model_file.name}: its weights file is missing", file.name, "nothing", hint))
        elif file.stat().st_size < size:
            got = f"{file.stat().st_size} bytes"
            problems.append(Problem(f"{file.name}: the weights file is too short", f"at least {size} bytes", got, hint))
    raise_all(problems, FileFormatError)


def open_session(model_file: Path, device: str = "cpu", threads: int | None = None) -> Any:
    """Return an onnxruntime.InferenceSession of `model_file` on `device`.

    Raises MissingDependencyError when the provider of `device` does not load; the session never falls back to the CPU.
    """
    check_packages("onnx_ir")
    wanted = providers(device)
    check_external_data(model_file)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(model_file), options, providers=wanted)
    except Exception as error:  # onnxruntime raises a family of pybind exceptions
        raise FileFormatError(
            f"{model_file}: onnxruntime {onnxruntime.__version__} cannot run this model on {device}",
            got=str(error).strip().split("\n")[0],
        ) from error
    loaded = session.get_providers()
    if wanted[0][0] not in loaded:
        raise MissingDependencyError(
            f"{wanted[0][0]} did not load",
            expected=wanted[0][0],
            got=", ".join(loaded),
            hint="the CUDA and cuDNN libraries of this onnxruntime-gpu must be installed",
        )
    return session
