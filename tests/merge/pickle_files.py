"""torch.save files to read: taken apart, put together again, changed, and compared with torch.load.

    python tests/merge/pickle_files.py --cases 20000 --seed 0

changes bytes of well-formed files. Each must be refused, or read as torch.load(weights_only=True) reads it.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import sys
import tempfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_merge.errors import FileFormatError
from adapter_merge.storage.tensor_io import read_tensor
from adapter_merge.storage.torch_pickle import WRAPPERS, read_pickle

Records = dict[str, bytes]


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def records_of(data: bytes) -> Records:
    """The records of a torch.save file by their names without "archive/"."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archive_of(records: Records, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return stream.getvalue()


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def loaded_by_torch(file: Path) -> dict[str, torch.Tensor]:
    """The oracle: torch's own reader, and the same rule for state dicts under a wrapper's key."""
    content = torch.load(file, weights_only=True, map_location="cpu")
    for key in WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, torch.Tensor) for value in inner.values()):
            content = inner
            break
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def check_equal(file: Path) -> None:
    """Raise AssertionError unless `file` is read as torch reads it; FileFormatError where it is refused."""
    found = read_pickle(file)
    try:
        wanted = loaded_by_torch(file)
    except Exception as error:
        raise AssertionError(f"torch refuses what was read: {type(error).__name__}: {error}") from error
    assert found.keys() == wanted.keys()
    for name, ref in found.items():
        assert ref.shape == tuple(wanted[name].shape), name
        if ref.dtype == "F8_E8M0":
            continue
        tensor = read_tensor(ref)
        assert tensor.dtype == wanted[name].dtype, name
        assert raw(tensor) == raw(wanted[name]), name


def seeds() -> list[bytes]:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    shared = torch.randn(4, 6)
    training = {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.99), "device": torch.device("cpu")}
    return [
        saved(layer.state_dict()),
        saved({"a.lora_A": shared[1:3], "b.lora_B": shared, "n": torch.tensor(7)}),
        saved({"model_state_dict": OrderedDict(layer.named_parameters()), "optimizer": training, "epoch": 3}),
        saved({"x": torch.ones(5).to(torch.float8_e4m3fn), "y": torch.ones(3, dtype=torch.bfloat16)}),
    ]


def change(data: bytes, pick: random.Random) -> bytes:
    """Bytes of the file, of its pickle or of its directory changed; the archive is put together again where it must."""
    kind = pick.randrange(5)
    if kind == 0:  # the pickle alone, in a whole archive
        records = records_of(data)
        records["data.pkl"] = _flipped(records["data.pkl"], pick)
        return archive_of(records)
    if kind == 1:  # one opcode taken out, doubled or exchanged
        records = records_of(data)
        table = bytearray(records["data.pkl"])
        place = pick.randrange(len(table))
        table[place : place + pick.randrange(3)] = pick.choice((b"", b"\x85", b"R", b"h\x00", b"u", b"(", b"0", b"2"))
        records["data.pkl"] = bytes(table)
        return archive_of(records)
    if kind == 2:
        return _flipped(data, pick)
    if kind == 3:  # a zip header, local or of the directory, or what ends the directory
        headers = [found.start() for found in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", data)]
        start = pick.choice(headers)
        return data[:start] + _flipped(data[start : start + 46], pick) + data[start + 46 :]
    stop = pick.randrange(len(data))
    return data[:stop] + (data[pick.randrange(len(data)) :] if pick.random() < 0.5 else b"")


def _flipped(data: bytes, pick: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(pick.choice((1, 1, 1, 2, 4))):
        place = pick.randrange(len(changed))
        changed[place] = pick.choice((changed[place] ^ (1 << pick.randrange(8)), 0, 255, pick.randrange(256)))
    return bytes(changed)


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Outcomes by name. Anything but "refused" and "equal" is printed with its number."""
    originals = seeds()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.bin"
        for number in range(cases):
            pick = random.Random(f"{seed}/{number}")
            file.write_bytes(change(pick.choice(originals), pick))
            try:
                check_equal(file)
                outcome = "equal"
            except FileFormatError:
                outcome = "refused"
            except Exception as error:
                outcome = "fault"
                print(f"case {number} of seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            outcomes[outcome] += 1
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counted = fuzz(arguments.cases, arguments.seed)
    print(dict(counted))
    sys.exit(1 if counted["fault"] else 0)
