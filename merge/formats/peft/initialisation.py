"""The initialisation of a LoRA (init_lora_weights), and the factors that it subtracted from the base.

As of PEFT 0.21: PiSSA and OLoRA decompose the weight, which can be repeated exactly; pissa_niter_*, CorDA,
LoRA-GA and LoftQ need the folder that was saved before training (--init-adapter), or the residual base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapter_merge.errors import Problem, UnsupportedError
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.residual import UNREPEATABLE_INITS, Initial
from adapter_merge.storage.safetensors_header import TensorRef

from .tensors import PeftExtras, PeftTensors

RESIDUAL_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Initialisations that leave the base as it is, and those whose subtracted factors can be computed again.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false", "none")
REPEATABLE_INITS = {"pissa": "svd", "olora": "qr"}


def is_plain_init(init_lora_weights: object) -> bool:
    """Return True for a value of init_lora_weights that leaves the base as it is."""
    return isinstance(init_lora_weights, bool | str | None) and str(init_lora_weights).lower() in PLAIN_INITS


def find_initial(config: Mapping[str, Any], tensors: PeftTensors, extras: PeftExtras) -> Initial | None:
    """Return the initialisation that changed the base; None where it left the base unchanged.

    Raises UnsupportedError for an unknown initialisation.
    """
    init_lora_weights = config.get("init_lora_weights", True)
    dtype = None
    if extras.residual_dtype is not None:
        dtype = RESIDUAL_DTYPES.get(extras.residual_dtype)
        if dtype is None:
            tensors.problems.append(
                Problem("the residual's dtype is unknown", ", ".join(RESIDUAL_DTYPES), repr(extras.residual_dtype))
            )
    init = str(init_lora_weights).lower()
    if is_plain_init(init_lora_weights):
        return None
    if init in REPEATABLE_INITS:
        return Initial(dtype=dtype, method=REPEATABLE_INITS[init])
    for start in UNREPEATABLE_INITS:
        if init.startswith(start):
            return Initial(dtype=dtype, method=start)
    raise UnsupportedError(
        f"{tensors.weights.parent}: init_lora_weights {init_lora_weights!r:.100} changed the base at training "
        "and is unknown",
        expected=f"true, {', '.join((*PLAIN_INITS, *REPEATABLE_INITS, *UNREPEATABLE_INITS))}",
    )


def add_initial_factors(
    module: LoraModule,
    group: Mapping[str, TensorRef],
    before: Mapping[str, tuple[TensorRef, TensorRef, float]],
    tensors: PeftTensors,
) -> LoraModule:
    """Return `module` with its initial factors: those in `group`, or those of an adapter saved before training."""
    initial = module.initial
    if initial is None:
        return module
    if module.embedding:  # PEFT initialises embeddings as plain LoRA, whatever the method
        return replace(module, initial=None)
    if "A0" in group and "B0" in group:
        a, b, scale = group["A0"], group["B0"], None
    elif module.name in before:
        a, b, scale = before[module.name]
    else:
        return module
    if a.shape[1:] != module.a.shape[1:] or b.shape[:1] != module.b.shape[:1] or a.shape[0] != b.shape[1]:
        tensors.problems.append(
            Problem(f"{tensors.weights}: the initial factors of {module.name} do not fit the trained ones")
        )
    return replace(module, initial=replace(initial, a=a, b=b, scale=scale))
