"""Table of all PEFT types: how the folder of each is read, or why it is refused; reader of the layer types.

Types in METHODS (folder.py) have a reader and a formula of their own (lora.py, lycoris.py). Types in LAYER_TYPES are
merged by PEFT's own layer (methods/peft_layer.py). In LN_TUNING, the trained norms replace the base's. REFUSED_TYPES
states why a type is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.known_settings import KnownSettings, describe_off_settings
from adapter_merge.methods.adapter import Adapter, AdapterFormat
from adapter_merge.methods.peft_layer import PREFIX, PeftLayerModule, layer_config, require_peft
from adapter_merge.storage.checkpoint import read_weights
from adapter_merge.storage.safetensors_header import TensorRef

from .known_settings import BIASES
from .patterns import pattern_fault


@dataclass(frozen=True)
class LayerType:
    """One type whose weights PEFT's own layer merges."""

    mark: str  # how the names of its tensors begin, after the module's path
    changes: tuple[str, ...] = ("weight",)
    refused: Mapping[str, tuple[Any, str]] | None = None  # setting -> (its value that is refused, why)
    drawn: tuple[str, ...] = ()  # tensors that a seed gives where they are not saved
    low_rank: bool = False  # the change of a weight has at most the rank that `rank_bound` returns


INDICES = "_indices"  # how the names of integer tensors end
BOTH = ("weight", "bias")
LAYER_TYPES = {
    "BEFT": LayerType("beft_", ("bias",)),
    "BOFT": LayerType("boft_"),
    "C3A": LayerType("c3a_"),
    "DEFT": LayerType("deft_"),
    "DELORA": LayerType("delora_", low_rank=True),
    "FOURIERFT": LayerType("fourierft_"),
    "GLORA": LayerType("glora_", BOTH),
    "GRALORA": LayerType("gralora_", low_rank=True),
    "HIRA": LayerType("hira_"),
    "HRA": LayerType("hra_", low_rank=True),
    "IA3": LayerType("ia3_", BOTH),
    "MISS": LayerType("miss_", low_rank=True),
    "OFT": LayerType("oft_"),
    "OSF": LayerType("osf_"),
    "PEANUT": LayerType("peanut_", low_rank=True),
    "PSOFT": LayerType(
        "psoft_",
        refused={"psoft_svd": ("lowrank", "a randomised decomposition, which other machines do not repeat")},
        low_rank=True,
    ),
    "PVERA": LayerType(
        "pvera_",
        refused={"sample_at_inference": (True, "its weights are drawn anew in every forward pass")},
        drawn=("pvera_A", "pvera_B"),
        low_rank=True,
    ),
    "RANDLORA": LayerType("randlora_", drawn=("randlora_A", "randlora_B")),
    "ROAD": LayerType("road_", BOTH),
    "SHIRA": LayerType("shira_"),
    "SUPERTUNING": LayerType("supertuning_"),
    "VBLORA": LayerType("vblora_", low_rank=True),
    "WAVEFT": LayerType("waveft_"),
}
REPLACED_TYPES = {"LN_TUNING": "ln_tuning_"}

_PROMPT = "it trains tokens or a key-value prefix beside the model and changes no weight"
REFUSED_TYPES = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _PROMPT
    ),
    "ADAPTION_PROMPT": "it adds gated prompt tokens to the attention and changes no weight",
    "ADAMSS": "its subspaces come from k-means clusters of the base's weights that the folder does not hold",
    "FROD": "its rotations come from a joint decomposition of one kind of weight over all layers",
    "LILY": "a router mixes its experts for each token, so that no single weight equals it; "
    "PEFT cannot merge it either",
    "POLY": "a router mixes its skills by the task of each input, so that no single weight equals it",
    "SHADOW": "its change depends on the input, so that no single weight equals it; PEFT cannot merge it either",
    "TINYLORA": "which vector a module uses follows the order of the model's modules, which the folder does not hold",
    "UNILORA": "the places in its vector follow the order of the model's modules, which the folder does not hold",
    "XLORA": "a classifier mixes its LoRAs for each token, so that no single weight equals it",
}


def read_layer_type(folder: Path, config: Mapping[str, Any], weights: Path, config_file: Path) -> Adapter:
    """Read a folder of a type in LAYER_TYPES or REPLACED_TYPES. Reads the config and the header of the weights.

    Raises UnsupportedError for settings that the installed PEFT does not know, AdapterError for unknown tensors,
    MissingDependencyError without peft.
    """
    kind = str(config["peft_type"])
    notes = _check_settings(kind, config, config_file)
    mark = LAYER_TYPES[kind].mark if kind in LAYER_TYPES else REPLACED_TYPES[kind]
    module_tensors: dict[str, dict[str, TensorRef]] = {}
    shared: dict[str, TensorRef] = {}
    replaced: dict[str, TensorRef] = {}
    problems: list[Problem] = []
    for ref in read_weights(weights).tensors:
        name = ref.name.removeprefix(PREFIX)
        module, separator, role = name.partition(f".{mark}")
        if name == ref.name and ref.name.startswith(f"base_model.{mark}"):
            shared[ref.name] = ref
        elif name == ref.name:
            problems.append(Problem(f"{weights}: unknown tensor {ref.name!r}", expected=f"a name under {PREFIX}"))
        elif separator and role.startswith("embedding_"):
            problems.append(Problem(f"{weights}: {kind} on an embedding is not supported", got=ref.name))
        elif separator and kind in REPLACED_TYPES and role in ("layers.weight", "layers.bias"):
            replaced[f"{module}.{role.removeprefix('layers.')}"] = ref
        elif separator and kind in LAYER_TYPES:
            module_tensors.setdefault(module, {})[ref.name] = ref
        elif ".original_module." not in name:
            replaced.setdefault(name.replace(".modules_to_save.", ".").replace(".base_layer.", "."), ref)
    if not module_tensors and not replaced and not problems:
        problems.append(Problem(f"{weights}: holds no tensors of {kind}"))
    raise_all(problems, AdapterError)
    entry = LAYER_TYPES.get(kind)
    modules = tuple(
        PeftLayerModule(
            name,
            kind,
            tensors | shared,
            config,
            entry.changes,
            entry.drawn,
            entry.changes[0],
            low_rank=rank_bound(kind, config),
        )
        for name, tensors in sorted(module_tensors.items())
        if entry is not None
    )
    base_name = config.get("base_model_name_or_path")
    return Adapter(
        folder=folder,
        format=AdapterFormat.PEFT,
        method=kind,
        modules=modules,
        replacements=replaced,
        config=config,
        base_name=base_name if isinstance(base_name, str) else None,
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        files=(config_file, weights),
        notes=notes,
    )


def rank_bound(kind: str, config: Mapping[str, Any]) -> int | None:
    """Return the largest rank of W' - W0 that the type and its settings allow; None where it is not below W0's.

    VBLORA, PVERA      up @ down, made from a bank of vectors, or from random matrices and trained scales
    DELORA             up @ down with scaled columns; MISS: r rows of numbers, repeated (not "bat", which multiplies W0)
    GRALORA            k^2 blocks of rank r / k, and hybrid_r for all blocks together
    HRA                W0 times r Householder reflections, less W0: the span of their vectors
    PEANUT, PSOFT      an r-dimensional input or output space, of factors or of W0's first singular vectors
    """
    if not LAYER_TYPES[kind].low_rank or config.get("init_weights") == "bat":
        return None
    pattern = config.get("rank_pattern")
    stated = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    ranks = [rank for rank in stated if isinstance(rank, int) and rank > 0]
    if len(ranks) < len(stated):
        return None
    blocks, hybrid = config.get("gralora_k"), config.get("hybrid_r")
    return max(ranks) * (blocks if isinstance(blocks, int) else 1) + (hybrid if isinstance(hybrid, int) else 0)


def _check_settings(kind: str, config: Mapping[str, Any], config_file: Path) -> tuple[str, ...]:
    """Return notes on the config; raise UnsupportedError for every setting that the installed PEFT cannot use."""
    require_peft(kind)
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UnsupportedError(
            f"{config_file}: PEFT {peft.__version__} has no type {kind}", hint="pip install --upgrade peft"
        )
    settings = KnownSettings(frozenset(field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])))
    problems, off = settings.check(config, str(config_file))
    entry = LAYER_TYPES.get(kind)
    for key, (value, why) in ((entry.refused if entry else None) or {}).items():
        if config.get(key) == value:
            problems.append(Problem(f"{config_file}: {kind} with {key} = {value!r} is not supported", got=why))
    for key in ("target_parameters", "trainable_token_indices", "layer_replication", "megatron_config"):
        if config.get(key):
            problems.append(Problem(f"{config_file}: {key} with {kind} is not supported"))
    if config.get("bias") not in BIASES:
        problems.append(Problem(f"{config_file}: bias is wrong", ", ".join(map(repr, BIASES)), repr(config["bias"])))
    for key, value in config.items():
        patterns = value if isinstance(value, dict) and key.endswith("_pattern") else ()
        for pattern in (*patterns, *_expressions(config, key)):
            fault = pattern_fault(str(pattern))
            if fault is not None:
                problems.append(Problem(f"{config_file}: {key}: {pattern!r:.100} is not usable", got=fault))
    raise_all(problems, UnsupportedError)
    try:
        layer_config({key: value for key, value in config.items() if key not in off}, ["module"])
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"{config_file}: PEFT {peft.__version__} refuses this config", got=f"{type(error).__name__}: {error}"[:400]
        ) from error
    return describe_off_settings(off, str(config_file)) + _version_note(config, peft.__version__, kind)


def _expressions(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the regular expression in a setting that PEFT matches against the module's name."""
    value = config.get(key)
    return (value,) if key == "feedforward_modules" and isinstance(value, str) else ()


def _version_note(config: Mapping[str, Any], installed: str, kind: str) -> tuple[str, ...]:
    """Return a note where another release of PEFT wrote the folder."""
    wrote = config.get("peft_version")
    if wrote == installed:
        return ()
    by = f"PEFT {wrote}" if isinstance(wrote, str) else "a PEFT that does not state its version"
    return (f"written by {by:.60}, merged by the {kind} layer of PEFT {installed}",)
