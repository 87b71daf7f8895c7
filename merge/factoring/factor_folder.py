"""Factor folder: a PEFT LoRA (or DoRA) folder with scale 1, and files for row scales and full replacements.

adapter_model.safetensors   base_model.model.<module>.lora_A.weight (R, in), .lora_B.weight (out, R), float32; with a
                            row scale .lora_magnitude_vector (out,) as well: PEFT loads it as DoRA; stacked experts as
                            in expert_factors.py
row_scale.safetensors       base_model.model.<module>.row_scale (out,) = m / rownorm(W0 + B A)
replacements.safetensors    <base tensor name> -> heads and biases that were trained as full tensors

`factor` and `extract` write this folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_merge.formats.peft.tensors import PREFIX, REPLACEMENTS
from adapter_merge.methods.adapter import Adapter
from adapter_merge.outputs.staging import write_json
from adapter_merge.storage.tensor_io import write_safetensors

from .expert_factors import PEFT_VERSION, ExpertFactors
from .supported import SINGLE_EXPERT
from .weight_factors import Factored

ROW_SCALES = "row_scale.safetensors"
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")  # settings that leave out some of the targets


@dataclass(frozen=True, eq=False)
class WeightFactors:
    """Factors of one weight as written: W' = diag(s) (W0 + up down), s = magnitude / rownorm(W0 + up down).

    Without a magnitude, s is 1.
    """

    module: str
    up: Tensor  # (out, R)
    down: Tensor  # (R, in)
    magnitude: Tensor | None = None  # (out,); of an embedding (dim,)
    row_scale: Tensor | None = None  # (out,): s
    embedding: bool = False  # the weight is (vocabulary, dim), whose transposed factors PEFT stores
    kernel: tuple[int, ...] = ()  # of a convolution, whose weight is (out, in k ...) here

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the float32 tensors by their names in adapter_model.safetensors."""
        stem = f"{PREFIX}{self.module}"
        if self.embedding:
            tensors = {f"{stem}.lora_embedding_A": self.up.T, f"{stem}.lora_embedding_B": self.down.T}
        else:
            ones = (1,) * len(self.kernel)
            down = self.down.reshape(self.rank, -1, *self.kernel)
            tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": self.up.reshape(*self.up.shape, *ones)}
        if self.magnitude is not None:
            shape = (1, -1, *(1 for _ in self.kernel)) if self.kernel else (-1,)
            tensors[f"{stem}.lora_magnitude_vector"] = self.magnitude.reshape(shape)
        return {name: tensor.contiguous().to(torch.float32) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class FolderConfig:
    """Settings of the folder's adapter_config.json that do not follow from its tensors."""

    base_name: str | None
    task_type: str | None
    conv1d: bool = False
    targets: list[str] | str | None = None  # target_modules; None: the name of every module
    saved: tuple[str, ...] = ()  # modules_to_save of the adapter's own config
    tied: bool = False  # the head is tied to the embedding, as in training
    parameters: tuple[str, ...] = ()  # target_parameters of the adapter's own config


def write_folder(
    folder: Path,
    factors: Sequence[WeightFactors],
    replacements: Mapping[str, Tensor],
    settings: FolderConfig,
    experts: Sequence[ExpertFactors] = (),
) -> None:
    """Write config, factors, row scales and replacements into the empty `folder`."""
    parts = [item.tensors() for item in factors] + [item.tensors() for item in experts]
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    scales = {
        f"{PREFIX}{item.module}.row_scale": item.row_scale.to(torch.float32)
        for item in factors
        if item.row_scale is not None and not item.embedding
    }
    adapted = {item.module for item in factors}
    saved, bias = set(), "none"
    for name, tensor in replacements.items():
        module, _, kind = name.rpartition(".")
        if module in adapted:
            bias = "all" if bias == "all" else "lora_only"
            tensors[f"{PREFIX}{module}.base_layer.{kind}"] = tensor
            continue
        tensors[f"{PREFIX}{name}"] = tensor
        if kind == "bias" and f"{module}.weight" not in replacements:
            bias = "all"  # PEFT's value for biases that were trained without their weights
        else:
            saved.add(module)
    write_json(
        folder / "adapter_config.json",
        _make_config(factors, experts, settings, saved_modules(saved, settings.saved), bias),
    )
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    if scales:
        write_safetensors(folder / ROW_SCALES, scales, {"format": "pt"})
    if replacements:
        write_safetensors(folder / REPLACEMENTS, dict(replacements), {"format": "pt"})


def write_factors(
    folder: Path,
    opened: Adapter,
    factored: Sequence[Factored],
    replacements: Mapping[str, Tensor],
    conv1d: bool,
    kernels: Mapping[str, tuple[int, ...]],
    experts: Sequence[ExpertFactors] = (),
) -> None:
    """Write the factor folder of an adapter into the empty `folder`. kernels: those of the adapted convolutions."""
    embeddings = {module.name for module in opened.modules if module.embedding}
    factored = _with_equal_ranks(factored)
    factors = [
        WeightFactors(
            item.name,
            item.up,
            item.down,
            item.magnitude,
            item.row_scale,
            item.name in embeddings,
            kernels.get(item.name, ()),
        )
        for item in factored
    ]
    targets, task = opened.config.get("target_modules"), opened.config.get("task_type")
    narrowed = any(opened.config.get(key) not in (None, [], "") for key in NARROWING)
    parameters = opened.config.get("target_parameters") if experts else None
    settings = FolderConfig(
        opened.base_name,
        task if isinstance(task, str) else None,
        conv1d,
        targets if isinstance(targets, list | str) and targets not in ("all-linear", "", []) and not narrowed else None,
        stated_modules(opened),
        opened.tied,
        tuple(parameters) if isinstance(parameters, list) else (),
    )
    write_folder(folder, factors, replacements, settings, experts)


def _with_equal_ranks(factored: Sequence[Factored]) -> list[Factored]:
    """Pad the factors of single experts with zeros to one rank: PEFT stacks them on loading.

    Source: peft.utils.transformers_weight_conversion.
    """
    rank = max((item.down.shape[0] for item in factored if SINGLE_EXPERT.search(item.name)), default=0)

    def padded(item: Factored) -> Factored:
        missing = rank - item.down.shape[0]
        if missing == 0 or not SINGLE_EXPERT.search(item.name):
            return item
        pad = torch.nn.functional.pad
        return replace(item, up=pad(item.up, (0, missing)), down=pad(item.down, (0, 0, 0, missing)))

    return [padded(item) for item in factored]


def stated_modules(opened: Adapter) -> tuple[str, ...]:
    """Return modules_to_save of the adapter's own config."""
    stated = opened.config.get("modules_to_save")
    return tuple(name for name in stated if isinstance(name, str)) if isinstance(stated, list) else ()


def saved_modules(replaced: Iterable[str], stated: Iterable[str]) -> list[str] | None:
    """Return modules_to_save for the module paths `replaced`: the `stated` names, and the paths that they leave out.

    A head of several layers is saved as one module (classifier, not classifier.dense), because PEFT cannot load a part
    of it. None where nothing is replaced.
    """
    replaced, names = set(replaced), list(stated)
    uncovered = {module for module in replaced if not any(f".{name}." in f".{module}." for name in names)}
    return sorted({*names, *uncovered}) or None if replaced else None


def _make_config(
    factors: Sequence[WeightFactors],
    experts: Sequence[ExpertFactors],
    settings: FolderConfig,
    modules_to_save: list[str] | None,
    bias: str,
) -> dict[str, Any]:
    """Return adapter_config.json. alpha == rank for every module, so that the scale is 1.

    r is the most common rank, or that of single experts, for which PEFT reads no pattern; the patterns hold the other
    ranks.
    """
    ranks = {item.module: item.rank for item in factors}
    every = ranks | {item.path: item.rank for item in experts}
    single = [rank for name, rank in ranks.items() if SINGLE_EXPERT.search(name)]
    common = Counter(single or every.values()).most_common(1)[0][0] if every else 1
    pattern = {name: rank for name, rank in every.items() if rank != common}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": settings.base_name,
        "task_type": settings.task_type,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks) if settings.targets is None else settings.targets,
        "lora_dropout": 0.0,
        "bias": bias,
        "fan_in_fan_out": settings.conv1d,
        "use_rslora": False,
        "use_dora": any(item.magnitude is not None for item in factors),
        "init_lora_weights": True,
        "modules_to_save": modules_to_save,
        **({"ensure_weight_tying": True} if settings.tied else {}),
        **({"target_parameters": [*settings.parameters], "peft_version": PEFT_VERSION} if experts else {}),
    }
