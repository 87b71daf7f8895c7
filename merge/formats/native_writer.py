"""Config and tensors of a converted adapter folder, for each method. Every setting of the source is kept.

PEFT copy   config and tensors of a PEFT folder, read from its pickle, with magnitudes from another file
PEFT LoRA   factors of another format, with r and alpha (and their patterns) for its scales; DoRA with row magnitudes
LYCORIS     LoKr, LoHa, magnitudes of columns, mixtures: LyCORIS' roles under the modules' dotted names
DCFT        both forms: transposed convolution with kernel and stride, and reshape ("form": "reshape")
DUDE        PiSSA, OLoRA, DuDe: the initial factors and the residual's dtype, or the saved residual itself
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapter_merge.binding.bound import BoundAdapter
from adapter_merge.errors import InputError, UnsupportedError
from adapter_merge.formats.peft.tensors import PREFIX, find_weights
from adapter_merge.methods.adapter import AdaptedModule, Adapter
from adapter_merge.methods.dcft import DcftModule
from adapter_merge.methods.dcft_reshape import DcftReshapeModule
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import LoraModule, lora_scale
from adapter_merge.methods.residual import decompose
from adapter_merge.storage.checkpoint import read_weights
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_tensor

from .native import FORMAT_VERSION

Lycoris = LoraModule | LokrModule | LohaModule


@dataclass
class SafeFolder:
    """The content of adapter_config.json and adapter_model.safetensors."""

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, module: AdaptedModule, role: str, tensor: Tensor) -> None:
        """Add the tensor of a module under its PEFT name."""
        self.tensors[f"{PREFIX}{module.name}.{role}"] = tensor.contiguous()


def copy_peft_folder(opened: Adapter) -> SafeFolder:
    """Copy a PEFT folder, with the magnitudes that were read from another file."""
    weights = find_weights(opened.folder)
    assert weights is not None, "the adapter was read from this folder"
    copy = SafeFolder(dict(opened.config), {ref.name: read_tensor(ref) for ref in read_weights(weights).tensors})
    for module in opened.modules:
        magnitude = module.magnitude
        if magnitude is not None and magnitude.file != weights:
            copy.put(module, "lora_magnitude_vector", read_tensor(magnitude).reshape(-1))
    return copy


def fits_peft_lora(modules: Sequence[AdaptedModule]) -> bool:
    """Return True when a PEFT folder can hold the modules: LoRA, or DoRA with a magnitude per output row in each."""
    loras = [module for module in modules if isinstance(module, LoraModule)]
    needs_more = any(m.initial is not None or m.frozen is not None or m.own_magnitude or m.e is not None for m in loras)
    axes = {None if module.magnitude is None else module.magnitude_dim for module in loras}
    needs_more = needs_more or any(m.core is not None for m in loras)
    return len(loras) == len(modules) and not needs_more and axes in ({None}, {0})


def build_peft_lora(modules: Sequence[AdaptedModule], fan_in_fan_out: bool) -> SafeFolder:
    """Build a PEFT LoRA or DoRA folder from LoRA modules of any format; tensors keep their dtype."""
    loras = [module for module in modules if isinstance(module, LoraModule)]
    safe = SafeFolder(
        {
            "peft_type": "LORA",
            "inference_mode": True,
            **_state_scales(loras),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": fan_in_fan_out,
            "use_dora": any(module.magnitude is not None for module in loras),
            "init_lora_weights": True,
        }
    )
    for module in loras:
        _put_factors(safe, module)
    return safe


def build_lycoris(modules: Sequence[AdaptedModule]) -> SafeFolder:
    """Build a LYCORIS folder: dotted module names, alpha = s r, and magnitudes whose shape shows their axis."""
    safe = SafeFolder({"peft_type": "LYCORIS", "format_version": FORMAT_VERSION})
    for module in modules:
        assert isinstance(module, Lycoris)
        if isinstance(module, LoraModule):
            rank: int | None = module.rank
            _put_pair(safe, module, "lora_down.weight", "lora_up.weight")
            if module.core is not None:
                safe.put(module, "lora_mid.weight", read_tensor(module.core))
        elif isinstance(module, LokrModule):
            rank = next((factor[1].shape[0] for factor in (module.w1, module.w2) if len(factor) == 2), None)
            for name, factor in (("lokr_w1", module.w1), ("lokr_w2", module.w2)):
                for part, ref in zip(("",) if len(factor) == 1 else ("_a", "_b"), factor, strict=True):
                    safe.put(module, name + part, read_tensor(ref))
            if module.core is not None:
                safe.put(module, "lokr_t2", read_tensor(module.core))
        else:
            rank = module.w1b.shape[0]
            for role, ref in zip(("w1_a", "w1_b", "w2_a", "w2_b"), module.refs, strict=False):
                safe.put(module, f"hada_{role}", read_tensor(ref))
            for role, ref in zip(("t1", "t2"), module.cores or (), strict=False):
                safe.put(module, f"hada_{role}", read_tensor(ref))
        if rank is not None:  # LoKr of two full matrices has the scale 1
            safe.put(module, "alpha", torch.tensor(_alpha_of(module.scale, rank), dtype=torch.float64))
        if module.magnitude is not None:
            shape = (1, -1) if module.magnitude_dim else (-1, 1)
            safe.put(module, "dora_scale", read_tensor(module.magnitude).reshape(shape))
    return safe


def build_dcft(modules: Sequence[AdaptedModule]) -> SafeFolder:
    """Build a DCFT folder. Raises UnsupportedError for strides that one config cannot state."""
    adapted = [module for module in modules if isinstance(module, DcftModule)]
    alphas = {module.alpha for module in adapted}
    kernels, strides = {module.kernel for module in adapted}, {module.stride for module in adapted}
    safe = SafeFolder()
    for module in adapted:
        stated = module.ranknum
        number = torch.tensor([stated]) if isinstance(stated, float) else read_tensor(stated).reshape(-1)
        for role, ref in (("lora_A", module.a), ("lora_B", module.b), ("lora_C", module.c)):
            safe.put(module, role, read_tensor(ref))
        safe.put(module, "ranknum", number.to(torch.float32))
        if module.bias is not None:
            safe.put(module, "lora_C.bias", read_tensor(module.bias))
    if len(strides) > 1 and any(module.stride != module.kernel for module in adapted):
        raise UnsupportedError(
            "the modules' strides differ from each other and from their kernels",
            expected="one stride for all modules, or stride == kernel",
            got=str(sorted(strides)),
        )
    safe.config = {
        "peft_type": "DCFT",
        "format_version": FORMAT_VERSION,
        "r": max(module.r for module in adapted),
        "kernel_size": list(kernels.pop()) if len(kernels) == 1 else None,
        "stride": list(strides.pop()) if len(strides) == 1 else None,
        "lora_alpha": alphas.pop(),
    }
    return safe


def build_dcft_reshape(modules: Sequence[AdaptedModule]) -> SafeFolder:
    """Build a DCFT folder of the reshape form, which has no scale."""
    safe = SafeFolder({"peft_type": "DCFT", "format_version": FORMAT_VERSION, "form": "reshape"})
    for module in modules:
        assert isinstance(module, DcftReshapeModule)
        for role, ref in (("B", module.b), ("A", module.a), ("deconv.weight", module.c), ("deconv.bias", module.bias)):
            if ref is not None:
                safe.put(module, role, read_tensor(ref))
    return safe


def build_dude(opened: Adapter, bound: BoundAdapter | None) -> SafeFolder:
    """Build a DUDE folder: PiSSA, OLoRA, DuDe, and DoRA whose magnitude is not trained or belongs to the columns.

    For an original base the factors at initialisation are stored, decomposed again where they were not saved; a
    residual that was saved beside the factors is stored itself.
    """
    loras = [module for module in opened.modules if isinstance(module, LoraModule)]
    principal = [module for module in loras if module.initial is not None]
    if bound is not None:
        residual = bound.base_kind == "residual"
    else:
        residual = opened.config.get("peft_type") == "DUDE" and opened.config.get("base") == "residual"
    safe = SafeFolder()
    for module in loras:
        _put_factors(safe, module)
        if module.frozen is not None:
            safe.put(module, "frozen.weight", read_tensor(module.frozen))
    if not residual:
        _put_initial_factors(safe, loras, bound)
    methods = {module.initial.method for module in principal if module.initial is not None}
    products = {module.initial.product for module in principal if module.initial is not None} - {None}
    magnitude = "trained" if any(module.magnitude is not None for module in loras) else "none"
    if any(module.own_magnitude for module in loras):
        magnitude = "frozen"
    config: Mapping[str, Any] = opened.config
    scales = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")}
    safe.config = {
        "peft_type": "DUDE",
        "format_version": FORMAT_VERSION,
        **(scales if config.get("peft_type") else _state_scales(loras)),
        "fan_in_fan_out": opened.fan_in_fan_out,
        "base": "residual" if residual else "original",
        "initial": "none" if residual or not principal else methods.pop() if len(methods) == 1 else "svd",
        "residual_dtype": None if residual or not principal else _find_residual_dtype(opened, loras, bound),
        **({"product_dtype": dtype_name(products.pop())} if len(products) == 1 and not residual else {}),
        "magnitude": magnitude,
        "magnitude_axis": "in" if any(module.magnitude_dim for module in loras) else "out",
    }
    return safe


def _put_pair(safe: SafeFolder, module: LoraModule, a: str, b: str) -> None:
    """Add A and B under these roles; those of a convolution as (r, in, k, ...) and (out, r, 1, ...)."""
    down, up = read_tensor(module.a), read_tensor(module.b)
    if module.kernel:
        kernel = module.kernel if module.core is None else (1,) * len(module.kernel)
        down = down.reshape(down.shape[0], -1, *kernel)
        up = up.reshape(*up.shape, *(1 for _ in kernel))
    safe.put(module, a, down)
    safe.put(module, b, up)


def _put_factors(safe: SafeFolder, module: LoraModule) -> None:
    """Add A, B and the magnitude of a module."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if module.embedding else ("lora_A.weight", "lora_B.weight")
    _put_pair(safe, module, a, b)
    if module.magnitude is not None:
        safe.put(module, "lora_magnitude_vector", read_tensor(module.magnitude).reshape(-1))


def _put_initial_factors(safe: SafeFolder, loras: Sequence[LoraModule], bound: BoundAdapter | None) -> None:
    """Add A0 and B0 of every module whose residual was not saved as a matrix."""
    weights = {item.module.name: item for item in bound.modules} if bound is not None else {}
    for module in loras:
        initial = module.initial
        if initial is None or module.frozen is not None:
            continue
        if initial.a is not None and initial.b is not None:
            a, b = read_tensor(initial.a), read_tensor(initial.b)
            if initial.scale is not None and initial.scale != module.scale:
                b = (b.to(torch.float64) * (initial.scale / module.scale)).to(torch.float32)
        else:
            b, a = decompose(initial, weights[module.name].oriented_weight(), module.rank, module.scale)
        safe.put(module, "lora_A_init.weight", a)
        safe.put(module, "lora_B_init.weight", b)


def _find_residual_dtype(opened: Adapter, loras: Sequence[LoraModule], bound: BoundAdapter | None) -> str:
    """Return the dtype that the residual was rounded to: as stated, as saved, or the base's."""
    weights = {item.module.name: item.weight.dtype for item in bound.modules} if bound is not None else {}
    dtypes = set()
    for module in loras:
        if module.initial is not None:
            saved = module.frozen.dtype if module.frozen is not None else None
            dtypes.add(module.initial.dtype or saved or weights.get(module.name))
    if len(dtypes) == 1 and None not in dtypes:
        return dtype_name(dtypes.pop())
    raise InputError(
        f"{opened.folder}: the dtype of its residual is unknown",
        got=", ".join(sorted(map(str, dtypes))),
        hint="pass --base BASE, or --residual-dtype",
    )


def dtype_name(dtype: object) -> str:
    """Return torch's name of a safetensors dtype, for example "bfloat16" for "BF16"."""
    return str(TORCH_DTYPES[str(dtype)]).removeprefix("torch.")


def _state_scales(loras: Sequence[LoraModule]) -> dict[str, Any]:
    """Return r, lora_alpha and their patterns for modules whose ranks and scales may differ."""
    stated = {module.name: (module.rank, _alpha_of(module.scale, module.rank)) for module in loras}
    r, alpha = Counter(stated.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {name: rank for name, (rank, _) in stated.items() if rank != r},
        "alpha_pattern": {name: module_alpha for name, (_, module_alpha) in stated.items() if module_alpha != alpha},
    }


def _alpha_of(scale: float, rank: int) -> float:
    """Return alpha with lora_scale(alpha, rank) == scale, rounded to 6 digits where that is exact."""
    short = round(scale * rank, 6)
    return short if lora_scale(short, rank, False) == scale else scale * rank
