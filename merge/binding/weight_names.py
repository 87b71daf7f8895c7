"""Places of a model's weights in the checkpoint: prefixes, fused projections, stacked or separate experts.

An adapter has the module names of the model at training. The checkpoint may hold the same weights with an added or
missing prefix (a backbone alone, a language model inside a vision model), fused (q, k, v in one matrix) or split,
stacked (all experts in one 3-D tensor) or separate. A renaming is used only where it makes every module fit exactly.
Facts about expert names: transformers' conversion_mapping.py, entries "mixtral" and "qwen2_moe".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapter_merge.storage.safetensors_header import TensorRef

from .transformers_names import TransformersNames

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<kind>[^.]+)\.weight")
GATES, UPS, DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
SIBLINGS = ((".mlp.", ".block_sparse_moe."), (".block_sparse_moe.", ".mlp."))
MAX_RUNS = 64  # runs of consecutive rows per 2-D weight; a fused projection of q, k and v has three
# projection -> (fused projection, the part of it)
FUSED_PARTS: Mapping[str, Sequence[tuple[str, str]]] = {
    "q_proj": (("qkv_proj", "q"),),
    "k_proj": (("qkv_proj", "k"),),
    "v_proj": (("qkv_proj", "v"),),
    "gate_proj": (("gate_up_proj", "gate"),),
    "up_proj": (("gate_up_proj", "up"),),
}
SPLITS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Place:
    """Rows of a stored tensor, and the rows of the module's weight that they hold."""

    ref: TensorRef
    rows: tuple[int, int] | None = None  # of the tensor's 2-D view; None: all
    part: tuple[int, int] | None = None  # of the module's weight; None: all
    turned: bool = False  # stored transposed

    @property
    def is_whole(self) -> bool:
        return self.rows is None and self.part is None


class Renaming:
    """A renaming from an adapter's names to the checkpoint's: transformers' mapping, or one prefix for all names.

    Without `mapped`: the leading components `strip` are removed, then `prefix` is added. With `mapped`: the mapping
    gives the stored rows of a parameter of the model; other names are searched among the renamed tensors.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorRef],
        strip: str = "",
        prefix: str = "",
        mapped: TransformersNames | None = None,
    ) -> None:
        self.strip, self.prefix, self.mapped = strip, prefix, mapped
        self.tensors = tensors if mapped is None else mapped.by_model_name

    def __call__(self, name: str) -> str:
        """Return the checkpoint's name for `name`, or `name` itself where only that one exists."""
        if self.mapped is not None:
            parameter = self.mapped.parameter(name)
            whole_tensor = self.mapped.find_whole_tensor(parameter) if parameter is not None else None
            if whole_tensor is not None:
                return whole_tensor.name
            name = parameter or self.mapped.rename(name)
            return self.tensors[name].name if name in self.tensors else name
        renamed = self.prefix + name.removeprefix(self.strip)
        if renamed in self.tensors:
            return renamed
        for old, new in SIBLINGS:
            if old in renamed and renamed.replace(old, new) in self.tensors:
                return renamed.replace(old, new)
        return name if name in self.tensors else renamed

    def spellings(self, name: str) -> Iterator[str]:
        """Yield the renamed name and its alternative spellings, whether they exist or not."""
        if self.mapped is not None:
            name = self.mapped.parameter(name) or self.mapped.rename(name)
        renamed = self.prefix + name.removeprefix(self.strip)
        yield renamed
        for old, new in SIBLINGS:
            if old in renamed:
                yield renamed.replace(old, new)


def find_places(name: str, shape: tuple[int, int], rename: Renaming, transposed: bool = False) -> tuple[Place, ...]:
    """Return the places of the weight `name` of `shape` (out, in); () where it is not in the checkpoint.

    Fused and stacked tensors are searched only where no tensor has the name itself.
    """
    tensors = rename.tensors
    parameter = rename.mapped.parameter(name) if rename.mapped is not None else None
    if rename.mapped is not None and parameter is not None:
        return _find_mapped(rename.mapped, parameter)
    for form in rename.spellings(name):
        if form in tensors:
            return (Place(tensors[form]),)
    for form in rename.spellings(name):
        placed = (
            _find_in_stack(form, shape, tensors)
            or _find_in_fused(form, shape, tensors)
            or _find_split(form, shape, tensors)
        )
        if placed:
            return placed
    if name in tensors:
        return (Place(tensors[name]),)
    return ()


def _find_mapped(names: TransformersNames, parameter: str) -> tuple[Place, ...]:
    """Return the stored rows from which transformers loads `parameter`."""
    whole_tensor = names.find_whole_tensor(parameter)
    if whole_tensor is not None:
        return (Place(whole_tensor),)
    stored = names.rows_of(parameter)
    if len(stored) > MAX_RUNS:
        names.failures[parameter] = "transformers reorders its rows"
        return ()
    total = math.prod(names.shapes[parameter][:-1])
    result = []
    for item in stored:
        rows = None if item.rows == (0, item.ref.rows) else item.rows
        part = None if item.parameter_rows == (0, total) and not item.turned else item.parameter_rows
        if item.turned:
            if len(stored) > 1 or rows is not None:
                return ()
            part = None
        result.append(Place(item.ref, rows, part, item.turned))
    return tuple(result)


def _find_in_stack(name: str, shape: tuple[int, int], tensors: Mapping[str, TensorRef]) -> tuple[Place, ...]:
    """Return the rows of one expert's 2-D weight in a stacked (experts, out, in) tensor."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return ()
    index, kind = int(match["index"]), match["kind"]
    gated = kind in GATES + UPS
    ref = tensors.get(f"{match['experts']}.{'gate_up_proj' if gated else 'down_proj'}")
    if ref is None or len(ref.shape) != 3 or index >= ref.shape[0] or kind not in GATES + UPS + DOWNS:
        return ()
    _, out, inner = ref.shape
    if (shape[0] * 2 if gated else shape[0], shape[1]) != (out, inner):
        return ()
    start = index * out + (shape[0] if kind in UPS else 0)
    return (Place(ref, rows=(start, start + shape[0])),)


def _find_in_fused(name: str, shape: tuple[int, int], tensors: Mapping[str, TensorRef]) -> tuple[Place, ...]:
    """Return the rows of q, k, v, gate or up in a fused projection."""
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    for fused, part in FUSED_PARTS.get(kind, ()):
        ref = tensors.get(f"{module}.{fused}.weight")
        if ref is None or len(ref.shape) != 2 or ref.shape[1] != shape[1] or not name.endswith(".weight"):
            continue
        total, rows = ref.shape[0], shape[0]
        if part == "q" and rows < total and (total - rows) % 2 == 0:
            return (Place(ref, rows=(0, rows)),)
        if part in "kv" and 2 * rows < total:
            start = total - (2 if part == "k" else 1) * rows
            return (Place(ref, rows=(start, start + rows)),)
        if part in ("gate", "up") and 2 * rows == total:
            start = 0 if part == "gate" else rows
            return (Place(ref, rows=(start, start + rows)),)
    return ()


def _find_split(name: str, shape: tuple[int, int], tensors: Mapping[str, TensorRef]) -> tuple[Place, ...]:
    """Return the separate projections that together hold a fused one."""
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    parts = SPLITS.get(kind, ())
    refs = [tensors.get(f"{module}.{part}.weight") for part in parts]
    fitting = [ref for ref in refs if ref is not None and len(ref.shape) == 2 and ref.shape[1] == shape[1]]
    if not parts or len(fitting) != len(parts) or sum(ref.shape[0] for ref in fitting) != shape[0]:
        return ()
    result, start = [], 0
    for ref in fitting:
        result.append(Place(ref, part=(start, start + ref.shape[0])))
        start += ref.shape[0]
    return tuple(result)


def find_renaming(
    names: Sequence[tuple[str, tuple[int, int] | None]],
    tensors: Mapping[str, TensorRef],
    exempt: frozenset[str] = frozenset(),
    prefix: str | None = None,
) -> tuple[Renaming, tuple[str, ...]]:
    """Return the renaming that finds every wanted (name, shape or None), and other prefixes that also fit.

    `exempt` names need not be found (a head that is tied to the embeddings). A stated `prefix` is used unchecked.
    Unchanged names are tried first, then names with the fewest leading components stripped. A name that ends in a dot
    matches any tensor below it.
    """
    if prefix is not None:
        return Renaming(tensors, prefix=prefix and prefix.rstrip(".") + "."), ()

    def fits(renaming: Renaming) -> bool:
        return all(name in exempt or _exists(name, shape, renaming) for name, shape in names)

    unchanged = Renaming(tensors)
    if not names or fits(unchanged):
        return unchanged, ()
    first = next((n for n, _ in names if n not in exempt), names[0][0])
    components = first.split(".")
    for count in range(len(components) - 1):
        strip = "".join(part + "." for part in components[:count])
        suffix = first[len(strip) :]
        prefixes = {""} if count else set()
        for key in tensors:
            for tail in _tails(suffix):
                if tail.endswith("."):
                    prefixes.add(key[: key.find("." + tail) + 1])
                elif key.endswith("." + tail):
                    prefixes.add(key[: -len(tail)])
        good = [p for p in sorted(prefixes, key=lambda p: (p.count("."), p)) if fits(Renaming(tensors, strip, p))]
        if good:
            return Renaming(tensors, strip, good[0]), tuple(good[1:])
    return unchanged, ()


def _tails(suffix: str) -> Iterator[str]:
    """Yield `rest` and the names of fused, split or stacked tensors that may hold it."""
    yield suffix
    for old, new in SIBLINGS:
        if old in "." + suffix:
            yield ("." + suffix).replace(old, new)[1:]
    stem, _, kind = suffix.removesuffix(".weight").rpartition(".")
    for fused, _ in FUSED_PARTS.get(kind, ()):
        yield f"{stem}.{fused}.weight"
    for part in SPLITS.get(kind, ())[:1]:
        yield f"{stem}.{part}.weight"
    match = EXPERT.fullmatch(suffix)
    if match:
        yield f"{match['experts']}.{'down_proj' if match['kind'] in DOWNS else 'gate_up_proj'}"


def _exists(name: str, shape: tuple[int, int] | None, renaming: Renaming) -> bool:
    """Return True when the checkpoint holds `name`, and in a fitting shape where `shape` is given."""
    if name.endswith("."):
        return any(key.startswith(form) for form in renaming.spellings(name) for key in renaming.tensors)
    if shape is None:
        return any(form in renaming.tensors for form in renaming.spellings(name)) or name in renaming.tensors
    placed = find_places(name, shape, renaming)
    return bool(placed) and (not placed[0].is_whole or placed[0].ref.as_matrix().shape in (shape, shape[::-1]))
