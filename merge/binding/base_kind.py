"""What PiSSA, OLoRA or DuDe was trained beside, the original base or the residual: by evidence, or as it is stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from adapter_merge.errors import AdapterError, MismatchError, UnsupportedError
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.residual import LOST_HINT, LOST_INITS, ORIGINAL_ABOVE, RESIDUAL_BELOW, base_evidence
from adapter_merge.storage.tensor_io import read_tensor

from .bound import BoundAdapter, BoundModule

EVIDENCE_SAMPLES = 6
WIDE = 8  # times the rank: in narrower weights any two parts have much in common


def with_base_kind(bound: BoundAdapter, base_kind: str | None) -> BoundAdapter:
    """Decide whether the base is the original or the residual, and drop the residual step in the latter case."""
    principal = [(item, module) for item, module in _loras(bound) if module.initial is not None]
    if not principal:
        return _check_residual(bound) if base_kind is None else bound
    evidence = None
    stated = bound.adapter.config.get("base") if bound.adapter.config.get("peft_type") == "DUDE" else None
    initials = [module.initial for _, module in principal if module.initial]
    unsaved = [module.initial for _, module in principal if module.frozen is None]
    lost = next((i.method for i in unsaved if i and i.method in LOST_INITS and not i.refs), None)
    measurable = all(i.method in ("svd", "qr", "pissa_niter") for i in initials)
    if base_kind is None and not measurable:
        if lost is None and "loftq" not in {i.method for i in initials}:
            base_kind = "original"  # the initial factors were given: they are to be subtracted
        else:
            raise _lost(bound, str(lost or "loftq"))
    if base_kind is None:
        cosines, evidence = _cosines(principal)
        if min(cosines) >= ORIGINAL_ABOVE:
            base_kind = "original"
        elif max(cosines) <= RESIDUAL_BELOW and stated == "original":
            raise MismatchError(
                "the adapter was trained beside the original base, and this is not it",
                expected=f"cosine >= {ORIGINAL_ABOVE} for every weight",
                got=evidence,
                hint="another model, or the residual: pass --base-kind residual if it is",
            )
        elif max(cosines) <= RESIDUAL_BELOW:
            base_kind = "residual"
        else:
            raise AdapterError(
                "cannot tell whether the base is the original or the residual (subtracting twice would be silent)",
                expected=f"cosine >= {ORIGINAL_ABOVE} (original) or <= {RESIDUAL_BELOW} (residual) for every weight",
                got=evidence,
                hint="pass --base-kind original or --base-kind residual",
            )
    if base_kind == "original":
        if lost is not None:
            raise _lost(bound, lost)
        return replace(bound, modules=tuple(_dtyped(item) for item in bound.modules), evidence=evidence)
    modules = tuple(
        replace(item, module=replace(item.module, initial=None)) if isinstance(item.module, LoraModule) else item
        for item in bound.modules
    )
    return replace(bound, modules=modules, base_kind="residual", evidence=evidence)


def _loras(bound: BoundAdapter) -> list[tuple[BoundModule, LoraModule]]:
    return [(item, item.module) for item in bound.modules if isinstance(item.module, LoraModule)]


def _cosines(modules: Sequence[tuple[BoundModule, LoraModule]]) -> tuple[list[float], str]:
    """base_evidence of a few weights from all over the model, small ones, and what to say of them."""
    count = min(EVIDENCE_SAMPLES, len(modules))
    bounds = [number * len(modules) // count for number in range(count + 1)]
    cosines = []
    for first, stop in pairwise(bounds):
        item, module = min(modules[first:stop], key=_reluctance)
        scale = module.scale if module.initial is not None and module.initial.method == "qr" else None
        cosines.append(base_evidence(item.oriented_weight(), read_tensor(module.a), read_tensor(module.b), scale))
    return cosines, f"cosine of base and B A: {min(cosines):.3f} .. {max(cosines):.3f} over {len(cosines)} weights"


def _reluctance(pair: tuple[BoundModule, LoraModule]) -> tuple[bool, int]:
    """How little a weight is fit to be looked at: too narrow, then too large (it is read whole, in float32)."""
    shape, rank = pair[1].shape, pair[1].rank
    narrow = min(shape) < WIDE * rank
    return narrow, -min(shape) if narrow else shape[0] * shape[1]


def _check_residual(bound: BoundAdapter) -> BoundAdapter:
    """A DuDe folder that says it belongs to the residual must not meet the original: nothing would be subtracted."""
    if bound.adapter.config.get("peft_type") != "DUDE" or bound.adapter.config.get("base") != "residual":
        return bound
    loras = _loras(bound)
    if not loras:
        return replace(bound, base_kind="residual")
    cosines, evidence = _cosines(loras)
    if max(cosines) >= ORIGINAL_ABOVE:
        raise MismatchError(
            "the adapter was trained on the residual base, and this is the original",
            expected=f"cosine <= {RESIDUAL_BELOW} for every weight",
            got=evidence,
            hint="give the residual base, or pass --base-kind residual if you are sure that it is one",
        )
    return replace(bound, base_kind="residual", evidence=evidence)


def _dtyped(item: BoundModule) -> BoundModule:
    """Stored initial factors without a dtype: the residual was kept in the base's."""
    module = item.module
    if not isinstance(module, LoraModule) or module.initial is None or module.initial.dtype is not None:
        return item
    if not module.initial.refs:
        return item
    return replace(item, module=replace(module, initial=replace(module.initial, dtype=item.weight.dtype)))


def _lost(bound: BoundAdapter, method: str) -> UnsupportedError:
    config = bound.adapter.config
    return UnsupportedError(
        f"{bound.adapter.folder}: init_lora_weights {config.get('init_lora_weights')!r} {LOST_INITS[method]}",
        expected="the factors at initialisation, or the residual base"
        if method != "loftq"
        else "the base as it was left by the initialisation, with --base-kind residual",
        hint=LOST_HINT if method != "loftq" else None,
    )
