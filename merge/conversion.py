"""Any adapter file -> a safe folder: safetensors, a config that says everything, no base weights, trained heads kept.

DCFT and DuDe become our own format (native_format.py), everything of LoRA's family a PEFT folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import AdaptedModule, Adapter
from .binding import BoundAdapter, bind
from .cards import adapter_table, card
from .checkpoint import open_checkpoint
from .dcft import DcftModule
from .dude import orthonormal_factors, principal_factors
from .errors import InputError, UnsupportedError
from .factors import adapter_only
from .formats import ReadOptions, open_adapter
from .lora import LoraModule
from .merging import describe_inputs
from .native_format import FORMAT_VERSION
from .output import MANIFEST, check_output, manifest, sha256, staged, write_json, write_text
from .peft_folder import saved_modules
from .peft_format import PREFIX
from .tensors import TORCH_DTYPES, read_tensor, write_safetensors

SAFE_FORMATS = ("PEFT folder", "adapter-merge folder")


def convert(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write `adapter` to `output` as a safe folder and return the manifest.

    base: needed for a PEFT DuDe folder (its initial factors and its residual's dtype are stored, so that no SVD has
    to be repeated); for a DCFT checkpoint it tells trained heads from base weights.
    """
    output = Path(output)
    checkpoint = open_checkpoint(base) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    bound = bind(opened, checkpoint, base_kind) if checkpoint is not None else None
    principal = [m for m in opened.modules if isinstance(m, LoraModule) and m.initial is not None]
    if opened.method == "DuDe" and bound is None and any(not m.initial.refs for m in principal if m.initial):
        raise InputError(
            f"{adapter}: a DuDe folder of PEFT does not say what it was trained beside",
            expected="--base BASE, the original or the residual",
            hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
        )
    inputs = (opened.folder,) if checkpoint is None else (opened.folder, checkpoint.folder)
    check_output(output, overwrite, inputs)
    opened.check_values()
    described = describe_inputs((bound,)) if bound is not None else adapter_only(opened)
    content = manifest("adapter", described, {})
    config, tensors = _content(opened, bound)
    if dry_run:
        return content | {"dry_run": True}
    with staged(output, overwrite) as folder:
        write_json(folder / "adapter_config.json", config)
        write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        body = f"Converted by adapter-merge from:\n\n{adapter_table(content['adapters'])}\n"
        text = card(output.name, opened.base_name, "adapter", "peft", ["adapter-merge", opened.method.lower()], body)
        write_text(folder / "README.md", text)
        content["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, content)
    return content


def _content(opened: Adapter, bound: BoundAdapter | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors."""
    common = {
        "base_model_name_or_path": opened.base_name,
        "task_type": opened.config.get("task_type"),
        "target_modules": _targets(opened),
        "modules_to_save": saved_modules({name.rpartition(".")[0] for name in opened.replacements}, opened),
    }
    tensors: dict[str, Tensor] = {}
    if all(isinstance(module, DcftModule) for module in opened.modules):
        config = _dcft(opened.modules, tensors)
    elif all(_is_plain(module) for module in opened.modules) and opened.format in SAFE_FORMATS:
        config = _dude(opened, bound, tensors) if opened.method == "DuDe" else _lora(opened, tensors)
    else:
        raise UnsupportedError(
            f"{opened.folder}: {opened.method} in a {opened.format} has no safe folder of its own",
            hint="adapter-merge factor writes its exact LoRA-equivalent factors, merge takes it as it is",
        )
    for name, ref in opened.replacements.items():
        tensors[f"{PREFIX}{name}"] = read_tensor(ref)
    return {**config, **{key: value for key, value in common.items() if key not in config}}, tensors


def _is_plain(module: AdaptedModule) -> bool:
    """True for what PEFT's LoRA tensors, and nothing beside them, say in full."""
    if not isinstance(module, LoraModule) or module.parameter != "weight":
        return False
    return module.e is None and module.frozen is None and not module.own_magnitude and module.magnitude_dim == 0


def _targets(opened: Adapter) -> Any:
    targets = opened.config.get("target_modules")
    return targets if isinstance(targets, list | str) else sorted(module.name for module in opened.modules)


def _dcft(modules: tuple[AdaptedModule, ...], tensors: dict[str, Tensor]) -> dict[str, Any]:
    alphas, kernels, strides, ranks = set(), set(), set(), set()
    for module in modules:
        assert isinstance(module, DcftModule)
        alphas.add(module.alpha)
        kernels.add(module.kernel)
        strides.add(module.stride)
        ranks.add(module.r)
        stated = module.ranknum
        number = torch.tensor([stated]) if isinstance(stated, float) else read_tensor(stated).reshape(-1)
        for role, tensor in (
            ("lora_A", read_tensor(module.a)),
            ("lora_B", read_tensor(module.b)),
            ("lora_C", read_tensor(module.c)),
            ("ranknum", number.to(torch.float32)),
        ):
            tensors[f"{PREFIX}{module.name}.{role}"] = tensor
        if module.bias is not None:
            tensors[f"{PREFIX}{module.name}.lora_C.bias"] = read_tensor(module.bias)
    uniform = strides if len(strides) == 1 else None
    if uniform is None and strides != kernels:
        raise UnsupportedError(
            "the modules' strides differ from each other and from their kernels",
            expected="one stride for all modules, or stride == kernel",
            got=str(sorted(strides)),
        )
    return {
        "peft_type": "DCFT",
        "format_version": FORMAT_VERSION,
        "r": max(ranks),
        "kernel_size": list(kernels.pop()) if len(kernels) == 1 else None,
        "stride": list(next(iter(uniform))) if uniform else None,
        "lora_alpha": alphas.pop(),
    }


def _lora_tensors(modules: tuple[AdaptedModule, ...], tensors: dict[str, Tensor]) -> None:
    for module in modules:
        assert isinstance(module, LoraModule)
        a, b = ("lora_embedding_A", "lora_embedding_B") if module.embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{module.name}.{a}"] = read_tensor(module.a)
        tensors[f"{PREFIX}{module.name}.{b}"] = read_tensor(module.b)
        if module.magnitude is not None:
            tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"] = read_tensor(module.magnitude).reshape(-1)


def _lora(opened: Adapter, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's own config carries on: only the tensors' file changes."""
    _lora_tensors(opened.modules, tensors)
    return dict(opened.config)


def _dude(opened: Adapter, bound: BoundAdapter | None, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The DuDe folder; on an original base with the factors at initialisation, found again by the same SVD."""
    if bound is None:  # the folder had its initial factors already
        original, dtype = True, _stored_dtype(opened)
    else:
        original = bound.base_kind == "original"
        dtype = TORCH_DTYPES[bound.modules[0].weight.dtype]
    _lora_tensors(opened.modules, tensors)
    if original:
        for item in bound.modules if bound is not None else ():
            module = item.module
            assert isinstance(module, LoraModule) and module.initial is not None
            if not module.initial.refs:
                weight = item.oriented_weight().to(torch.float32)
                again = orthonormal_factors if module.initial.method == "qr" else principal_factors
                b, a = again(weight, module.rank, module.scale)
                tensors[f"{PREFIX}{module.name}.lora_A_init.weight"] = a.contiguous()
                tensors[f"{PREFIX}{module.name}.lora_B_init.weight"] = b.contiguous()
        for module in opened.modules:
            assert isinstance(module, LoraModule)
            if module.initial is not None and module.initial.a is not None and module.initial.b is not None:
                tensors[f"{PREFIX}{module.name}.lora_A_init.weight"] = read_tensor(module.initial.a)
                tensors[f"{PREFIX}{module.name}.lora_B_init.weight"] = read_tensor(module.initial.b)
    kept: Mapping[str, Any] = opened.config
    return {
        "peft_type": "DUDE",
        "format_version": FORMAT_VERSION,
        "r": kept.get("r"),
        "lora_alpha": kept.get("lora_alpha"),
        "use_rslora": bool(kept.get("use_rslora")),
        "rank_pattern": kept.get("rank_pattern") or {},
        "alpha_pattern": kept.get("alpha_pattern") or {},
        "fan_in_fan_out": opened.fan_in_fan_out,
        "base": "original" if original else "residual",
        "residual_dtype": str(dtype).removeprefix("torch."),
    }


def _stored_dtype(opened: Adapter) -> torch.dtype:
    for module in opened.modules:
        if isinstance(module, LoraModule) and module.initial is not None and module.initial.dtype is not None:
            return TORCH_DTYPES[module.initial.dtype]
    raise InputError(f"{opened.folder}: the dtype of its residual is unknown", hint="pass --base BASE")
