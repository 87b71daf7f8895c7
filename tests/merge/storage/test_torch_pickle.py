"""torch.save files are read as torch.load(weights_only=True) reads them, or refused; nothing else happens."""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pickle_files
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickle_files import archive_of, check_equal, records_of, saved

from adapter_merge.errors import FileFormatError
from adapter_merge.storage.torch_pickle import read_pickle

# fmt: off
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
          torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]
# fmt: on

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = int(torch.Size(shape).numel())
    dtype = draw(st.sampled_from(DTYPES))
    data = bytes(draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    view = draw(st.sampled_from(["whole", "slice", "transpose", "parameter", "attributes"]))
    if view == "slice" and shape and shape[0] > 1:
        return tensor[1:]
    if view == "transpose" and len(shape) > 1:
        return tensor.transpose(0, 1)
    if view in ("parameter", "attributes") and dtype.is_floating_point:
        parameter = torch.nn.Parameter(tensor, requires_grad=dtype.itemsize > 1)
        if view == "attributes":
            parameter.note = "ours"  # type: ignore[attr-defined]
        return parameter
    return tensor


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    named=st.dictionaries(NAMES, tensors(), min_size=1, max_size=5),
    ties=st.integers(0, 2),
    wrapper=st.sampled_from([None, "model_state_dict", "state_dict", "model"]),
)  # fmt: skip
def test_generated_files_are_read_as_torch_reads_them(
    named: dict[str, torch.Tensor], ties: int, wrapper: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = OrderedDict(named)
    for number in range(ties):
        state[f"tied{number}"] = next(iter(named.values()))
    content: Any = state if wrapper is None else {wrapper: state, "epoch": 3, "lr": 0.1, "note": None}
    file = tmp_path_factory.getbasetemp() / "generated.bin"
    file.write_bytes(saved(content))
    try:
        check_equal(file)
    except FileFormatError as error:
        assert not all(tensor.is_contiguous() for tensor in state.values()), error


def test_a_models_own_state_dict(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for data in pickle_files.seeds():
        file.write_bytes(data)
        check_equal(file)


def with_pickle(old: bytes, new: bytes) -> bytes:
    """A file of two tensors with `old` in its pickle exchanged for `new`."""
    records = records_of(saved({"a": torch.arange(4.0), "b": torch.arange(4)}))
    assert old in records["data.pkl"]
    return archive_of(records | {"data.pkl": records["data.pkl"].replace(old, new)})


def changed_records(**changes: bytes) -> bytes:
    records = records_of(saved({"a": torch.arange(4.0)}))
    return archive_of(records | {name.replace("_slash_", "/"): data for name, data in changes.items()})


def twice() -> bytes:
    stream = io.BytesIO(saved({"a": torch.arange(4.0)}))
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(16))
    return stream.getvalue()


def negated() -> torch.Tensor:
    tensor = torch.ones(2, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    return tensor


def grown() -> bytes:
    shared = torch.zeros(1 << 20)
    return saved({f"t{number}": shared[:] for number in range(256)})


def two_dtypes() -> bytes:
    """The second tensor's int64 storage renamed to the first one's record."""
    records = records_of(saved({"a": torch.zeros(4), "b": torch.arange(2)}))
    table = records["data.pkl"].replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    return archive_of(records | {"data.pkl": table})


def unused_storage() -> bytes:
    """The record of a storage that only the optimizer beside the state dict uses, made shorter."""
    records = records_of(saved({"state_dict": {"a": torch.ones(2)}, "optimizer": {"step": torch.ones(3)}}))
    return archive_of(records | {"data/1": bytes(8)})


FOUR = b"K\x04\x85"  # the shape (4,)
LONG = b"\x8a\x06" + (2**40).to_bytes(6, "little")
ATTACKS: dict[str, tuple[Any, str]] = {
    "big-endian": (lambda: changed_records(byteorder=b"big"), "little-endian"),
    "unknown byte order": (lambda: changed_records(byteorder=b"middle"), "little-endian"),
    "negative bit": (lambda: saved({"a": negated()}), "negative bit"),
    "conjugate bit": (lambda: saved({"a": torch.ones(2, dtype=torch.complex64).conj()}), "conjugate"),
    "sparse": (lambda: saved({"a": torch.eye(3).to_sparse()}), "sparse"),
    "meta": (lambda: saved({"a": torch.zeros(3, device="meta")}), "meta"),
    "float8 that requires grad": (
        lambda: saved({"a": torch.ones(2).to(torch.float8_e4m3fn).requires_grad_()}), "requires grad"),
    "integers that require grad": (lambda: with_pickle(b"K\x01\x85q\x13\x89", b"K\x01\x85q\x13\x88"), "requires grad"),
    "complex128": (lambda: saved({"a": torch.zeros(3, dtype=torch.complex128)}), "complex128"),
    "transposed": (lambda: saved({"a": torch.arange(6.0).reshape(2, 3).T}), "row-major"),
    "expanded": (lambda: saved({"a": torch.zeros(1).expand(1 << 40)}), "larger than the file"),
    "grown by sharing": (grown, "larger than the file"),
    "an object": (lambda: saved({"a": torch.zeros(2), "args": argparse.Namespace(x=1)}), "could run code"),
    "deflated": (
        lambda: archive_of(records_of(saved({"a": torch.zeros(400)})), zipfile.ZIP_DEFLATED), "compressed"),
    "record twice": (twice, "twice"),
    "short record": (lambda: changed_records(data_slash_0=bytes(12)), "not the archive's"),
    "long record": (lambda: changed_records(data_slash_0=bytes(20)), "not the archive's"),
    "short record that no weight uses": (unused_storage, "not the archive's"),
    "unknown record": (lambda: changed_records(**{"constants.pkl": b"x"}), "no torch.save"),
    "unknown version": (lambda: changed_records(version=b"99\n"), "version"),
    "two dtypes": (two_dtypes, "has two sizes"),
    "huge shape": (lambda: with_pickle(FOUR, LONG + b"\x85"), "after its storage"),
    "huge storage": (lambda: with_pickle(b"K\x04t", LONG + b"t"), "archive's"),
    "huge offset": (
        lambda: with_pickle(b"QK\x00", b"Q\x8a\x08" + (2**62).to_bytes(8, "little")), "after its storage"),
    "negative stride": (lambda: with_pickle(b"K\x01\x85", b"J\xff\xff\xff\xff\x85"), "shape or stride"),
    "memo at 2^32 - 1": (lambda: with_pickle(b"K\x01\x85", b"K\x01\x85r\xff\xff\xff\xff"), ""),
    "deep nesting": (lambda: with_pickle(b"K\x01\x85", b"(" * 2000 + b"K\x01\x85"), "nested"),
    "os.system": (lambda: with_pickle(b"ctorch\nFloatStorage\n", b"cos\nsystem\n"), "could run code"),
    "protocol 4": (lambda: with_pickle(b"\x80\x02", b"\x80\x04"), "protocol 2"),
    "a number among tensors": (lambda: saved({"q.lora_A": torch.zeros(2), "q.alpha": 16.0}), "a number"),
    "two state dicts": (
        lambda: saved({"model": {"a": torch.zeros(2)}, "state_dict": {"a": torch.ones(2)}}), "several"),
    "tensors beside a state dict": (
        lambda: saved({"state_dict": {"q.lora_A": torch.zeros(2)}, "k.lora_A": torch.ones(2)}), "outside its state"),
    "tensors in a dict of their own": (
        lambda: saved({"q.lora_A": torch.zeros(2), "more": {"k.lora_A": torch.ones(2)}}), "outside its state"),
    "tensors of a module in a dict": (
        lambda: saved({"q.lora_A": torch.zeros(2), "layers.1": {"lora_A": torch.ones(2)}}), "outside its state"),
    "tensors in a list": (
        lambda: saved({"q.lora_A": torch.zeros(2), "k.lora_A": [torch.ones(2)]}), "outside its state"),
    "numbered tensors": (lambda: saved({1: torch.zeros(2)}), "not strings"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_cannot_be_read_in_place_is_refused(attack: str, tmp_path: Path) -> None:
    make, text = ATTACKS[attack]
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(make())
    if not text:  # harmless: read as torch reads it
        check_equal(file)
        return
    with pytest.raises(FileFormatError, match=text) as caught:
        read_pickle(file)
    assert str(file) in str(caught.value) and caught.value.problems[0].hint


def test_the_state_of_training_beside_a_state_dict_is_no_part_of_it(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    content = {"model_state_dict": {"q.lora_A": torch.zeros(2)}, "optimizer": optimizer, "rng_state": torch.zeros(9)}
    torch.save(content, tmp_path / "final.ckpt")
    assert list(read_pickle(tmp_path / "final.ckpt")) == ["q.lora_A"]


def test_the_legacy_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.bin"
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"1\.6 and newer"):
        read_pickle(file)


def test_a_local_header_that_contradicts_the_directory(tmp_path: Path) -> None:
    data = bytearray(changed_records())
    place = data.index(b"archive/data/0")
    data[place : place + 14] = b"archive/data/9"
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(FileFormatError, match="local header"):
        read_pickle(tmp_path / "x.bin")


HEADER_FIELDS = {  # name: (offset in a directory entry, its bytes)
    "made by": (4, 2), "version needed": (6, 2), "flags": (8, 2), "method": (10, 2), "time": (12, 2), "date": (14, 2),
    "checksum": (16, 4), "packed size": (20, 4), "size": (24, 4), "name's size": (28, 2), "extra's size": (30, 2),
    "comment's size": (32, 2), "disk": (34, 2), "internal attributes": (36, 2), "external attributes": (38, 4),
    "offset": (42, 4),
}  # fmt: skip


@pytest.mark.parametrize("field", HEADER_FIELDS)
def test_every_bit_of_a_directory_entry_is_checked(field: str, tmp_path: Path) -> None:
    """For torch's zip reader, one bit of the external attributes makes a record a folder without bytes."""
    data, file = saved({"a": torch.arange(4.0)}), tmp_path / "x.bin"
    offset, nbytes = HEADER_FIELDS[field]
    entries = [found.start() for found in re.finditer(rb"PK\x01\x02", data)]
    for entry in entries:
        for bit in range(8 * nbytes):
            changed = bytearray(data)
            changed[entry + offset + bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            with pytest.raises(FileFormatError):
                check_equal(file)


def test_bytes_between_records_are_refused(tmp_path: Path) -> None:
    data = changed_records()
    first = data.index(b"PK\x03\x04", 4)
    (tmp_path / "x.bin").write_bytes(data[:first] + b"hidden" + data[first:])
    with pytest.raises(FileFormatError, match="directory"):
        read_pickle(tmp_path / "x.bin")


def test_millions_of_opcodes_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_merge.storage.pickle_machine.MAX_OPCODES", 10_000)
    (tmp_path / "x.bin").write_bytes(with_pickle(b"K\x01\x85", b"K\x01\x85" + b"q\xff" * 20_000))
    with pytest.raises(FileFormatError, match="opcodes"):
        read_pickle(tmp_path / "x.bin")


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(saved({"a": torch.arange(4.0)}))
    program = (
        "import sys; from pathlib import Path; from adapter_merge.storage.checkpoint import read_weights;"
        "print([ref.name for ref in read_weights(Path(sys.argv[1])).tensors]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "['a']"), done.stderr


@pytest.mark.slow
def test_changed_files_are_refused_or_read_as_torch_reads_them() -> None:
    """In a process of its own: a crash of the interpreter is a failure, not the end of the tests."""
    program = [sys.executable, pickle_files.__file__, "--cases", "1500", "--seed", "1"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    assert "equal" in done.stdout and "refused" in done.stdout
