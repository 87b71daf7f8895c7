"""Ways to spoil an artefact, each on a copy of its folder, by its files alone.

A sabotage takes tensors from the files (artefact_files.py), never from what a check looks at, and says what it changed.
One that cannot be done to an artefact (it has no two tensors of one shape in two layers, no untouched tensor) says so
with NotApplicableError; what changes no value is not applicable either.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from artefact_files import Place, tensors_in, write_tensor
from torch import Tensor

MANIFEST = "adapter_merge.json"
HEADS = ("lm_head", "classifier", "score", "embed_tokens", "wte", "pooler")


class NotApplicableError(Exception):
    """There is nothing of the kind in this artefact."""


Values = dict[Place, Tensor]


def zero(values: Values, source: random.Random) -> Values:
    """A whole tensor becomes zero."""
    place = choose(values, source, lambda value: bool(value.any()))
    return {place: torch.zeros_like(values[place])}


def scale(values: Values, source: random.Random) -> Values:
    """A whole tensor times 1.02."""
    place = choose(values, source, lambda value: bool(value.any()))
    return {place: values[place] * 1.02}


def negate_row(values: Values, source: random.Random) -> Values:
    """The first row of a matrix that is not zero changes its sign."""
    place = choose(values, source, lambda value: value.dim() >= 2 and bool(value.any()))
    changed = values[place].clone()
    rows = changed.reshape(-1, changed.shape[-1])
    row = int(rows.any(1).nonzero()[0])
    rows[row] *= -1
    return {place: rows.reshape(changed.shape)}


def swap_layers(values: Values, source: random.Random) -> Values:
    """Two tensors of the same name but for the layer's number change places."""
    alike: dict[tuple[str, ...], list[Place]] = {}
    for place in values:
        stem = re.sub(r"(?<=[._/])\d+(?=[._/])", "#", place.name)
        if stem != place.name and bool(values[place].any()):
            alike.setdefault((stem, str(place.shape), str(place.dtype)), []).append(place)
    pairs = [
        (group[0], other) for group in alike.values() for other in group[1:]
        if not torch.equal(values[group[0]], values[other])
    ]  # fmt: skip
    if not pairs:
        raise NotApplicableError("no two layers hold tensors of one shape")
    one, two = source.choice(pairs)
    return {one: values[two].clone(), two: values[one].clone()}


def nudge(values: Values, source: random.Random) -> Values:
    """One element, by a fifth of the tensor's largest."""
    place = choose(values, source, lambda value: bool(value.any()))
    changed = values[place].clone()
    flat = changed.reshape(-1)
    flat[source.randrange(flat.numel())] += 0.2 * flat.abs().max()
    return {place: changed}


def nudge_untouched(values: Values, source: random.Random, base: Values) -> Values:
    """One element of a tensor that the artefact has from the base as it was."""
    kept = {place for place, value in values.items() if any(_equal(value, other) for other in base.values())}
    if not kept:
        raise NotApplicableError("no tensor of the base lies in it")
    return nudge({place: values[place] for place in kept}, source)


def nudge_head(values: Values, source: random.Random) -> Values:
    """One element of a bias, a norm, a head or an embedding."""
    heads = {
        place: value for place, value in values.items()
        if value.dim() == 1 or any(part in HEADS for part in place.name.split("."))
    }  # fmt: skip
    if not heads:
        raise NotApplicableError("no bias, norm, head or embedding in it")
    return nudge(heads, source)


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)


def choose(values: Values, source: random.Random, fits: Callable[[Tensor], bool]) -> Place:
    """One of the tensors that fit, by the seed."""
    places = [place for place, value in values.items() if fits(value)]
    if not places:
        raise NotApplicableError("no tensor for it")
    return source.choice(places)


TENSOR_SABOTAGES: dict[str, Callable[[Values, random.Random], Values]] = {
    "zeroed": zero,
    "x 1.02": scale,
    "row negated": negate_row,
    "layers swapped": swap_layers,
    "one element": nudge,
    "head or bias": nudge_head,
}


def spoil(kind: str, folder: Path, copy: Path, seed: int, base: Mapping[Place, Tensor] | None = None) -> str:
    """Copy `folder` to `copy` and change tensors of the copy; which ones. Raises NotApplicableError.

    The manifest's hashes are made true again: what is proved then is the proof, not the hash.
    """
    values = tensors_in(folder)
    source = random.Random(f"{seed} {kind}")
    if kind == "untouched":
        changed = nudge_untouched(values, source, dict(base or {}))
    else:
        changed = TENSOR_SABOTAGES[kind](values, source)
    changed = {place: value for place, value in changed.items() if not torch.equal(value, values[place])}
    if not changed:
        raise NotApplicableError("changes no value")
    copy_folder(folder, copy)
    for place, value in changed.items():
        write_tensor(copy, place, value)
    rehash(copy)
    return ", ".join(f"{place.file}: {place.name}" for place in changed)


def copy_folder(folder: Path, copy: Path) -> None:
    """A copy that may be written to."""
    shutil.copytree(folder, copy)


def rehash(folder: Path) -> None:
    """Write the files' own hashes into the manifest, where it has any."""

    def renewed(manifest: dict[str, Any]) -> None:
        files = manifest.get("files") or {}
        for name, entry in files.items():
            sha = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            files[name] = {**entry, "sha256": sha} if isinstance(entry, dict) else sha

    edit_manifest(folder, renewed)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest in place; nothing where there is none."""
    file = folder / MANIFEST
    if file.is_file():
        content = json.loads(file.read_text("utf-8"))
        change(content)
        file.write_text(json.dumps(content), "utf-8")


# -- manifests ---------------------------------------------------------------------------------------------------------


def _claim_inexact(manifest: dict[str, Any]) -> None:
    """The manifest says of itself that nothing in it is exact, and that errors of any size are known."""
    manifest["exact"] = False
    for figures in (manifest.get("layers") or {}).values():
        for key in figures:
            if isinstance(figures[key], float):
                figures[key] = 1e6
    for key, value in (manifest.get("certificate") or {}).items():
        if isinstance(value, float):
            manifest["certificate"][key] = 1e6


def _claim_kind(manifest: dict[str, Any]) -> None:
    manifest["artefact"] = "factors" if manifest.get("artefact") == "adapter" else "adapter"


def _claim_base(manifest: dict[str, Any]) -> None:
    if not (manifest.get("base") or {}).get("fingerprint"):
        raise NotApplicableError("the manifest names no fingerprint of a base")
    manifest["base"]["fingerprint"] = hashlib.sha256(b"another base").hexdigest()


def _claim_adapter(manifest: dict[str, Any]) -> None:
    adapters = manifest.get("adapters")
    if not adapters:
        raise NotApplicableError("the manifest names no adapter")
    for entry in adapters.values() if isinstance(adapters, dict) else adapters:
        entry["sha256"] = hashlib.sha256(b"another adapter").hexdigest()


def _claim_file(manifest: dict[str, Any]) -> None:
    files = manifest.get("files")
    if not files:
        raise NotApplicableError("the manifest holds no hashes")
    name, wrong = sorted(files)[-1], hashlib.sha256(b"another file").hexdigest()
    files[name] = {**files[name], "sha256": wrong} if isinstance(files[name], dict) else wrong


MANIFEST_SABOTAGES: dict[str, tuple[bool, Callable[[dict[str, Any]], None]]] = {  # with a weight spoiled, the edit
    "manifest covers a weight, inexact": (True, _claim_inexact),
    "manifest covers a weight, kind": (True, _claim_kind),
    "manifest, base": (False, _claim_base),
    "manifest, adapter": (False, _claim_adapter),
    "manifest, file": (False, _claim_file),
}


def forge(kind: str, folder: Path, copy: Path) -> str:
    """Copy `folder` to `copy` and edit the copy's manifest; with it a tensor, times 100, that the edit is to cover."""
    if not (folder / MANIFEST).is_file():
        raise NotApplicableError("it has no manifest")
    spoiled, edit = MANIFEST_SABOTAGES[kind]
    if not spoiled:
        copy_folder(folder, copy)
        edit_manifest(copy, edit)
        return "the manifest alone"
    values = tensors_in(folder)
    place = choose(values, random.Random(kind), lambda value: value.dim() >= 2 and bool(value.any()))
    copy_folder(folder, copy)
    write_tensor(copy, place, values[place] * 100)
    edit_manifest(copy, edit)
    rehash(copy)
    return f"{place.file}: {place.name}"
