"""The adapter-merge folder, for methods that PEFT has no format for: DCFT, DuDe, PiSSA, OLoRA, LyCORIS' files.

adapter_config.json   peft_type DCFT, DUDE or LYCORIS, format_version 1, base_model_name_or_path, task_type,
                      target_modules, modules_to_save, and the keys below
adapter_model.safetensors   base_model.model.<module>.<role>, roles as below; base_model.model.<base tensor> for heads

DCFT     r, lora_alpha, kernel_size, stride; or "form": "reshape" (dcft_reshape.py) without them
         lora_A (r, in/k0), lora_B (out/k1, r), lora_C (1, 1, k0, k1), ranknum (1,); channels: dcft_tensors.py
         reshape: B (in/d, r), A (r, out/d), deconv.weight (1, 1, d, d), deconv.bias (1,)
DUDE     r, lora_alpha, use_rslora, base ("original" or "residual"), residual_dtype, and optionally (the first value is
         the default) initial ("svd", "qr", ...: the decomposition; "none": nothing was subtracted), magnitude
         ("trained", "frozen": the norms of the residual, "none"), magnitude_axis ("out" or "in"), product_dtype (of the
         factors at initialisation and their product, where these were rounded before they were subtracted)
         lora_A.weight (r, in), lora_B.weight (out, r), lora_magnitude_vector (out,), and optionally the factors at
         initialisation, lora_A_init.weight and lora_B_init.weight, so that no SVD is repeated, or the residual itself,
         frozen.weight (out, in)
LYCORIS  lora_down.weight, lora_up.weight, lokr_*, hada_*, alpha, dora_scale (out, 1) or (1, in), as in kohya.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, Problem, raise_all
from adapter_merge.formats.dcft_reshape_file import read_reshaped
from adapter_merge.formats.peft.initialisation import RESIDUAL_DTYPES
from adapter_merge.formats.peft.lora import LORA_ROLES, make_lora_modules, name_lora_method
from adapter_merge.formats.peft.tensors import PREFIX, WEIGHT_FILES, PeftTensors, find_weights, group_tensors
from adapter_merge.methods.adapter import AdaptedModule, Adapter, AdapterFormat, MethodName
from adapter_merge.methods.dcft import DcftModule
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.residual import DECOMPOSITIONS, UNREPEATABLE_INITS, Initial
from adapter_merge.storage.checkpoint import read_json, read_weights
from adapter_merge.storage.safetensors_header import TensorRef

from .dcft_tensors import group_dcft, is_pair, make_dcft_modules
from .known_settings import KnownSettings
from .kohya import group_lycoris, make_lycoris_modules, name_method
from .statements import compare_number, compare_number_tensors

NATIVE_TYPES = ("DCFT", "DUDE", "LYCORIS")
FORMAT_VERSION = 1
DUDE_ROLES = {**LORA_ROLES, "frozen.weight": "frozen"}
CHOICES = {
    "base": ("original", "residual"),
    "initial": (*DECOMPOSITIONS, "none", *UNREPEATABLE_INITS),
    "magnitude": ("trained", "frozen", "none"),
    "magnitude_axis": ("out", "in"),
}
_COMMON = ("peft_type", "format_version", "base_model_name_or_path", "task_type", "target_modules", "modules_to_save")
SETTINGS = {
    "DCFT": KnownSettings(
        frozenset((*_COMMON, "r", "lora_alpha", "kernel_size", "stride", "form")),
        ignored=frozenset(
            # what adapter_merge.peft writes beside: how it was trained, and how PEFT finds the modules again
            (
                *("auto_mapping", "inference_mode", "peft_version", "revision", "lora_dropout", "init_weights"),
                *("exclude_modules", "layers_to_transform", "layers_pattern"),
            )
        ),
    ),
    "DUDE": KnownSettings(
        frozenset(
            (
                *_COMMON,
                *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
                *(*CHOICES, "residual_dtype", "product_dtype"),
            )
        )
    ),
    "LYCORIS": KnownSettings(frozenset(_COMMON)),
}


def read_native(folder: Path, alpha: float | None = None, ranknum: float | None = None) -> Adapter:
    """Read the adapter in `folder`; `alpha` and `ranknum` override the stored ones. Raises AdapterError."""
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
    unknown, _ = SETTINGS[config["peft_type"]].check(config, str(config_file), strict=True)
    problems += unknown
    if config.get("form") not in (None, "reshape"):
        problems.append(Problem(f"{config_file}: form is wrong", "'reshape', or none", f"{config['form']!r:.100}"))
    shard = read_weights(weights)
    replacements: Mapping[str, TensorRef] = {}
    contradictions: tuple[Problem, ...] = ()
    if config["peft_type"] == "LYCORIS":
        lycoris, format_problems = group_lycoris(shard.tensors, weights, PREFIX)
        modules = make_lycoris_modules(lycoris, alpha, False, None, weights, format_problems)
        contradictions = compare_number_tensors(
            "alpha", alpha, (group.get("alpha") for group in lycoris.values()), weights
        )
        method = name_method(modules)
    elif config["peft_type"] == "DUDE":
        tensors = group_tensors(shard.tensors, weights, DUDE_ROLES)
        method, modules = _read_dude(tensors, config, problems)
        replacements, format_problems = tensors.replacements, tensors.problems
    elif config.get("form") == "reshape":
        modules, replacements, format_problems = read_reshaped(shard.tensors, PREFIX, weights)
        method = "DCFT"
    else:
        groups, replacements, format_problems = group_dcft(shard.tensors, PREFIX, weights)
        chosen = config.get("lora_alpha") if alpha is None else alpha
        contradictions = compare_number("alpha", alpha, config.get("lora_alpha"), config_file)
        contradictions += compare_number_tensors(
            "ranknum", ranknum, (group.get("ranknum") for group in groups.values()), weights
        )
        modules, module_problems = make_dcft_modules(groups, chosen, config.get("stride"), None, weights, ranknum)
        format_problems = [*format_problems, *module_problems, *_check_dcft_config(config, modules, config_file)]
        method = "DCFT"
    raise_all(problems + format_problems, AdapterError)
    return Adapter(
        folder=folder,
        format=AdapterFormat.NATIVE,
        method=method,
        modules=modules,
        replacements=replacements,
        config=config,
        base_name=config.get("base_model_name_or_path"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        files=(config_file, weights),
        contradictions=contradictions,
    )


def _check_dcft_config(
    config: Mapping[str, Any], modules: tuple[AdaptedModule, ...], config_file: Path
) -> list[Problem]:
    """Return a problem where a DCFT config states another rank or kernel than its tensors have."""
    adapted = [module for module in modules if isinstance(module, DcftModule)]
    ranks = {module.r for module in adapted}
    kernels = {module.kernel for module in adapted}
    problems = []
    if adapted and "r" in config and config["r"] != max(ranks):
        problems.append(Problem(f"{config_file}: r is not the rank of the tensors", str(max(ranks)), repr(config["r"])))
    stated = config.get("kernel_size")
    if adapted and stated is not None and (not is_pair(stated) or {tuple(stated)} != kernels):
        problems.append(
            Problem(f"{config_file}: kernel_size is not the kernel of the tensors", str(sorted(kernels)), repr(stated))
        )
    return problems


def _read_dude(
    tensors: PeftTensors, config: Mapping[str, Any], problems: list[Problem]
) -> tuple[str, tuple[AdaptedModule, ...]]:
    """Return method and modules of a DUDE folder; problems are added to `problems` and `tensors.problems`."""
    choices = {key: config.get(key, values[0]) for key, values in CHOICES.items()} | {"base": config.get("base")}
    for key, value in choices.items():
        if value not in CHOICES[key]:
            problems.append(
                Problem(f'DuDe config: "{key}" is missing or wrong', " or ".join(CHOICES[key]), f"{value!r:.100}")
            )
    initial = None
    if choices["base"] != "residual" and choices["initial"] != "none":
        dtype = RESIDUAL_DTYPES.get(str(config.get("residual_dtype")))
        if dtype is None:
            problems.append(
                Problem(
                    'DuDe config: "residual_dtype" is missing or wrong',
                    ", ".join(RESIDUAL_DTYPES),
                    repr(config.get("residual_dtype"))[:100],
                    "the dtype that the frozen residual was rounded to at training",
                )
            )
        product = RESIDUAL_DTYPES.get(str(config.get("product_dtype")))
        if product is None and config.get("product_dtype") is not None:
            problems.append(
                Problem(
                    'DuDe config: "product_dtype" is wrong',
                    ", ".join(RESIDUAL_DTYPES),
                    repr(config["product_dtype"])[:100],
                )
            )
        initial = Initial(dtype=dtype, method=str(choices["initial"]), product=product)
    trained = choices["magnitude"] == "trained"
    axis = int(choices["magnitude_axis"] == "in")
    modules: list[AdaptedModule] = []
    for module in make_lora_modules(tensors, {**config, "use_dora": trained}, initial, axis=axis):
        if isinstance(module, LoraModule):
            frozen = tensors.groups[module.name].get("frozen")
            if frozen is not None and frozen.shape != module.shape:
                shape = str(frozen.shape)
                problems.append(Problem(f"the frozen weight of {module.name} does not fit", str(module.shape), shape))
            module = replace(module, frozen=frozen, own_magnitude=choices["magnitude"] == "frozen", magnitude_dim=axis)
        modules.append(module)
    method = name_lora_method({"use_dora": choices["magnitude"] != "none"}, initial)
    return MethodName.DUDE if trained and choices["base"] == "residual" else method, tuple(modules)
