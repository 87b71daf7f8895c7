"""Interpreter of the pickle in a torch.save file: names, dtypes, shapes and locations of tensors, without running code.

A pickle is a program for a stack machine. This machine knows the opcodes that torch.save emits (protocol 2; Python's
Lib/pickletools.py describes them), and refuses all others. Dictionary keys are strings and numbers only, and
there are no sets, since hashing a deeply nested tuple overflows the interpreter's C stack. The memo is a dictionary,
so that a large index takes no memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from typing import Any

from .pickle_allow_list import (
    DEVICES,
    FUNCTIONS,
    STORAGE_DTYPES,
    TENSOR_DTYPES,
    UNSUPPORTED,
    VALUES,
    DamagedPickle,
    ForbiddenPickle,
    Global,
    OrderedItems,
    PickledStorage,
    UnsupportedPickle,
    is_size,
)

MAX_OPCODES = 5_000_000  # a tensor takes about 35
MAX_MARKS = 1_000  # nesting depth of containers
MAX_INTEGER_BYTES = 9
MAX_NAME_BYTES = 256


def read_pickle_table(data: bytes) -> tuple[Any, Collection[PickledStorage]]:
    """Return the content that the pickle `data` describes, and every storage that it names, used or not.

    The content consists of dict, list, tuple, str, numbers, bytes, None, PickledTensor and opaque values.

    Raises only DamagedPickle, ForbiddenPickle or UnsupportedPickle, after at most MAX_OPCODES steps.
    """
    machine = _Machine(data)
    try:
        return machine.run(), machine.storages.values()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, (DamagedPickle, ForbiddenPickle, UnsupportedPickle)):
            raise
        raise DamagedPickle(f"{type(error).__name__} at byte {machine.position}") from error


class _Machine:
    """The interpreter's state: pickle and position, stack, stacks below each mark, memo."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, PickledStorage] = {}

    def run(self) -> Any:
        if self.data[:2] != b"\x80\x02":
            raise DamagedPickle("it is not a pickle of protocol 2, which torch.save writes")
        self.position = 2
        for _ in range(MAX_OPCODES):
            opcode = self.data[self.position]
            self.position += 1
            if opcode == ord("."):  # STOP
                if self.marked or len(self.stack) != 1 or self.position != len(self.data):
                    raise DamagedPickle("it does not end with exactly one value")
                return self.stack[0]
            action = _ACTIONS.get(opcode)
            if action is None:
                raise DamagedPickle(f"torch.save writes no opcode {opcode:#04x} (byte {self.position - 1})")
            action(self)
        raise DamagedPickle(f"it has more than {MAX_OPCODES} opcodes")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes and advance. Raises for a pickle that ends too early."""
        data = self.data[self.position : self.position + count]
        if len(data) < count:
            raise DamagedPickle("it ends too early")
        self.position += count
        return data

    def unsigned(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items


def _mark(machine: _Machine) -> None:
    if len(machine.marked) >= MAX_MARKS:
        raise DamagedPickle(f"its containers are nested deeper than {MAX_MARKS}")
    machine.marked.append(machine.stack)
    machine.stack = []


def _text(machine: _Machine) -> None:
    machine.stack.append(machine.take(machine.unsigned(4)).decode("utf-8"))


def _long(machine: _Machine) -> None:
    count = machine.unsigned(1)
    if count > MAX_INTEGER_BYTES:
        raise DamagedPickle(f"an integer of {count} bytes")
    machine.stack.append(int.from_bytes(machine.take(count), "little", signed=True))


def _tuple(machine: _Machine) -> None:
    items = tuple(machine.pop_mark())
    machine.stack.append(items)


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def action(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise DamagedPickle("a tuple of more values than there are")
        items = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        machine.stack.append(items)

    return action


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise DamagedPickle(f"appends to a {type(target).__name__}")
    target.extend(items)


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) not in (dict, OrderedItems) or len(items) % 2:
        raise DamagedPickle(f"sets an item of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key is not None and type(key) not in (str, int, float, bool):
            raise DamagedPickle(f"a dictionary key that is a {type(key).__name__}")
        target[key] = value


def _global(machine: _Machine) -> None:
    first = machine.data.index(b"\n", machine.position, machine.position + MAX_NAME_BYTES)
    second = machine.data.index(b"\n", first + 1, first + 1 + MAX_NAME_BYTES)
    module = machine.data[machine.position : first].decode("ascii")
    name = f"{module}.{machine.data[first + 1 : second].decode('ascii')}"
    machine.position = second + 1
    if name in UNSUPPORTED:
        raise UnsupportedPickle(f"{UNSUPPORTED[name]} ({name})")
    if name not in FUNCTIONS and name not in STORAGE_DTYPES and name not in TENSOR_DTYPES and name not in VALUES:
        raise ForbiddenPickle(name)
    machine.stack.append(Global(name))


def _call(machine: _Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if type(arguments) is not tuple or type(function) is not Global or function.name not in FUNCTIONS:
        raise DamagedPickle("calls a value that is not a function")
    machine.stack.append(FUNCTIONS[function.name](*arguments))


def _build(machine: _Machine) -> None:
    """Set attributes (a state dict's _metadata, with the versions of its modules); no tensor depends on them."""
    state = machine.stack.pop()
    if type(machine.stack[-1]) is not OrderedItems or type(state) is not dict:
        raise DamagedPickle(f"sets attributes of a {type(machine.stack[-1]).__name__}")


def _storage(machine: _Machine) -> None:
    """Turn ("storage", class, key, device, numel) into the storage; repeated names of one storage must agree."""
    kind, storage_class, key, location, numel = machine.stack.pop()
    if kind != "storage" or type(storage_class) is not Global or storage_class.name not in STORAGE_DTYPES:
        raise DamagedPickle("a persistent id that is not a storage")
    if type(key) is not str or type(location) is not str or not is_size(numel):
        raise DamagedPickle("a storage without key, device and size")
    if location.partition(":")[0] not in DEVICES:
        raise DamagedPickle("a storage on an unknown device")
    if location == "meta":
        raise UnsupportedPickle("a tensor on the meta device, which has no values")
    is_untyped = storage_class.name == "torch.storage.UntypedStorage"
    storage = PickledStorage(key, STORAGE_DTYPES[storage_class.name], numel, is_untyped)
    known = machine.storages.setdefault(key, storage)
    if (known.dtype, known.numel) != (storage.dtype, storage.numel):
        raise DamagedPickle(
            f"storage {key} has two sizes: {known.numel} of {known.dtype} and {numel} of {storage.dtype}"
        )
    machine.stack.append(storage)


_ACTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord("N"): lambda machine: machine.stack.append(None),
    0x88: lambda machine: machine.stack.append(True),
    0x89: lambda machine: machine.stack.append(False),
    ord("J"): lambda machine: machine.stack.append(int.from_bytes(machine.take(4), "little", signed=True)),
    ord("K"): lambda machine: machine.stack.append(machine.unsigned(1)),
    ord("M"): lambda machine: machine.stack.append(machine.unsigned(2)),
    0x8A: _long,  # LONG1
    ord("G"): lambda machine: machine.stack.append(struct.unpack(">d", machine.take(8))[0]),
    ord("X"): _text,  # BINUNICODE
    ord("]"): lambda machine: machine.stack.append([]),
    ord("}"): lambda machine: machine.stack.append({}),
    ord(")"): lambda machine: machine.stack.append(()),
    ord("("): _mark,
    ord("t"): _tuple,
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("a"): lambda machine: _append(machine, [machine.stack.pop()]),
    ord("e"): lambda machine: _append(machine, machine.pop_mark()),
    ord("s"): lambda machine: _set_items(machine, [machine.stack.pop(), machine.stack.pop()][::-1]),
    ord("u"): lambda machine: _set_items(machine, machine.pop_mark()),
    ord("h"): lambda machine: machine.stack.append(machine.memo[machine.unsigned(1)]),
    ord("j"): lambda machine: machine.stack.append(machine.memo[machine.unsigned(4)]),
    ord("q"): lambda machine: machine.memo.__setitem__(machine.unsigned(1), machine.stack[-1]),
    ord("r"): lambda machine: machine.memo.__setitem__(machine.unsigned(4), machine.stack[-1]),
    ord("c"): _global,
    ord("R"): _call,
    ord("b"): _build,
    ord("Q"): _storage,  # BINPERSID
}
