"""Results of a search for quantised weights: the weights, their other tensors, and the faults found."""

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
    """Weights and faults of one checkpoint, collected while its `tensors` are searched."""

    tensors: Mapping[str, TensorRef]
    weights: dict[str, PackedWeight] = field(default_factory=dict)
    side: set[str] = field(default_factory=set)  # names of tensors that a dense checkpoint does not have
    _faults: dict[tuple[str, str | None, str | None, str | None], list[str]] = field(default_factory=dict)

    def add_weight(self, weight: PackedWeight) -> None:
        """Add a weight. Each of its parts becomes a side tensor, except a part with the weight's own name."""
        self.weights[weight.name] = weight
        self.side.update(ref.name for ref in weight.parts.values() if ref.name != weight.name)

    def add_fault(
        self, name: str, cause: str, expected: str | None = None, got: str | None = None, hint: str | None = None
    ) -> None:
        """Record the fault `cause` of the tensor `name`. Tensors with equal faults are reported as one problem."""
        self._faults.setdefault((cause, expected, got, hint), []).append(name)

    def find_part(
        self, name: str, dtypes: Collection[str], shapes: Collection[Shape], *, owner: str, optional: bool = False
    ) -> TensorRef | None:
        """Return the stored tensor `name` of the weight `owner` if its dtype and shape are allowed.

        Otherwise record a fault and return None. A missing tensor that is `optional` is not a fault.
        """
        ref = self.tensors.get(name)
        if ref is None:
            if not optional:
                ending = name.removeprefix(owner.removesuffix("weight"))
                self.add_fault(owner, f"the tensor {ending} of this weight is missing", "a tensor of that name", "none")
            return None
        if ref.dtype not in dtypes:
            self.add_fault(name, "does not have the dtype of its scheme", " or ".join(dtypes), ref.dtype)
        elif ref.shape not in shapes:
            self.add_fault(name, "does not have the shape that follows from its weight and the config",
                       " or ".join(str(list(shape)) for shape in shapes), str(list(ref.shape)))  # fmt: skip
        else:
            return ref
        return None

    def faulty_names(self) -> set[str]:
        """Return the names of all tensors with a fault."""
        return {name for names in self._faults.values() for name in names}

    def problems(self) -> list[Problem]:
        """Return one problem per distinct fault, with the names of its tensors."""
        found = []
        for (cause, expected, got, hint), names in self._faults.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            found.append(Problem(f"{', '.join(names[:NAMED])}{more}: {cause}", expected, got, hint))
        return found

    def raise_faults(self) -> None:
        """Raise FileFormatError with all faults; do nothing where there are none."""
        raise_all(self.problems(), FileFormatError)
