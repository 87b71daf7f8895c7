"""Checkpoints of MyTransformers (github hhnqqq/MyTransformers): LoRA, rsLoRA, DoRA, PiSSA, OLoRA, MiLoRA, DuDe.

A torch file (.ckpt), flat or under model_state_dict, beside a config.json of the training arguments, which names the
variant (mytransformers_arguments.py). Per module: weight_a (r, in), weight_b (out, r), since 83fcc6a origin_magnitude
(out,), and the frozen weight, which for PiSSA, OLoRA, MiLoRA and DuDe is the residual; with --save-trainable the frozen
weight is left out. s = lora_scaler / lora_rank, of rsLoRA lora_scaler / sqrt(lora_rank).

Without the frozen weight the residual is computed again as in the layers' init_lora_weights: from the base in the
training dtype, with factors and product in that dtype too (in float32 with run_lora_in_fp32), so that half precision
rounds several times (`Initial.product`).

Before 83fcc6a the magnitude was neither trained nor saved: it is the row norm of the residual (DuDe) or of the weight
(DoRA) at run time, so that such a DuDe differs from its base even before training. DoRA before October 2024 used the
norms of columns (--magnitude-axis in).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.peft.initialisation import RESIDUAL_DTYPES
from adapter_merge.methods.adapter import Adapter, AdapterFormat, MethodName
from adapter_merge.methods.lora import LoraModule, lora_scale
from adapter_merge.methods.residual import Initial
from adapter_merge.storage.checkpoint import Checkpoint, read_json, read_weights
from adapter_merge.storage.safetensors_header import TensorRef

from .known_settings import describe_off_settings
from .mytransformers_arguments import ARGUMENTS, VARIANTS
from .state_dict import SortedTensors, sort_tensors
from .statements import compare_name, compare_number

ROLES = {
    "weight_a": "A",
    "weight_b": "B",
    "origin_magnitude": "m",
    "init_weight_a": "A0",
    "init_weight_b": "B0",
    "weight": "W",
}
REPEATABLE_ITERATIONS = 2  # with at most this number, pissa_n_iters and milora_n_iters select a full SVD
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DECOMPOSED = {
    MethodName.PISSA: "svd",
    MethodName.DUDE: "svd",
    MethodName.OLORA: "qr",
    MethodName.MILORA: "svd_least",
}
MILORA_NOTE = (
    "MiLoRA starts from the smallest singular values: the factors do not show whether the base is the original. "
    "It is assumed to be the original, as in MyTransformers"
)


@dataclass(frozen=True)
class Training:
    """The training arguments that apply to all modules."""

    method: MethodName
    scaler: float
    rank: int | None
    fast: bool  # the decomposition was a randomised SVD
    axis: int  # 0: magnitudes of output rows; 1: of input columns
    dtype: str | None  # of the frozen weights, as safetensors names it; None: not stated
    in_float32: bool  # run_lora_in_fp32
    stated: bool  # False where there are no training arguments, which is reported separately


def read_mytransformers(
    file: Path,
    alpha: float | None,
    magnitude_axis: str | None,
    base: Checkpoint | None,
    residual_dtype: str | None = None,
) -> Adapter:
    """Read the adapter in `file`. `alpha` overrides lora_scaler, `residual_dtype` the dtype of training.

    Raises AdapterError with every problem, UnsupportedError for an unknown variant or argument.
    """
    config_file = file.parent / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    unsupported, off = ARGUMENTS.check(config, str(config_file))
    raise_all(unsupported, UnsupportedError)
    tensors = sort_tensors(read_weights(file).tensors, ROLES, base)
    problems = list(tensors.problems)
    method = _find_variant(config, config_file, problems)
    if not config:
        problems.append(
            Problem(
                f"{file}: the variant is named only in the training arguments, which are missing",
                f"{config_file.name} with the arguments, as the trainer writes it beside the file",
                "no such file" if not config_file.is_file() else "an empty file",
                "files of LoRA, rsLoRA, HiRA and others hold the same tensors: a guess would merge a wrong adapter",
            )
        )
    problems += _check_rope_theta(config, config_file, base)
    iterations = config.get("milora_n_iters" if method == MethodName.MILORA else "pissa_n_iters", 1)
    training = Training(
        method,
        _read_scaler(config, alpha, file, problems),
        _read_rank(config, config_file, problems),
        method != MethodName.OLORA and not (isinstance(iterations, int) and iterations <= REPEATABLE_ITERATIONS),
        1 if magnitude_axis == "in" else 0,
        _find_training_dtype(config, residual_dtype, config_file, problems),
        _read_flag(config, "run_lora_in_fp32", config_file, problems),
        bool(config),
    )
    modules = _make_modules(tensors, training, file, problems)
    raise_all(problems, AdapterError)
    assumed = any(m.initial is not None and m.initial.method == "svd_least" and m.frozen is None for m in modules)
    return Adapter(
        folder=file.parent,
        format=AdapterFormat.MYTRANSFORMERS,
        method=method,
        modules=modules,
        replacements=tensors.replacements,
        config=config,
        files=(file, *((config_file,) if config else ())),
        contradictions=(
            *compare_number("alpha", alpha, config.get("lora_scaler"), config_file),
            *compare_name(
                "residual-dtype", residual_dtype, TORCH_NAMES.get(str(config.get("default_dtype"))), config_file
            ),
        ),
        notes=(*tensors.notes, *describe_off_settings(off, str(config_file)), *((MILORA_NOTE,) if assumed else ())),
    )


def _find_variant(config: Mapping[str, Any], config_file: Path, problems: list[Problem]) -> MethodName:
    """Return the variant whose flag is set, LoRA where none is; adds a problem where several are."""
    chosen = [key for key in VARIANTS if _read_flag(config, key, config_file, problems)]
    if len(chosen) > 1:
        problems.append(
            Problem(
                f"{config_file}: names {len(chosen)} variants",
                "one",
                ", ".join(chosen),
                "MyTransformers uses one of them, depending on its version: keep the one that was trained",
            )
        )
    return VARIANTS[chosen[0]] if chosen else MethodName.LORA


def _read_flag(config: Mapping[str, Any], key: str, config_file: Path, problems: list[Problem]) -> bool:
    """Return the boolean `key`, False where it is missing; adds a problem where it is not a boolean."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        problems.append(Problem(f"{config_file}: {key} is wrong", "true or false", repr(value)[:100]))
    return value is True


def _read_rank(config: Mapping[str, Any], config_file: Path, problems: list[Problem]) -> int | None:
    """Return lora_rank, which the factors must have; None where it is missing; adds a problem where it is wrong."""
    rank = config.get("lora_rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        problems.append(Problem(f"{config_file}: lora_rank is wrong", "a whole number above 0", repr(rank)[:100]))
        return None
    return rank


def _read_scaler(config: Mapping[str, Any], alpha: float | None, file: Path, problems: list[Problem]) -> float:
    """Return `alpha`, or lora_scaler; where neither is a usable number, adds a problem and returns 1."""
    scaler = config.get("lora_scaler") if alpha is None else alpha
    if isinstance(scaler, bool) or not isinstance(scaler, int | float) or not 0 < abs(scaler) < 1e12:
        problems.append(
            Problem(
                f"{file}: lora_scaler is missing or wrong",
                "the training arguments in config.json, or --alpha NUMBER",
                repr(scaler)[:100],
                "the scale is lora_scaler / rank: it must be known, a guess would merge a wrong adapter",
            )
        )
        return 1.0
    return float(scaler)


def _find_training_dtype(
    config: Mapping[str, Any], stated: str | None, config_file: Path, problems: list[Problem]
) -> str | None:
    """Return the dtype that the base was loaded in: as stated, default_dtype, or by fp16 and bf16; None: unknown."""
    if stated is not None:
        return RESIDUAL_DTYPES.get(stated)
    fp16, bf16 = (_read_flag(config, key, config_file, problems) for key in ("fp16", "bf16"))
    name = config.get("default_dtype")
    if name is None and ("fp16" in config or "bf16" in config):
        name = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    if name is not None and name not in DTYPES:
        problems.append(Problem(f"{config_file}: default_dtype is wrong", ", ".join(DTYPES), repr(name)[:100]))
    return DTYPES.get(name) if isinstance(name, str) else None


def _check_rope_theta(config: Mapping[str, Any], config_file: Path, base: Checkpoint | None) -> list[Problem]:
    """Return a problem where rope_theta differs from the base's: the merged model would use other positions."""
    theta = config.get("rope_theta")
    if theta is None or base is None:
        return []
    nested = base.config.get("rope_parameters")
    base_theta = base.config.get("rope_theta", nested.get("rope_theta") if isinstance(nested, dict) else None)
    if base_theta is None or base_theta == theta:
        return []
    return [Problem(f"{config_file}: rope_theta is not the base's", repr(base_theta)[:100], repr(theta)[:100])]


def _make_modules(
    tensors: SortedTensors, training: Training, file: Path, problems: list[Problem]
) -> tuple[LoraModule, ...]:
    """Return one module per group of tensors; adds to `problems`."""
    modules: list[LoraModule] = []
    scaled = training.method in (MethodName.DUDE, MethodName.DORA)
    for name, group in sorted(tensors.groups.items()):
        a, b, m, frozen = (group.get(role) for role in ("A", "B", "m", "W"))
        if a is None or b is None or not len(a.shape) == len(b.shape) == 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
            shapes = ", ".join(f"{role} {ref.shape}" for role, ref in group.items())
            problems.append(
                Problem(f"{file}: the tensors of {name} do not fit", "weight_a (r, in), weight_b (out, r)", shapes)
            )
            continue
        rank, shape = a.shape[0], (b.shape[0], a.shape[1])
        if training.rank is not None and training.rank != rank:
            problems.append(
                Problem(f"{file}: the rank of {name} is not the config's", f"r = {training.rank}", f"r = {rank}")
            )
        if frozen is not None and frozen.shape != shape:
            problems.append(Problem(f"{file}: the frozen weight of {name} does not fit", str(shape), str(frozen.shape)))
        if m is not None and not scaled and training.stated:
            problems.append(
                Problem(f"{file}: {name} has a magnitude", f"none: the arguments name {training.method}", m.name)
            )
        elif m is not None and m.shape != (shape[training.axis],):
            problems.append(
                Problem(f"{file}: the magnitude of {name} does not fit", f"({shape[training.axis]},)", str(m.shape))
            )
        initial = _find_initial(training, group, a, b, frozen, file, problems)
        modules.append(
            LoraModule(
                name,
                a,
                b,
                lora_scale(training.scaler, rank, training.method == MethodName.RSLORA),
                magnitude=m if scaled else None,
                initial=initial,
                magnitude_dim=training.axis,
                frozen=frozen if initial is not None else None,
                own_magnitude=m is None and scaled,
            )
        )
    if not modules and not problems:
        problems.append(Problem(f"{file}: holds no adapter (weight_a, weight_b)"))
    return tuple(modules)


def _find_initial(
    training: Training,
    group: Mapping[str, TensorRef],
    a: TensorRef,
    b: TensorRef,
    frozen: TensorRef | None,
    file: Path,
    problems: list[Problem],
) -> Initial | None:
    """Return what the initialisation of one module subtracted from its weight, and in which dtypes; None: nothing."""
    method = DECOMPOSED.get(training.method)
    if method is None:
        return None
    dtype = training.dtype
    if dtype is None and not training.in_float32:
        dtype = a.dtype  # without run_lora_in_fp32 the factors are in the frozen weight's dtype
    if dtype is None and frozen is None:
        problems.append(
            Problem(
                f"{file}: the dtype of its residual is unknown",
                "default_dtype in config.json, or --residual-dtype",
                "run_lora_in_fp32 without default_dtype, fp16 or bf16",
            )
        )
    product = "F32" if training.in_float32 else dtype
    a0, b0 = group.get("A0"), group.get("B0")
    if a0 is not None and b0 is not None and a0.shape == a.shape and b0.shape == b.shape:
        return Initial(a0, b0, dtype=dtype, method=method, product=product)
    if training.fast and frozen is None and training.method == MethodName.MILORA:
        problems.append(
            Problem(
                f"{file}: its initialisation used a randomised SVD, which cannot be repeated",
                f"milora_n_iters of at most {REPEATABLE_ITERATIONS}, or the frozen weights beside the factors",
                hint="save without --save-trainable",
            )
        )
    if training.fast and frozen is None:
        return Initial(dtype=dtype, method="pissa_niter")
    return Initial(dtype=dtype, method=method, product=product)
