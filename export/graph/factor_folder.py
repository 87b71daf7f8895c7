"""Reader of factor folders: an adapter as LoRA factors and row scales.

y = row_scale * (x W0^T + x A^T B^T) + bias        A (R, in), B (out, R), row_scale (out,) or none
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import AdapterError, InputError, Problem, raise_all
from adapter_merge.formats.peft.patterns import read_pattern
from adapter_merge.storage.checkpoint import read_json
from adapter_merge.storage.module_paths import match_module_paths

from .targets import POSITIONS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
SCALE = ".row_scale"


@dataclass(frozen=True, eq=False)
class LinearFactors:
    """The factors of one linear layer, float32, in the checkpoint's orientation."""

    down: NDArray[np.float32]  # (R, in)
    up: NDArray[np.float32]  # (out, R)
    row_scale: NDArray[np.float32] | None = None  # (out,)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of an adapter by module path, and the tensors that replace the base's."""

    source: Path
    linears: Mapping[str, LinearFactors]
    replacements: Mapping[str, NDArray[np.float32]]
    method: str = "factors"
    error: float = 0.0  # largest relative error of a weight's change, where factoring measured one
    origin: str | None = None  # evidence of the base that the adapter was trained on, as a sentence
    contradictions: tuple[str, ...] = ()  # evidence against the base, where the adapter was used with force
    frozen_positions: bool = False  # DeBERTa: the positional queries use the base's weight (DCFT with share_att_key)

    def evidence(self) -> dict[str, Any]:
        """Return the evidence of the base as keys of the manifest."""
        return {"origin": self.origin, **({"contradictions": list(self.contradictions)} if self.contradictions else {})}

    def rename_for(self, modules: Iterable[str], tensors: Iterable[str]) -> Factors:
        """Return the factors under a graph's names, which may have one leading component more or less.

        PEFT and transformers name an encoder's modules with or without the body's prefix. The product of the relative
        positions (targets.POSITIONS) gets the factors of its module, unless these are for tokens only.
        """
        paths = set(modules)
        module_paths = match_module_paths(self.linears, paths)
        tensor_names = match_module_paths(self.replacements, tensors)
        linears = {module_paths.get(name, name): value for name, value in self.linears.items()}
        if not self.frozen_positions:
            linears |= {name + POSITIONS: value for name, value in linears.items() if name + POSITIONS in paths}
        replacements = {tensor_names.get(name, name): value for name, value in self.replacements.items()}
        return replace(self, linears=linears, replacements=replacements)

    @property
    def max_rank(self) -> int:
        return max((linear.rank for linear in self.linears.values()), default=0)


def read_factors(folder: Path, source: Path | None = None) -> Factors:
    """Read the factors in `folder`. Raises InputError or AdapterError with every problem.

    source: the adapter that the factors were made from, where `folder` is a temporary folder; errors name it.
    """
    name = source or folder
    import numpy as np

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{name}: has no factors", expected="adapter_model.safetensors")
    config = read_json(folder / "adapter_config.json")
    tensors = _read_arrays(weights)
    scales = _read_optional(folder / "row_scale.safetensors")
    replacements = _read_optional(folder / "replacements.safetensors")
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(Problem(f"{name}: not a factor folder", "peft_type LORA", repr(config.get("peft_type"))))
    if config.get("use_dora") and not scales:
        problems.append(
            Problem(
                f"{name}: a DoRA adapter without its row scales",
                expected="row_scale.safetensors",
                hint="adapter-merge factor BASE ADAPTER -o FOLDER writes it",
            )
        )
    linears = _pair_factors(tensors, scales, config, name, problems)
    problems += _check_unused(tensors, linears, replacements, name)
    problems += [
        Problem(f"{name}: {key} contains NaN or infinity")
        for key, tensor in {**tensors, **scales}.items()
        if not np.isfinite(tensor).all()
    ]
    raise_all(problems, AdapterError)
    manifest_file = folder / "adapter_merge.json"
    manifest: dict[str, Any] = read_json(manifest_file) if manifest_file.is_file() else {}
    entries = manifest.get("adapters")
    method = entries[0].get("method", "factors") if isinstance(entries, list) and entries else "factors"
    error = max((layer.get("relative_error") or 0.0 for layer in manifest.get("layers", {}).values()), default=0.0)
    frozen = manifest.get("frozen_positions") is True
    return Factors(name, linears, replacements, method, error, frozen_positions=frozen)


def _pair_factors(
    tensors: Mapping[str, Any],
    scales: Mapping[str, Any],
    config: Mapping[str, Any],
    source: Path,
    problems: list[Problem],
) -> dict[str, LinearFactors]:
    """Return the factors by module path; those that do not fit each other are added to `problems`."""
    ranks = read_pattern(config, "rank_pattern", str(source), problems)
    alphas = read_pattern(config, "alpha_pattern", str(source), problems)
    linears = {}
    for key in sorted(tensors):
        if not key.startswith(PREFIX) or not key.endswith(DOWN):
            continue
        module = key[len(PREFIX) : -len(DOWN)]
        down, up = tensors[key], tensors.get(f"{PREFIX}{module}{UP}")
        scale = scales.get(f"{PREFIX}{module}{SCALE}")
        if up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            problems.append(
                Problem(
                    f"{module}: the shapes of lora_A and lora_B do not match",
                    "(R, in) and (out, R)",
                    f"{down.shape} and {None if up is None else up.shape}",
                )
            )
            continue
        if scale is not None and scale.shape != (up.shape[0],):
            problems.append(
                Problem(f"{module}: row_scale has another size than the rows", f"({up.shape[0]},)", str(scale.shape))
            )
        rank, alpha = ranks.get(module, config.get("r")), alphas.get(module, config.get("lora_alpha"))
        if rank != down.shape[0] or alpha != rank:
            problems.append(
                Problem(
                    f"{module}: the scale is not folded into lora_B",
                    f"r == lora_alpha == {down.shape[0]}",
                    f"r {rank}, lora_alpha {alpha}",
                    "make the folder with adapter-merge factor",
                )
            )
        linears[module] = LinearFactors(down, up, scale)
    return linears


def _check_unused(
    tensors: Mapping[str, Any], linears: Iterable[str], replacements: Iterable[str], source: Path
) -> list[Problem]:
    """Return a problem where the folder adapts an embedding, and one where it has tensors that are not used."""
    used = {f"{PREFIX}{module}{suffix}" for module in linears for suffix in (DOWN, UP, ".lora_magnitude_vector")}
    for name in replacements:  # the folder contains them a second time, under PEFT's names
        module, _, kind = name.rpartition(".")
        used |= {f"{PREFIX}{name}", f"{PREFIX}{module}.base_layer.{kind}"}
    embeddings = [name for name in tensors if name.endswith((".lora_embedding_A", ".lora_embedding_B"))]
    unused = sorted(set(tensors) - used - set(embeddings))
    problems = []
    if embeddings:
        problems.append(
            Problem(
                f"{source}: adapts an embedding, which a graph cannot switch",
                got=embeddings[0],
                hint="export with --mode merged",
            )
        )
    if unused:
        problems.append(Problem(f"{source}: has tensors that are not used", got=", ".join(unused[:5])))
    return problems


def _read_optional(file: Path) -> dict[str, Any]:
    """Return the arrays in `file`; an empty dict where there is no such file."""
    return _read_arrays(file) if file.is_file() else {}


def _read_arrays(file: Path) -> dict[str, Any]:
    """Return the float32 arrays in a safetensors file. Raises FileFormatError for a damaged file."""
    from adapter_merge.storage.safetensors_header import read_header

    read_header(file)  # checks the header, with an error that states the reason
    from safetensors.torch import load_file

    # Copies: load_file maps the file into memory, and a later change of the file would change the arrays.
    return {name: tensor.float().numpy().copy() for name, tensor in load_file(file).items()}
