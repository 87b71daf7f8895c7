"""Merge and materialise: the whole jobs behind `adapter-merge merge` and `adapter-merge delta`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .binding import BoundAdapter, bind
from .cards import adapter_table, card
from .checkpoint import open_checkpoint
from .devices import choose_device
from .engine import Progress, execute
from .errors import InputError
from .formats import ReadOptions, open_adapter
from .output import MANIFEST, check_output, check_space, manifest, sha256, staged, write_json, write_text
from .plan import INDEX, MergePlan, plan_delta, plan_merge

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LOST_WARNING = 0.5


def open_pair(
    base: str | Path | None,
    adapter: str | Path,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
) -> BoundAdapter:
    """`adapter` bound to `base`; without a base, a checkpoint that holds its own (DCFT reference)."""
    checkpoint = open_checkpoint(base) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    if checkpoint is None:
        checkpoint = opened.own_base
        if checkpoint is None:
            raise InputError(
                f"{adapter}: is an adapter alone",
                expected="BASE and ADAPTER",
                hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
            )
    return bind(opened, checkpoint, base_kind)


def adapter_sha256(adapter: Adapter) -> str:
    """sha256 over the adapter's files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(adapter.files):
        digest.update(f"{file.name}\0{sha256(file)}\0".encode())
    return digest.hexdigest()


def describe_inputs(adapters: tuple[BoundAdapter, ...]) -> dict[str, Any]:
    """The manifest's account of base and adapters."""
    base = adapters[0].base
    return {
        "base": {
            "name": base.config.get("_name_or_path") or adapters[0].adapter.base_name or base.folder.name,
            "path": str(base.folder),
            "fingerprint": base.fingerprint,
        },
        "adapters": [
            {
                "name": bound.adapter.folder.resolve().name,
                "path": str(bound.adapter.folder),
                "format": bound.adapter.format,
                "method": bound.adapter.method,
                "modules": len(bound.modules),
                "replacements": sorted(bound.replacements),
                "base_kind": bound.base_kind,
                "evidence": bound.evidence,
                "sha256": adapter_sha256(bound.adapter),
            }
            for bound in adapters
        ],
    }


def merge(
    base: str | Path | None,
    adapter: str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the merged model to `output` and return its manifest.

    base: model folder or hub id; None when `adapter` is a DCFT reference checkpoint, which holds its base.
    dtype: float32, float16 or bfloat16 for all float tensors of the output; None keeps each tensor's own.
    base_kind: original or residual (PiSSA and DuDe); None decides by evidence.
    progress: called with the bytes of each finished tensor.
    Raises AdapterMergeError (see errors.py); nothing is left behind then.
    """
    output = Path(output)
    bound = open_pair(base, adapter, base_kind, options)
    check_output(output, overwrite, (bound.base.folder, bound.adapter.folder))
    bound.adapter.check_values()
    plan = plan_merge(bound.base, (bound,), DTYPES[dtype] if dtype else None)
    check_space(output, plan.nbytes)
    chosen = choose_device(device)
    content = manifest("merged model", describe_inputs((bound,)), {"dtype": dtype, "device": str(chosen)})
    if dry_run:
        return content | {"dry_run": True, "bytes": plan.nbytes}
    with staged(output, overwrite) as folder:
        figures = execute(plan, folder, chosen, workers, progress)
        _copy_side_files(plan, folder)
        if plan.config is not None:
            write_text(folder / "config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
        index = plan.index()
        if index is not None:
            write_json(folder / INDEX, index)
        content["layers"] = {name: asdict(figures[name]) for name in sorted(figures)}
        content["warnings"] = _rounding_warnings(content["layers"])
        write_text(folder / "README.md", _merged_card(content, output.name))
        content["files"] = _hashes(folder)
        write_json(folder / MANIFEST, content)
    return content


def delta(
    base: str | Path | None,
    adapter: str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write dW = W' - W0 of every adapted weight to `output`/delta.safetensors, float32 unless `dtype` is given."""
    output = Path(output)
    bound = open_pair(base, adapter, base_kind, options)
    check_output(output, overwrite, (bound.base.folder, bound.adapter.folder))
    bound.adapter.check_values()
    plan = plan_delta(bound, DTYPES[dtype or "float32"])
    check_space(output, plan.nbytes)
    chosen = choose_device(device)
    content = manifest("deltas", describe_inputs((bound,)), {"dtype": dtype or "float32", "device": str(chosen)})
    content["not_included"] = sorted(bound.replacements)
    if dry_run:
        return content | {"dry_run": True, "bytes": plan.nbytes}
    with staged(output, overwrite) as folder:
        execute(plan, folder, chosen, workers, progress)
        content["files"] = _hashes(folder)
        write_json(folder / MANIFEST, content)
    return content


def _copy_side_files(plan: MergePlan, folder: Path) -> None:
    for relative in plan.side_files:
        if relative.as_posix() in ("README.md", MANIFEST) or (
            relative.as_posix() == "config.json" and plan.config is not None
        ):
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base.folder / relative, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _rounding_warnings(layers: Mapping[str, Mapping[str, float]]) -> list[str]:
    lost = [name for name, figures in layers.items() if figures["rounding"] > LOST_WARNING]
    if not lost:
        return []
    return [
        f"rounding to the output dtype is more than {LOST_WARNING:.0%} of the delta in {len(lost)} of {len(layers)} "
        f"weights (first: {lost[0]}): write float32, or keep the adapter as factors"
    ]


def _merged_card(content: Mapping[str, Any], title: str) -> str:
    name = str(content["base"]["name"])
    body = f"""Made by adapter-merge {content["versions"]["adapter-merge"]}: the adapters below, merged into the base.

{adapter_table(content["adapters"])}

`{MANIFEST}` holds the inputs' hashes, the versions, and the size and rounding of every weight's change.

```python
from transformers import AutoModelForCausalLM  # or the class of your task
model = AutoModelForCausalLM.from_pretrained("{title}")
```
"""
    return card(title, name, "merge", "transformers", ["adapter-merge", "merge"], body)
