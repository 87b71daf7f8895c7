"""Output files of a plan as Ray tasks on an existing cluster: `--ray ADDRESS`.

The driver, the process that the user started, opens the inputs, plans, and starts one task per output file. A task
opens and plans the same, computes its file in a folder of its own, and renames it to its place. Ray starts the task of
a dead worker or machine again, elsewhere; a task that goes on although Ray holds it for dead can only rename the same
bytes to the same place, or finds its folder removed. The driver records finished files, and writes all others.
"""

from __future__ import annotations

import glob
import importlib
import os
import platform
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge import errors
from adapter_merge.errors import (
    AdapterMergeError,
    InputError,
    MismatchError,
    MissingDependencyError,
    OutputError,
    Problem,
)
from adapter_merge.files.installation import install_command
from adapter_merge.outputs.leftovers import remove

from .options import DeltaOptions, MergeOptions

if TYPE_CHECKING:
    from adapter_merge.binding.bind import BoundAdapter
    from adapter_merge.combine.open_inputs import AdapterInput
    from adapter_merge.engine.execute import FinishedShard, Progress
    from adapter_merge.engine.plan import MergePlan, ShardPlan

TASK_CPUS = 2  # reserved for a task: one worker of the engine, and the threads that hash and write
RETRIES = 20  # of one task, each after the death of its worker or machine
TASKS = ".tasks-"  # begin of the name of the folder with the tasks' folders, in the output's staging folder
DIED = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "LocalRayletDiedError", "ObjectLostError")


@dataclass(frozen=True)
class Job:
    """What every task of one merge or delta receives."""

    base: str | None
    adapter: AdapterInput
    options: MergeOptions | DeltaOptions
    identity: tuple[tuple[str, str], ...]  # what must be equal on all machines, by its name for errors
    folder: Path  # the staging folder of the output, on a file system that all machines share
    tasks: str  # name of the folder in it with the tasks' folders
    piece_bytes: int | None = None  # delta: size of the pieces of its file


def make_job(bound: BoundAdapter, base: str | Path | None, adapter: AdapterInput, options: Any, folder: Path) -> Job:
    """Return the job of the opened inputs, with absolute paths, since tasks run in other working folders."""
    from adapter_merge.combine.recipe import Recipe

    reading = options.reading
    if reading is not None:
        reading = replace(reading, **{k: _absolute(v) for k, v in asdict(reading).items() if isinstance(v, Path)})
    if isinstance(adapter, Recipe):
        items = [
            replace(
                item,
                path=str(_absolute(item.path)),
                options={k: _absolute(v) if isinstance(v, Path) else v for k, v in (item.options or {}).items()},
            )
            for item in adapter.ingredients
        ]
        adapter = replace(adapter, ingredients=tuple(items), base=adapter.base and str(_absolute(adapter.base)))
    else:
        adapter = str(_absolute(adapter))
    return Job(
        str(_absolute(base)) if base is not None else None,
        adapter,
        replace(options, reading=reading),
        identity_of(bound),
        folder.resolve(),
        TASKS + secrets.token_hex(8),
    )


def _absolute(path: str | Path) -> str | Path:
    """Return an existing path as an absolute one; a hub id or an address stays as it is."""
    return type(path)(Path(path).resolve()) if Path(path).exists() else path


def identity_of(bound: BoundAdapter) -> tuple[tuple[str, str], ...]:
    """Return what must be equal on all machines: the versions of what computes, the base and the adapters."""
    from importlib.metadata import version

    from adapter_merge.combine.adapter_hashes import combined_sha256, hash_adapter_files
    from adapter_merge.combine.open_inputs import parts_of

    return (
        *((name, version(name)) for name in ("adapter-merge", "torch", "safetensors")),
        ("python", platform.python_version()),
        ("base", bound.base.fingerprint),
        *(
            (f"adapter {number} ({part.adapter.folder.name})", combined_sha256(hash_adapter_files(part.adapter)))
            for number, part in enumerate(parts_of(bound), 1)
        ),
    )


def check_ray_options(options: MergeOptions | DeltaOptions) -> None:
    """Raise InputError for options that exclude --ray, MissingDependencyError where Ray is not installed."""
    if options.ray is None:
        return
    stated = {
        "--shards": getattr(options, "part", None) is not None,
        "--finish": getattr(options, "finish", False),
        "--keep-preimage": getattr(options, "keep_preimage", False),
        f"--device {options.device}": options.device not in ("auto", "cpu", "cuda"),
    }
    problems = [Problem(f"--ray excludes {name}") for name, given in stated.items() if given]
    errors.raise_all(problems, InputError)
    _import_ray()


def kind_of_device(options: MergeOptions | DeltaOptions) -> str:
    """Return "cpu" or "cuda", the device of the tasks; this machine's devices do not matter. auto is the CPU."""
    return "cuda" if options.device == "cuda" else "cpu"


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingDependencyError("--ray needs the package ray", hint=install_command("ray")) from error


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connect to the cluster at `address`, unless this process is connected. Raises InputError."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"--ray {address}: no Ray cluster answers there",
            expected="auto on a machine of the cluster, HOST:PORT of its head, or ray://HOST:PORT",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="ray start --head on one machine, ray start --address HOST:6379 on the others; a cluster with tokens "
            "needs RAY_AUTH_MODE=token and its token here too",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def write_on_ray(
    job: Job,
    shards: Sequence[ShardPlan],
    progress: Progress | None = None,
    on_shard: Callable[[FinishedShard], None] | None = None,
) -> dict[str, FinishedShard]:
    """Write `shards` into the job's folder by tasks of the cluster at options.ray; return them by file name.

    progress: called with the bytes of each finished file. on_shard: called when a file is on the disk.
    Raises the error of the first task that fails, InputError where no cluster answers or no machine can take a task,
    OutputError where a task's file is not seen here, AdapterMergeError where a task's workers died RETRIES + 1 times.
    """
    ray = _import_ray()
    finished: dict[str, FinishedShard] = {}
    tasks = job.folder / job.tasks
    for old in job.folder.glob(f"{TASKS}*"):
        remove(old)
    if not shards:
        return finished
    tasks.mkdir()
    try:
        with _connected(ray, str(job.options.ray)):
            needed = _resources(ray, job.options)
            task = ray.remote(max_retries=RETRIES, **needed)(write_file)
            shared = ray.put(job)
            largest_first = sorted(shards, key=lambda shard: (-shard.nbytes, shard.file))
            pending = {task.remote(shared, shard.file, shard.identity): shard for shard in largest_first}
            try:
                while pending:
                    (ready,), _ = ray.wait(list(pending), num_returns=1)
                    shard = pending.pop(ready)
                    result = _result_of(ray, ready, shard.file)
                    _check_visible(job.folder / shard.file, shard.nbytes, result["host"])
                    done = result["finished"]
                    finished[shard.file] = done
                    if on_shard is not None:
                        on_shard(done)
                    if progress is not None:
                        progress(shard.nbytes)
            finally:
                for reference in pending:
                    ray.cancel(reference, force=True)
    finally:
        remove(tasks)
    return finished


def _resources(ray: Any, options: MergeOptions | DeltaOptions) -> dict[str, float]:
    """Return what each task reserves. Raises InputError where no machine of the cluster has as much."""
    cpus = options.workers or TASK_CPUS
    gpus = 1 if kind_of_device(options) == "cuda" else 0
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        largest = max((machine.get("CPU", 0) for machine in machines), default=0)
        raise InputError(
            f"--ray {options.ray}: no machine of the cluster can take a task",
            expected=f"{cpus} CPUs{' and a GPU' if gpus else ''} on one machine",
            got=f"{len(machines)} machines, with at most {largest:g} CPUs and "
            f"{max((machine.get('GPU', 0) for machine in machines), default=0):g} GPUs",
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


def _result_of(ray: Any, reference: Any, file: str) -> dict[str, Any]:
    """Return the result of a task that has ended. Raises its error."""
    try:
        result: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        if type(error).__name__ in DIED:
            raise AdapterMergeError(
                f"{file}: the worker of its task died {RETRIES + 1} times",
                got=type(error).__name__,
                hint="too little memory on the cluster's machines is the usual reason; finished files of a merge with "
                "--keep-partial are kept",
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise AdapterMergeError(
            f"{file}: its task failed",
            got=lines[-1] if lines else type(error).__name__,
            hint="adapter-merge must be installed on every machine of the cluster, in the same version",
        ) from error
    if "problems" in result:
        kind = getattr(errors, result["error"])
        raise kind([Problem(**fields) for fields in result["problems"]])
    return result


def _check_visible(file: Path, nbytes: int, host: str) -> None:
    """Raise OutputError unless `file` has `nbytes` bytes as this machine sees it."""
    try:
        with file.open("rb") as stream:  # a network file system asks its server again when a file is opened
            found = os.fstat(stream.fileno()).st_size
    except OSError as error:
        found = -1
        cause: OSError | None = error
    else:
        cause = None
    if found != nbytes:
        raise OutputError(
            f"{file}: {host} has written it, and this machine does not see it",
            expected=f"{nbytes} bytes",
            got="no file" if found < 0 else f"{found} bytes",
            hint="the output must be on a file system that all machines share under the same path",
        ) from cause


def write_file(job: Job, file: str, identity: str) -> dict[str, Any]:
    """Write the output file `file` of `job`: the task, which runs in a process of any machine of the cluster.

    identity: that of the file's plan (ShardPlan.identity). Returns {"finished", "host"}, or {"error", "problems"}.
    """
    host = socket.gethostname()
    try:
        return {"finished": _write(job, file, identity, host), "host": host}
    except AdapterMergeError as error:
        return {"error": type(error).__name__, "problems": [asdict(problem) for problem in error.problems]}
    except OSError as error:
        cause = f"{error.filename or file}: {host} cannot read or write it ({error.strerror or error})"
        return {"error": "OutputError", "problems": [{"cause": cause}]}


def _write(job: Job, file: str, identity: str, host: str) -> FinishedShard:
    """Compute the file in a folder of its own and rename it to its place. Raises AdapterMergeError or OSError."""
    from adapter_merge.combine.open_inputs import snapshot_of
    from adapter_merge.engine.devices import choose_devices
    from adapter_merge.engine.execute import execute
    from adapter_merge.outputs.staging import sync_folder

    tasks = job.folder / job.tasks
    if not tasks.is_dir():
        raise OutputError(
            f"{job.folder}: {host} does not see the folder that the driver has made there",
            hint="the output must be on a file system that all machines share under the same path",
        )
    bound, plan = _open(job, host)
    shard = next((shard for shard in plan.shards if shard.file == file), None)
    if shard is None or shard.identity != identity:
        raise MismatchError(
            f"{file}: {host} plans it in another way than the driver", hint="compare the machines' BASE"
        )
    for earlier in tasks.glob(f"{glob.escape(file)}.*"):  # of an attempt whose worker is dead or held for dead
        remove(earlier)
    own = tasks / f"{file}.{secrets.token_hex(4)}"  # unlike the earlier one's, which may still rename what is in it
    own.mkdir()
    finished = execute(
        plan,
        own,
        choose_devices(kind_of_device(job.options)),
        job.options.workers or 1,
        shards=[shard],
        hashing=job.options.hashes,
        link=getattr(job.options, "link", "copy"),
        vram=job.options.vram,
    )[file]
    snapshot = snapshot_of(bound)
    (snapshot.without_link_times() if getattr(job.options, "link", "copy") == "hardlink" else snapshot).check()
    sync_folder(own)
    (own / file).rename(job.folder / file)
    sync_folder(job.folder)
    remove(own)
    return finished


_OPENED: dict[str, tuple[BoundAdapter, MergePlan]] = {}  # by Job.tasks: a worker opens the inputs of a job once


def _open(job: Job, host: str) -> tuple[BoundAdapter, MergePlan]:
    """Open the inputs and plan as the driver did. Raises MismatchError where they differ from the driver's."""
    from adapter_merge.combine.open_inputs import open_pair
    from adapter_merge.engine.pieces import divide

    from .plans import make_plan

    if job.tasks not in _OPENED:
        bound = open_pair(job.base, job.adapter, job.options.base_kind, job.options.reading)
        here = dict(identity_of(bound))
        errors.raise_all(
            [
                Problem(f"{host} has another {name} than the driver", expected=value, got=here.get(name, "none"))
                for name, value in job.identity
                if here.get(name) != value
            ],
            MismatchError,
        )
        plan = make_plan(bound, job.options)
        if job.piece_bytes is not None:
            plan = replace(plan, shards=divide(plan.shards[0], job.piece_bytes))
        _OPENED.clear()
        _OPENED[job.tasks] = bound, plan
    return _OPENED[job.tasks]
