"""Files of kohya sd-scripts and LyCORIS for a language model (text encoder): LoRA, LoKr, LoHa, DoRA.

One safetensors file. A module's name is a prefix (lora_te_, lora_te1_, lora_te2_, lycoris_) and its path with dots
replaced by underscores; the base's names are needed to find the path. Per module: lora_down.weight (r, in),
lora_up.weight (out, r), or lokr_* or hada_*; alpha (one number, s = alpha / r; without it s = 1, as in sd-scripts); and
dora_scale, (out, 1) for norms of output rows, (1, in) for norms of input columns (LyCORIS' wd_on_out).
LyCORIS' LoKr with two full matrices has s = 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from adapter_merge.errors import AdapterError, Problem, UnsupportedError, raise_all
from adapter_merge.formats.peft.lycoris import LOHA_ROLES, LOKR_ROLES, can_multiply, find_factor, make_loha_module
from adapter_merge.methods.adapter import AdaptedModule, Adapter, AdapterFormat
from adapter_merge.methods.loha import LohaModule
from adapter_merge.methods.lokr import LokrModule
from adapter_merge.methods.lora import LoraModule
from adapter_merge.storage.checkpoint import Checkpoint, read_weights
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_io import read_tensor

from .components import component_of, diffusers_name, others_note
from .known_settings import KnownSettings
from .statements import compare_number_tensors

LORA_ROLES = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "t2", "lora_down": "A", "lora_up": "B"}
COMMON_ROLES = {"alpha": "alpha", "dora_scale": "m"}
ROLES = {**LORA_ROLES, **{key: f"lokr_{v}" for key, v in LOKR_ROLES.items()},
         **{key: f"hada_{v}" for key, v in LOHA_ROLES.items()}, **COMMON_ROLES}  # fmt: skip
# prefix -> component of a pipeline; lora_unet_ stands before the modules of a transformer (Flux) as well
COMPONENT_PREFIXES = {
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "lora_unet_": "unet", "lora_transformer_": "transformer",
}  # fmt: skip
PREFIXES = (*COMPONENT_PREFIXES, "lycoris_")
IMAGE_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_vae_")
FOREIGN_NAMES = "is this the model that was trained? Files in another layout than diffusers': load_lora_weights and "
FOREIGN_NAMES += "save_lora_weights of diffusers write them in its own names"

# Metadata of sd-scripts (train_network.py) and LyCORIS (lycoris.kohya) that describe the network.
NETWORK_KEYS = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_dropout", "ss_network_args")
NETWORK_MODULES = ("None", "networks.lora", "lycoris.kohya", "locon.locon_kohya")
ALGORITHMS = ("lora", "locon", "loha", "lokr")
OFF = ("none", "null", "false", "")
NETWORK_ARGUMENTS = KnownSettings(
    read=frozenset(("rs_lora", "wd_on_out")),  # wd_on_out: the shape of dora_scale shows it
    ignored=frozenset(
        (
            *("conv_dim", "conv_alpha", "conv_lr", "dropout", "rank_dropout", "module_dropout", "rank_dropout_scale"),
            *("preset", "factor", "decompose_both", "full_matrix", "unbalanced_factorization", "dora_wd", "use_tucker"),
            *("use_cp", "use_conv_cp", "bypass_mode", "loraplus_lr_ratio", "loraplus_unet_lr_ratio"),
            *("loraplus_text_encoder_lr_ratio", "block_dims", "block_alphas", "block_lr_zero_threshold"),
            *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "train_t5xxl", "verbose"),
        )
    ),
    refused={"use_scalar": "a trained scalar", "train_norm": "trained norms", "constraint": "a constrained OFT"},
)


def holds_kohya(names: tuple[str, ...]) -> bool:
    """Return True when some tensor has a role that only these files use."""
    return any(name.endswith((".lora_down.weight", ".lora_up.weight")) or ".lokr_w" in name or ".hada_w" in name
               for name in names)  # fmt: skip


def read_kohya(file: Path, alpha: float | None, magnitude_axis: str | None, base: Checkpoint | None) -> Adapter:
    """Read the adapter in `file`. Raises AdapterError with every problem, UnsupportedError for an image model."""
    shard = read_weights(file)
    groups, problems = group_lycoris(shard.tensors, file)
    groups, notes = _groups_of(groups, base, file)
    arguments = _network_arguments(shard.metadata, file)
    rsloras = str(arguments.get("rs_lora")).lower() == "true"
    named: dict[str, Mapping[str, TensorRef]] = {}
    for flat, group in sorted(groups.items()):
        name = _find_path(flat, base)
        if name is None:
            problems.append(Problem(f"{file}: the base has no weight for {flat}", hint=FOREIGN_NAMES))
        elif name in named:
            problems.append(Problem(f"{file}: two modules of the file have the name {name}"))
        else:
            named[name] = group
    modules = make_lycoris_modules(named, alpha, rsloras, magnitude_axis, file, problems)
    raise_all(problems, AdapterError)
    return Adapter(
        folder=file.parent,
        format=AdapterFormat.KOHYA,
        method=name_method(modules),
        modules=modules,
        replacements={},
        config={},
        base_name=shard.metadata.get("ss_sd_model_name"),
        files=(file,),
        notes=notes,
        contradictions=compare_number_tensors("alpha", alpha, (group.get("alpha") for group in named.values()), file),
    )


def _groups_of(
    groups: dict[str, dict[str, TensorRef]], base: Checkpoint | None, file: Path
) -> tuple[dict[str, dict[str, TensorRef]], tuple[str, ...]]:
    """Return the modules of the component that `base` is, and a note on the others.

    Raises UnsupportedError where all belong to an image model and `base` is none.
    """
    by_component: dict[str, list[str]] = {}
    for name in groups:
        prefix = next((prefix for prefix in COMPONENT_PREFIXES if name.startswith(prefix)), None)
        by_component.setdefault(COMPONENT_PREFIXES[prefix] if prefix is not None else "", []).append(name)
    if base is None or by_component.keys() <= {""}:
        return groups, ()
    if (
        "_class_name" in base.config
        and "unet" in by_component
        and not str(base.config["_class_name"]).startswith("UNet")
    ):
        by_component["transformer"] = [*by_component.get("transformer", ()), *by_component.pop("unet")]
    component = component_of(base, by_component)
    if component is None and "" not in by_component:
        raise UnsupportedError(
            f"{file}: its modules belong to an image model or to its text encoders",
            expected="a base that is that part of the pipeline, such as PIPELINE/unet",
            got=", ".join(f"{len(names)} modules of {name}" for name, names in by_component.items()),
        )
    chosen = {*by_component.get(component or "", ()), *by_component.get("", ())}
    counts = {name: len(names) for name, names in by_component.items() if name}
    return {name: group for name, group in groups.items() if name in chosen}, others_note(counts, component)


def group_lycoris(
    refs: Iterable[TensorRef], file: Path, prefix: str = ""
) -> tuple[dict[str, dict[str, TensorRef]], list[Problem]]:
    """Return the tensors by module and role, and a problem for each tensor without a role."""
    groups: dict[str, dict[str, TensorRef]] = {}
    problems: list[Problem] = []
    by_length = sorted(ROLES, key=len, reverse=True)
    for ref in refs:
        role = next((r for r in by_length if ref.name.endswith("." + r)), None)
        if role is None or not ref.name.startswith(prefix):
            problems.append(Problem(f"{file}: unknown tensor {ref.name!r}", expected=", ".join(ROLES)))
        else:
            groups.setdefault(ref.name[len(prefix) : -len(role) - 1], {})[ROLES[role]] = ref
    return groups, problems


def make_lycoris_modules(
    groups: Mapping[str, Mapping[str, TensorRef]],
    alpha: float | None,
    rslora: bool,
    magnitude_axis: str | None,
    file: Path,
    problems: list[Problem],
) -> tuple[AdaptedModule, ...]:
    """Return one module per group (module path -> role -> tensor); adds to `problems`.

    magnitude_axis: "out" or "in", for a dora_scale of a square weight whose shape does not tell.
    """
    modules: list[AdaptedModule] = []
    for name, group in sorted(groups.items()):
        module = _make_module(name, group, alpha, rslora, file, problems)
        if module is None:
            continue
        scale = group["m"].as_matrix() if "m" in group else None  # of a convolution (out, 1, 1, 1)
        if scale is not None:
            axis = _find_magnitude_axis(scale, module.shape, magnitude_axis)
            if axis is None:
                problems.append(
                    Problem(
                        f"{file}: the dora_scale of {name} may belong to rows or to columns",
                        f"({module.shape[0]}, 1) for rows, (1, {module.shape[1]}) for columns",
                        str(scale.shape),
                        "pass --magnitude-axis out or in where the weight is square",
                    )
                )
                continue
            module = replace(module, magnitude=scale, magnitude_dim=axis)
        modules.append(module)
    if not modules and not problems:
        problems.append(Problem(f"{file}: holds no adapter factors"))
    return tuple(modules)


def name_method(modules: Iterable[AdaptedModule]) -> str:
    """Return the display name of the methods, for example "LoKr with magnitudes" or "LoHa and LoRA"."""
    kinds = {type(module).__name__.removesuffix("Module") for module in modules}
    method = " and ".join(sorted({"Lora": "LoRA", "Lokr": "LoKr", "Loha": "LoHa"}[kind] for kind in kinds))
    if any(module.magnitude is not None for module in modules):
        method = "DoRA" if method == "LoRA" else f"{method} with magnitudes"
    return method


def _find_path(flat: str, base: Checkpoint | None) -> str | None:
    """Return the module's path in the base, None where the base has no such module; without a base, the flat name."""
    name = flat
    for prefix in PREFIXES:
        if flat.startswith(prefix):
            name = flat.removeprefix(prefix)
            break
    if base is None:
        return name
    modules = [key.removesuffix(".weight") for key in base.tensors if key.endswith(".weight")]
    if "_class_name" in base.config:
        name = diffusers_name(name, base.config.get("layers_per_block")) or name
        same = [module for module in modules if module.replace(".", "_") == name.replace(".", "_")]
        return same[0] if len(same) == 1 else None
    exact = [module for module in modules if module.replace(".", "_") == name.replace(".", "_")]
    if not exact:
        exact = [module for module in modules if f"_{module}".replace(".", "_").endswith("_" + name.replace(".", "_"))]
    if not exact:  # the base is a backbone saved without its prefix
        exact = [module for module in modules if f"_{name}".replace(".", "_").endswith("_" + module.replace(".", "_"))]
    return exact[0] if len(exact) == 1 else None


def _make_module(
    name: str,
    group: Mapping[str, TensorRef],
    alpha: float | None,
    rslora: bool,
    file: Path,
    problems: list[Problem],
) -> LoraModule | LokrModule | LohaModule | None:
    """Return the module of one group; None, and a problem, where its tensors do not fit each other."""
    stored = _read_alpha(group.get("alpha"), problems) if alpha is None else alpha
    lokr = {role.removeprefix("lokr_"): ref for role, ref in group.items() if role.startswith("lokr_")}
    hada = {role.removeprefix("hada_"): ref for role, ref in group.items() if role.startswith("hada_")}

    def scale(rank: int) -> float:
        if stored is None:
            return 1.0
        return stored / (math.sqrt(rank) if rslora else rank)

    a, b, core = group.get("A"), group.get("B"), group.get("t2")
    if a is not None and b is not None and not lokr and not hada:
        kernel = core.shape[2:] if core is not None else a.shape[2:]
        pointwise = set(b.shape[2:]) <= {1} and (core is None or set(a.shape[2:]) <= {1})
        a, b = a.as_matrix(), b.as_matrix()
        inner = core is None or core.shape[:2] == (b.shape[-1], a.shape[0])  # lora_mid: (r, r, k, ...)
        if pointwise and inner and can_multiply(b, a):
            return LoraModule(name, a, b, scale(a.shape[0]), kernel=kernel, core=core)
    if lokr and not hada and a is None and b is None:
        w1, w2 = find_factor(lokr, "w1"), find_factor(lokr, "w2", lokr.get("t2"))
        if w1 and w2:
            low = [pair[1].shape[0] for pair in (w1, w2) if len(pair) == 2]
            return LokrModule(name, w1, w2, scale(low[0]) if low else 1.0, core=lokr.get("t2"))
    if hada and not lokr and a is None and b is None:
        rank = hada["w1_b"].shape[0] if "w1_b" in hada and hada["w1_b"].shape else 1
        module = make_loha_module(name, hada, scale(max(rank, 1)))
        if module is not None:
            return module
    shapes = ", ".join(f"{role} {ref.shape}" for role, ref in group.items())
    problems.append(
        Problem(f"{file}: the tensors of {name} do not fit", "the factors of one LoRA, LoKr or LoHa", shapes)
    )
    return None


def _read_alpha(ref: TensorRef | None, problems: list[Problem]) -> float | None:
    """Return the alpha stored in `ref`; None, and a problem unless `ref` is None, where there is no usable one."""
    if ref is None:
        return None
    if math.prod(ref.shape) != 1 or ref.dtype not in (*FLOAT_DTYPES, "I32", "I64"):
        problems.append(Problem(f"{ref.file}: {ref.name} is not a number", got=f"{ref.dtype} {ref.shape}"))
        return None
    value = float(read_tensor(ref).reshape(-1)[0])
    if not math.isfinite(value) or value == 0:
        problems.append(Problem(f"{ref.file}: {ref.name} is not a usable scale", got=str(value)))
        return None
    return value


def _find_magnitude_axis(scale: TensorRef, shape: tuple[int, int], stated: str | None) -> int | None:
    """Return 0 for a magnitude per output row, 1 for one per input column, None where neither shape nor user tells."""
    out, inner = shape
    rows = scale.shape == (out, 1) or (scale.shape == (out,) and (out != inner or stated == "out"))
    columns = scale.shape == (1, inner) or (scale.shape == (inner,) and (out != inner or stated == "in"))
    if rows and columns:
        return {"out": 0, "in": 1}.get(stated or "")
    return 0 if rows else 1 if columns else None


def _network_arguments(metadata: Mapping[str, str], file: Path) -> Mapping[str, object]:
    """Return the network's arguments from the metadata. Raises UnsupportedError for unknown ones."""
    problems = [
        Problem(f"{file}: the metadata key {key} is unknown", ", ".join(NETWORK_KEYS), f"{metadata[key]:.100}")
        for key in metadata
        if key.startswith("ss_network_") and key not in NETWORK_KEYS
    ]
    module = metadata.get("ss_network_module", "None")
    if module not in NETWORK_MODULES:
        problems.append(
            Problem(
                f"{file}: the network {module!r:.100} is not supported", ", ".join(NETWORK_MODULES), "ss_network_module"
            )
        )
    try:
        arguments = json.loads(metadata.get("ss_network_args") or "{}")
    except ValueError:
        arguments = None
    if arguments is None and metadata.get("ss_network_args") in ("None", "null"):
        arguments = {}
    if not isinstance(arguments, dict):
        problems.append(
            Problem(f"{file}: ss_network_args cannot be read", "a JSON object", f"{metadata['ss_network_args']:.100}")
        )
        arguments = {}
    off = {key: value for key, value in arguments.items() if str(value).lower() not in OFF}
    algorithm = off.pop("algo", "lora")
    if algorithm not in ALGORITHMS:
        problems.append(Problem(f"{file}: LyCORIS' algo {algorithm!r:.60} is not supported", ", ".join(ALGORITHMS)))
    problems += NETWORK_ARGUMENTS.check(off, f"{file}: ss_network_args")[0]
    raise_all(problems, UnsupportedError)
    return arguments
