"""Restoring of a merged model's base, bit for bit, from a pre-image or the original base: `adapter-merge restore`."""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from adapter_merge.errors import FileFormatError, InputError, MismatchError, Problem, raise_all
from adapter_merge.files.hashing import hash_files
from adapter_merge.files.input_snapshot import InputSnapshot
from adapter_merge.files.json_types import TEXT, Each, Kind, Schema, Stated, check_types
from adapter_merge.files.links import can_link, link_file
from adapter_merge.outputs.leftovers import PREIMAGE_FOLDER
from adapter_merge.outputs.manifest import MANIFEST, read_manifest
from adapter_merge.outputs.preimage import SIDE, VERSION, inflate
from adapter_merge.outputs.staging import check_output, check_space, nearest_folder, staged
from adapter_merge.storage.checkpoint import plain_name, read_json
from adapter_merge.storage.safetensors_header import TensorRef, read_header
from adapter_merge.storage.tensor_io import pread_into

from .options import RestoreOptions
from .results import RestoreResult

COPY_BYTES = 1 << 20
# Fields of a frame: first byte in the tensor, number of bytes, offset in the .bin file, stored sizes of the byte
# planes, and whether the bytes are an XOR difference to the merged tensor.
FRAME = (int, int, int, list, bool)


def _are_frames(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(frame, list)
        and tuple(map(type, frame)) == FRAME
        and min(frame[:3]) >= 0
        and all(type(size) is int for size in frame[3])
        for frame in value
    )


PREIMAGE: Schema = {
    "source": Stated(TEXT),
    "header": Stated(TEXT),
    "places": Stated(Each(TEXT)),
    "frames": Stated(Each(Kind("a list of frames", _are_frames))),
}
Progress = Callable[[int], None]


def restore(
    merged: str | Path,
    output: str | Path,
    options: RestoreOptions = RestoreOptions(),
    *,
    progress: Progress | None = None,
) -> RestoreResult:
    """Write the base of `merged` to `output`, bit for bit, and check each file against the manifest's sha256.

    The bytes come from `options.base`, or from the pre-image that the merge kept. progress: called with the bytes of
    each file. Raises InputError where neither a base nor a pre-image exists, MismatchError where the base is another
    model, FileFormatError where a restored file does not have the manifest's sha256; no output is left behind then.

    Example:
        >>> sorted(restore("merged", "base-again", RestoreOptions(base="base")).files)[0]
        'config.json'
    """
    merged, output, base = Path(merged), Path(output), options.base
    manifest = read_manifest(merged)
    expected: dict[str, str] = ((manifest or {}).get("base") or {}).get("files") or {}
    if not expected:
        raise InputError(
            f"{merged}: does not state the files of its base",
            expected=f"an {MANIFEST} with the hashes of the base's files",
            hint="was it merged by adapter-merge, with hashes?",
        )
    names = [_check_inside(name, merged / MANIFEST) for name in expected]
    check_output(output, options.overwrite, (merged, *([Path(base)] if base is not None else [])))
    if base is not None:
        _check_base(Path(base), expected)
        files, parent = [Path(base) / name for name in names], nearest_folder(output)
        check_space(output, sum(file.stat().st_size for file in files if not can_link(file, parent, options.link)))
    elif not (merged / PREIMAGE_FOLDER).is_dir():
        raise InputError(
            f"{merged}: holds no pre-image of its base",
            expected="the original base, or a merge made with --keep-preimage",
            hint=f"--base {manifest['base'].get('path')}" if manifest else None,
        )
    if options.dry_run:
        return RestoreResult(output, dict(expected))
    sources = [
        merged / MANIFEST,
        *(path for name in names if (path := (Path(base) if base is not None else merged) / name).is_file()),
    ]
    inputs = InputSnapshot(sources, may_be_linked=True).without_link_times()
    with staged(output, options.overwrite, inputs) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if base is not None:
            for name in names:
                _copy(Path(base) / name, folder / name, options.link)
                if progress is not None:
                    progress((folder / name).stat().st_size)
        else:
            _rebuild(merged, folder, names, progress)
        restored = hash_files(folder / name for name in names)
        raise_all(
            [
                Problem(f"{name}: the restored file differs from the base", expected[name], restored[folder / name],
                        "the merged model or its pre-image was changed: adapter-merge verify shows which file")
                for name in names
                if restored[folder / name] != expected[name]
            ],
            FileFormatError,
        )  # fmt: skip
    return RestoreResult(output, dict(expected))


def _check_inside(name: str, source: Path) -> str:
    """Return `name`. Raises FileFormatError where it leads outside the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise FileFormatError(f"{source}: names a file outside its folder", got=repr(name))
    return name


def _check_base(base: Path, expected: dict[str, str]) -> None:
    """Raise MismatchError with every file of `base` that is missing or does not have the expected sha256."""
    problems = [Problem(f"{base}: {name} is missing") for name in expected if not (base / name).is_file()]
    raise_all(problems, MismatchError)
    found = hash_files(base / name for name in expected)
    raise_all(
        [
            Problem(f"{base / name}: is not the file that was merged", f"sha256 {sha}", f"sha256 {found[base / name]}")
            for name, sha in expected.items()
            if found[base / name] != sha
        ],
        MismatchError,
    )


def _copy(source: Path, target: Path, link: str) -> None:
    """Link `source` to `target` where `link` allows it, else copy it and flush it to the disk."""
    if not link_file(source, target, link):
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())


def _rebuild(merged: Path, folder: Path, names: list[str], progress: Progress | None) -> None:
    """Write the base's files: weights from the pre-image, replaced files from its side folder, others from `merged`."""
    indices = sorted((merged / PREIMAGE_FOLDER).glob("*.json"))
    weights = {}
    for path in indices:
        content = read_json(path)
        check_types(content, PREIMAGE, path)
        if content.get("version") != VERSION:
            raise FileFormatError(
                f"{path}: unknown version of the pre-image", expected=str(VERSION), got=str(content.get("version"))
            )
        weights[plain_name(content["source"], path)] = (path, content)
    side = merged / PREIMAGE_FOLDER / SIDE
    for name in names:
        if name not in weights:
            replaced = side / name
            source = replaced if replaced.is_file() else merged / name
            if not source.is_file():
                raise FileFormatError(f"{merged}: {name} is neither in the merged model nor in its pre-image")
            _copy(source, folder / name, "copy")
    needed = [item for name, item in weights.items() if name in names]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))), thread_name_prefix="restore") as pool:
        for size in pool.map(lambda item: _rebuild_file(merged, folder, *item), needed):
            if progress is not None:
                progress(size)


def _rebuild_file(merged: Path, folder: Path, index: Path, content: dict[str, Any]) -> int:
    """Write one weights file of the base from its pre-image; return its size in bytes."""
    try:
        header_bytes = zlib.decompress(base64.b64decode(content["header"]))
    except (ValueError, zlib.error) as error:
        raise FileFormatError(f"{index}: the header in the pre-image is damaged ({error})") from error
    target = folder / content["source"]
    refs = _parse_header(header_bytes, target)
    places: dict[str, str] = content["places"]
    frames: dict[str, list[list[Any]]] = content["frames"]
    merged_tensors = {ref.name: ref for ref in read_header(merged / index.name.removesuffix(".json")).tensors}
    buffer = torch.empty(COPY_BYTES, dtype=torch.uint8)
    written = len(header_bytes)
    with (
        target.open("xb", buffering=COPY_BYTES) as stream,
        (merged / index.name.removesuffix(".json")).open("rb", buffering=0) as weights,
        index.with_suffix(".bin").open("rb", buffering=0) as kept,
    ):
        stream.write(header_bytes)
        for ref in refs:
            merged_tensor = merged_tensors.get(places.get(ref.name, ref.name))
            if ref.name not in frames and ref.nbytes:
                if merged_tensor is None or merged_tensor.nbytes != ref.nbytes:
                    raise FileFormatError(f"{index}: neither the pre-image nor the merged model holds {ref.name}")
                for first in range(0, ref.nbytes, COPY_BYTES):
                    piece = buffer[: min(COPY_BYTES, ref.nbytes - first)]
                    pread_into(weights.fileno(), piece.numpy().data, merged_tensor.start + first, weights.name)
                    stream.write(piece.numpy().data)
            position = 0
            for first, nbytes, offset, sizes, xor in frames.get(ref.name, ()):
                if first != position:
                    raise FileFormatError(f"{index}: {ref.name} has a gap at byte {position}")
                room, frame_bytes = os.fstat(kept.fileno()).st_size, sum(abs(size) for size in sizes)
                if offset + frame_bytes > room:
                    raise FileFormatError(
                        f"{kept.name}: ends before a frame of {ref.name}",
                        expected=f"{offset + frame_bytes}",
                        got=f"{room}",
                    )
                packed = bytearray(frame_bytes)
                pread_into(kept.fileno(), memoryview(packed), offset, kept.name)
                data = inflate(sizes, bytes(packed), nbytes)
                if xor:
                    data = _xor_with_merged(data, merged_tensor, first, weights.fileno(), weights.name)
                stream.write(data.numpy().data)
                position += nbytes
            if ref.name in frames and position != ref.nbytes:
                raise FileFormatError(f"{index}: {ref.name} ends at byte {position}", expected=str(ref.nbytes))
            written += ref.nbytes
        stream.flush()
        os.fsync(stream.fileno())
    return written


def _parse_header(header: bytes, target: Path) -> list[TensorRef]:
    """Return the tensors of a header, in the order of their offsets. Raises FileFormatError for a damaged header."""
    try:
        content = json.loads(header[8:])
        content.pop("__metadata__", None)
        return sorted(
            (
                TensorRef(
                    name,
                    target,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(len(header) + at for at in entry["data_offsets"]),
                )
                for name, entry in content.items()
            ),
            key=lambda ref: (ref.start, ref.stop),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{target.name}: the header in the pre-image is damaged") from error


def _xor_with_merged(
    data: torch.Tensor, merged_tensor: TensorRef | None, first: int, fd: int, name: str
) -> torch.Tensor:
    """Return `data` (n,) uint8 XOR the merged tensor's bytes from byte `first`. Raises FileFormatError without them."""
    if merged_tensor is None or first + data.numel() > merged_tensor.nbytes:
        raise FileFormatError(f"{name}: the merged tensor that a frame refers to is missing")
    merged = torch.empty_like(data)
    pread_into(fd, merged.numpy().data, merged_tensor.start + first, name)
    return data.bitwise_xor_(merged)
