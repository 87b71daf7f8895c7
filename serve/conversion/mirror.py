"""A local copy of an adapter folder on object storage or on the hub, renewed while a server runs."""

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
SECONDS = 30.0  # between two looks at the source
STATE = ".mirror.json"  # the version of each adapter that is in the folder
PATIENCE = 600.0  # seconds to wait for another server that renews the same folder


class Mirror:
    """The adapters below `source`, one folder each: s3://bucket/adapters, or hf://org/name with adapters in folders.

    folder: the local copy; the server takes it as its --adapter-dir.
    """

    def __init__(self, source: str) -> None:
        self.source = source.removeprefix("hf://").rstrip("/")
        key = hashlib.sha256(self.source.encode()).hexdigest()[:16]
        self.folder = cache_folder() / "mirrors" / key / "adapters"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def renew(self) -> list[str]:
        """Bring the folder up to date; return the names that are new, changed or gone. Raises InputError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, patience=PATIENCE):
            versions, get = self._look()
            state = self.folder / STATE
            before: dict[str, str] = json.loads(state.read_text()) if state.is_file() else {}
            present = {name: version for name, version in before.items() if (self.folder / name).is_dir()}
            changed = sorted(name for name in versions if versions[name] != present.get(name))
            gone = sorted(set(present) - set(versions))
            for name in changed:
                self._replace(name, get(name))
            for name in gone:
                self._remove(name)
            temporary = state.with_suffix(".new")
            temporary.write_text(json.dumps(versions))
            temporary.replace(state)
        return changed + gone

    def start(self, say: Callable[[str], None]) -> None:
        """Look at the source every SECONDS, on a thread, until `stop`; a failure is said once and tried again."""

        def run() -> None:
            failed = False
            while not self._stop.wait(SECONDS):
                try:
                    changed = self.renew()
                except (AdapterMergeError, OSError) as error:
                    if not failed:
                        say(f"{self.source} cannot be looked at, its adapters stay as they are: {error}")
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

    def _look(self) -> tuple[dict[str, str], Callable[[str], Path]]:
        """Return the version of every adapter at the source, and what downloads one of them."""
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
            raise InputError(f"{self.source}: not a repository of adapters", expected="org/name or org/name@revision")
        commit, names = list_folders(match["repo"], match["revision"])
        return dict.fromkeys(names, commit), lambda name: download(match["repo"], commit, name)

    def _replace(self, name: str, copy: Path) -> None:
        """Put the files of `copy` into the folder under `name`, in the place of those that were there."""
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
