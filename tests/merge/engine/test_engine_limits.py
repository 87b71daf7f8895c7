"""What the engine holds and what it leaves running: bytes ahead of the blocks, device memory, work in flight."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from combination_oracle import CONFIGS, recipe, train_all
from merge_models import base_tensors, write_base, write_lora
from pico_bases import llama, quiet
from stand_in_devices import WORKSPACE, Launch, lagging_lane, stand_in_devices, watched
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adapter_merge.api.merge import open_pair
from adapter_merge.binding.bound import BoundModule
from adapter_merge.combine.delta_ops import CombinedEdit
from adapter_merge.engine import cuda_memory, schedule
from adapter_merge.engine import execute as engine
from adapter_merge.engine.lanes import Block, Inline, Lane, Mark, Slot, cpu_lane
from adapter_merge.engine.plan import MergePlan, plan_merge
from adapter_merge.engine.tasks import estimate_edit_bytes
from adapter_merge.errors import InputError, NumericsError
from adapter_merge.methods.canonical_form import CanonicalForm

CPU = torch.device("cpu")
DEVICES = [torch.device("cuda", index) for index in range(2)]


@pytest.fixture
def plan(tmp_path: Path) -> MergePlan:
    tensors = base_tensors(layers=4, factor=8)
    base = write_base(tmp_path / "base", tensors, shards=2)
    bound = open_pair(base, write_lora(tmp_path / "adapter", tensors, dora=True))
    (tmp_path / "out").mkdir()
    return plan_merge(bound.base, (bound,))


# -- what is held ---------------------------------------------------------------------------------------------


def most_forms_held(plan: MergePlan, folder: Path, workers: int, patch: pytest.MonkeyPatch) -> int:
    """How many edits of tensors were in memory at once. The first block waits until no further one is prepared."""
    held, most, has_begun, lock = 0, 0, False, threading.Condition()
    real = BoundModule.stored_edit

    def stored_edit(self: BoundModule, *arguments: Any) -> Any:
        nonlocal held, most
        edit = real(self, *arguments)
        weakref.finalize(edit, release)
        with lock:
            held += 1
            most = max(most, held)
            lock.notify_all()
        return edit

    def release() -> None:
        nonlocal held
        with lock:
            held -= 1

    def launch(lane: Lane, real_launch: Launch, *arguments: Any) -> None:
        nonlocal has_begun
        with lock:
            while not has_begun and lock.wait(0.3):
                pass
            has_begun = True
        real_launch(*arguments)

    patch.setattr(BoundModule, "stored_edit", stored_edit)
    patch.setattr(engine, "cpu_lane", lambda: watched(cpu_lane(), launch))
    engine.execute(plan, folder, CPU, workers)
    return most


def test_forms_ahead_of_their_blocks_have_a_limit_in_bytes(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers times shards times large ranks must not add up: each of both shards then has its own tensor's alone."""
    with monkeypatch.context() as patch:
        free = most_forms_held(plan, tmp_path / "out", 2, patch)
    (tmp_path / "limited").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "AHEAD_BYTES", 1)
        limited = most_forms_held(plan, tmp_path / "limited", 2, patch)
    assert free > 4
    assert limited <= 4  # of each shard the tensor in work, and the one before it with its last blocks
    for shard in plan.shards:
        assert (tmp_path / "out" / shard.file).read_bytes() == (tmp_path / "limited" / shard.file).read_bytes()


def test_a_block_fits_the_device_with_the_least_memory(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0

    def launch(lane: Lane, real: Launch, slot: Slot, block: Block, *rest: Any) -> None:
        nonlocal largest
        largest = max(largest, block.elements * block.arithmetic.itemsize)
        real(slot, block, *rest)

    lane_of = lambda device, size: watched(lagging_lane(size), launch)  # noqa: E731
    with stand_in_devices(monkeypatch, lane_of, (64 << 20, 8 << 30)) as given:
        engine.execute(plan, tmp_path / "out", DEVICES)
    sizes = {size for _, size in given}
    assert len(sizes) == 1
    assert 0 < largest <= min(sizes) < cuda_memory.BLOCK_BYTES


def test_factors_count_as_device_memory(plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks get what the largest factors leave; where they leave nothing, it is said before anything is written."""
    forms, blocks, least = cuda_memory.estimate_worker_memory(plan.shards)
    largest = max(
        module.stored_form().up.nbytes + module.stored_form().down.nbytes
        for bound in plan.adapters
        for module in bound.modules
    )
    assert forms == cuda_memory.EDITS_HELD * largest
    need = forms + WORKSPACE + blocks * least
    each = cuda_memory.HASHING_WORKERS
    with stand_in_devices(monkeypatch, lambda device, size: lagging_lane(size), (4 << 30, 4 << 30)) as given:
        engine.execute(plan, tmp_path / "out", DEVICES, vram=(each + 1) * (need + 8 * blocks))
        assert sorted(given) == [(0, least + 8)] * each + [(1, least + 8)] * each
        (tmp_path / "none").mkdir()
        with pytest.raises(InputError, match="--vram"):
            engine.execute(plan, tmp_path / "none", DEVICES, vram=2 * need - 1)
    assert list((tmp_path / "none").iterdir()) == []


def test_a_device_with_little_memory_has_fewer_workers(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms, blocks, least = cuda_memory.estimate_worker_memory(plan.shards)
    free = (3 * (forms + WORKSPACE + blocks * least) + 8, 4 << 30)
    with stand_in_devices(monkeypatch, lambda device, size: lagging_lane(size), free) as given:
        engine.execute(plan, tmp_path / "out", DEVICES, vram=1 << 30)
    assert sorted(device for device, _ in given) == [0, 0] + [1] * cuda_memory.HASHING_WORKERS


def test_every_share_of_a_combination_counts_as_device_memory(tmp_path: Path) -> None:
    """Residuals of two DuDes are two more pairs of factors on the device."""
    with quiet():
        base = llama(tmp_path / "base")
    adapters = train_all(base, tmp_path, dict.fromkeys(("one", "two"), CONFIGS["dude"]))
    bound = open_pair(base, recipe(adapters, {"one": 0.5, "two": 0.5}, method="ties", density=0.5))
    jobs = [job for shard in plan_merge(bound.base, (bound,)).shards for job in shard.jobs if job.edits]
    assert jobs
    for job in jobs:
        rows, columns = job.source.shape
        assert estimate_edit_bytes(job) == 4 * (rows + columns) * 2 * (4 + 4)
    single = open_pair(base, adapters["one"])
    alone, both = (cuda_memory.estimate_worker_memory(plan_merge(one.base, (one,)).shards) for one in (single, bound))
    assert both[0] == 2 * alone[0]
    assert both[1] == alone[1] + 2 * cuda_memory.BLOCKS_PER_SHARE


def test_passes_of_a_device_are_taken_one_at_a_time_where_blocks_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds of a combination: on the device, on one thread and one queue, with the result that the CPU has."""
    with quiet():
        base = llama(tmp_path / "base")
    adapters = train_all(base, tmp_path, {name: CONFIGS[name] for name in ("lora", "dora")})
    made = recipe(adapters, {"lora": 0.7, "dora": 0.3}, method="ties", density=0.4)
    bound = open_pair(base, made)
    plan = plan_merge(bound.base, (bound,))
    for name in ("cpu", "device"):
        (tmp_path / name).mkdir()
    engine.execute(plan, tmp_path / "cpu", CPU, 2)
    threads: set[str] = set()
    devices: set[torch.device] = set()
    queues: list[Inline] = []
    real = CombinedEdit.pass_sums

    class OnCpu(TorchFunctionMode):
        """Places on the CPU what the engine places on a device, since there is none here."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            options = {name: self.move(value) for name, value in (kwargs or {}).items()}
            return func(*map(self.move, args), **options)

        @staticmethod
        def move(value: Any) -> Any:
            if not isinstance(value, torch.device) or value == CPU:
                return value
            devices.add(value)
            return CPU

    class DeviceQueue(Inline):
        def activate(self) -> contextlib.AbstractContextManager[Any]:
            return OnCpu()

    def pass_sums(self: CombinedEdit, block: Tensor, start: int) -> Tensor:
        threads.add(threading.current_thread().name)
        return real(self, block, start)

    def queue(device: torch.device) -> Inline:
        queues.append(DeviceQueue())
        return queues[-1]

    monkeypatch.setattr(CombinedEdit, "pass_sums", pass_sums)
    monkeypatch.setattr(schedule, "CudaQueue", queue)
    with stand_in_devices(monkeypatch, lambda device, size: lagging_lane(size), (8 << 30, 8 << 30)):
        engine.execute(plan, tmp_path / "device", DEVICES)
    assert threads == {"pass_0"}
    assert devices == {DEVICES[0]}
    assert len(queues) == 1
    for shard in plan.shards:
        assert (tmp_path / "cpu" / shard.file).read_bytes() == (tmp_path / "device" / shard.file).read_bytes()


# -- what is left running -------------------------------------------------------------------------------------


def test_every_worker_makes_its_device_the_threads_own(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread begins on the first device, whatever thread made its streams."""
    entered: set[tuple[str, str]] = set()

    def current_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
        entered.add((threading.current_thread().name, str(device)))
        return contextlib.nullcontext()

    monkeypatch.setattr("adapter_merge.engine.worker.current_device", current_device)
    engine.execute(plan, tmp_path / "out", CPU, 3)
    assert entered == {(f"merge-{number}", "cpu") for number in range(3)}


def test_a_failure_waits_for_the_blocks_in_flight(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers with copies under way into them must not go back to an allocator."""
    flying: deque[object] = deque()
    waited: list[object] = []

    class Late:
        def synchronize(self) -> None:
            waited.append(self)

    def launch(lane: Lane, real: Launch, slot: Slot, *rest: Any) -> None:
        real(slot, *rest)
        slot.host_norm.fill_(float("nan"))
        for target in rest[-1]:
            target.fill_(255)  # NaN, in every float dtype
        slot.mark = Late()
        flying.append(slot.mark)

    monkeypatch.setattr(engine, "cpu_lane", lambda: watched(lagging_lane(1 << 16), launch))
    with pytest.raises(NumericsError):
        engine.execute(plan, tmp_path / "out", CPU, 1)
    assert len(flying) == cuda_memory.DEPTH
    assert list(flying) == waited


def test_a_launch_that_fails_midway_is_waited_for(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels may have begun to write: the lane's queues come to their end before its buffers are given back."""
    ended: list[str] = []

    class Queue(Inline):
        def __init__(self, name: str) -> None:
            self.name = name

        def mark(self) -> Mark:
            return Ending(self.name)

    class Ending:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            ended.append(self.name)

    def launch(lane: Lane, real: Launch, *arguments: Any) -> None:
        raise NumericsError("midway")

    queues = {name: Queue(name) for name in ("upload", "compute", "download")}
    monkeypatch.setattr(engine, "cpu_lane", lambda: watched(replace(lagging_lane(1 << 16), **queues), launch))
    with pytest.raises(NumericsError, match="midway"):
        engine.execute(plan, tmp_path / "out", CPU, 1)
    assert ended == ["upload", "compute", "download"]


def test_a_failure_ends_what_was_to_be_decomposed(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the form that is being found is finished: the next ones may take minutes each."""
    begun: list[str] = []
    stopped = threading.Event()
    real_shutdown, real_edit = ThreadPoolExecutor.shutdown, BoundModule.stored_edit

    def shutdown(self: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if wait and stopped.is_set():
            time.sleep(0.5)  # for the next ones to begin, had the first call not cancelled them
        real_shutdown(self, False, cancel_futures=cancel_futures)
        stopped.set()
        real_shutdown(self, wait, cancel_futures=cancel_futures)

    def stored_edit(self: BoundModule, *arguments: Any) -> Any:
        begun.append(self.name)
        assert stopped.wait(60)
        return real_edit(self, *arguments)

    def progress(nbytes: int) -> None:
        raise ValueError("a callback that fails")

    monkeypatch.setattr(schedule, "LOOK_AHEAD", 8)  # several adapted tensors are in the queue
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    monkeypatch.setattr(BoundModule, "stored_edit", stored_edit)
    with pytest.raises(ValueError, match="a callback that fails"):
        engine.execute(plan, tmp_path / "out", CPU, 1, progress)
    assert len(begun) <= 1


# -- nothing silent where the host may not look ----------------------------------------------------------------


def test_a_zero_row_with_a_magnitude_becomes_nan_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA no value may be looked at between blocks; the check of what comes back has to see it."""
    weight = torch.randn(3, 4)
    weight[1] = 0
    form = CanonicalForm(torch.zeros(3, 1), torch.zeros(1, 4), magnitude=torch.tensor([1.0, 1.0, 1.0]))
    with pytest.raises(NumericsError, match="row 1"):
        form.merged(weight)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    merged: Tensor = form.merged(weight)
    assert merged[1].isnan().all()
    assert merged[[0, 2]].isfinite().all()
    silent = CanonicalForm(form.up, form.down, magnitude=torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(silent.merged(weight)[1], torch.zeros(4))
