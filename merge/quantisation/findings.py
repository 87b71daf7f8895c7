"""What a search for quantised weights has found: the weights, the tensors beside them, and all that is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from adapter_merge.errors import FileFormatError, Problem, raise_all
from adapter_merge.storage.safetensors_header import TensorRef

from .packed_weight import PackedWeight

NAMED = 5  # tensors that a problem names; the others are counted
Shape = tuple[int, ...]


@dataclass
class Findings:
    """The weights of one checkpoint, collected while its `tensors` are searched."""

    tensors: Mapping[str, TensorRef]
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    side: set[str] = field(default_factory=set)  # tensors that a dense checkpoint does not have
    _faults: dict[tuple[str, str | None, str | None, str | None], list[str]] = field(default_factory=dict)

    def add(self, weight: PackedWeight) -> None:
        """Add a weight. Its parts, save one that has the weight's own name, are beside it."""
        self.weights[weight.name] = weight
        self.side.update(ref.name for ref in weight.parts.values() if ref.name != weight.name)

    def fault(
        self, name: str, cause: str, expected: str | None = None, got: str | None = None, hint: str | None = None
    ) -> None:
        """Note that `cause` holds for the tensor `name`; equal causes become one problem that names their tensors."""
        self._faults.setdefault((cause, expected, got, hint), []).append(name)

    def part(
        self, name: str, dtypes: Collection[str], shapes: Collection[Shape], *, owner: str, optional: bool = False
    ) -> TensorRef | None:
        """Return the stored tensor `name` of the weight `owner` if its dtype and shape are as the scheme needs them.

        Otherwise note the fault and return None; a tensor that is not there is no fault where it is `optional`.
        """
        ref = self.tensors.get(name)
        if ref is None:
            if not optional:
                ending = name.removeprefix(owner.removesuffix("weight"))
                self.fault(owner, f"no {ending} beside the weight", "a tensor of that name", "none")
            return None
        if ref.dtype not in dtypes:
            self.fault(name, "has another dtype than its scheme stores", " or ".join(dtypes), ref.dtype)
        elif ref.shape not in shapes:
            self.fault(name, "has not the shape that its weight and config give",
                       " or ".join(str(list(shape)) for shape in shapes), str(list(ref.shape)))  # fmt: skip
        else:
            return ref
        return None

    def faulty(self) -> set[str]:
        """Return the names that have a fault."""
        return {name for names in self._faults.values() for name in names}

    def problems(self) -> list[Problem]:
        """Return one problem for each kind of fault, which names its tensors."""
        found = []
        for (cause, expected, got, hint), names in self._faults.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            found.append(Problem(f"{', '.join(names[:NAMED])}{more}: {cause}", expected, got, hint))
        return found

    def require_sound(self) -> None:
        """Raise FileFormatError with all faults, grouped, where there are any."""
        raise_all(self.problems(), FileFormatError)
