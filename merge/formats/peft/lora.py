"""The LoRA family of a PEFT folder: LORA (with DoRA, PiSSA, OLoRA, CorDA, EVA, rsLoRA), ADALORA, TRAINABLE_TOKENS.

Roles (peft.tuners.lora, .adalora, .trainable_tokens; 0.21): lora_A.weight (r, in), lora_B.weight (out, r), lora_B.bias
(out,), lora_magnitude_vector (out,), lora_embedding_A (r, vocabulary), lora_embedding_B (dim, r);
AdaLoRA lora_A (r, in), lora_B (out, r), lora_E (r, 1); token_adapter.trainable_tokens_delta (n, dim).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, Problem, raise_all
from adapter_merge.methods.adapter import AdaptedModule, MethodName
from adapter_merge.methods.lora import ADALORA_EPSILON, BiasModule, LoraModule, StackModule, lora_scale
from adapter_merge.methods.residual import Initial
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.checkpoint import read_json, read_weights
from adapter_merge.storage.safetensors_header import TensorRef

from .initialisation import add_initial_factors, find_initial
from .patterns import Pattern, read_pattern
from .tensors import (
    PREFIX,
    PeftExtras,
    PeftTensors,
    find_weights,
    group_tensors,
    read_flag,
    read_number,
    read_rank,
    require_factors,
)

TOKEN_ROLES = {"token_adapter.trainable_tokens_delta": "T", "trainable_tokens_delta": "T"}
LORA_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_A_init.weight": "A0",
    "lora_B_init.weight": "B0",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_embedding_A": "EA",
    "lora_embedding_B": "EB",
    "token_adapter.trainable_tokens_delta": "T",
}
GROUPED_HINT = (
    "PEFT's LoRA of a grouped convolution reads all input channels in every group, as no weight of the layer can: it "
    "cannot be merged, by PEFT neither"
)
ADALORA_ROLES = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}


def read_lora(
    tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras
) -> tuple[str, tuple[AdaptedModule, ...]]:
    """Return method and modules of a LORA folder; problems are added to `tensors.problems`."""
    initial = find_initial(config, tensors, extras)
    return name_lora_method(config, initial), make_lora_modules(tensors, config, initial, extras)


def name_lora_method(config: Mapping[str, Any], initial: Initial | None) -> str:
    """Return the display name of a LoRA-family method: LoRA, rsLoRA, DoRA, PiSSA, OLoRA, MiLoRA or DuDe."""
    if config.get("use_dora"):
        return MethodName.DUDE if initial is not None else MethodName.DORA
    if initial is not None:
        by_decomposition = {"svd": MethodName.PISSA, "qr": MethodName.OLORA, "svd_least": MethodName.MILORA}
        return by_decomposition.get(initial.method, f"LoRA ({config.get('init_lora_weights')})")
    return MethodName.RSLORA if config.get("use_rslora") else MethodName.LORA


@dataclass(frozen=True)
class Scales:
    """Rank and scale of every module path, by r, lora_alpha, use_rslora and their patterns in the config."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern

    def rank_of(self, path: str) -> float:
        """Return the rank that the config states for the module or parameter at `path`; unchecked in a pattern."""
        stated: float = self.rank_pattern.get(path, self.rank)
        return stated

    def scale_of(self, path: str, rank: int) -> float:
        """Return s of the module or parameter at `path`, whose factors have `rank`."""
        return lora_scale(float(self.alpha_pattern.get(path, self.alpha)), rank, self.rslora)


def make_lora_modules(
    tensors: PeftTensors,
    config: Mapping[str, Any],
    initial: Initial | None,
    extras: PeftExtras | None = None,
    axis: int = 0,
) -> tuple[AdaptedModule, ...]:
    """Return the modules of a LoRA-family adapter; problems are added to `tensors.problems`.

    axis: 0 for magnitudes per output row, as PEFT has them; 1 for magnitudes per input column.
    """
    extras = extras or PeftExtras()
    dora, biased = read_flag(config, "use_dora", tensors), read_flag(config, "lora_bias", tensors)
    scales = _read_scales(config, tensors)
    magnitudes = _read_magnitudes(extras.magnitudes) if extras.magnitudes is not None else {}
    before: Mapping[str, tuple[TensorRef, TensorRef, float]] = {}
    if extras.init_adapter is not None and initial is not None:
        before = read_initial_factors(extras.init_adapter)
    target_parameters = _read_target_parameters(config, tensors)
    modules: list[AdaptedModule] = []
    for name, group in sorted(tensors.groups.items()):
        if "T" in group:
            modules += _read_token_rows(name, group["T"], config.get("trainable_token_indices"), tensors)
            if len(group) == 1:
                continue
        factors = _select_factors(name, group, tensors)
        if factors is None:
            continue
        a, b = factors
        embedding = "EA" in group
        kernel: tuple[int, ...] = ()
        if is_convolution(a, b) and not embedding:
            kernel = a.shape[2:]
            group = {role: as_vector(ref) if role == "m" else ref.as_matrix() for role, ref in group.items()}
            a, b = a.as_matrix(), b.as_matrix()
        stack = None if embedding else _make_stack(name, a, b, scales, target_parameters, tensors)
        if stack is not None:
            modules.append(stack)
            continue
        if scales.rank_of(name) != a.shape[0]:
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: the rank of {name} is not the config's",
                    f"r = {scales.rank_of(name)}",
                    f"r = {a.shape[0]}",
                )
            )
            continue
        if kernel and initial is not None:
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: {name} adapts a convolution, which PEFT does not initialise so",
                    "init_lora_weights true or gaussian",
                    repr(config.get("init_lora_weights"))[:100],
                )
            )
        magnitude = group.get("m") or magnitudes.get(name)
        magnitude = as_vector(magnitude) if magnitude is not None and kernel else magnitude
        scale = scales.scale_of(name, a.shape[0])
        module = LoraModule(
            name,
            a,
            b,
            scale,
            magnitude=magnitude,
            initial=initial,
            embedding=embedding,
            magnitude_dim=axis,
            kernel=kernel,
        )
        module = add_initial_factors(module, group, before, tensors)
        _check_magnitude(module, dora, tensors)
        _check_bias(module, group.get("bias"), biased, dora, tensors)
        if "bias" in group:
            modules.append(BiasModule(name, group["bias"], scale))
        modules.append(module)
    require_factors(modules, tensors)
    return tuple(modules)


def _read_scales(config: Mapping[str, Any], tensors: PeftTensors) -> Scales:
    """Return ranks and scales of the config; problems are added to `tensors.problems`."""
    folder = str(tensors.weights.parent)
    return Scales(
        rank=read_rank(config, "r", tensors),
        alpha=read_number(
            config,
            "lora_alpha",
            tensors,
            "the scale is alpha / r: it must be known, a guess would merge a wrong adapter",
        ),
        rslora=read_flag(config, "use_rslora", tensors),
        rank_pattern=read_pattern(config, "rank_pattern", folder, tensors.problems),
        alpha_pattern=read_pattern(config, "alpha_pattern", folder, tensors.problems),
    )


def _select_factors(
    name: str, group: Mapping[str, TensorRef], tensors: PeftTensors
) -> tuple[TensorRef, TensorRef] | None:
    """Return A (r, in) and B (out, r) of one module; where they are incomplete or do not fit, add a problem.

    Those of a convolution are A (r, in, k, ...) and B (out, r, 1, ...).
    """
    embedding = "EA" in group or "EB" in group
    a, b = (group.get("EA"), group.get("EB")) if embedding else (group.get("A"), group.get("B"))
    if a is None or b is None or {"A", "EA"} <= group.keys():
        tensors.problems.append(Problem(f"{tensors.weights}: {name} has only one of its two factors, or too many"))
        return None
    convolved = is_convolution(a, b) and not embedding
    matrices = convolved or len(a.shape) == len(b.shape) == 2
    if not matrices or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        tensors.problems.append(
            Problem(
                f"{tensors.weights}: the factors of {name} do not fit",
                "A (r, in), B (out, r); of a convolution A (r, in, k, ...), B (out, r, 1, ...)",
                f"A {a.shape}, B {b.shape}",
                GROUPED_HINT if convolved else None,
            )
        )
        return None
    return a, b


def is_convolution(a: TensorRef, b: TensorRef) -> bool:
    """Return True for the factors of a convolution: A (r, in, k, ...) and B (out, r, 1, ...)."""
    return 2 < len(a.shape) == len(b.shape) and set(b.shape[2:]) == {1}


def as_vector(magnitude: TensorRef) -> TensorRef:
    """Return a convolution's magnitude (1, out, 1, ...) as (out,); any other shape unchanged."""
    shape = magnitude.shape
    inner = len(shape) > 2 and shape[0] == 1 and set(shape[2:]) == {1}
    return replace(magnitude, shape=(shape[1],)) if inner else magnitude


def _make_stack(
    name: str,
    a: TensorRef,
    b: TensorRef,
    scales: Scales,
    target_parameters: Mapping[str, list[tuple[str, str]]],
    tensors: PeftTensors,
) -> StackModule | None:
    """Return the module of factors that target_parameters assigns to stacked experts; None for any other module."""
    owner, _, _ = name.partition(".base_layer")
    has_plain_rank = name == owner and scales.rank_of(name) == a.shape[0]
    targets = []
    for entry, parameter in target_parameters.get(owner.rpartition(".")[2], ()):
        if has_plain_rank and "." not in entry:
            continue  # a parameter name without its owner belongs to experts, whose A has a multiple of r rows
        path = f"{owner}.{parameter}"
        rank = scales.rank_of(path)
        is_target = path == entry or path.endswith("." + entry)
        if is_target and rank == int(rank) and a.shape[0] % int(rank) == 0:
            targets.append((parameter, int(rank), scales.scale_of(path, int(rank))))
    if not targets:
        return None
    wrappers = sum(group_name.partition(".base_layer")[0] == owner for group_name in tensors.groups)
    return StackModule(owner, a, b, tuple(targets), name.count(".base_layer"), wrappers)


def _check_bias(
    module: LoraModule, bias: TensorRef | None, lora_bias: bool, use_dora: bool, tensors: PeftTensors
) -> None:
    """Add a problem where lora_B.bias is missing or unexpected by the config's lora_bias, or cannot be merged."""
    if not module.embedding and lora_bias != (bias is not None):
        tensors.problems.append(
            Problem(
                f"{tensors.weights}: {module.name} has {'no' if lora_bias else 'a'} lora_B.bias although lora_bias is "
                f"{'set' if lora_bias else 'not set'}",
                hint="use the adapter_config.json of the training",
            )
        )
    out = module.b.shape[0]
    if bias is not None and (use_dora or bias.shape != (out,) or module.embedding):
        tensors.problems.append(
            Problem(
                f"{tensors.weights}: the lora_B.bias of {module.name} cannot be merged",
                f"({out},), without DoRA",
                str(bias.shape) + (" with DoRA" if use_dora else ""),
            )
        )


def _read_magnitudes(source: Path) -> dict[str, TensorRef]:
    """Return magnitude vectors by module, from a weights file or another PEFT folder. Raises AdapterError."""
    file = find_weights(source) if source.is_dir() else source
    if file is None or not file.is_file():
        raise AdapterError(f"{source}: no such magnitudes", expected="a safetensors or .bin file, or a PEFT folder")
    magnitudes = {}
    for ref in read_weights(file).tensors:
        name = ref.name.removeprefix(PREFIX)
        for role in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
            if name.endswith("." + role):
                magnitudes[name[: -len(role) - 1]] = ref
    if not magnitudes:
        raise AdapterError(f"{source}: holds no magnitudes", expected=f"{PREFIX}<module>.lora_magnitude_vector")
    return magnitudes


def _read_target_parameters(config: Mapping[str, Any], tensors: PeftTensors) -> dict[str, list[tuple[str, str]]]:
    """Return the entries of target_parameters as {last component of the owner: [(entry, parameter name), ...]}."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        tensors.problems.append(
            Problem(f"{tensors.weights.parent}: target_parameters is wrong", "a list of names", repr(targets)[:200])
        )
        return {}
    by_owner: dict[str, list[tuple[str, str]]] = {}
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        by_owner.setdefault(owner.rpartition(".")[2], []).append((target, parameter))
    if "" in by_owner:  # a bare parameter name, as "all-linear" saves it: of any owner that is not a plain linear layer
        everywhere = by_owner.pop("")
        for name in tensors.groups:
            owner = name.partition(".base_layer")[0].rpartition(".")[2]
            by_owner.setdefault(owner, []).extend(item for item in everywhere if item not in by_owner[owner])
    return by_owner


def _read_token_rows(name: str, values: TensorRef, indices: object, tensors: PeftTensors) -> Iterator[TokenModule]:
    """Yield the module of the trained rows of embedding `name`; where the indices do not fit, add a problem."""
    folder = str(tensors.weights.parent)
    rows = indices
    if isinstance(indices, dict):
        rows = next(
            (value for key, value in indices.items() if isinstance(key, str) and f".{name}".endswith(f".{key}")), None
        )
    if (
        not isinstance(rows, list)
        or not all(isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 1 << 40 for index in rows)
        or len(set(rows)) != len(rows)
    ):
        tensors.problems.append(
            Problem(f"{folder}: the token indices of {name} are missing or wrong", "a list of rows", repr(rows)[:200])
        )
    elif len(values.shape) != 2 or values.shape[0] != len(rows):
        tensors.problems.append(
            Problem(f"{tensors.weights}: the tokens of {name} do not fit", f"({len(rows)}, dim)", str(values.shape))
        )
    else:
        yield TokenModule(name, values, tuple(rows))


def _check_magnitude(module: LoraModule, use_dora: bool, tensors: PeftTensors) -> None:
    """Add a problem where the magnitude is missing, unexpected, or not of shape (out,) or (in,)."""
    magnitude = module.magnitude
    size = module.shape[1] if module.embedding else module.shape[module.magnitude_dim]
    if use_dora and magnitude is None:
        tensors.problems.append(
            Problem(
                f"{tensors.weights}: {module.name} has no magnitude vector although use_dora is set",
                expected=f"{PREFIX}{module.name}.lora_magnitude_vector",
                hint="PEFT drops the magnitudes when it saves with path_initial_model_for_weight_conversion: save the "
                "adapter again without that option, or pass --magnitudes FILE (a checkpoint that still has them)",
            )
        )
    elif not use_dora and magnitude is not None:
        tensors.problems.append(
            Problem(f"{tensors.weights}: {module.name} has a magnitude vector although use_dora is not set")
        )
    elif magnitude is not None and magnitude.shape != (size,):
        tensors.problems.append(
            Problem(
                f"{tensors.weights}: the magnitude of {module.name} does not fit",
                f"({size},)",
                str(magnitude.shape),
            )
        )


def read_adalora(
    tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras
) -> tuple[str, tuple[AdaptedModule, ...]]:
    """Read an ADALORA folder: dW = s B diag(E) A, s = alpha / (init_r + 1e-5), since PEFT's ranknum stays at init_r."""
    rank = read_rank(config, "init_r", tensors)
    alpha = read_number(config, "lora_alpha", tensors)
    modules: list[AdaptedModule] = []
    for name, group in sorted(tensors.groups.items()):
        a, b, e = group.get("A"), group.get("B"), group.get("E")
        if a is None or b is None or e is None:
            tensors.problems.append(Problem(f"{tensors.weights}: {name} lacks one of lora_A, lora_B, lora_E"))
            continue
        r = a.shape[0] if a.shape else -1
        matrices = len(a.shape) == len(b.shape) == 2 and 0 not in (a.shape[1], b.shape[0])
        if not matrices or b.shape[1] != r or e.shape != (r, 1):
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: the factors of {name} do not fit",
                    "A (r, in), B (out, r), E (r, 1)",
                    f"{a.shape}, {b.shape}, {e.shape}",
                )
            )
            continue
        if r == 0:
            continue  # pruned away
        scaling = alpha if alpha > 0 else float(r)
        modules.append(LoraModule(name, a, b, scaling / (rank + ADALORA_EPSILON), e=e))
    require_factors(modules, tensors)
    return "AdaLoRA", tuple(modules)


def read_tokens(
    tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras
) -> tuple[str, tuple[AdaptedModule, ...]]:
    """Read a TRAINABLE_TOKENS folder: trained embedding rows, without a LoRA."""
    modules: list[AdaptedModule] = []
    for name, group in sorted(tensors.groups.items()):
        modules += _read_token_rows(name, group["T"], config.get("token_indices"), tensors)
    if not modules and not tensors.problems:
        tensors.problems.append(Problem(f"{tensors.weights}: holds no trained tokens"))
    return "trainable tokens", tuple(modules)


def read_initial_factors(folder: Path) -> dict[str, tuple[TensorRef, TensorRef, float]]:
    """Return (A0, B0, scale) by module from the PEFT folder that was saved before training. Raises AdapterError."""
    config = read_json(folder / "adapter_config.json")
    weights = find_weights(folder)
    if weights is None:
        raise AdapterError(f"{folder}: no adapter weights in the initial adapter")
    tensors = group_tensors(read_weights(weights).tensors, weights, LORA_ROLES)
    plain = {**config, "use_dora": False}
    for group in tensors.groups.values():
        group.pop("m", None)
    modules = make_lora_modules(tensors, plain, None)
    raise_all(tensors.problems, AdapterError)
    return {m.name: (m.a, m.b, m.scale) for m in modules if isinstance(m, LoraModule)}
