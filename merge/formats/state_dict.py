"""State dicts that hold adapter and model at once, sorted by role: what is adapter, trained, or just the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapter_merge.binding.weight_names import find_renaming
from adapter_merge.errors import Problem
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes


@dataclass
class Foreign:
    """Tensors by module and role, tensors trained in full, and what does not belong."""

    groups: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    replacements: dict[str, TensorRef] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    others: dict[str, TensorRef] = field(default_factory=dict)  # neither, where no base tells which were trained

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of tensors that cannot be placed without a base."""
        if not self.others:
            return ()
        first = next(iter(self.others))
        return (
            f"the file holds {len(self.others)} other tensors (first: {first}); without a base nothing tells which of "
            "them were trained, and none is taken",
        )


def sort_tensors(refs: Iterable[TensorRef], roles: Mapping[str, str], base: Checkpoint | None) -> Foreign:
    """Sort a state dict. With a base, tensors that differ from it were trained; without one none are taken.

    A module is what has any role but "W" (its own weight, "<module>.weight" unless roles say otherwise).
    """
    found = Foreign()
    by_length = sorted(roles, key=len, reverse=True)
    others = found.others
    for ref in refs:
        role = next((r for r in by_length if ref.name.endswith("." + r)), None)
        if role is None:
            others[ref.name] = ref
        else:
            found.groups.setdefault(ref.name[: -len(role) - 1], {})[roles[role]] = ref
    for name in [name for name, group in found.groups.items() if group.keys() == {"W"}]:
        ref = found.groups.pop(name)["W"]
        others[ref.name] = ref
    if base is None:
        return found
    rename, _ = find_renaming([(f"{name}.weight", None) for name in found.groups], base.tensors)
    for name, ref in others.items():
        target = rename(name)
        held = base.tensors.get(target)
        if held is None:
            hint = "the base lacks it: is this the model that was trained?"
            found.problems.append(Problem(f"{ref.file}: {name} is no adapter tensor", hint=hint))
        elif not same_bytes(ref, held):
            found.replacements[target] = ref
    found.others = {}
    return found
