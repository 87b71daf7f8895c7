"""Our own safe adapter folder, for the methods that PEFT has no name for: DCFT and DuDe.

adapter_config.json   peft_type DCFT or DUDE, format_version 1, base_model_name_or_path, task_type, target_modules,
                      r, lora_alpha; DCFT: kernel_size, stride; DUDE: use_rslora, base ("original" or "residual"),
                      residual_dtype
adapter_model.safetensors   base_model.model.<module>.<role>, roles as below; base_model.model.<base tensor> for heads

DCFT roles: lora_A (r_sub, in/k0), lora_B (out/k1, r_sub), lora_C (1, 1, k0, k1), ranknum (1,)
DUDE roles: lora_A.weight (r, in), lora_B.weight (out, r), lora_magnitude_vector (out,), and optionally the factors
            at initialisation, lora_A_init.weight and lora_B_init.weight, so that no SVD has to be repeated
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .adapter import AdaptedModule, Adapter
from .checkpoint import read_json, read_weights
from .dcft import DcftModule
from .dcft_format import dcft_modules, group_dcft, is_pair
from .dude import Initial
from .errors import AdapterError, Problem, raise_all
from .initialisation import RESIDUAL_DTYPES
from .lora_format import LORA_ROLES, lora_modules
from .peft_format import PREFIX, WEIGHT_FILES, find_weights, group_tensors

FORMAT_VERSION = 1


def read_native(folder: Path, alpha: float | None = None, ranknum: float | None = None) -> Adapter:
    """The DCFT or DuDe adapter in `folder`; `alpha` and `ranknum` override its own. Raises AdapterError."""
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    weights = find_weights(folder)
    problems: list[Problem] = []
    if weights is None:
        raise AdapterError(f"{folder}: no adapter weights", expected=" or ".join(WEIGHT_FILES))
    if config.get("format_version") != FORMAT_VERSION:
        problems.append(
            Problem(
                f"{config_file}: unknown format_version",
                str(FORMAT_VERSION),
                repr(config.get("format_version")),
            )
        )
    shard = read_weights(weights)
    if config["peft_type"] == "DCFT":
        groups, replacements, found = group_dcft(shard.tensors, PREFIX, weights)
        chosen = config.get("lora_alpha") if alpha is None else alpha
        modules, more = dcft_modules(groups, chosen, config.get("stride"), None, weights, ranknum)
        problems += _untrue(config, modules, config_file)
        method = "DCFT"
    else:
        parts = group_tensors(shard.tensors, weights, LORA_ROLES)
        modules = lora_modules(parts, {**config, "use_dora": True}, _initial(config, problems))
        replacements, found, more = parts.replacements, parts.problems, []
        method = "DuDe"
    raise_all(problems + found + more, AdapterError)
    return Adapter(
        folder=folder,
        format="adapter-merge folder",
        method=method,
        modules=modules,
        replacements=replacements,
        config=config,
        base_name=config.get("base_model_name_or_path"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        files=(config_file, weights),
    )


def _untrue(config: Mapping[str, Any], modules: tuple[AdaptedModule, ...], config_file: Path) -> list[Problem]:
    """Where a DCFT config says another rank or kernel than its tensors have."""
    found = [module for module in modules if isinstance(module, DcftModule)]
    ranks = {module.r for module in found}
    kernels = {module.kernel for module in found}
    problems = []
    if found and "r" in config and config["r"] != max(ranks):
        problems.append(Problem(f"{config_file}: r is not the tensors'", str(max(ranks)), repr(config["r"])))
    stated = config.get("kernel_size")
    if found and stated is not None and (not is_pair(stated) or {tuple(stated)} != kernels):
        problems.append(Problem(f"{config_file}: kernel_size is not the tensors'", str(sorted(kernels)), repr(stated)))
    return problems


def _initial(config: Mapping[str, Any], problems: list[Problem]) -> Initial | None:
    base = config.get("base")
    if base == "residual":
        return None
    if base != "original":
        problems.append(Problem('DuDe config: "base" is missing or wrong', "original or residual", repr(base)))
    dtype = RESIDUAL_DTYPES.get(str(config.get("residual_dtype")))
    if dtype is None:
        problems.append(
            Problem(
                'DuDe config: "residual_dtype" is missing or wrong',
                ", ".join(RESIDUAL_DTYPES),
                repr(config.get("residual_dtype")),
                "the dtype in which the frozen residual was kept at training: it was rounded to it",
            )
        )
    return Initial(dtype=dtype)
