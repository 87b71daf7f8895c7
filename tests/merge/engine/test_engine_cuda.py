"""The CUDA path without CUDA: device discipline under fake tensors, order of the streams, and the ring of slots.

test_cuda.py runs the real thing where a device is.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from merge_models import base_tensors, expected, read_model, write_base, write_lora
from stand_in_devices import CPU, WORKSPACE, Launch, device_slot, stand_in_devices, watched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.api.restore import restore
from adapter_merge.combine.delta_ops import METHODS, CombinedEdit, Settings, WeightedEdit
from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.engine import cuda_lanes, cuda_memory, lanes
from adapter_merge.engine import execute as engine
from adapter_merge.engine.devices import exact_products
from adapter_merge.engine.lanes import Block, Done, Inline, Lane, Mark, Slot
from adapter_merge.engine.plan import plan_merge
from adapter_merge.errors import InputError
from adapter_merge.methods.block_edits import BlockEdit, InTurn, RowRange
from adapter_merge.methods.canonical_form import CanonicalForm, Residual
from adapter_merge.storage.tensor_io import write_safetensors

CUDA = torch.device("cuda", 0)
ROWS, COLUMNS, RANK = 6, 8, 2


class Unguarded(TorchFunctionMode):
    """Python's methods as operators: a CPU build of torch has no device guard for the former on fake CUDA tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return self.index(args[0], args[1])
        if func is Tensor.__setitem__:
            view, value = self.index(args[0], args[1]), args[2]
            return self.call(Tensor.copy_ if isinstance(value, Tensor) else Tensor.fill_, view, value)
        return self.call(func, *args, **(kwargs or {}))

    @staticmethod
    def call(func: Any, *args: Any, **options: Any) -> Any:
        try:
            return func(*args, **options)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
            return getattr(torch.ops.aten, func.__name__)(*args, **options)

    @staticmethod
    def index(tensor: Tensor, index: Any) -> Tensor:
        dim = 0
        for item in index if isinstance(index, tuple) else (index,):
            if item is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(item, int):
                tensor = tensor.select(dim, item)
                continue
            else:
                assert isinstance(item, slice)
                start, stop, step = item.indices(tensor.shape[dim])
                assert step == 1
                tensor = tensor.narrow(dim, start, stop - start)
            dim += 1
        return tensor


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """CUDA tensors without values, memory or a device."""
    with FakeTensorMode(), Unguarded():
        yield


def form_of(kind: str, device: torch.device) -> CanonicalForm:
    up, down = torch.randn(ROWS, RANK, device=device), torch.randn(RANK, COLUMNS, device=device)
    if kind == "row_scale":
        return CanonicalForm(up, down, row_scale=torch.rand(ROWS, device=device))
    if kind == "col_scale":
        return CanonicalForm(up, down, col_scale=torch.rand(COLUMNS, device=device))
    if kind == "dora":
        return CanonicalForm(up, down, magnitude=torch.rand(ROWS, device=device))
    if kind == "dude":
        residual = Residual(torch.randn(ROWS, 1, device=device), torch.randn(1, COLUMNS, device=device), torch.bfloat16)
        return CanonicalForm(up, down, magnitude=torch.rand(ROWS, device=device), residual=residual)
    return CanonicalForm(up, down)


def edit_of(kind: str, device: torch.device) -> BlockEdit:
    """Every kind of edit that an engine meets, and two adapters by every method of combination."""
    if kind == "rows":
        return RowRange(form_of("dora", device).to(device), 0, ROWS)
    if kind == "in turn":
        return InTurn((form_of("lora", device), form_of("row_scale", device)))
    if kind in METHODS:
        parts = tuple(WeightedEdit(form_of(name, device), 0.5, 0.5, 7) for name in ("lora", "dora"))
        thresholds = (torch.zeros(2, dtype=torch.int64, device=device) for _ in range(2))
        settings = Settings(kind, 0.5, 0.1)
        found = dict(zip(("low", "high"), thresholds, strict=True)) if settings.by_size else {}
        return CombinedEdit(parts, settings, 0, **found)
    return form_of(kind, device)


def block_of(delta: bool = False, target: torch.dtype = torch.bfloat16, measured: int = ROWS) -> Block:
    return Block(0, ROWS, COLUMNS, torch.bfloat16, torch.float32, target, delta, measured)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kind", ["lora", "row_scale", "col_scale", "dora", "dude", "rows", "in turn", *METHODS])
def test_no_step_mixes_devices_or_waits_for_the_device(kind: str, delta: bool) -> None:
    """Fake tensors refuse an operation on two devices, and any that needs a value on the host."""
    with fake_cuda():
        slot = Slot(CUDA, pinned=False)
        lane = Lane(CUDA, (slot,), Inline(), Inline(), Inline(), 1 << 20)
        block = block_of(delta, measured=0 if delta else ROWS)
        targets = [torch.empty(half, dtype=torch.uint8, device=CPU) for half in (10, block.elements * 2 - 10)]
        lane.launch(slot, block, [edit_of(kind, CUDA)], targets)
        assert {slot.bytes("host_in", 8).device, slot.host_norm.device, slot.host_sums.device} == {CPU}
        assert {slot.bytes(name, 8).device for name in ("in", "out", "work")} == {CUDA}
        assert slot.norm.device == slot.sums.device == CUDA


def test_a_form_on_the_wrong_device_is_seen_by_these_tests() -> None:
    with fake_cuda():
        slot = Slot(CUDA, pinned=False)
        lane = Lane(CUDA, (slot,), Inline(), Inline(), Inline(), 1 << 20)
        block = block_of()
        with pytest.raises(Exception, match="device"):
            lane.launch(slot, block, [form_of("lora", CPU)], [torch.empty(block.elements * 2, dtype=torch.uint8)])


class Recorded:
    """A queue that notes what goes through it, and runs nothing until `drain`: a stream that lags behind its host."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.marks = name, log, 0

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        self.log.append(f"{self.name} work")
        yield

    def mark(self) -> Mark:
        self.marks += 1
        self.log.append(f"{self.name} mark {self.marks}")
        return RecordedMark(f"{self.name} {self.marks}", self.log)

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, RecordedMark)
        self.log.append(f"{self.name} waits for {mark.name}")


class RecordedMark:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


def recorded_lane(log: list[str], depth: int = cuda_memory.DEPTH, block_bytes: int = 1 << 12) -> Lane:
    slots = tuple(device_slot() for _ in range(depth))
    queues = [Recorded(name, log) for name in ("upload", "compute", "download")]
    return Lane(CPU, slots, *queues, block_bytes)


def test_each_queue_waits_for_the_one_before_it() -> None:
    log: list[str] = []
    lane = recorded_lane(log, 1)
    slot = lane.slots[0]
    block = block_of()
    weight = torch.randn(ROWS, COLUMNS).bfloat16()
    form = form_of("dude", CPU)
    source = slot.bytes("host_in", weight.nbytes)
    source.copy_(weight.view(torch.uint8).view(-1))
    pieces = [torch.empty(size, dtype=torch.uint8) for size in (10, weight.nbytes - 10)]
    lane.launch(slot, block, [form], pieces)
    slot.mark.synchronize()
    assert log == [
        "upload work",
        "upload mark 1",
        "compute waits for upload 1",
        "compute work",
        "compute mark 1",
        "download waits for compute 1",
        "download work",
        "download mark 1",
        "host waits for download 1",
    ]
    merged = form.merged(weight.float())
    assert torch.equal(torch.cat(pieces).view(torch.bfloat16).view(ROWS, COLUMNS), merged.bfloat16())
    assert slot.result_norm == pytest.approx(float(merged.norm()), rel=1e-6)


def test_the_engine_keeps_several_blocks_in_flight_and_waits_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own loop over lagging queues: right bytes, blocks overlap, no buffer is used before its mark."""
    tensors = base_tensors(factor=8)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    log: list[str] = []
    flying: list[int] = []
    pending: deque[tuple[Slot, Any]] = deque()

    def late(lane: Lane, real: Launch, slot: Slot, block: Block, forms: Any, targets: list[Tensor]) -> None:
        """Nothing of a block happens before somebody waits for its mark."""
        assert slot not in [held for held, _ in pending], "a slot is used again while its block is in flight"
        for target in targets:
            target.fill_(255)  # NaN, should anybody look too early
        pending.append((slot, lambda: real(slot, block, forms, targets)))
        flying.append(len(pending))

        class Late:
            def synchronize(self) -> None:
                held, run = pending.popleft()
                assert held is slot, "blocks land in the order of their start"
                run()
                slot.mark.synchronize()

        slot.mark = Late()

    monkeypatch.setattr(engine, "cpu_lane", lambda: watched(recorded_lane(log, block_bytes=1 << 16), late))
    (tmp_path / "out").mkdir()
    finished = engine.execute(plan, tmp_path / "out", CPU, workers=1)
    assert max(flying) == cuda_memory.DEPTH
    assert not pending
    found, exact = read_model(tmp_path / "out"), expected(tensors, adapter)
    for name, tensor in tensors.items():
        if name in exact:
            torch.testing.assert_close(found[name].double(), exact[name], rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(found[name], tensor)
    assert sum(len(shard.figures) for shard in finished.values()) == len(exact)


def test_the_overlapping_path_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = base_tensors(factor=8)
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    merge(base, adapter, tmp_path / "plain", MergeOptions(workers=2))
    block_bytes = lanes.cpu_lane().block_bytes
    monkeypatch.setattr(engine, "cpu_lane", lambda: recorded_lane([], block_bytes=block_bytes))
    merge(base, adapter, tmp_path / "ring", MergeOptions(workers=3))
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "ring" / file.name).read_bytes()


def test_results_at_odd_bytes_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pre-image needs what came down in pieces as numbers, wherever in the file it lies."""
    tensors = base_tensors(layers=2, factor=8)
    base = write_base(tmp_path / "base", tensors, shards=1)
    file = base / "model.safetensors"
    file.unlink()
    write_safetensors(file, {"model.mask": torch.ones(3, dtype=torch.bool), **tensors})
    adapter = write_lora(tmp_path / "adapter", tensors)
    merge(base, adapter, tmp_path / "plain", MergeOptions(workers=1))
    monkeypatch.setattr(engine, "cpu_lane", lambda: recorded_lane([], block_bytes=lanes.CPU_BLOCK_BYTES))
    merge(base, adapter, tmp_path / "ring", MergeOptions(keep_preimage=True))
    assert (tmp_path / "ring" / file.name).read_bytes() == (tmp_path / "plain" / file.name).read_bytes()
    restore(tmp_path / "ring", tmp_path / "back")
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_device_without_memory_is_no_bug_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = base_tensors()
    base = write_base(tmp_path / "base", tensors)
    adapter = write_lora(tmp_path / "adapter", tensors)

    def launch(lane: Lane, real: Launch, *arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine, "cpu_lane", lambda: watched(lanes.cpu_lane(), launch))
    with pytest.raises(InputError, match=r"Tried to allocate 2\.00 GiB") as caught:
        merge(base, adapter, tmp_path / "out")
    assert "--vram" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_several_devices_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device computes, within its own share of memory, and together they write what one CPU writes."""
    tensors = base_tensors(layers=4, factor=16)
    base = write_base(tmp_path / "base", tensors, shards=4)
    adapter = write_lora(tmp_path / "adapter", tensors, dora=True)
    bound = open_pair(base, adapter)
    plan = plan_merge(bound.base, (bound,))
    assert len(plan.shards) > 2
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    engine.execute(plan, tmp_path / "one", CPU, workers=1)
    devices = [torch.device("cuda", index) for index in range(2)]
    forms, blocks, _ = cuda_memory.estimate_worker_memory(plan.shards)
    each = forms + WORKSPACE + blocks * lanes.CPU_BLOCK_BYTES  # blocks of another size add up in another order
    free = tuple(int(share * (cuda_memory.HASHING_WORKERS + 1) * each / cuda_memory.VRAM_FRACTION) for share in (1, 3))
    computed: dict[torch.device, int] = dict.fromkeys(devices, 0)
    together = threading.Barrier(len(devices) * cuda_memory.HASHING_WORKERS)  # nobody is done before all have begun
    begun = threading.local()
    owner: dict[int, torch.device] = {}

    def launch(lane: Lane, real: Launch, *arguments: Any) -> None:
        if not hasattr(begun, "yes"):
            begun.yes = True
            together.wait(60)
        computed[owner[id(lane)]] += 1
        real(*arguments)

    def lane_of(device: torch.device, size: int) -> Lane:
        lane = watched(recorded_lane([], block_bytes=size), launch)
        owner[id(lane)] = device
        return lane

    with stand_in_devices(monkeypatch, lane_of, free) as given:
        engine.execute(plan, tmp_path / "two", devices)
    for shard in plan.shards:
        assert (tmp_path / "one" / shard.file).read_bytes() == (tmp_path / "two" / shard.file).read_bytes()
    assert all(computed.values())
    assert given.count((0, lanes.CPU_BLOCK_BYTES)) == given.count((1, lanes.CPU_BLOCK_BYTES)) == len(given) / 2


@pytest.mark.parametrize("vram", [24 << 20, 64 << 20, 8 << 30])
def test_blocks_stay_within_the_memory_that_is_given(
    vram: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = base_tensors()
    bound = open_pair(write_base(tmp_path / "base", tensors), write_lora(tmp_path / "adapter", tensors, dora=True))
    shards = plan_merge(bound.base, (bound,)).shards
    with stand_in_devices(monkeypatch, lambda device, size: recorded_lane([]), (80 << 30,)):
        makers, size = cuda_lanes.cuda_lanes([CUDA], shards, None, vram, hashing=True)
    assert size == cuda_memory.BLOCK_BYTES or vram < 1 << 30
    with fake_cuda():
        slot = Slot(CUDA, pinned=False)
        rows = size // (4 * COLUMNS)
        block = Block(0, rows, COLUMNS, torch.float32, torch.float32, torch.float32, False, measured=rows)
        up, magnitude = torch.empty(block.rows, RANK, device=CUDA), torch.empty(block.rows, device=CUDA)
        form = CanonicalForm(up, torch.empty(RANK, COLUMNS, device=CUDA), magnitude=magnitude)
        lane = Lane(CUDA, (slot,), Inline(), Inline(), Inline(), size)
        lane.launch(slot, block, [form], [torch.empty(block.elements * 4, dtype=torch.uint8, device=CPU)])
        names = ("in", "work", "spare", "out")
        held = sum(slot.bytes(name, 1).untyped_storage().nbytes() for name in names)
    one = WORKSPACE + cuda_memory.DEPTH * held + cuda_memory.TEMPORARY_BLOCKS * size
    assert held == cuda_memory.BLOCKS_PER_SLOT * block.elements * 4
    assert (len(makers) + 1) * one <= vram  # one more for a pass over a whole weight


@pytest.mark.slow
@pytest.mark.preloaded("torch")
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9 has this setting")
@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_products_are_exact_whatever_the_process_has_set_and_its_setting_comes_back(setting: str) -> None:
    """In a process of its own: torch's old and new settings cannot be told apart once both were used."""
    program = f"""
import torch
from adapter_merge.engine.devices import exact_products
{setting}
matmul = torch.backends.cuda.matmul
before = matmul.fp32_precision, torch.backends.fp32_precision
inherited = before[0] == before[1]
with exact_products(torch.device("cuda")):
    assert matmul.fp32_precision == "ieee"
    torch.rand(64, 64) @ torch.rand(64, 64)
assert (matmul.fp32_precision, torch.backends.fp32_precision) == before
if inherited:
    for value in ("tf32", "ieee"):
        torch.backends.fp32_precision = value
        assert matmul.fp32_precision == value, "it no longer follows the setting of all backends"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("allowed", [False, True])
def test_products_are_exact_where_torch_has_the_old_setting_alone(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(allow_tf32=allowed)  # as torch 2.7 has it
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    with pytest.raises(InputError), exact_products(CUDA):
        assert not settings.allow_tf32
        raise InputError("put back after a failure as well")
    assert settings.allow_tf32 is allowed


def test_work_that_is_done_when_it_returns_needs_no_waiting() -> None:
    inline = Inline()
    with inline.activate():
        mark = inline.mark()
    inline.wait(mark)
    assert isinstance(mark, Done)
    mark.synchronize()
