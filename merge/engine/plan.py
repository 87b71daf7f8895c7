"""Plan of a merge: every output file and the offset of every tensor, made from headers before a weight is read.

An output shard has the layout of the base's shard, or of a new division into files, so all offsets are known in
advance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from adapter_merge.binding.bind import BoundAdapter, BoundModule
from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all
from adapter_merge.files.input_errors import reading
from adapter_merge.storage.checkpoint import Checkpoint, Shard, read_json
from adapter_merge.storage.computed_tensor import ComputedRef
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, ITEM_BYTES, TensorRef, layout

EMPTY: Mapping[str, TensorRef] = MappingProxyType({})


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: the values of `source`, changed by `edits` and written to `place`.

    `original` is the base's tensor where `source` belongs to an adapter and replaces it. It is still read, because the
    base's file is hashed.
    """

    source: TensorRef
    place: TensorRef
    edits: tuple[BoundModule, ...] = ()
    original: TensorRef | None = None

    @property
    def is_copy(self) -> bool:
        """True when the tensor's bytes are copied unchanged."""
        return not self.edits and self.source.dtype == self.place.dtype


@dataclass(frozen=True)
class ShardPlan:
    """One output file: the bytes of its header, and its tensors in the order of their offsets.

    `source` is the base's safetensors file that the first jobs read from its beginning to its end, in order;
    `source_header` is its header. None where no input file is read in that order: pickles, packed weights.
    """

    file: str
    header: bytes
    jobs: tuple[TensorJob, ...]
    source: Path | None = None
    source_header: bytes = b""

    @property
    def is_copy(self) -> bool:
        """True when the output file equals the source file, including the header."""
        return (
            self.source is not None
            and self.header == self.source_header
            and all(job.is_copy and job.original is None and job.source.file == self.source for job in self.jobs)
        )

    @property
    def identity(self) -> str:
        """sha256 of what the file is made from except the values: names, offsets, sources and numbers of edits."""
        digest = hashlib.sha256(self.header)
        for job in self.jobs:
            digest.update(f"{job.source.file.name}\0{job.source.name}\0{job.source.start}\0{len(job.edits)}\0".encode())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of the output file in bytes."""
        return max((job.place.stop for job in self.jobs), default=len(self.header))


@dataclass(frozen=True)
class MergePlan:
    """Complete plan of one merge or delta."""

    base: Checkpoint
    adapters: tuple[BoundAdapter, ...]
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any] | None  # written instead of the base's config.json; None: that file is copied
    side_files: tuple[Path, ...]
    operation: str = "merge"  # or "delta"

    @property
    def nbytes(self) -> int:
        """Size of all output shards in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def index_name(self) -> str:
        """Name of the index of several shards."""
        return f"{self.base.stem}.safetensors.index.json"

    def index(self) -> dict[str, Any] | None:
        """Return the content of the index, or None for a single shard."""
        if len(self.shards) == 1:
            return None
        placed = {job.place.name: shard.file for shard in self.shards for job in shard.jobs}
        total = sum(job.place.nbytes for shard in self.shards for job in shard.jobs)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


def plan_merge(
    base: Checkpoint,
    adapters: tuple[BoundAdapter, ...],
    dtype: str | None = None,
    computed: str | None = None,
    parts: Mapping[str, TensorRef] = EMPTY,
    max_shard_bytes: int | None = None,
) -> MergePlan:
    """Plan the merged checkpoint.

    `dtype` is the safetensors name of the dtype for all float tensors; None keeps the dtype of each tensor. `computed`
    is that of the weights that a quantised base holds packed, and the model's dtype in its config. `parts` replace
    stored tensors by name. `max_shard_bytes` divides the tensors into new files of at most this size (a larger tensor
    gets its own file); None keeps the base's files.
    Raises InputError where two adapters replace one tensor or a tensor is both adapted and replaced, UnsupportedError
    where an adapter adds a tensor to a quantised base.
    """
    edits, replacements = _collect_changes(adapters)
    # Tensors read from the adapter instead of the base: replaced ones, and adapted saved ones (resized embedding).
    own = {**parts, **replacements}
    matrices: dict[str, TensorRef] = {}  # convolutions, which are computed as (out, in k k)
    for name, modules in edits.items():
        if name in base.tensors and modules[0].weight != base.tensors[name]:
            read_as = matrices if modules[0].weight == base.tensors[name].as_matrix() else own
            read_as[name] = modules[0].weight
    layout_shards = (
        base.shards if max_shard_bytes is None else divide_into_shards(base, max_shard_bytes, dtype, computed)
    )
    added = _added_entries(base, adapters, edits, replacements, computed)
    count = len(layout_shards)
    shards = []
    for number, shard in enumerate(layout_shards, 1):
        file = f"{base.stem}{'' if count == 1 else f'-{number:05d}-of-{count:05d}'}.safetensors"
        entries = [
            _Entry(
                own.get(ref.name) or matrices.get(ref.name, ref),
                ref.name,
                (computed or ref.dtype) if isinstance(ref, ComputedRef) else ref.dtype,
                tuple(edits.get(ref.name, ())),
                ref if ref.name in own and shard.is_whole else None,
                ref.shape if ref.name in matrices else None,
            )
            for ref in shard.tensors
        ]
        if number == count:
            entries += added
        shards.append(_plan_shard(file, entries, dtype, {"format": "pt", **shard.metadata}, shard))
    return MergePlan(base, adapters, tuple(shards), _merged_config(base, adapters, dtype or computed), base.side_files)


def _collect_changes(
    adapters: tuple[BoundAdapter, ...],
) -> tuple[dict[str, list[BoundModule]], dict[str, TensorRef]]:
    """Return the modules of all adapters by the tensor that they adapt, and the replaced tensors by name.

    Raises InputError where two adapters replace one tensor, or a tensor is both adapted and replaced.
    """
    edits: dict[str, list[BoundModule]] = {}
    replacements: dict[str, TensorRef] = {}
    problems: list[Problem] = []
    for bound in adapters:
        for module in bound.modules:
            edits.setdefault(module.name, []).append(module)
        for name, ref in bound.replacements.items():
            if name in replacements:
                problems.append(Problem(f"two adapters replace {name}", hint="merge them one at a time, or drop one"))
            replacements[name] = ref
    for name in edits.keys() & replacements.keys():
        problems.append(Problem(f"{name} is both adapted and replaced"))
    raise_all(problems, InputError)
    return edits, replacements


def _added_entries(
    base: Checkpoint,
    adapters: tuple[BoundAdapter, ...],
    edits: Mapping[str, Sequence[BoundModule]],
    replacements: Mapping[str, TensorRef],
    computed: str | None,
) -> list[_Entry]:
    """Return the entries of tensors that the base does not have: separated heads, added tensors, copies.

    Raises UnsupportedError where an adapter adds a tensor to a quantised base.
    """
    entries = [
        _Entry(modules[0].weight, name, modules[0].weight.dtype, tuple(modules))
        for name, modules in edits.items()
        if name not in base.tensors  # a head that was tied to the embeddings
    ]
    problems = []
    for name, ref in replacements.items():
        if name in base.tensors:
            continue
        main = computed or _main_dtype(base)
        if main not in FLOAT_DTYPES:
            problems.append(
                Problem(
                    f"{name}: the adapter adds a tensor to a base that is quantised",
                    f"a base in {'/'.join(FLOAT_DTYPES)}",
                    main,
                    "a quantised tensor needs scales, and this one has none: "
                    "merge into the unquantised base, then quantise",
                )
            )
        entries.append(_Entry(ref, name, main if ref.dtype in FLOAT_DTYPES else ref.dtype))
    raise_all(problems, UnsupportedError)
    copies = {name: ref for bound in adapters for name, ref in bound.copies.items()}
    for name, ref in copies.items():
        if name not in replacements and name not in edits:
            entries.append(_Entry(ref, name, ref.dtype))
    return entries


def divide_into_shards(base: Checkpoint, limit: int, dtype: str | None, computed: str | None) -> tuple[Shard, ...]:
    """Return the base's tensors in their order, in files of at most `limit` bytes in the output's dtype."""
    groups: list[list[TensorRef]] = [[]]
    size = 0
    for ref in (ref for shard in base.shards for ref in shard.tensors):
        stored = (computed or ref.dtype) if isinstance(ref, ComputedRef) else ref.dtype
        written = dtype if dtype and stored in FLOAT_DTYPES else stored
        nbytes = math.prod(ref.shape) * ITEM_BYTES[written]
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(ref)
        size += nbytes
    return tuple(Shard(group[0].file, tuple(group), {"format": "pt"}, is_whole=False) for group in groups if group)


def plan_delta(bound: BoundAdapter, dtype: str = "F32") -> MergePlan:
    """Plan one file with the dense delta dW of every adapted weight, in `dtype`, under the weight's name."""
    edits: dict[str, list[BoundModule]] = {}
    for module in bound.modules:
        edits.setdefault(module.name, []).append(module)
    held = bound.base.tensors
    entries = [
        _Entry(modules[0].weight, name, dtype, tuple(modules), shape=_stored_shape(modules[0].weight, held))
        for name, modules in edits.items()
    ]
    shard = _plan_shard("delta.safetensors", entries, dtype, {"format": "pt"})
    return MergePlan(bound.base, (bound,), (shard,), None, (), operation="delta")


def _stored_shape(weight: TensorRef, held: Mapping[str, TensorRef]) -> tuple[int, ...] | None:
    """Return the base's shape of a weight that is computed as a matrix; None for any other."""
    ref = held.get(weight.name)
    return ref.shape if ref is not None and ref != weight and ref.as_matrix() == weight else None


class _Entry(NamedTuple):
    """One tensor of an output file, before its offset is known."""

    source: TensorRef
    name: str
    dtype: str  # of the output where the caller asks for none
    edits: tuple[BoundModule, ...] = ()
    original: TensorRef | None = None
    shape: tuple[int, ...] | None = None  # of the output, where the source is read in another one


def _plan_shard(
    file: str,
    entries: Sequence[_Entry],
    dtype: str | None,
    metadata: Mapping[str, str],
    base: Shard | None = None,
) -> ShardPlan:
    """Lay out one output file. `base` is the base's shard whose tensors are the first entries, in its order."""
    tensors = [
        (entry.name, dtype if dtype and entry.dtype in FLOAT_DTYPES else entry.dtype, entry.shape or entry.source.shape)
        for entry in entries
    ]
    header, places = layout(Path(file), tensors, metadata)
    source, source_header = None, b""
    if base is not None and base.is_whole and base.file.suffix == ".safetensors":
        source = base.file
        with reading(source), source.open("rb") as stream:
            source_header = stream.read(base.tensors[0].start if base.tensors else source.stat().st_size)
        same = [(ref.name, ref.dtype, ref.shape) for ref in base.tensors] == tensors
        if same and dict(base.metadata) == dict(metadata):
            # Keep the base's header byte for byte, so that an unchanged shard is the same file.
            header = source_header
            places = tuple(replace(ref, file=Path(file)) for ref in base.tensors)
    jobs = tuple(
        TensorJob(entry.source, place, entry.edits, entry.original)
        for entry, place in zip(entries, places, strict=True)
    )
    return ShardPlan(file, header, jobs, source, source_header)


def _main_dtype(base: Checkpoint) -> str:
    """Return the dtype (safetensors name) that holds most of the base's bytes."""
    sizes: dict[str, int] = {}
    for ref in base.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _merged_config(base: Checkpoint, adapters: tuple[BoundAdapter, ...], dtype: str | None) -> dict[str, Any] | None:
    """Return the merged model's config, or None where it equals the base's config.json."""
    file = base.folder / "config.json"
    if not file.is_file():
        return None
    config = dict(base.config)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = names[dtype]
    for bound in adapters:
        for key, value in bound.config_changes.items():
            inner = config.get("text_config")
            nested = isinstance(inner, dict) and key not in config
            if nested or (isinstance(inner, dict) and key in inner):
                config["text_config"] = {**config["text_config"], key: value}
            if not nested:
                config[key] = value
    return config if config != read_json(file) else None
