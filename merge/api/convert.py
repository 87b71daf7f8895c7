"""Conversion of an adapter of any format to a safe folder: the job behind `adapter-merge convert`.

The folder holds safetensors files, a config that states every setting, the trained heads, and no base weights. Methods
that PEFT can load are written as a PEFT folder, all others in this project's own format (native_writer.py, native.py).
"""

from __future__ import annotations

from pathlib import Path

import torch

from adapter_merge.binding.bind import BoundAdapter, bind
from adapter_merge.combine.base_weights import fingerprint_weights, hash_whole_weights
from adapter_merge.combine.open_inputs import describe_adapter_alone, describe_inputs
from adapter_merge.combine.origin import bind_checked
from adapter_merge.errors import InputError, NumericsError, Problem, UnsupportedError, raise_all
from adapter_merge.factoring.factor_folder import saved_modules, stated_modules
from adapter_merge.factoring.supported import require_names, warn_unproved_heads
from adapter_merge.files.hashing import file_sha256
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.native_writer import (
    SafeFolder,
    build_dcft,
    build_dcft_reshape,
    build_dude,
    build_lycoris,
    build_peft_lora,
    copy_peft_folder,
    fits_peft_lora,
)
from adapter_merge.formats.peft.tensors import PREFIX
from adapter_merge.methods.adapter import Adapter, AdapterFormat, MethodName
from adapter_merge.methods.dcft import DcftModule
from adapter_merge.methods.dcft_reshape import DcftReshapeModule
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import LoraModule
from adapter_merge.outputs.manifest import make_manifest, write_manifest
from adapter_merge.outputs.model_card import adapter_table, card
from adapter_merge.outputs.staging import check_output, staged, write_json, write_text
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.storage.tensor_io import read_tensor, write_safetensors

from .options import ConvertOptions
from .results import ConvertResult


def convert(
    adapter: str | Path,
    output: str | Path,
    options: ConvertOptions = ConvertOptions(),
) -> ConvertResult:
    """Write `adapter` (a folder, file or hub id of any format) to `output` as a safe folder.

    The folder holds safetensors files and a config that states every setting: a merge of the folder needs no reading
    options and writes the same bytes as a merge of the original. Tensors keep their shapes: up (out, R), down (R, in),
    magnitude (out,). Raises InputError, AdapterError or UnsupportedError where the adapter cannot be read or has no
    safe form, NumericsError for NaN or infinity; no output is left behind then.

    Example:
        >>> convert("adapter", "safe", ConvertOptions(base="base")).artefact
        'adapter'
    """
    output = Path(output)
    checkpoint = open_base(options.base) if options.base is not None else None
    opened = open_adapter(adapter, options.reading, checkpoint)
    require_names(opened, checkpoint)
    bound = bind_checked(opened, checkpoint, options.base_kind) if checkpoint is not None else None
    unknown = [
        module.initial
        for module in opened.modules
        if isinstance(module, LoraModule) and module.initial and not module.initial.refs and module.frozen is None
    ]
    if opened.method == MethodName.DUDE and bound is None and unknown:
        raise InputError(
            f"{adapter}: a DuDe folder of PEFT does not state on which base weights it was trained",
            expected="--base BASE, the original base or the residual",
            hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
        )
    inputs = (opened.folder,) if checkpoint is None else (opened.folder, checkpoint.folder)
    check_output(output, options.overwrite, inputs)
    opened.check_values()
    described = describe_inputs(bound, options.reading) if bound is not None else describe_adapter_alone(opened)
    trained_on = bound or (bind(opened, opened.own_base) if opened.own_base is not None else None)
    if trained_on is not None:
        described["base"] |= {
            "weights": fingerprint_weights(trained_on),
            "whole_weights": hash_whole_weights(trained_on),
        }
    content = make_manifest("adapter", described, {}) | {"warnings": warn_unproved_heads(opened, options.base)}
    safe = _content(opened, bound)
    _check_finite(safe, opened)
    if options.dry_run:
        return ConvertResult(output, content | {"dry_run": True})
    snapshot = opened.snapshot if checkpoint is None else opened.snapshot + checkpoint.snapshot
    with staged(output, options.overwrite, snapshot) as folder:
        write_json(folder / "adapter_config.json", safe.config)
        write_safetensors(folder / "adapter_model.safetensors", safe.tensors, {"format": "pt"})
        body = f"Converted by adapter-merge from:\n\n{adapter_table(content['adapters'])}\n"
        text = card(output.name, opened.base_name, "adapter", "peft", ["adapter-merge", opened.method.lower()], body)
        write_text(folder / "README.md", text)
        content["files"] = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, content)
    return ConvertResult(output, content)


def _check_finite(safe: SafeFolder, opened: Adapter) -> None:
    """Raise NumericsError for tensors with NaN or infinity, such as initial factors computed with a negative alpha."""
    wrong = [name for name, tensor in safe.tensors.items() if not bool(torch.isfinite(tensor).all())]
    raise_all(
        [Problem(f"{opened.folder}: {name} would hold NaN or infinity", hint="is lora_alpha right?") for name in wrong],
        NumericsError,
    )


def _content(opened: Adapter, bound: BoundAdapter | None) -> SafeFolder:
    """Return the safe folder's config and tensors, in the format that fits the adapter's method."""
    modules = opened.modules
    if modules and all(isinstance(module, DcftModule) for module in modules):
        safe = build_dcft(modules)
    elif modules and all(isinstance(module, DcftReshapeModule) for module in modules):
        safe = build_dcft_reshape(modules)
    elif opened.format == AdapterFormat.PEFT and not _stores_initial(opened):
        return copy_peft_folder(opened)
    elif fits_peft_lora(modules) and opened.config.get("peft_type") != "DUDE":
        conv1d = bound is not None and any(item.transposed for item in bound.modules)
        safe = build_peft_lora(modules, opened.fan_in_fan_out or conv1d)
    elif all(isinstance(module, LoraModule | LokrModule | LohaModule) for module in modules) and (
        opened.format == AdapterFormat.KOHYA or opened.config.get("peft_type") == "LYCORIS"
    ):
        safe = build_lycoris(modules)
    else:
        _check_lora_weights_only(opened)
        safe = build_dude(opened, bound)
    targets = opened.config.get("target_modules") if opened.config.get("peft_type") else None
    common = {
        "base_model_name_or_path": opened.base_name,
        "task_type": opened.config.get("task_type"),
        "target_modules": targets if isinstance(targets, list | str) else sorted(module.name for module in modules),
        "modules_to_save": saved_modules(
            (name.rpartition(".")[0] for name in opened.replacements), stated_modules(opened)
        ),
    }
    safe.config |= {key: value for key, value in common.items() if key not in safe.config}
    for name, ref in opened.replacements.items():
        safe.tensors[f"{PREFIX}{name}"] = read_tensor(ref)
    return safe


def _stores_initial(opened: Adapter) -> bool:
    """True for a PEFT folder without its initial factors or residual dtype, where the options state them."""
    initials = [module.initial for module in opened.modules if isinstance(module, LoraModule) and module.initial]
    if any(initial.refs or initial.dtype is not None for initial in initials):
        return True
    return opened.method == MethodName.DUDE and not _find_other_modules(opened)


def _find_other_modules(opened: Adapter) -> list[str]:
    """Return the modules whose tensors a PEFT folder of type DUDE has no names for."""
    return [
        f"{module.name} ({type(module).__name__.removesuffix('Module').lower()})"
        for module in opened.modules
        if not isinstance(module, LoraModule) or module.parameter != "weight" or module.e is not None
    ]


def _check_lora_weights_only(opened: Adapter) -> None:
    """Raise UnsupportedError where the adapter has modules that a PEFT folder of type DUDE cannot hold."""
    others = _find_other_modules(opened)
    if others:
        raise UnsupportedError(
            f"{opened.folder}: the safe folder of {opened.method} can hold LoRA factors of weights only",
            got=", ".join(others[:5]),
            hint="convert without --init-adapter and --residual-dtype, and state them at the merge",
        )
