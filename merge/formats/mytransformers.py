"""MyTransformers (github hhnqqq/MyTransformers): LoRA, PiSSA, DoRA and DuDe checkpoints of its trainer.

A torch file (.ckpt), flat or under model_state_dict, beside a config.json of the training arguments (lora_rank,
lora_scaler, use_dude, use_dora, use_pissa, pissa_n_iters). Per module: weight_a (r, in), weight_b (out, r), since
83fcc6a origin_magnitude (out,), and the frozen weight, which for PiSSA and DuDe is the residual; with
--save-trainable the frozen weight is left out. s = lora_scaler / lora_rank.

Before 83fcc6a the magnitude was not trained nor saved: it is the row norm of the residual (DuDe) or of the weight
(DoRA) at run time, so a DuDe of that age differs from its base before it is trained. DoRA before October 2024 took
the norms of columns (--magnitude-axis in).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, Problem, raise_all
from adapter_merge.methods.adapter import AdaptedModule, Adapter
from adapter_merge.methods.lora import LoraModule
from adapter_merge.methods.residual import Initial
from adapter_merge.storage.checkpoint import Checkpoint, read_json, read_weights

from .state_dict import Foreign, sort_tensors

ROLES = {
    "weight_a": "A",
    "weight_b": "B",
    "origin_magnitude": "m",
    "init_weight_a": "A0",
    "init_weight_b": "B0",
    "weight": "W",
}
REPEATABLE_ITERATIONS = 2  # pissa_n_iters up to this means a full SVD (LinearWithPiSSA)


def read_mytransformers(
    file: Path, alpha: float | None, magnitude_axis: str | None, base: Checkpoint | None
) -> Adapter:
    """The adapter in `file`. Raises AdapterError with every problem."""
    config_file = file.parent / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    found = sort_tensors(read_weights(file).tensors, ROLES, base)
    problems = list(found.problems)
    scaler = config.get("lora_scaler") if alpha is None else alpha
    if isinstance(scaler, bool) or not isinstance(scaler, int | float) or not 0 < abs(scaler) < 1e12:
        problems.append(
            Problem(
                f"{file}: lora_scaler is not known",
                f"the training arguments in {config_file.name}, or --alpha NUMBER",
                repr(scaler)[:100],
                "the scale is lora_scaler / rank: it must be known, a guess would merge a wrong adapter",
            )
        )
        scaler = 1.0
    flags = [config.get(key) for key in ("use_dude", "use_dora", "use_pissa")]
    if any(flag is not None and not isinstance(flag, bool) for flag in flags):
        problems.append(Problem(f"{config_file}: use_dude, use_dora or use_pissa is wrong", "true or false"))
    method = next((name for flag, name in zip(flags, ("DuDe", "DoRA", "PiSSA"), strict=True) if flag is True), "LoRA")
    if not config and any("m" in group for group in found.groups.values()):
        problems.append(
            Problem(
                f"{file}: DoRA or DuDe? That stands only in the training arguments",
                f"{config_file.name} with use_dora or use_dude",
            )
        )
    modules = _modules(found, config, float(scaler), method, 1 if magnitude_axis == "in" else 0, file, problems)
    raise_all(problems, AdapterError)
    return Adapter(
        folder=file.parent,
        format="MyTransformers checkpoint",
        method=method,
        modules=modules,
        replacements=found.replacements,
        config=config,
        files=(file, *((config_file,) if config else ())),
        notes=found.notes,
    )


def _modules(
    found: Foreign,
    config: Mapping[str, Any],
    scaler: float,
    method: str,
    axis: int,
    file: Path,
    problems: list[Problem],
) -> tuple[AdaptedModule, ...]:
    said = config.get("lora_rank")
    iterations = config.get("pissa_n_iters", 1)
    repeatable = isinstance(iterations, int) and iterations <= REPEATABLE_ITERATIONS
    modules: list[AdaptedModule] = []
    for name, group in sorted(found.groups.items()):
        a, b, m, frozen = (group.get(role) for role in ("A", "B", "m", "W"))
        if a is None or b is None or not len(a.shape) == len(b.shape) == 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
            got = ", ".join(f"{role} {ref.shape}" for role, ref in group.items())
            problems.append(
                Problem(f"{file}: the tensors of {name} do not fit", "weight_a (r, in), weight_b (out, r)", got)
            )
            continue
        shape = (b.shape[0], a.shape[1])
        if isinstance(said, int) and said != a.shape[0]:
            problems.append(
                Problem(f"{file}: the rank of {name} is not the config's", f"r = {said}", f"r = {a.shape[0]}")
            )
        if frozen is not None and frozen.shape != shape:
            problems.append(Problem(f"{file}: the frozen weight of {name} does not fit", str(shape), str(frozen.shape)))
        if m is not None and m.shape != (shape[axis],):
            problems.append(Problem(f"{file}: the magnitude of {name} does not fit", f"({shape[axis]},)", str(m.shape)))
        initial = None
        if method in ("DuDe", "PiSSA"):
            a0, b0 = group.get("A0"), group.get("B0")
            if a0 is not None and b0 is not None and a0.shape == a.shape and b0.shape == b.shape:
                initial = Initial(a0, b0)
            else:
                initial = Initial(method="svd" if repeatable or frozen is not None else "pissa_niter")
        modules.append(
            LoraModule(
                name,
                a,
                b,
                scaler / a.shape[0],
                magnitude=m if method in ("DuDe", "DoRA") else None,
                initial=initial,
                magnitude_dim=axis,
                frozen=frozen if initial is not None else None,
                own_magnitude=m is None and method in ("DuDe", "DoRA"),
            )
        )
    if not modules and not problems:
        problems.append(Problem(f"{file}: holds no adapter (weight_a, weight_b)"))
    return tuple(modules)
