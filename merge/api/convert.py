"""Any adapter file -> a safe folder: safetensors, a config that says everything, no base weights, trained heads kept.

What PEFT has a name for becomes a PEFT folder, everything else a folder of our own (native_writer.py, native.py).
"""

from __future__ import annotations

from pathlib import Path

import torch

from adapter_merge.binding.bind import BoundAdapter, bind
from adapter_merge.combine.base_weights import base_weights, whole_weights
from adapter_merge.combine.open_inputs import adapter_only, describe_inputs
from adapter_merge.combine.origin import bind_checked
from adapter_merge.errors import InputError, NumericsError, Problem, UnsupportedError, raise_all
from adapter_merge.factoring.factor_folder import saved_modules, stated_modules
from adapter_merge.factoring.supported import require_names, unproved_heads
from adapter_merge.formats.detection import open_adapter
from adapter_merge.formats.native_writer import (
    SafeFolder,
    dcft,
    dcft_reshape,
    dude,
    is_peft_lora,
    lycoris,
    peft_copy,
    peft_lora,
)
from adapter_merge.formats.peft.tensors import PREFIX
from adapter_merge.methods.adapter import Adapter, AdapterFormat
from adapter_merge.methods.dcft import DcftModule
from adapter_merge.methods.dcft_reshape import DcftReshapeModule
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import LoraModule
from adapter_merge.outputs.model_card import adapter_table, card
from adapter_merge.outputs.staging import check_output, manifest, sha256, staged, write_json, write_manifest, write_text
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

    The folder holds safetensors and a config that states everything: it merges to the same bytes and needs no options.
    Raises AdapterMergeError; nothing is left behind then.

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
    if opened.method == "DuDe" and bound is None and unknown:
        raise InputError(
            f"{adapter}: a DuDe folder of PEFT does not say what it was trained beside",
            expected="--base BASE, the original or the residual",
            hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
        )
    inputs = (opened.folder,) if checkpoint is None else (opened.folder, checkpoint.folder)
    check_output(output, options.overwrite, inputs)
    opened.check_values()
    described = describe_inputs(bound, options.reading) if bound is not None else adapter_only(opened)
    trained_on = bound or (bind(opened, opened.own_base) if opened.own_base is not None else None)
    if trained_on is not None:
        described["base"] |= {"weights": base_weights(trained_on), "whole_weights": whole_weights(trained_on)}
    content = manifest("adapter", described, {}) | {"warnings": unproved_heads(opened, options.base)}
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
        content["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_manifest(folder, content)
    return ConvertResult(output, content)


def _check_finite(safe: SafeFolder, opened: Adapter) -> None:
    """Factors at initialisation are found here: a scale that is no scale (a negative alpha) makes them NaN."""
    wrong = [name for name, tensor in safe.tensors.items() if not bool(torch.isfinite(tensor).all())]
    raise_all(
        [Problem(f"{opened.folder}: {name} would hold NaN or infinity", hint="is lora_alpha right?") for name in wrong],
        NumericsError,
    )


def _content(opened: Adapter, bound: BoundAdapter | None) -> SafeFolder:
    """The safe folder of the adapter's kind."""
    modules = opened.modules
    if modules and all(isinstance(module, DcftModule) for module in modules):
        safe = dcft(modules)
    elif modules and all(isinstance(module, DcftReshapeModule) for module in modules):
        safe = dcft_reshape(modules)
    elif opened.format == AdapterFormat.PEFT and not _stores_initial(opened):
        return peft_copy(opened)
    elif is_peft_lora(modules) and opened.config.get("peft_type") != "DUDE":
        conv1d = bound is not None and any(item.transposed for item in bound.modules)
        safe = peft_lora(modules, opened.fan_in_fan_out or conv1d)
    elif all(isinstance(module, LoraModule | LokrModule | LohaModule) for module in modules) and (
        opened.format == AdapterFormat.KOHYA or opened.config.get("peft_type") == "LYCORIS"
    ):
        safe = lycoris(modules)
    else:
        _only_factors(opened)
        safe = dude(opened, bound)
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
    """True for a PEFT folder that does not say what was subtracted from its base, and of which it is known now."""
    found = [module.initial for module in opened.modules if isinstance(module, LoraModule) and module.initial]
    if any(initial.refs or initial.dtype is not None for initial in found):
        return True
    return opened.method == "DuDe" and not _beside_factors(opened)


def _beside_factors(opened: Adapter) -> list[str]:
    """Modules that a DUDE folder has no roles for."""
    return [
        f"{module.name} ({type(module).__name__.removesuffix('Module').lower()})"
        for module in opened.modules
        if not isinstance(module, LoraModule) or module.parameter != "weight" or module.e is not None
    ]


def _only_factors(opened: Adapter) -> None:
    strange = _beside_factors(opened)
    if strange:
        raise UnsupportedError(
            f"{opened.folder}: the safe folder of {opened.method} holds factors of weights alone",
            got=", ".join(strange[:5]),
            hint="leave --init-adapter and --residual-dtype to merge, and convert without them",
        )
