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
from .tensors import PREFIX, Parts, PeftExtras, find_weights, flag, group_tensors, number, rank_of

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


def read_lora(parts: Parts, config: Mapping[str, Any], extras: PeftExtras) -> tuple[str, tuple[AdaptedModule, ...]]:
    """Method and modules of a LORA folder; what is wrong with it is added to `parts.problems`."""
    initial = initial_of(config, parts, extras)
    return method_name(config, initial), lora_modules(parts, config, initial, extras)


def method_name(config: Mapping[str, Any], initial: Initial | None) -> str:
    """What to call a LoRA-family adapter."""
    if config.get("use_dora"):
        return "DuDe" if initial is not None else "DoRA"
    if initial is not None:
        return {"svd": "PiSSA", "qr": "OLoRA", "svd_least": "MiLoRA"}.get(
            initial.method, f"LoRA ({config.get('init_lora_weights')})"
        )
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def lora_modules(
    parts: Parts,
    config: Mapping[str, Any],
    initial: Initial | None,
    extras: PeftExtras | None = None,
    axis: int = 0,
) -> tuple[AdaptedModule, ...]:
    """The modules of a LoRA-family adapter; everything that is wrong with them is added to `parts.problems`.

    axis: 1 where magnitudes belong to input columns, which PEFT does not do.
    """
    extras = extras or PeftExtras()
    where = str(parts.weights.parent)
    dora, rslora = flag(config, "use_dora", parts), flag(config, "use_rslora", parts)
    rank = rank_of(config, "r", parts)
    alpha = number(
        config, "lora_alpha", parts, "the scale is alpha / r: it must be known, a guess would merge a wrong adapter"
    )
    ranks = read_pattern(config, "rank_pattern", where, parts.problems)
    alphas = read_pattern(config, "alpha_pattern", where, parts.problems)
    magnitudes = _given_magnitudes(extras.magnitudes) if extras.magnitudes is not None else {}
    before = initial_factors(extras.init_adapter) if extras.init_adapter is not None and initial is not None else {}
    stacks = _target_parameters(config, parts)
    modules: list[AdaptedModule] = []
    for name, group in sorted(parts.groups.items()):
        if "T" in group:
            modules += _tokens(name, group["T"], config.get("trainable_token_indices"), parts)
            if len(group) == 1:
                continue
        embedding = "EA" in group or "EB" in group
        a, b = (group.get("EA"), group.get("EB")) if embedding else (group.get("A"), group.get("B"))
        if a is None or b is None or {"A", "EA"} <= group.keys():
            parts.problems.append(Problem(f"{parts.weights}: {name} has only one of its two factors, or too many"))
            continue
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
            hint = "convolutions are not supported" if len(a.shape) > 2 else None
            parts.problems.append(
                Problem(
                    f"{parts.weights}: the factors of {name} do not fit",
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
            wrappers = sum(other.partition(".base_layer")[0] == owner for other in parts.groups)
            depth = name.count(".base_layer")
            modules.append(StackModule(owner, a, b, tuple(targets), depth, wrappers))
            continue
        said = ranks.get(name, rank)
        if said != a.shape[0]:
            parts.problems.append(
                Problem(f"{parts.weights}: the rank of {name} is not the config's", f"r = {said}", f"r = {a.shape[0]}")
            )
            continue
        magnitude = group.get("m") or magnitudes.get(name)
        scale = scale_of(name, a.shape[0])
        module = LoraModule(
            name, a, b, scale, magnitude=magnitude, initial=initial, embedding=embedding, magnitude_dim=axis
        )
        module = with_initial(module, group, before, parts)
        _check_magnitude(module, dora, parts)
        if "bias" in group:
            bias = group["bias"]
            if dora or bias.shape != (b.shape[0],) or embedding:
                parts.problems.append(
                    Problem(
                        f"{parts.weights}: the lora_B.bias of {name} cannot be merged",
                        f"({b.shape[0]},), without DoRA",
                        str(bias.shape) + (" with DoRA" if dora else ""),
                    )
                )
            modules.append(BiasModule(name, bias, scale))
        modules.append(module)
    if not modules and not parts.problems:
        parts.problems.append(Problem(f"{parts.weights}: holds no adapter factors"))
    return tuple(modules)


def _given_magnitudes(source: Path) -> dict[str, TensorRef]:
    """Magnitude vectors by module, from a weights file or another PEFT folder."""
    file = find_weights(source) if source.is_dir() else source
    if file is None or not file.is_file():
        raise AdapterError(f"{source}: no such magnitudes", expected="a safetensors or .bin file, or a PEFT folder")
    found = {}
    for ref in read_weights(file).tensors:
        name = ref.name.removeprefix(PREFIX)
        for role in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
            if name.endswith("." + role):
                found[name[: -len(role) - 1]] = ref
    if not found:
        raise AdapterError(f"{source}: holds no magnitudes", expected=f"{PREFIX}<module>.lora_magnitude_vector")
    return found


def _target_parameters(config: Mapping[str, Any], parts: Parts) -> dict[str, list[tuple[str, str]]]:
    """owner's last component -> (target, parameter): the parameters that may be adapted."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        parts.problems.append(
            Problem(f"{parts.weights.parent}: target_parameters is wrong", "a list of names", repr(targets)[:200])
        )
        return {}
    found: dict[str, list[tuple[str, str]]] = {}
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        found.setdefault(owner.rpartition(".")[2], []).append((target, parameter))
    if "" in found:  # a bare parameter name, as "all-linear" saves it: of any owner that is not a plain linear layer
        everywhere = found.pop("")
        for name in parts.groups:
            owner = name.partition(".base_layer")[0].rpartition(".")[2]
            found.setdefault(owner, []).extend(item for item in everywhere if item not in found[owner])
    return found


def _tokens(name: str, values: TensorRef, indices: object, parts: Parts) -> Iterator[TokenModule]:
    """The trained rows of the embedding `name`."""
    where = str(parts.weights.parent)
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
        parts.problems.append(
            Problem(f"{where}: the token indices of {name} are missing or wrong", "a list of rows", repr(own)[:200])
        )
    elif len(values.shape) != 2 or values.shape[0] != len(own):
        parts.problems.append(
            Problem(f"{parts.weights}: the tokens of {name} do not fit", f"({len(own)}, dim)", str(values.shape))
        )
    else:
        yield TokenModule(name, values, tuple(own))


def _check_magnitude(module: LoraModule, use_dora: bool, parts: Parts) -> None:
    magnitude = module.magnitude
    size = module.shape[1] if module.embedding else module.shape[module.magnitude_dim]
    if use_dora and magnitude is None:
        parts.problems.append(
            Problem(
                f"{parts.weights}: {module.name} has no magnitude vector although use_dora is set",
                expected=f"{PREFIX}{module.name}.lora_magnitude_vector",
                hint="PEFT drops the magnitudes when it saves with path_initial_model_for_weight_conversion: save the "
                "adapter again without that option, or pass --magnitudes FILE (a checkpoint that still has them)",
            )
        )
    elif not use_dora and magnitude is not None:
        parts.problems.append(
            Problem(f"{parts.weights}: {module.name} has a magnitude vector although use_dora is not set")
        )
    elif magnitude is not None and magnitude.shape != (size,):
        parts.problems.append(
            Problem(f"{parts.weights}: the magnitude of {module.name} does not fit", f"({size},)", str(magnitude.shape))
        )


def read_adalora(parts: Parts, config: Mapping[str, Any], extras: PeftExtras) -> tuple[str, tuple[AdaptedModule, ...]]:
    """AdaLoRA: B diag(E) A, scaled by the rank at the start of training (PEFT's ranknum stays at init_r)."""
    rank = rank_of(config, "init_r", parts)
    alpha = number(config, "lora_alpha", parts)
    modules: list[AdaptedModule] = []
    for name, group in sorted(parts.groups.items()):
        a, b, e = group.get("A"), group.get("B"), group.get("E")
        if a is None or b is None or e is None:
            parts.problems.append(Problem(f"{parts.weights}: {name} lacks one of lora_A, lora_B, lora_E"))
            continue
        r = a.shape[0] if a.shape else -1
        matrices = len(a.shape) == len(b.shape) == 2 and 0 not in (a.shape[1], b.shape[0])
        if not matrices or b.shape[1] != r or e.shape != (r, 1):
            parts.problems.append(
                Problem(
                    f"{parts.weights}: the factors of {name} do not fit",
                    "A (r, in), B (out, r), E (r, 1)",
                    f"{a.shape}, {b.shape}, {e.shape}",
                )
            )
            continue
        if r == 0:
            continue  # pruned away
        scaling = alpha if alpha > 0 else float(r)
        modules.append(LoraModule(name, a, b, scaling / (rank + ADALORA_EPSILON), e=e))
    if not modules and not parts.problems:
        parts.problems.append(Problem(f"{parts.weights}: holds no adapter factors"))
    return "AdaLoRA", tuple(modules)


def read_tokens(parts: Parts, config: Mapping[str, Any], extras: PeftExtras) -> tuple[str, tuple[AdaptedModule, ...]]:
    """TrainableTokens alone, without a LoRA beside it."""
    modules: list[AdaptedModule] = []
    for name, group in sorted(parts.groups.items()):
        modules += _tokens(name, group["T"], config.get("token_indices"), parts)
    if not modules and not parts.problems:
        parts.problems.append(Problem(f"{parts.weights}: holds no trained tokens"))
    return "trainable tokens", tuple(modules)


def initial_factors(folder: Path) -> dict[str, tuple[TensorRef, TensorRef, float]]:
    """A0, B0 and their scale by module, from the PEFT folder saved before training."""
    config = read_json(folder / "adapter_config.json")
    weights = find_weights(folder)
    if weights is None:
        raise AdapterError(f"{folder}: no adapter weights in the initial adapter")
    parts = group_tensors(read_weights(weights).tensors, weights, LORA_ROLES)
    plain = {**config, "use_dora": False}
    for group in parts.groups.values():
        group.pop("m", None)
    modules = lora_modules(parts, plain, None)
    raise_all(parts.problems, AdapterError)
    return {m.name: (m.a, m.b, m.scale) for m in modules if isinstance(m, LoraModule)}
