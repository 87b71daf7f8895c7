"""A local copy of the adapters on object storage or in a hub repository, updated while a server runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from adapter_merge.errors import AdapterMergeError, InputError
from adapter_merge.files.cache_folder import cache_folder
from adapter_merge.files.hub import download, list_folders
from adapter_merge.files.locks import locked
from adapter_merge.files.object_storage import fetch, is_url, list_objects
from adapter_merge.storage.checkpoint import HUB_ID

log = logging.getLogger(__name__)
SECONDS = 30.0  # between two updates
STATE = ".mirror.json"  # the version of each adapter that is in the folder
PATIENCE = 600.0  # seconds to wait for another server that updates the same folder


class Mirror:
    """A local copy of the adapters below `source`, one folder per adapter.

    source: an address of object storage such as s3://bucket/adapters, or hf://org/name. folder: the local copy, which
    the server uses as its --adapter-dir.
    """

    def __init__(self, source: str) -> None:
        self.source = source.removeprefix("hf://").rstrip("/")
        key = hashlib.sha256(self.source.encode()).hexdigest()[:16]
        self.folder = cache_folder() / "mirrors" / key / "adapters"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def update(self) -> list[str]:
        """Update the folder; return the names of new, changed and removed adapters. Raises InputError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, patience=PATIENCE):
            versions, download_adapter = self._list_source()
            state = self.folder / STATE
            before: dict[str, str] = json.loads(state.read_text()) if state.is_file() else {}
            present = {name: version for name, version in before.items() if (self.folder / name).is_dir()}
            changed = sorted(name for name in versions if versions[name] != present.get(name))
            removed = sorted(set(present) - set(versions))
            for name in changed:
                self._replace(name, download_adapter(name))
            for name in removed:
                self._remove(name)
            temporary = state.with_suffix(".new")
            temporary.write_text(json.dumps(versions))
            temporary.replace(state)
        return changed + removed

    def start(self, say: Callable[[str], None]) -> None:
        """Start a thread that updates the folder every SECONDS until `stop`; repeated failures are reported once.

        say: called with a text for each report.
        """

        def run() -> None:
            failed = False
            while not self._stop.wait(SECONDS):
                try:
                    changed = self.update()
                except (AdapterMergeError, OSError) as error:
                    if not failed:
                        say(f"{self.source} cannot be read; the server keeps the adapters that it has: {error}")
                    failed = True
                    continue
                failed = False
                if changed:
                    say(f"{self.source}: {', '.join(changed)} changed")

        self._thread = threading.Thread(target=run, name="mirror", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _list_source(self) -> tuple[dict[str, str], Callable[[str], Path]]:
        """Return the version of every adapter at the source, and a function that downloads an adapter by its name."""
        if is_url(self.source):
            parts: dict[str, list[tuple[str, str]]] = {}
            for path, item in sorted(list_objects(self.source).items()):
                name, slash, rest = path.partition("/")
                if slash and rest and not name.startswith("."):
                    parts.setdefault(name, []).append((rest, item.version))
            versions = {name: hashlib.sha256(json.dumps(files).encode()).hexdigest() for name, files in parts.items()}
            return versions, lambda name: fetch(f"{self.source}/{name}")
        match = HUB_ID.fullmatch(self.source)
        if match is None or match["inside"]:
            raise InputError(
                f"{self.source}: not the name of a hub repository", expected="org/name or org/name@revision"
            )
        commit, names = list_folders(match["repo"], match["revision"])
        return dict.fromkeys(names, commit), lambda name: download(match["repo"], commit, name)

    def _replace(self, name: str, copy: Path) -> None:
        """Replace the adapter `name` in the folder by the files of `copy`."""
        fresh = self.folder / f".new-{name}"
        shutil.rmtree(fresh, ignore_errors=True)
        for file in sorted(copy.rglob("*")):
            if file.is_file():
                target = fresh / file.relative_to(copy)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(file.resolve(), target)
                except OSError:  # another file system
                    shutil.copy2(file, target)
        self._remove(name)
        fresh.rename(self.folder / name)

    def _remove(self, name: str) -> None:
        old = self.folder / f".old-{name}"
        shutil.rmtree(old, ignore_errors=True)
        if (self.folder / name).is_dir():
            (self.folder / name).rename(old)
            shutil.rmtree(old, ignore_errors=True)


def is_remote(source: str) -> bool:
    """Return True for an address of object storage, or of a hub repository as hf://org/name."""
    return source.startswith("hf://") or is_url(source)
