"""Readers of LOKR, LOHA and VERA folders; tensor roles as in peft.tuners.lokr, .loha and .vera (0.21)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapter_merge.errors import Problem, UnsupportedError
from adapter_merge.methods.adapter import AdaptedModule
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.tucker import core_fits
from adapter_merge.methods.vera import Projections, VeraModule
from adapter_merge.storage.safetensors_header import TensorRef

from .patterns import read_pattern
from .tensors import PeftExtras, PeftTensors, read_number, read_rank, require_factors

LOKR_ROLES = {f"lokr_{role}": role for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
LOHA_ROLES = {f"hada_{role}": role for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
VERA_ROLES = {"vera_lambda_b": "b", "vera_lambda_d": "d", "vera_A": "A", "vera_B": "B"}
ReadResult = tuple[str, tuple[AdaptedModule, ...]]


def find_factor(group: Mapping[str, TensorRef], name: str, core: TensorRef | None = None) -> tuple[TensorRef, ...]:
    """Return one Kronecker factor of a LoKr: (full,), (a, b), or () where it is missing or its shapes do not fit.

    core: that between a (r, o2) and b (r, i2) of an adapted convolution.
    """
    if name in group:
        full = group[name].as_matrix() if name == "w2" else group[name]
        return (full,) if len(full.shape) == 2 and 0 not in full.shape else ()
    a, b = group.get(f"{name}_a"), group.get(f"{name}_b")
    if a is None or b is None or not (can_multiply(a, b) if core is None else core_fits(core, a, b)):
        return ()
    return (a, b)


def can_multiply(a: TensorRef, b: TensorRef) -> bool:
    """Return True when a (n, r) and b (r, m) are non-empty matrices that can be multiplied."""
    return len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0] and 0 not in (*a.shape, *b.shape)


def read_lokr(tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras) -> ReadResult:
    """Read a LOKR folder: dW = s kron(W1, W2), s = alpha / r. Returns the method's name and its modules."""
    rank, alpha = read_rank(config, "r", tensors), read_number(config, "alpha", tensors)
    folder = str(tensors.weights.parent)
    ranks = read_pattern(config, "rank_pattern", folder, tensors.problems)
    alphas = read_pattern(config, "alpha_pattern", folder, tensors.problems)
    modules: list[AdaptedModule] = []
    for name, group in sorted(tensors.groups.items()):
        core = group.get("t2")
        w1, w2 = find_factor(group, "w1"), find_factor(group, "w2", core)
        if "w2" in group and len(group["w2"].shape) == 3:
            raise UnsupportedError(
                f"{tensors.weights}: {name} adapts a Conv1d by a full lokr_w2",
                expected="lokr_w2_a and lokr_w2_b, or a Conv2d",
                got="PEFT lays out the product of its three dimensions in another order than LyCORIS does",
            )
        if not w1 or not w2:
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: the tensors of {name} do not fit",
                    "lokr_w1 or lokr_w1_a (o, r) and lokr_w1_b (r, i), and the same of w2",
                    ", ".join(f"{role} {ref.shape}" for role, ref in group.items()),
                )
            )
            continue
        stated = ranks.get(name, rank)
        if core is None and len(group.get("w2", w2[0]).shape) == 2:
            tensors.problems += _check_lokr_rank(name, w1, w2, stated, config, tensors)
        modules.append(LokrModule(name, w1, w2, float(alphas.get(name, alpha)) / stated, core=core))
    require_factors(modules, tensors)
    return "LoKr", tuple(modules)


def read_loha(tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras) -> ReadResult:
    """Read a LOHA folder: dW = s (W1a W1b) * (W2a W2b), s = alpha / r. Returns the method's name and its modules."""
    rank, alpha = read_rank(config, "r", tensors), read_number(config, "alpha", tensors)
    folder = str(tensors.weights.parent)
    ranks = read_pattern(config, "rank_pattern", folder, tensors.problems)
    alphas = read_pattern(config, "alpha_pattern", folder, tensors.problems)
    modules: list[AdaptedModule] = []
    for name, group in sorted(tensors.groups.items()):
        stated = ranks.get(name, rank)
        module = make_loha_module(name, group, float(alphas.get(name, alpha)) / stated)
        if module is None:
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: the tensors of {name} do not fit",
                    "hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_a (out, r), hada_w2_b (r, in); with cores hada_t1 "
                    "and hada_t2 (r, r, k, k) w1_a and w2_a (r, out)",
                    ", ".join(f"{role} {ref.shape}" for role, ref in group.items()),
                )
            )
        elif module.w1b.shape[0] != stated or module.w2b.shape[0] != stated:
            tensors.problems.append(_other_rank(name, stated, f"{module.w1b.shape[0]}, {module.w2b.shape[0]}", tensors))
        else:
            modules.append(module)
    require_factors(modules, tensors)
    return "LoHa", tuple(modules)


def _check_lokr_rank(
    name: str,
    w1: tuple[TensorRef, ...],
    w2: tuple[TensorRef, ...],
    rank: float,
    config: Mapping[str, Any],
    tensors: PeftTensors,
) -> list[Problem]:
    """Return a problem where PEFT builds other factors from the config, and so does not load the file's.

    PEFT decomposes W2 where the rank is below half of its larger side, and W1 in the same way with decompose_both
    (peft.tuners.lokr.layer, update_layer).
    """
    problems = []
    for label, factor, may_be_decomposed in (("w1", w1, config.get("decompose_both") is True), ("w2", w2, True)):
        rows, columns = factor[0].shape[0], factor[-1].shape[1]
        decomposed = may_be_decomposed and rank < max(rows, columns) / 2
        if len(factor) == 2 and factor[0].shape[1] != rank:
            problems.append(_other_rank(name, rank, str(factor[0].shape[1]), tensors))
        elif decomposed != (len(factor) == 2):
            expected = f"lokr_{label}_a and lokr_{label}_b" if decomposed else f"lokr_{label}"
            got = f"lokr_{label}_a and lokr_{label}_b" if len(factor) == 2 else f"lokr_{label}"
            problems.append(
                Problem(
                    f"{tensors.weights}: PEFT does not load the factors of {name}, since r and decompose_both in its "
                    "config name others",
                    expected,
                    got,
                    "use the adapter_config.json of the training",
                )
            )
    return problems


def _other_rank(name: str, stated: float, got: str, tensors: PeftTensors) -> Problem:
    return Problem(f"{tensors.weights}: the rank of {name} is not the config's", f"r = {stated}", f"r = {got}")


def make_loha_module(name: str, group: Mapping[str, TensorRef], scale: float) -> LohaModule | None:
    """Return the LoHa module of `group`, or None where a tensor is missing or the shapes do not fit."""
    refs = [group.get(role) for role in ("w1_a", "w1_b", "w2_a", "w2_b")]
    if any(ref is None for ref in refs):
        return None
    w1a, w1b, w2a, w2b = (ref for ref in refs if ref is not None)
    core1, core2 = group.get("t1"), group.get("t2")
    if core1 is not None and core2 is not None:
        same = w1a.shape[1:] == w2a.shape[1:] and w1b.shape[1:] == w2b.shape[1:] and core1.shape[2:] == core2.shape[2:]
        fitting = core_fits(core1, w1a, w1b) and core_fits(core2, w2a, w2b) and same
        return LohaModule(name, w1a, w1b, w2a, w2b, scale, cores=(core1, core2)) if fitting else None
    if core1 is not None or core2 is not None:
        return None
    if not can_multiply(w1a, w1b) or not can_multiply(w2a, w2b):
        return None
    if w1a.shape[0] != w2a.shape[0] or w1b.shape[1] != w2b.shape[1]:
        return None
    return LohaModule(name, w1a, w1b, w2a, w2b, scale)


def read_vera(tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras) -> ReadResult:
    """Read a VERA folder: shared matrices that were saved, or are drawn again from projection_prng_key."""
    rank = read_rank(config, "r", tensors)
    shared = tensors.groups.pop("", {})
    a, b = shared.get("A"), shared.get("B")
    seed = config.get("projection_prng_key")
    if (a is None) != (b is None) or (a is None and (not isinstance(seed, int) or isinstance(seed, bool))):
        tensors.problems.append(
            Problem(
                f"{tensors.weights}: neither the shared matrices nor their seed are known",
                "base_model.vera_A and base_model.vera_B, or projection_prng_key in the config",
                f"projection_prng_key {seed!r}",
            )
        )
        return "VeRA", ()
    if a is not None and b is not None and not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank):
        tensors.problems.append(
            Problem(
                f"{tensors.weights}: the shared matrices do not fit",
                f"vera_A ({rank}, in), vera_B (out, {rank})",
                f"{a.shape}, {b.shape}",
            )
        )
    if isinstance(seed, int) and not -(1 << 63) <= seed < 1 << 64:
        tensors.problems.append(
            Problem(f"{tensors.weights.parent}: projection_prng_key is not a seed", got=repr(seed)[:50])
        )
    projections = Projections(a, b, seed if isinstance(seed, int) else 0, rank)
    modules: list[AdaptedModule] = []
    for name, group in sorted(tensors.groups.items()):
        lambda_b, lambda_d = group.get("b"), group.get("d")
        if lambda_b is None or lambda_d is None or len(lambda_b.shape) != 1 or lambda_d.shape != (rank,):
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: the tensors of {name} do not fit",
                    f"vera_lambda_b (out,), vera_lambda_d ({rank},)",
                    ", ".join(f"{role} {ref.shape}" for role, ref in group.items()),
                )
            )
            continue
        modules.append(VeraModule(name, lambda_b, lambda_d, projections))
    require_factors(modules, tensors)
    return "VeRA", tuple(modules)
