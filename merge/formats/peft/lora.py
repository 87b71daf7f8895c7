"""The LoRA family of a PEFT folder: LORA (with DoRA, PiSSA, OLoRA, CorDA, EVA, rsLoRA), ADALORA, TRAINABLE_TOKENS.

Roles (peft.tuners.lora, .adalora, .trainable_tokens; 0.21): lora_A.weight (r, in), lora_B.weight (out, r), lora_B.bias
(out,), lora_magnitude_vector (out,), lora_embedding_A (r, vocabulary), lora_embedding_B (dim, r);
AdaLoRA lora_A (r, in), lora_B (out, r), lora_E (r, 1); token_adapter.trainable_tokens_delta (n, dim).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, Problem, raise_all
from adapter_merge.methods.adapter import AdaptedModule
from adapter_merge.methods.lora import ADALORA_EPSILON, BiasModule, LoraModule, StackModule, lora_scale
from adapter_merge.methods.residual import Initial
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.storage.checkpoint import read_json, read_weights
from adapter_merge.storage.safetensors_header import TensorRef

from .initialisation import initial_of, with_initial
from .patterns import read_pattern
from .tensors import (
    PREFIX,
    PeftExtras,
    PeftTensors,
    find_weights,
    flag,
    group_tensors,
    number,
    rank_of,
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
ADALORA_ROLES = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}


def read_lora(
    tensors: PeftTensors, config: Mapping[str, Any], extras: PeftExtras
) -> tuple[str, tuple[AdaptedModule, ...]]:
    """Return method and modules of a LORA folder; problems are added to `tensors.problems`."""
    initial = initial_of(config, tensors, extras)
    return method_name(config, initial), lora_modules(tensors, config, initial, extras)


def method_name(config: Mapping[str, Any], initial: Initial | None) -> str:
    """Return the display name of a LoRA-family method: LoRA, rsLoRA, DoRA, PiSSA, OLoRA, MiLoRA or DuDe."""
    if config.get("use_dora"):
        return "DuDe" if initial is not None else "DoRA"
    if initial is not None:
        return {"svd": "PiSSA", "qr": "OLoRA", "svd_least": "MiLoRA"}.get(
            initial.method, f"LoRA ({config.get('init_lora_weights')})"
        )
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def lora_modules(
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
    where = str(tensors.weights.parent)
    dora, rslora = flag(config, "use_dora", tensors), flag(config, "use_rslora", tensors)
    biased = flag(config, "lora_bias", tensors)
    rank = rank_of(config, "r", tensors)
    alpha = number(
        config,
        "lora_alpha",
        tensors,
        "the scale is alpha / r: it must be known, a guess would merge a wrong adapter",
    )
    ranks = read_pattern(config, "rank_pattern", where, tensors.problems)
    alphas = read_pattern(config, "alpha_pattern", where, tensors.problems)
    magnitudes = _read_magnitudes(extras.magnitudes) if extras.magnitudes is not None else {}
    before = initial_factors(extras.init_adapter) if extras.init_adapter is not None and initial is not None else {}
    stacks = _read_target_parameters(config, tensors)
    modules: list[AdaptedModule] = []
    for name, group in sorted(tensors.groups.items()):
        if "T" in group:
            modules += _read_token_rows(name, group["T"], config.get("trainable_token_indices"), tensors)
            if len(group) == 1:
                continue
        embedding = "EA" in group or "EB" in group
        a, b = (group.get("EA"), group.get("EB")) if embedding else (group.get("A"), group.get("B"))
        if a is None or b is None or {"A", "EA"} <= group.keys():
            tensors.problems.append(Problem(f"{tensors.weights}: {name} has only one of its two factors, or too many"))
            continue
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            hint = "convolutions are not supported" if len(a.shape) > 2 else None
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: the factors of {name} do not fit",
                    "A (r, in), B (out, r)",
                    f"A {a.shape}, B {b.shape}",
                    hint,
                )
            )
            continue

        def scale_of(path: str, rank: int) -> float:
            return lora_scale(float(alphas.get(path, alpha)), rank, rslora)

        owner, _, _ = name.partition(".base_layer")
        targets = []
        plain = name == owner and ranks.get(name, rank) == a.shape[0]
        for parameter in stacks.get(owner.rpartition(".")[2], ()):
            if plain and "." not in parameter[0]:
                continue  # a bare name belongs to experts: their A has a multiple of r rows
            path = f"{owner}.{parameter[1]}"
            if path == parameter[0] or path.endswith("." + parameter[0]):
                own_rank = int(ranks.get(path, rank))
                if a.shape[0] % own_rank == 0:
                    targets.append((parameter[1], own_rank, scale_of(path, own_rank)))
        if targets and not embedding:
            wrappers = sum(other.partition(".base_layer")[0] == owner for other in tensors.groups)
            depth = name.count(".base_layer")
            modules.append(StackModule(owner, a, b, tuple(targets), depth, wrappers))
            continue
        stated_rank = ranks.get(name, rank)
        if stated_rank != a.shape[0]:
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: the rank of {name} is not the config's",
                    f"r = {stated_rank}",
                    f"r = {a.shape[0]}",
                )
            )
            continue
        magnitude = group.get("m") or magnitudes.get(name)
        scale = scale_of(name, a.shape[0])
        module = LoraModule(
            name, a, b, scale, magnitude=magnitude, initial=initial, embedding=embedding, magnitude_dim=axis
        )
        module = with_initial(module, group, before, tensors)
        _check_magnitude(module, dora, tensors)
        if not embedding and biased != ("bias" in group):
            tensors.problems.append(
                Problem(
                    f"{tensors.weights}: {name} has {'no' if biased else 'a'} lora_B.bias although lora_bias is "
                    f"{'set' if biased else 'not set'}",
                    hint="use the adapter_config.json of the training",
                )
            )
        if "bias" in group:
            bias = group["bias"]
            if dora or bias.shape != (b.shape[0],) or embedding:
                tensors.problems.append(
                    Problem(
                        f"{tensors.weights}: the lora_B.bias of {name} cannot be merged",
                        f"({b.shape[0]},), without DoRA",
                        str(bias.shape) + (" with DoRA" if dora else ""),
                    )
                )
            modules.append(BiasModule(name, bias, scale))
        modules.append(module)
    require_factors(modules, tensors)
    return tuple(modules)


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
    where = str(tensors.weights.parent)
    own = indices
    if isinstance(indices, dict):
        own = next(
            (value for key, value in indices.items() if isinstance(key, str) and f".{name}".endswith(f".{key}")), None
        )
    if (
        not isinstance(own, list)
        or not all(isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 1 << 40 for index in own)
        or len(set(own)) != len(own)
    ):
        tensors.problems.append(
            Problem(f"{where}: the token indices of {name} are missing or wrong", "a list of rows", repr(own)[:200])
        )
    elif len(values.shape) != 2 or values.shape[0] != len(own):
        tensors.problems.append(
            Problem(f"{tensors.weights}: the tokens of {name} do not fit", f"({len(own)}, dim)", str(values.shape))
        )
    else:
        yield TokenModule(name, values, tuple(own))


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
    rank = rank_of(config, "init_r", tensors)
    alpha = number(config, "lora_alpha", tensors)
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


def initial_factors(folder: Path) -> dict[str, tuple[TensorRef, TensorRef, float]]:
    """Return (A0, B0, scale) by module from the PEFT folder that was saved before training. Raises AdapterError."""
    config = read_json(folder / "adapter_config.json")
    weights = find_weights(folder)
    if weights is None:
        raise AdapterError(f"{folder}: no adapter weights in the initial adapter")
    tensors = group_tensors(read_weights(weights).tensors, weights, LORA_ROLES)
    plain = {**config, "use_dora": False}
    for group in tensors.groups.values():
        group.pop("m", None)
    modules = lora_modules(tensors, plain, None)
    raise_all(tensors.problems, AdapterError)
    return {m.name: (m.a, m.b, m.scale) for m in modules if isinstance(m, LoraModule)}
