"""Sorting of a state dict that holds adapter and model tensors: factors, tensors trained in full, base tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapter_merge.binding.weight_names import find_renaming
from adapter_merge.errors import Problem
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes


@dataclass
class SortedTensors:
    """The tensors of a state dict by use, and the problems."""

    groups: dict[str, dict[str, TensorRef]] = field(default_factory=dict)  # module -> role -> adapter tensor
    replacements: dict[str, TensorRef] = field(default_factory=dict)  # base tensor name -> tensor trained in full
    problems: list[Problem] = field(default_factory=list)
    others: dict[str, TensorRef] = field(default_factory=dict)  # without a base: tensors without a role

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on the tensors of `others`; () where there are none."""
        if not self.others:
            return ()
        first = next(iter(self.others))
        return (
            f"the file holds {len(self.others)} other tensors (first: {first}); without a base it is unknown which "
            "of them were trained, and none is used",
        )


def sort_tensors(refs: Iterable[TensorRef], roles: Mapping[str, str], base: Checkpoint | None) -> SortedTensors:
    """Sort the tensors `refs` of a state dict by `roles` (name suffix -> role).

    A module is adapted where it has any tensor besides "W" (the weight itself). With a base, every other tensor that
    differs from the base's counts as trained in full, and a tensor that the base lacks is a problem.
    """
    result = SortedTensors()
    by_length = sorted(roles, key=len, reverse=True)
    other_tensors = result.others
    for ref in refs:
        role = next((r for r in by_length if ref.name.endswith("." + r)), None)
        if role is None:
            other_tensors[ref.name] = ref
        else:
            result.groups.setdefault(ref.name[: -len(role) - 1], {})[roles[role]] = ref
    for name in [name for name, group in result.groups.items() if group.keys() == {"W"}]:
        ref = result.groups.pop(name)["W"]
        other_tensors[ref.name] = ref
    if base is None:
        return result
    rename, _ = find_renaming([(f"{name}.weight", None) for name in result.groups], base.tensors)
    for name, ref in other_tensors.items():
        target = rename(name)
        base_tensor = base.tensors.get(target)
        if base_tensor is None:
            hint = "the base lacks it: is this the model that was trained?"
            result.problems.append(Problem(f"{ref.file}: {name} is no adapter tensor", hint=hint))
        elif not same_bytes(ref, base_tensor):
            result.replacements[target] = ref
    result.others = {}
    return result
