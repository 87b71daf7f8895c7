"""Conversion of an adapter of any format into the folder that vLLM loads.

The command, loading at run time and offline use all call `Converter.obtain`. Adapters that vLLM could not serve are
refused from their headers, before anything is converted.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapter_merge.errors import (
    AdapterError,
    InputError,
    Problem,
    UnsupportedError,
    raise_all,
)

from .cache import ENTRY, Cache, Lease, compute_key
from .stated_settings import Stated, read_settings_beside

# The ranks that vLLM's --max-lora-rank takes (vllm/config/lora.py, 0.28 to 0.32).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MANIFEST = "adapter_merge.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# When the base is loaded, multi-head latent attention multiplies these into other weights, without the adapter.
ABSORBED = ("kv_b_proj",)
HEADS = ("score", "classifier")
NOT_LINEAR = ("embed_tokens", "lm_head", "wte", "wpe", "embed_out", "word_embeddings", "embed_in", *HEADS)


# (name, inode, size, mtime, ctime) of every file in a folder
Signature = tuple[tuple[str, int, int, int, int], ...]


class _ChangedError(Exception):
    """The adapter changed between its hash and its conversion."""


@dataclass(frozen=True)
class Served:
    """One converted adapter, ready for vLLM."""

    folder: Path
    rank: int
    targets: tuple[str, ...]  # last parts of the adapted modules' names
    form: str  # "lora" or "lora+row_scale"
    origin: str  # evidence of the base that the adapter was trained on
    lease: Lease | None = None
    seconds: float | None = None  # duration of the conversion; None when it was in the cache

    def release(self) -> None:
        """Release the lease on the folder."""
        if self.lease is not None:
            self.lease.release()


@dataclass(frozen=True)
class Outline:
    """The properties of an adapter that its headers and config show before it is converted."""

    source: Path
    method: str
    rank: int  # an upper bound
    targets: tuple[str, ...]
    ready: bool  # already a factor folder
    experts: bool  # adapts experts: written as expert_layout.py says
    key: str
    stated: Stated = field(default_factory=Stated)


def check_name(name: str) -> str:
    """Return `name` where it is a valid adapter name: no separators, no `..`, no leading dot. Raises InputError."""
    if NAME.fullmatch(name) is None or ".." in name:
        raise InputError(
            f"{name!r} cannot name an adapter",
            expected="letters, digits, dots, dashes and underscores, the first one a letter or digit",
        )
    return name


def locate(adapter: str | Path) -> Path:
    """Return an adapter's folder or file; a hub id is downloaded. Raises InputError where there is none."""
    from adapter_merge.storage.checkpoint import resolve

    return Path(adapter) if Path(adapter).is_file() else resolve(adapter)


def signature(*paths: Path) -> Signature:
    """Return (name, inode, size, mtime, ctime) of every file in these folders, which changes when a file does."""
    states = []
    for path in paths:
        for file in os.scandir(path) if path.is_dir() else (path,):
            states.append(file_signature(file))
    return tuple(sorted(states))


def file_signature(file: Path | os.DirEntry[str]) -> tuple[str, int, int, int, int]:
    """Return (name, inode, size, mtime, ctime) of one file; one system call."""
    about = file.stat()
    return (file.name, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


def why_no_heads(replacements: Iterable[str]) -> str:
    """Return why vLLM cannot store these replaced tensors per adapter; "" where it can, or where there are none.

    vLLM keeps one head per adapter for classifiers: one linear layer called score or classifier (vllm/lora/layers/
    classifier.py, from 0.32 on).
    """
    modules = {name.rpartition(".")[0] for name in replacements}
    if not modules:
        return ""
    if modules - set(HEADS) or len(modules) > 1 or f"{next(iter(modules))}.weight" not in replacements:
        return "vLLM stores one per adapter only for a classifier's head, a single layer named score or classifier"
    spec = find_spec("vllm")
    places = spec.submodule_search_locations if spec is not None else None
    if not any(Path(place, "lora", "layers", "classifier.py").is_file() for place in places or ()):
        return "this vLLM cannot store a head per adapter; 0.32 and later can"
    return ""


def allowed_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that is at least `rank`. Raises UnsupportedError above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise UnsupportedError(
        f"an adapter of rank {rank} is too large for vLLM's LoRA layers",
        expected=f"at most {RANKS[-1]}",
        hint="merge it into the base instead: adapter-merge merge",
    )


class Converter:
    """Converts adapters of one base into served folders, in a cache."""

    def __init__(self, base: str | Path, cache: Cache | None = None) -> None:
        from adapter_merge.storage.checkpoint import resolve

        self.name = str(base)
        self.base = resolve(base)
        self.cache = cache or Cache()

    @cached_property
    def checkpoint(self) -> Any:
        from adapter_merge.quantisation.dense_view import open_base

        return open_base(self.base)

    def linear_targets(self) -> tuple[str, ...]:
        """Return the last components of the names of linear weights in the base's layers (no embeddings, no heads)."""
        targets = set()
        for name, ref in self.checkpoint.tensors.items():
            module, _, leaf = name.rpartition(".")
            inside = re.search(r"\.\d+\.", name) is not None and ".experts." not in name
            if leaf == "weight" and len(ref.shape) == 2 and inside:
                targets.add(module.rsplit(".", 1)[-1])
        return tuple(sorted(targets - set(NOT_LINEAR)))

    def outline(self, adapter: str | Path, stated: Stated | None = None) -> Outline:
        """Read an adapter's headers without converting it. Raises AdapterMergeError where vLLM could not serve it."""
        from importlib.metadata import version

        from adapter_merge.combine.origin import bind_checked
        from adapter_merge.files.hashing import file_sha256
        from adapter_merge.formats.detection import open_adapter
        from adapter_merge.methods.peft_layer import PeftLayerModule

        from .expert_layout import adapts_experts, find_expert_problems, target_of

        source = locate(adapter)
        stated = (stated or Stated()).with_defaults(read_settings_beside(source))
        about = _factor_manifest(source)
        opened = open_adapter(source, stated.options, self.checkpoint)
        modules = [module.name for module in opened.modules]
        targets = tuple(sorted({target_of(name) for name in modules}))
        problems = []
        reason = why_no_heads(opened.replacements)
        if reason:
            names = ", ".join(list(opened.replacements)[:3])
            problems.append(
                Problem(
                    f"{source}: holds tensors that were trained in full ({names}): {reason}",
                    hint="merge it into the base instead: adapter-merge merge",
                )
            )
        strange = [name for name in modules if name.rsplit(".", 1)[-1] in NOT_LINEAR]
        if strange:
            problems.append(
                Problem(
                    f"{source}: adapts {', '.join(strange[:3])}; only linear layers are served exactly",
                    hint="merge it into the base instead: adapter-merge merge",
                )
            )
        experts = adapts_experts(opened.modules)
        if experts:
            bound = bind_checked(opened, self.checkpoint, stated.base_kind)
            problems += find_expert_problems(source, bound)
        held = self.checkpoint.tensors
        convolved = [name for name in modules if f"{name}.weight" in held and len(held[f"{name}.weight"].shape) > 2]
        if convolved:
            problems.append(
                Problem(
                    f"{source}: adapts {convolved[0]}, a convolution; vLLM adapts linear layers only",
                    hint="merge it into the base instead: adapter-merge merge",
                )
            )
        absorbed = [name for name in modules if name.rsplit(".", 1)[-1] in ABSORBED]
        if absorbed:
            problems.append(
                Problem(
                    f"{source}: adapts {absorbed[0]}, which vLLM merges into its attention kernels at start",
                    hint="merge it into the base instead: adapter-merge merge",
                )
            )
        dense = [m for m in opened.modules if isinstance(m, PeftLayerModule) and m.low_rank is None]
        if dense:
            problems.append(
                Problem(
                    f"{source}: {dense[0].kind} has no exact low-rank factors",
                    hint="merge it into the base, or serve the folder that factor --rank R writes",
                )
            )
        raise_all(problems, UnsupportedError)
        if not modules:
            raise AdapterError(f"{source}: holds no adapted module")
        files = opened.files
        if about is not None:
            files = tuple(file for file in sorted(source.iterdir()) if file.is_file())
        parts: dict[str, Any] = {
            "package": version("adapter-merge"),
            "base": self.checkpoint.fingerprint,
            "base files": self.checkpoint.state,  # row scales depend on every element of the base
            "files": {file.name: file_sha256(file) for file in files},
        }
        if stated.values:
            parts["stated"] = stated.identity()
        # On the original base the initial factors are subtracted, which adds their rank to that of the trained factors.
        subtracted = about is None and stated.base_kind != "residual"
        rank = max(
            module.factor_rank if subtracted and not isinstance(module, PeftLayerModule) else module.rank
            for module in opened.modules
        )
        return Outline(source, opened.method, rank, targets, about is not None, experts, compute_key(parts), stated)

    def obtain(self, adapter: str | Path, stated: Stated | None = None) -> Served:
        """Return the served folder of `adapter`, from the cache or converted now, with a lease on it.

        Raises AdapterMergeError for an adapter that cannot be served, or that changed during each of three conversions.
        """
        lease = self.cache.lease(Path(adapter))
        if lease is not None:
            return describe(lease)
        for _ in range(3):
            source = locate(adapter)
            before = signature(source)
            outline = self.outline(source, stated)
            watched = signature(*outline.stated.paths)
            spent: list[float] = []
            try:
                lease = self.cache.obtain(outline.key, partial(self._make, outline, (before, watched), spent))
            except _ChangedError:
                continue
            return replace(describe(lease), seconds=sum(spent) if spent else None)
        raise InputError(f"{adapter}: changed while it was read", hint="try again when its files are complete")

    def _make(
        self, outline: Outline, before: tuple[Signature, Signature], spent: list[float], folder: Path
    ) -> dict[str, Any]:
        """Write the served folder and return the content of its entry.json.

        Appends the duration in seconds to `spent`. Raises _ChangedError where the adapter's files have changed since
        they were hashed.
        """
        began = time.monotonic()
        if outline.ready:
            from adapter_merge.combine.origin import bind_checked
            from adapter_merge.formats.detection import open_adapter
            from adapter_merge.outputs.staging import copy_synced

            bound = bind_checked(open_adapter(outline.source, outline.stated.options, self.checkpoint), self.checkpoint)
            origin = bound.origin.text
            folder.mkdir()
            for name in ("adapter_config.json", "adapter_model.safetensors", "row_scale.safetensors", MANIFEST):
                if (outline.source / name).is_file():
                    copy_synced(outline.source / name, folder / name)
        else:
            from adapter_merge.api.factor import factor
            from adapter_merge.api.options import FactorOptions

            options = FactorOptions(base_kind=outline.stated.base_kind, reading=outline.stated.options, hash_base=False)
            made = factor(self.base, outline.source, folder, options)
            origin = made.as_json()["adapters"][0]["origin"]
        if outline.experts:
            from .expert_layout import write_single_experts

            write_single_experts(folder, self.checkpoint)
        if (signature(outline.source), signature(*outline.stated.paths)) != before:
            raise _ChangedError
        spent.append(time.monotonic() - began)
        return {
            "adapter": str(outline.source.absolute()),
            "base": self.name,
            "method": outline.method,
            "origin": origin,
            "stated": {
                key: str(value.absolute()) if isinstance(value, Path) else value
                for key, value in outline.stated.values.items()
            },
        }


def describe(lease: Lease) -> Served:
    """Return rank, targets and origin from the files of a served folder; releases the lease after an error."""
    try:
        return _describe(lease)
    except BaseException:
        lease.release()
        raise


def _describe(lease: Lease) -> Served:
    from safetensors import safe_open

    from .expert_layout import target_of

    config = json.loads((lease.folder / "adapter_config.json").read_text("utf-8"))
    rank, targets = 1, set()
    with safe_open(str(lease.folder / "adapter_model.safetensors"), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith(".lora_A.weight"):
                rank = max(rank, file.get_slice(key).get_shape()[0])
                targets.add(target_of(key.removesuffix(".lora_A.weight")))
    form = "lora+row_scale" if config.get("use_dora") else "lora"
    origin = str(json.loads((lease.folder / ENTRY).read_text("utf-8")).get("origin", "not recorded"))
    return Served(lease.folder, rank, tuple(sorted(targets)), form, origin, lease)


def inside(directory: Path, name: str) -> Path | None:
    """Return the folder `name` in `directory`; None where there is none.

    Raises InputError for a name that is not a plain folder name, and for links, of the folder or of a file in it, that
    lead out of `directory`.
    """
    check_name(name)
    folder = directory / name
    if not folder.is_dir():
        return None
    refuse_links_out(directory, folder)
    return folder


def refuse_links_out(root: Path, folder: Path) -> None:
    """Raise InputError where `folder`, or a file or folder in it, is a link that leads out of `root`."""
    resolved = root.resolve()
    for path in (folder, *(folder.rglob("*") if folder.is_dir() else ())):
        if not path.resolve().is_relative_to(resolved):
            raise InputError(
                f"{folder.name}: {path.name} is a link that leaves the adapter folder",
                expected=f"everything under {root}",
            )


def folders(directory: Path) -> list[str]:
    """Return the folder names in `directory` that are valid adapter names."""
    return sorted(path.name for path in directory.iterdir() if path.is_dir() and NAME.fullmatch(path.name))


def _factor_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a factor folder; None for any other folder."""
    from adapter_merge.storage.checkpoint import read_json

    file = folder / MANIFEST
    if not file.is_file():
        return None
    about = read_json(file)
    return about if about.get("artefact") == "factors" else None
