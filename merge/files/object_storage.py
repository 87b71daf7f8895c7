"""Models and adapters on object storage (s3://, gs://, az://): copies of the files that are read, and uploads.

fsspec's file systems do the requests. A copy is a folder in the cache (cache_folder.py) whose name is a hash of the
address and of the version (ETag or generation) of each file, so a copy never changes, and a second run reads no bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from adapter_merge.errors import InputError, OutputError

from .cache_folder import cache_folder
from .hub import select_files
from .installation import install_command
from .locks import locked

log = logging.getLogger(__name__)

T = TypeVar("T")
EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}  # of a URL's scheme: the extra with its client
VERSIONS = ("ETag", "etag", "generation")  # what the file systems call the version of an object
MANIFEST = "adapter_merge.json"
PIECE_BYTES = 16 << 20  # of one request
PARALLEL_FILES = 4
ATTEMPTS = 2  # in addition to the clients' own retries
FIRST_WAIT = 0.5  # seconds before the second attempt; each further wait is twice as long
PATIENCE = 3600.0  # seconds to wait for another process that downloads the same files
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class StoredObject:
    """One file below an address: its size in bytes and its version."""

    nbytes: int
    version: str


def is_url(name: str) -> bool:
    """Return True for an address such as s3://bucket/folder."""
    return URL.fullmatch(name) is not None


def fetch(url: str) -> Path:
    """Return a local copy of the model or adapter at `url`: its folder, or its file where `url` names a GGUF file.

    Only the files that are read are downloaded, in pieces. A piece whose connection breaks is requested again. After a
    killed run, the next one downloads only the missing bytes. Raises InputError for an unknown scheme, a missing
    client, an address without files, refused access, a full disk, and files that cannot be read or that change
    meanwhile.

    Example: fetch("s3://models/llama/adapters/german")
    """
    store, root = _open(url)
    objects = list_objects(url, store, root)
    if not objects:
        raise InputError(f"{url}: no such folder", hint="check the address, and the account's access to it")
    single = list(objects) == [""]
    names = [""] if single else select_files(list(objects))
    chosen = {name: objects[name] for name in names}
    stated = [url, *sorted((name, item.nbytes, item.version) for name, item in chosen.items())]
    key = hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:32]
    last = PurePosixPath(root).name
    place = cache_folder() / "objects" / key
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place, patience=PATIENCE):
            if not place.is_dir():
                _download(url, store, root, chosen, place)
    return place / last


def list_objects(url: str, store: Any = None, root: str | None = None) -> dict[str, StoredObject]:
    """Return all files below `url` by their names relative to it; the name is "" where `url` is a file itself."""
    if store is None:
        store, root = _open(url)
    assert root is not None
    entries: Mapping[str, Any] = _attempt(url, lambda: store.find(root, detail=True, refresh=True))
    objects = {}
    for path, about in entries.items():
        name = path.removeprefix(root).lstrip("/")
        if about.get("type") != "file" or (name == "" and path != root):
            continue
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
            raise InputError(f"{url}: holds a file outside its folder", got=repr(name))
        version = next((str(about[field]) for field in VERSIONS if about.get(field)), None)
        if version is None:
            raise InputError(f"{url}: the storage states no version of {name or root}", expected=" or ".join(VERSIONS))
        objects[name] = StoredObject(int(about["size"]), version)
    return objects


def check_address(url: str, replace: bool) -> None:
    """Raise OutputError or InputError where `url` cannot be written or, without `replace`, holds files already."""
    store, root = _open(url)
    if "/" not in root.strip("/"):
        raise OutputError(f"{url}: an output needs a folder of its own", expected=f"{url.rstrip('/')}/NAME")
    existing = list_objects(url, store, root)
    if existing and not replace:
        raise OutputError(
            f"{url}: holds {len(existing)} files already", hint="choose another address, or use --overwrite"
        )


def upload(folder: Path, url: str) -> str:
    """Copy the files of `folder` to `url`, the manifest last; return the URL. Files of other names there are an error.

    A reader that waits for adapter_merge.json therefore never sees half an output. Raises OutputError; `folder` stays.
    """
    store, root = _open(url)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    others = sorted(set(list_objects(url, store, root)) - set(files))
    if others:
        raise OutputError(
            f"{url}: holds {len(others)} files that the output does not have", got=", ".join(others[:5]),
            hint=f"remove them, or choose another address; {folder} is complete",
        )  # fmt: skip
    try:
        if MANIFEST in files and store.exists(f"{root}/{MANIFEST}"):
            _attempt(url, lambda: store.rm_file(f"{root}/{MANIFEST}"))
        for name in sorted(files, key=lambda name: (name == MANIFEST, name)):
            _attempt(url, lambda name=name: store.put_file(str(files[name]), f"{root}/{name}"))  # type: ignore[misc]
        stored = list_objects(url, store, root)
    except InputError as error:
        problem = error.problems[0]
        raise OutputError(
            f"{url}: the upload failed", got=problem.got or problem.cause, hint=f"{folder} is complete: upload it again"
        ) from error
    wrong = [name for name, path in files.items() if name not in stored or stored[name].nbytes != path.stat().st_size]
    if wrong:
        raise OutputError(f"{url}: {len(wrong)} files are missing or have another size", got=", ".join(wrong[:5]))
    return url


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of `url`, and its path there without a slash at the end."""
    match = URL.fullmatch(url)
    scheme = match["scheme"] if match is not None else ""
    if scheme not in EXTRAS:
        raise InputError(
            f"{url}: the scheme {scheme}:// is unknown", expected=", ".join(f"{name}://" for name in (*EXTRAS, "hf"))
        )
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        store, root = url_to_fs(url)
    except ImportError as error:
        raise InputError(
            f"{url}: the client of {scheme}:// is not installed", got=str(error), hint=install_command(EXTRAS[scheme])
        ) from error
    except ValueError as error:
        raise InputError(f"{url}: not an address", got=str(error)) from error
    return store, str(root).rstrip("/")


def _download(url: str, store: Any, root: str, chosen: Mapping[str, StoredObject], place: Path) -> None:
    """Download `chosen` files below `root` into the new folder `place`.

    A partial folder of an earlier run is completed.
    """
    partial = place.with_name(f".partial-{place.name}")
    folder = partial / PurePosixPath(root).name
    needed = sum(item.nbytes for item in chosen.values())
    present = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    partial.mkdir(exist_ok=True)
    free = shutil.disk_usage(partial).free
    if needed - present > free:
        raise InputError(
            f"{url}: too large for the cache's disk", expected=f"{(needed - present) / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB", hint="ADAPTER_MERGE_CACHE chooses another folder",
        )  # fmt: skip

    log.info("%s: downloading %d files, %.2f GB", url, len(chosen), (needed - present) / 1e9)

    def copy(name: str) -> None:
        target = folder / name if name else folder
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy_object(url, store, f"{root}/{name}" if name else root, target, chosen[name].nbytes)

    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        futures = [pool.submit(copy, name) for name in chosen]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    current = list_objects(url, store, root)
    changed = sorted(name for name, item in chosen.items() if current.get(name) != item)
    if changed:
        shutil.rmtree(partial)
        raise InputError(
            f"{url}: {len(changed)} files changed while they were downloaded", got=", ".join(changed[:5]),
            hint="run the command again",
        )  # fmt: skip
    partial.rename(place)


def _copy_object(url: str, store: Any, path: str, target: Path, nbytes: int) -> None:
    """Append the pieces of one object that `target` lacks."""
    with target.open("ab", buffering=0) as stream:
        if stream.tell() > nbytes:
            stream.truncate(0)
        while (first := os.fstat(stream.fileno()).st_size) < nbytes:
            stop = min(nbytes, first + PIECE_BYTES)
            piece = _attempt(url, lambda first=first, stop=stop: _read_piece(store, path, first, stop))  # type: ignore[misc]
            view = memoryview(piece)
            while view:
                view = view[stream.write(view) :]
        os.fsync(stream.fileno())


def _read_piece(store: Any, path: str, first: int, stop: int) -> bytes:
    piece: bytes = store.cat_file(path, start=first, end=stop)
    if len(piece) != stop - first:
        raise OSError(f"{path}: got {len(piece)} bytes instead of {stop - first}")
    return piece


def _attempt(url: str, request: Callable[[], T]) -> T:
    """Run a request, up to ATTEMPTS times where it fails for a temporary reason. Raises InputError."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except (FileNotFoundError, PermissionError) as error:
            cause = "no such folder" if isinstance(error, FileNotFoundError) else "access is refused"
            raise InputError(
                f"{url}: {cause}", got=_first_line(error), hint="check the address and the account's credentials"
            ) from error
        except Exception as error:  # each client raises exceptions of its own
            if type(error).__name__ == "NoCredentialsError" or attempt + 1 == ATTEMPTS:
                raise InputError(
                    f"{url}: cannot be read", got=f"{type(error).__name__}: {_first_line(error)}",
                    hint="run the command again: downloaded bytes are kept",
                ) from error  # fmt: skip
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
