"""Reader of factor folders: an adapter as LoRA factors and row scales.

y = row_scale * (x W0^T + x A^T B^T) + bias        A (R, in), B (out, R), row_scale (out,) or none
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import AdapterError, InputError, Problem, raise_all
from adapter_merge.storage.checkpoint import read_json

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
    contradictions: tuple[str, ...] = ()  # what of it speaks against the base, where it was forced
    frozen_positions: bool = False  # DeBERTa: the positional queries keep the frozen weight (DCFT with share_att_key)

    def evidence(self) -> dict[str, Any]:
        """Return the manifest's keys of what tells the base of the training."""
        return {"origin": self.origin, **({"contradictions": list(self.contradictions)} if self.contradictions else {})}

    def aligned(self, modules: Iterable[str], tensors: Iterable[str]) -> Factors:
        """Return the factors under a graph's names, which may have one leading component more or less.

        PEFT and transformers name an encoder's modules with or without the body's prefix. A positional product (see
        targets.POSITIONS) has the factors of its module, unless they are for tokens alone.
        """

        def place(name: str, known: set[str], endings: Mapping[str, list[str]]) -> str:
            shorter = name.partition(".")[2]
            if name in known:
                return name
            if shorter in known:
                return shorter
            longer = endings.get(name, [])
            return longer[0] if len(longer) == 1 else name

        paths, names = set(modules), set(tensors)
        path_ends, name_ends = _endings(paths), _endings(names)
        linears = {place(name, paths, path_ends): value for name, value in self.linears.items()}
        if not self.frozen_positions:
            linears |= {name + POSITIONS: value for name, value in linears.items() if name + POSITIONS in paths}
        return replace(
            self,
            linears=linears,
            replacements={place(name, names, name_ends): value for name, value in self.replacements.items()},
        )

    @property
    def max_rank(self) -> int:
        return max((linear.rank for linear in self.linears.values()), default=0)


def _endings(names: set[str]) -> dict[str, list[str]]:
    ends: dict[str, list[str]] = {}
    for name in sorted(names):
        ends.setdefault(name.partition(".")[2], []).append(name)
    return ends


def read_factors(folder: Path, source: Path | None = None) -> Factors:
    """Read the factors in `folder`. Raises InputError or AdapterError with every problem found.

    source: the adapter that they were made from, where `folder` is a temporary one; errors name it.
    """
    named = source or folder
    import numpy as np

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{named}: no factors here", expected="adapter_model.safetensors")
    config = read_json(folder / "adapter_config.json")
    manifest_file = folder / "adapter_merge.json"
    manifest: dict[str, Any] = read_json(manifest_file) if manifest_file.is_file() else {}
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(Problem(f"{named}: not a factor folder", "peft_type LORA", repr(config.get("peft_type"))))
    tensors = _load(weights)
    scales = _load(folder / "row_scale.safetensors") if (folder / "row_scale.safetensors").is_file() else {}
    if config.get("use_dora") and not scales:
        problems.append(
            Problem(
                f"{named}: a DoRA adapter without its row scales",
                expected="row_scale.safetensors",
                hint="adapter-merge factor BASE ADAPTER -o FOLDER writes it",
            )
        )
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
                    f"{module}: lora_A and lora_B do not belong together",
                    "(R, in) and (out, R)",
                    f"{down.shape} and {None if up is None else up.shape}",
                )
            )
            continue
        if scale is not None and scale.shape != (up.shape[0],):
            problems.append(Problem(f"{module}: row_scale", f"({up.shape[0]},)", str(scale.shape)))
        rank, alpha = _pattern(config, module, "rank", "r"), _pattern(config, module, "alpha", "lora_alpha")
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
    known = {f"{PREFIX}{module}{suffix}" for module in linears for suffix in (DOWN, UP, ".lora_magnitude_vector")}
    replacements_file = folder / "replacements.safetensors"
    replacements = _load(replacements_file) if replacements_file.is_file() else {}
    for name in replacements:  # PEFT's copies of them
        module, _, kind = name.rpartition(".")
        known |= {f"{PREFIX}{name}", f"{PREFIX}{module}.base_layer.{kind}"}
    embeddings = [name for name in tensors if name.endswith((".lora_embedding_A", ".lora_embedding_B"))]
    if embeddings:
        problems.append(
            Problem(
                f"{named}: adapts an embedding, which a graph cannot switch",
                got=embeddings[0],
                hint="export with --mode merged",
            )
        )
    unused = sorted(set(tensors) - known - set(embeddings))
    if unused:
        problems.append(Problem(f"{named}: tensors that nothing uses", got=", ".join(unused[:5])))
    for name, tensor in {**tensors, **scales}.items():
        if not np.isfinite(tensor).all():
            problems.append(Problem(f"{named}: {name} holds NaN or infinity"))
    raise_all(problems, AdapterError)
    entries = manifest.get("adapters")
    method = entries[0].get("method", "factors") if isinstance(entries, list) and entries else "factors"
    errors = [layer.get("relative_error") or 0.0 for layer in manifest.get("layers", {}).values()]
    frozen = manifest.get("frozen_positions") is True
    error = max(errors, default=0.0)
    return Factors(named, linears, replacements, method, error, frozen_positions=frozen)


def _pattern(config: Mapping[str, Any], module: str, kind: str, default: str) -> Any:
    """PEFT's rank_pattern or alpha_pattern, whose keys are module paths or their ends."""
    import re

    for pattern, value in (config.get(f"{kind}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config.get(default)


def _load(file: Path) -> dict[str, Any]:
    from adapter_merge.storage.safetensors_header import read_header

    read_header(file)  # a damaged file is named here, with its reason
    from safetensors.torch import load_file

    # Copies: load_file maps the file, and a change of it would reach the arrays.
    return {name: tensor.float().numpy().copy() for name, tensor in load_file(file).items()}
