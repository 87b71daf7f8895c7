"""The kind of a base, original or residual, for PiSSA, OLoRA and DuDe: as stated, or decided by measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from adapter_merge.errors import AdapterError, Problem, UnsupportedError
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.residual import (
    ORIGINAL_ABOVE,
    OVERSAMPLING,
    RESIDUAL_BELOW,
    UNREPEATABLE_HINT,
    UNREPEATABLE_INITS,
    measure_base_evidence,
)
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.tensor_io import all_finite, read_tensor

from .bound import BoundAdapter, BoundModule, Origin

EVIDENCE_SAMPLES = 6
HALF = {"BF16": "bfloat16", "F16": "float16"}
WEAK = 0.5  # of the base's largest singular value: a product below it is no principal part
WIDE = 8  # narrower weights than this times the rank: random products already have a large cosine


def decide_base_kind(bound: BoundAdapter, base_kind: str | None) -> BoundAdapter:
    """Decide whether the base is the original or the residual, and drop the residual step in the latter case."""
    principal = [(item, module) for item, module in _select_loras(bound) if module.initial is not None]
    if not principal:
        return _check_residual(bound, base_kind)
    evidence = None
    stated = bound.adapter.config.get("base") if bound.adapter.config.get("peft_type") == "DUDE" else None
    initials = [module.initial for _, module in principal if module.initial]
    unsaved = [module.initial for _, module in principal if module.frozen is None]
    unrepeatable_method = next((i.method for i in unsaved if i and i.method in UNREPEATABLE_INITS and not i.refs), None)
    measurable = all(i.method in ("svd", "qr", "pissa_niter") for i in initials)
    if base_kind is None and not measurable:
        if unrepeatable_method is None and "loftq" not in {i.method for i in initials}:
            base_kind = "original"  # the initial factors are known and will be subtracted
        else:
            raise _make_unrepeatable_error(bound, str(unrepeatable_method or "loftq"))
    if measurable:
        cosines, evidence = _measure_cosines(principal)
        measured = _decide_kind(cosines)
        weak = _find_weak_product(principal) if measured == "residual" else None
        if weak is not None:  # no part of the base that was subtracted: neither kind of base fits
            measured, evidence = None, f"{evidence}; {weak}"
        if base_kind is None and measured is None:
            raise AdapterError(
                "cannot tell whether the base is the original or the residual (a wrong guess gives a wrong model)",
                expected=f"cosine >= {ORIGINAL_ABOVE} (original) or <= {RESIDUAL_BELOW} (residual) for every weight",
                got=evidence,
                hint="pass --base-kind original or --base-kind residual",
            )
        bound = replace(bound, origin=_check_statements(base_kind, stated, measured, evidence))
        base_kind = base_kind or measured
    if base_kind == "original":
        _check_not_quantised(bound, [item for item, _ in principal])
        if unrepeatable_method is not None:
            raise _make_unrepeatable_error(bound, unrepeatable_method)
        full_evidence = _check_residual_dtype(principal, evidence, bound.adapter.forced)
        return replace(bound, modules=tuple(_state_dtype(item) for item in bound.modules), evidence=full_evidence)
    modules = tuple(
        replace(item, module=replace(item.module, initial=None)) if isinstance(item.module, LoraModule) else item
        for item in bound.modules
    )
    return replace(bound, modules=modules, base_kind="residual", evidence=evidence)


def _check_not_quantised(bound: BoundAdapter, items: Sequence[BoundModule]) -> None:
    """Raise UnsupportedError where the residual would have to be computed from a quantised weight.

    PEFT subtracts the initial factors from the unquantised weight (its pissa_init refuses other dtypes) and quantises
    the residual afterwards: q(W - s B0 A0), which cannot be computed from q(W).
    """
    quantised = [item.name for item in items if isinstance(item.weight, ComputedRef)]
    if quantised:
        config = bound.adapter.config
        raise UnsupportedError(
            f"{bound.adapter.folder}: was trained on a residual base, and the weights of this base are quantised",
            expected="the residual, which was quantised after the initial factors were subtracted",
            got=f"init_lora_weights {config.get('init_lora_weights')!r}; {len(quantised)} weights, as {quantised[0]}",
            hint="give the residual base (stored quantised, or with --trained-on) and --base-kind residual",
        )


def _select_loras(bound: BoundAdapter) -> list[tuple[BoundModule, LoraModule]]:
    """Return the bound LoRA modules, each with its module."""
    return [(item, item.module) for item in bound.modules if isinstance(item.module, LoraModule)]


def _measure_cosines(modules: Sequence[tuple[BoundModule, LoraModule]]) -> tuple[list[float], str]:
    """Return measure_base_evidence of a few small weights, spread over the model, and a sentence with their range."""
    cosines = []
    for item, module in _spread(modules):
        scale = module.scale if module.initial is not None and module.initial.method == "qr" else None
        cosines.append(
            measure_base_evidence(item.oriented_weight(), read_tensor(module.a), read_tensor(module.b), scale)
        )
    return cosines, f"cosine of base and B A: {min(cosines):.3f} .. {max(cosines):.3f} over {len(cosines)} weights"


def _find_weak_product(modules: Sequence[tuple[BoundModule, LoraModule]]) -> str | None:
    """Return the contradiction where s B A is far smaller than the base, which has lost its principal part to it.

    PiSSA and DuDe subtract the largest singular values: none that is left exceeds the smallest of s B0 A0.
    """
    ratios = []
    for item, module in _spread(modules):
        if module.initial is None or module.initial.method not in ("svd", "pissa_niter"):
            return None
        weight = item.oriented_weight().to(torch.float32)
        a, b = read_tensor(module.a).to(torch.float32), read_tensor(module.b).to(torch.float32)
        if not all(all_finite(tensor) for tensor in (weight, a, b)):  # reported where values are checked
            return None
        product = torch.linalg.svdvals(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T)[0] * abs(module.scale)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            largest = torch.svd_lowrank(weight, q=min(OVERSAMPLING, *weight.shape), niter=4)[1][0]
        ratios.append(float(product / largest.clamp_min(torch.finfo(torch.float32).tiny)))
    if not ratios or max(ratios) >= WEAK:
        return None
    return f"s B A is at most {max(ratios):.2g} of the base's largest singular value, which PiSSA would have subtracted"


def _spread(modules: Sequence[tuple[BoundModule, LoraModule]]) -> list[tuple[BoundModule, LoraModule]]:
    """Return up to EVIDENCE_SAMPLES small weights, one from each of as many stretches of the model."""
    count = min(EVIDENCE_SAMPLES, len(modules))
    bounds = [number * len(modules) // count for number in range(count + 1)]
    return [min(modules[first:stop], key=_measuring_cost) for first, stop in pairwise(bounds)]


def _decide_kind(cosines: Sequence[float]) -> str | None:
    """Return the kind of base that all cosines show; None where they disagree or lie between the bounds."""
    if min(cosines) >= ORIGINAL_ABOVE:
        return "original"
    return "residual" if max(cosines) <= RESIDUAL_BELOW else None


def _measuring_cost(pair: tuple[BoundModule, LoraModule]) -> tuple[bool, int]:
    """Return a sort key: wide weights before narrow ones, whose cosines are no evidence; then by their size."""
    shape, rank = pair[1].shape, pair[1].rank
    narrow = min(shape) < WIDE * rank
    return narrow, -min(shape) if narrow else shape[0] * shape[1]


def _check_residual(bound: BoundAdapter, base_kind: str | None) -> BoundAdapter:
    """Check a DuDe folder that states the residual base against the measured kind of the given base."""
    if bound.adapter.config.get("peft_type") != "DUDE" or bound.adapter.config.get("base") != "residual":
        return bound
    loras = _select_loras(bound)
    if not loras:
        return replace(bound, base_kind="residual")
    cosines, evidence = _measure_cosines(loras)
    measured = "original" if min(cosines) >= ORIGINAL_ABOVE else None
    return replace(
        bound,
        base_kind="residual",
        evidence=evidence,
        origin=_check_statements(base_kind, "residual", measured, evidence),
    )


def _check_statements(user: str | None, config: str | None, measured: str | None, evidence: str) -> Origin:
    """Return the contradictions between the user's base kind, the config's, and the measured one."""
    problems = []
    if user is not None and config is not None and user != config and measured is None:
        problems.append(
            Problem(
                f"--base-kind {user} contradicts the adapter's config, which states the {config} base",
                hint=f"leave --base-kind out and give the {config} base; --force uses the stated value",
            )
        )
    claimed = user or config
    if claimed is not None and measured is not None and measured != claimed:
        problems.append(
            Problem(
                f"the base is not the {claimed} base that "
                + ("--base-kind states" if user is not None else "the adapter's config states"),
                expected=f"cosine {'>= ' if claimed == 'original' else '<= '}"
                f"{ORIGINAL_ABOVE if claimed == 'original' else RESIDUAL_BELOW} for every weight",
                got=evidence,
                hint="give the base of the training; --force uses the stated value",
            )
        )
    return Origin(contradictions=tuple(problems))


def _check_residual_dtype(
    principal: Sequence[tuple[BoundModule, LoraModule]], evidence: str | None, forced: bool
) -> str | None:
    """Return `evidence` with the dtype that the residual is rounded to.

    Raises AdapterError where it is unknown: a base that is stored in half precision may have been loaded in float32 for
    the training, and PEFT's factors are float32 in both cases. Factors in the base's half precision show that the base
    was loaded as stored.
    """
    dtypes, unknown = set(), set()
    for item, module in principal:
        if module.initial is None or module.frozen is not None:
            continue
        stored = item.weight.dtype
        dtypes.add(module.initial.dtype or stored)
        if module.initial.dtype is None and stored in HALF and {module.a.dtype, module.b.dtype} != {stored}:
            unknown.add(stored)
    if unknown and not forced:
        name = HALF[min(unknown)]
        raise AdapterError(
            f"cannot tell the dtype of the frozen residual: the base is stored in {name}, and may have been loaded in "
            "float32 for the training (a wrong guess gives a slightly wrong model)",
            expected=f"--residual-dtype {name} (loaded as stored, the default of transformers 5) or "
            "--residual-dtype float32 (the default of transformers 4)",
            hint="what dtype did the training script load the model in?",
        )
    if not dtypes:
        return evidence
    text = f"residual in {', '.join(sorted(dtypes))}"
    return f"{evidence}; {text}" if evidence else text


def _state_dtype(item: BoundModule) -> BoundModule:
    """Return the module with the base's dtype for its residual where initial factors are stored without a dtype."""
    module = item.module
    if not isinstance(module, LoraModule) or module.initial is None or module.initial.dtype is not None:
        return item
    if not module.initial.refs:
        return item
    return replace(item, module=replace(module, initial=replace(module.initial, dtype=item.weight.dtype)))


def _make_unrepeatable_error(bound: BoundAdapter, method: str) -> UnsupportedError:
    """Return the error for an initialisation that cannot be computed again."""
    config = bound.adapter.config
    return UnsupportedError(
        f"{bound.adapter.folder}: init_lora_weights {config.get('init_lora_weights')!r} {UNREPEATABLE_INITS[method]}",
        expected="the factors at initialisation, or the residual base"
        if method != "loftq"
        else "the base after the initialisation, with --base-kind residual",
        hint=UNREPEATABLE_HINT if method != "loftq" else None,
    )
