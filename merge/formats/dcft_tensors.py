"""The tensors of a DCFT adapter, in an adapter-merge folder or a checkpoint of the reference: sorted and checked.

Per module: lora_A (r, in/k0), lora_B (out/k1, r), lora_C (1, 1, k0, k1), ranknum (1,). Several channels, whose
deconvolutions are added: lora_A (channels, r, in/k0), lora_B (channels, out/k1, r), lora_C (channels, 1, k0, k1).
A lora_C that is a torch.nn.ConvTranspose2d is saved as lora_C.weight and lora_C.bias (1,).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from adapter_merge.errors import Problem
from adapter_merge.methods.adapter import AdaptedModule
from adapter_merge.methods.dcft import DcftModule, infer_stride
from adapter_merge.storage.safetensors_header import TensorRef

DCFT_ROLE = re.compile(r"(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_C(?:\.weight|\.bias)?|ranknum)")
SHARED_ROLES = ("lora_C", "lora_C.weight", "lora_C.bias")  # one kernel for all modules


def group_dcft(
    refs: tuple[TensorRef, ...], prefix: str, weights: Path
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef], list[Problem]]:
    """Return DCFT tensors by module and role, every other tensor by its name, and the problems.

    `prefix` is removed from every name; a name without it is a problem.
    """
    groups: dict[str, dict[str, TensorRef]] = {}
    other_tensors: dict[str, TensorRef] = {}
    problems = []
    for ref in refs:
        name = ref.name.removeprefix(prefix)
        match = DCFT_ROLE.fullmatch(name)
        if prefix and name == ref.name:
            problems.append(Problem(f"{weights}: unknown tensor {ref.name!r}", expected=f"a name under {prefix}"))
        elif match:
            group, role = groups.setdefault(match["module"], {}), match["role"].removesuffix(".weight")
            if role in group:
                problems.append(Problem(f"{weights}: {match['module']} has two tensors for {role}"))
            group[role] = ref
        else:
            other_tensors[name] = ref
    for name in SHARED_ROLES:
        shared = other_tensors.pop(name, None)
        if shared is not None:
            for group in groups.values():
                group.setdefault(name.removesuffix(".weight"), shared)
    return groups, other_tensors, problems


def make_dcft_modules(
    groups: Mapping[str, Mapping[str, TensorRef]],
    alpha: object,
    stride: object,
    shapes: Mapping[str, tuple[int, ...]] | None,
    weights: Path,
    ranknum: float | None = None,
) -> tuple[tuple[AdaptedModule, ...], list[Problem]]:
    """Return the modules of a DCFT adapter, and the problems.

    `stride` is [s0, s1] where the config states it; otherwise it is computed from `shapes`, the (out, in) of each
    module's weight; without both it is the kernel's size. `ranknum` replaces the tensors of that name.
    """
    modules: list[AdaptedModule] = []
    problems: list[Problem] = []
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        problems.append(
            Problem(
                f"{weights.parent}: lora_alpha is missing or wrong in the config",
                "the number used at training",
                repr(alpha),
                "the scale alpha / ranknum is never in the tensors: pass --alpha NUMBER",
            )
        )
        alpha = 1.0
    if stride is not None and not is_pair(stride):
        problems.append(Problem(f"{weights.parent}: stride is wrong in the config", "[s0, s1]", repr(stride)))
        stride = None
    for label, value in (("lora_alpha", alpha), ("ranknum", ranknum)):
        if isinstance(value, int | float) and not (math.isfinite(value) and (label == "lora_alpha" or value > 0)):
            problems.append(
                Problem(f"{weights.parent}: {label} is not a usable number", "finite, ranknum > 0", str(value))
            )
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
        bias = group.get("lora_C.bias")
        if (
            not images_fit(a.shape, b.shape, c.shape)
            or ("ranknum" in group and math.prod(group["ranknum"].shape) != 1)
            or (bias is not None and bias.shape != (1,))
        ):
            problems.append(
                Problem(
                    f"{weights}: the tensors of {name} do not fit",
                    "lora_A (r, in/k0), lora_B (out/k1, r), lora_C (1, 1, k0, k1), ranknum (1,); of several channels "
                    "(channels, r, in/k0), (channels, out/k1, r), (channels, 1, k0, k1)",
                    ", ".join(f"{role} {ref.shape}" for role, ref in group.items()),
                )
            )
            continue
        kernel = (c.shape[2], c.shape[3])
        strides: tuple[int, int] | None = kernel
        if isinstance(stride, list):
            strides = (stride[0], stride[1])
        elif shapes is not None:
            out, inner = shapes[name]
            inferred = infer_stride(inner, a.shape[-1], kernel[0]), infer_stride(out, b.shape[-2], kernel[1])
            strides = None if inferred[0] is None or inferred[1] is None else (inferred[0], inferred[1])
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
            modules.append(DcftModule(name, a, b, c, number, float(alpha), strides, bias))
    if not groups:
        problems.append(Problem(f"{weights}: holds no DCFT tensors (lora_A, lora_B, lora_C)"))
    return tuple(modules), problems + _check_strides(modules, weights)


def images_fit(a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...]) -> bool:
    """Return True when lora_A, lora_B and lora_C of these shapes form one deconvolution of one or more channels."""
    if len(c) != 4 or c[1] != 1 or 0 in (*a, *b, *c):
        return False
    if len(a) == len(b) == 2:
        return c[0] == 1 and a[0] == b[1]
    return len(a) == len(b) == 3 and a[0] == b[0] == c[0] and a[1] == b[2]


def _check_strides(modules: list[AdaptedModule], weights: Path) -> list[Problem]:
    """Return a problem for each module whose stride exceeds its kernel, unless all do: such factors were truncated."""
    gaps = [
        m for m in modules if isinstance(m, DcftModule) and any(s > k for s, k in zip(m.stride, m.kernel, strict=True))
    ]
    if not gaps or len(gaps) == len(modules):
        return []
    return [
        Problem(
            f"{weights}: the factors of {module.name} fit its weight only with gaps between kernels",
            f"a stride of at most the kernel's size, {module.kernel}, as in the other modules",
            f"stride {module.stride}",
            "in and out must be divisible by the kernel size",
        )
        for module in gaps
    ]


def is_pair(value: object) -> bool:
    """Return True for a list of two whole numbers >= 1."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, int) and part >= 1 for part in value)
