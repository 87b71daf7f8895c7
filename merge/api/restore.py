"""The base's exact bytes back, from a kept pre-image or from the original base, proved by their hashes."""

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
from adapter_merge.outputs.preimage import SIDE, VERSION, inflate
from adapter_merge.outputs.staging import MANIFEST, check_output, check_space, nearest_folder, read_manifest, staged
from adapter_merge.storage.checkpoint import plain_name, read_json
from adapter_merge.storage.safetensors_header import TensorRef, read_header
from adapter_merge.storage.tensor_io import pread_into

from .options import RestoreOptions
from .results import RestoreResult

COPY_BYTES = 1 << 20
# Of a frame: byte of the tensor, bytes, place in the .bin file, stored sizes of its planes, whether it is a difference.
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
    """Write the base of `merged` to `output`, bit for bit, each file proved against the manifest's sha256.

    progress: called with the bytes of each file. Raises InputError without a base and a pre-image, MismatchError when
    the base is another model, FileFormatError when what was restored is not what the manifest promises.

    Example:
        >>> sorted(restore("merged", "base-again", RestoreOptions(base="base")).files)[0]
        'config.json'
    """
    merged, output, base = Path(merged), Path(output), options.base
    manifest = read_manifest(merged)
    expected: dict[str, str] = ((manifest or {}).get("base") or {}).get("files") or {}
    if not expected:
        raise InputError(
            f"{merged}: does not say what its base was",
            expected=f"an {MANIFEST} with the hashes of the base's files",
            hint="was it merged by adapter-merge, with hashes?",
        )
    names = [_inside(name, merged / MANIFEST) for name in expected]
    check_output(output, options.overwrite, (merged, *([Path(base)] if base is not None else [])))
    if base is not None:
        _check_base(Path(base), expected)
        files, beside = [Path(base) / name for name in names], nearest_folder(output)
        check_space(output, sum(file.stat().st_size for file in files if not can_link(file, beside, options.link)))
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
        found = hash_files(folder / name for name in names)
        raise_all(
            [
                Problem(f"{name}: what was restored is not the base's file", expected[name], found[folder / name],
                        "the merged model or its pre-image was changed: adapter-merge verify names the file")
                for name in names
                if found[folder / name] != expected[name]
            ],
            FileFormatError,
        )  # fmt: skip
    return RestoreResult(output, dict(expected))


def _inside(name: str, source: Path) -> str:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise FileFormatError(f"{source}: names a file outside its folder", got=repr(name))
    return name


def _check_base(base: Path, expected: dict[str, str]) -> None:
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
    if not link_file(source, target, link):
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())


def _rebuild(merged: Path, folder: Path, names: list[str], progress: Progress | None) -> None:
    """Weights from the pre-image, what the merge replaced from its side folder, the rest from the merged model."""
    indices = sorted((merged / PREIMAGE_FOLDER).glob("*.json"))
    weights = {}
    for path in indices:
        content = read_json(path)
        check_types(content, PREIMAGE, path)
        if content.get("version") != VERSION:
            raise FileFormatError(f"{path}: another version", expected=str(VERSION), got=str(content.get("version")))
        weights[plain_name(content["source"], path)] = (path, content)
    side = merged / PREIMAGE_FOLDER / SIDE
    for name in names:
        if name not in weights:
            kept = side / name
            source = kept if kept.is_file() else merged / name
            if not source.is_file():
                raise FileFormatError(f"{merged}: {name} is neither here nor in the pre-image")
            _copy(source, folder / name, "copy")
    wanted = [item for name, item in weights.items() if name in names]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))), thread_name_prefix="restore") as pool:
        for size in pool.map(lambda item: _rebuild_file(merged, folder, *item), wanted):
            if progress is not None:
                progress(size)


def _rebuild_file(merged: Path, folder: Path, index: Path, content: dict[str, Any]) -> int:
    """One weights file of the base; its size."""
    try:
        header_bytes = zlib.decompress(base64.b64decode(content["header"]))
    except (ValueError, zlib.error) as error:
        raise FileFormatError(f"{index}: the header in the pre-image is damaged ({error})") from error
    target = folder / content["source"]
    refs = _refs(header_bytes, target)
    places: dict[str, str] = content["places"]
    frames: dict[str, list[list[Any]]] = content["frames"]
    held = {ref.name: ref for ref in read_header(merged / index.name.removesuffix(".json")).tensors}
    buffer = torch.empty(COPY_BYTES, dtype=torch.uint8)
    written = len(header_bytes)
    with (
        target.open("xb", buffering=COPY_BYTES) as stream,
        (merged / index.name.removesuffix(".json")).open("rb", buffering=0) as weights,
        index.with_suffix(".bin").open("rb", buffering=0) as kept,
    ):
        stream.write(header_bytes)
        for ref in refs:
            now = held.get(places.get(ref.name, ref.name))
            if ref.name not in frames and ref.nbytes:
                if now is None or now.nbytes != ref.nbytes:
                    raise FileFormatError(f"{index}: holds nothing of {ref.name}, and the merged model neither")
                for first in range(0, ref.nbytes, COPY_BYTES):
                    piece = buffer[: min(COPY_BYTES, ref.nbytes - first)]
                    pread_into(weights.fileno(), piece.numpy().data, now.start + first, weights.name)
                    stream.write(piece.numpy().data)
            position = 0
            for first, nbytes, offset, sizes, xor in frames.get(ref.name, ()):
                if first != position:
                    raise FileFormatError(f"{index}: {ref.name} has a gap at byte {position}")
                room, need = os.fstat(kept.fileno()).st_size, sum(abs(size) for size in sizes)
                if offset + need > room:
                    raise FileFormatError(
                        f"{kept.name}: ends before a frame of {ref.name}", expected=f"{offset + need}", got=f"{room}"
                    )
                packed = bytearray(need)
                pread_into(kept.fileno(), memoryview(packed), offset, kept.name)
                data = inflate(sizes, bytes(packed), nbytes)
                if xor:
                    data = _xor(data, now, first, weights.fileno(), weights.name)
                stream.write(data.numpy().data)
                position += nbytes
            if ref.name in frames and position != ref.nbytes:
                raise FileFormatError(f"{index}: {ref.name} ends at byte {position}", expected=str(ref.nbytes))
            written += ref.nbytes
        stream.flush()
        os.fsync(stream.fileno())
    return written


def _refs(header: bytes, target: Path) -> list[TensorRef]:
    """The places of a header that `read_header` accepted when the base was merged."""
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


def _xor(data: torch.Tensor, now: TensorRef | None, first: int, fd: int, name: str) -> torch.Tensor:
    if now is None or first + data.numel() > now.nbytes:
        raise FileFormatError(f"{name}: the merged tensor that a frame refers to is not there")
    merged = torch.empty_like(data)
    pread_into(fd, merged.numpy().data, now.start + first, name)
    return data.bitwise_xor_(merged)
