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

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .adapter import AdaptedModule, Adapter
from .checkpoint import read_json, read_weights
from .dcft import DcftModule, infer_stride
from .dude import Initial
from .errors import AdapterError, Problem, raise_all
from .headers import TensorRef
from .initialisation import RESIDUAL_DTYPES
from .lora_format import LORA_ROLES, lora_modules
from .peft_format import PREFIX, WEIGHT_FILES, find_weights, group_tensors

FORMAT_VERSION = 1
DCFT_ROLE = re.compile(r"(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_C|ranknum)")


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
    ranks = {module.a.shape[0] for module in found}
    kernels = {module.kernel for module in found}
    problems = []
    if found and "r" in config and config["r"] != max(ranks):
        problems.append(Problem(f"{config_file}: r is not the tensors'", str(max(ranks)), repr(config["r"])))
    stated = config.get("kernel_size")
    if found and stated is not None and (not _is_pair(stated) or {tuple(stated)} != kernels):
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


def group_dcft(
    refs: tuple[TensorRef, ...], prefix: str, weights: Path
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef], list[Problem]]:
    """DCFT tensors by module and role; every other tensor by its own name."""
    groups: dict[str, dict[str, TensorRef]] = {}
    others: dict[str, TensorRef] = {}
    problems = []
    for ref in refs:
        name = ref.name.removeprefix(prefix)
        match = DCFT_ROLE.fullmatch(name)
        if prefix and name == ref.name:
            problems.append(Problem(f"{weights}: unknown tensor {ref.name!r}", expected=f"a name under {prefix}"))
        elif match:
            groups.setdefault(match["module"], {})[match["role"]] = ref
        else:
            others[name] = ref
    shared = others.pop("lora_C", None)  # one kernel for all modules
    if shared is not None:
        for group in groups.values():
            group.setdefault("lora_C", shared)
    return groups, others, problems


def dcft_modules(
    groups: Mapping[str, Mapping[str, TensorRef]],
    alpha: object,
    stride: object,
    shapes: Mapping[str, tuple[int, ...]] | None,
    weights: Path,
    ranknum: float | None = None,
) -> tuple[tuple[AdaptedModule, ...], list[Problem]]:
    """The modules of a DCFT adapter, and everything that is wrong with them.

    `stride` is [s0, s1] where the config states it; otherwise it follows from `shapes`, the (out, in) of the
    weight of each module, and None for both means stride == kernel. `ranknum` stands in for (or overrides) the tensors
    of that name.
    """
    modules: list[AdaptedModule] = []
    problems: list[Problem] = []
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        problems.append(
            Problem(
                f"{weights.parent}: lora_alpha is missing or wrong in the config",
                "the number that was trained with",
                repr(alpha),
                "the scale alpha / ranknum is never in the tensors: pass --alpha NUMBER",
            )
        )
        alpha = 1.0
    if stride is not None and not _is_pair(stride):
        problems.append(Problem(f"{weights.parent}: stride is wrong in the config", "[s0, s1]", repr(stride)))
        stride = None
    for label, said in (("lora_alpha", alpha), ("ranknum", ranknum)):
        if isinstance(said, int | float) and not (math.isfinite(said) and (label == "lora_alpha" or said > 0)):
            problems.append(Problem(f"{weights.parent}: {label} is no usable number", "finite, ranknum > 0", str(said)))
    for name, group in sorted(groups.items()):
        needed = ("lora_A", "lora_B", "lora_C") if ranknum is not None else ("lora_A", "lora_B", "lora_C", "ranknum")
        missing = [role for role in needed if role not in group]
        if missing:
            hint = None
            if missing == ["ranknum"]:
                hint = "loralib's lora_state_dict() drops ranknum: save the full state dict, or pass --ranknum NUMBER"
            problems.append(Problem(f"{weights}: {name} lacks {', '.join(missing)}", hint=hint))
            continue
        a, b, c = group["lora_A"], group["lora_B"], group["lora_C"]
        if (
            len(a.shape) != 2
            or len(b.shape) != 2
            or len(c.shape) != 4
            or c.shape[:2] != (1, 1)
            or a.shape[0] != b.shape[1]
            or 0 in (*a.shape, *b.shape, *c.shape)
            or ("ranknum" in group and math.prod(group["ranknum"].shape) != 1)
        ):
            problems.append(
                Problem(
                    f"{weights}: the tensors of {name} do not fit",
                    "lora_A (r, in/k0), lora_B (out/k1, r), lora_C (1, 1, k0, k1), ranknum (1,)",
                    f"{a.shape}, {b.shape}, {c.shape}",
                )
            )
            continue
        kernel = (c.shape[2], c.shape[3])
        strides: tuple[int, int] | None = kernel
        if isinstance(stride, list):
            strides = (stride[0], stride[1])
        elif shapes is not None:
            out, inner = shapes[name]
            found = infer_stride(inner, a.shape[1], kernel[0]), infer_stride(out, b.shape[0], kernel[1])
            strides = None if found[0] is None or found[1] is None else (found[0], found[1])
            if strides is None:
                problems.append(
                    Problem(
                        f"{weights}: no stride makes the deconvolution of {name} as large as its weight",
                        f"(out, in) = {(out, inner)}",
                        f"lora_A {a.shape}, lora_B {b.shape}, kernel {kernel}",
                        "in and out must be divisible by the kernel size",
                    )
                )
        if strides is not None:
            number = group["ranknum"] if ranknum is None else float(ranknum)
            modules.append(DcftModule(name, a, b, c, number, float(alpha), strides))
    if not groups:
        problems.append(Problem(f"{weights}: holds no DCFT tensors (lora_A, lora_B, lora_C)"))
    return tuple(modules), problems + _stray_strides(modules, weights)


def _stray_strides(modules: list[AdaptedModule], weights: Path) -> list[Problem]:
    """Modules whose stride leaves gaps between the kernels although others' does not: their factors were cut."""
    gaps = [
        m for m in modules if isinstance(m, DcftModule) and any(s > k for s, k in zip(m.stride, m.kernel, strict=True))
    ]
    if not gaps or len(gaps) == len(modules):
        return []
    return [
        Problem(
            f"{weights}: the factors of {module.name} fit its weight with gaps only",
            f"a stride of at most the kernel's size, {module.kernel}, as in the other modules",
            f"stride {module.stride}",
            "in and out must be divisible by the kernel size",
        )
        for module in gaps
    ]


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, int) and part >= 1 for part in value)
