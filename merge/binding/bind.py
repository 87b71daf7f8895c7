"""Adapter meets base: every adapted module finds its weight and every replacement its tensor, or all problems show.

bound.py       what comes out: BoundModule, BoundAdapter
weight_names.py       where a module of the model lies in the checkpoint: prefixes, fused projections
fitting.py     one module and its stored weight: shape, orientation
experts.py     experts, stacked or apart
embeddings.py  embeddings and heads: tied, resized, and what the config must say
positional.py  DeBERTa: which weights give the positional queries and keys after DCFT
base_kind.py   PiSSA, OLoRA, DuDe: the original base or the residual
"""

from __future__ import annotations

from adapter_merge.errors import MismatchError, Problem, raise_all
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.lora import BiasModule, StackModule
from adapter_merge.methods.tokens import TokenModule
from adapter_merge.methods.vera import VeraModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

from .base_kind import with_base_kind
from .bound import BoundAdapter, BoundModule, parameter_of
from .embeddings import TIED_HEADS, is_resized, with_config
from .fitting import bind_module, overlaps, sized
from .positional import with_positional_projections
from .weight_names import Renaming, find_renaming

__all__ = ["BoundAdapter", "BoundModule", "bind"]


def bind(adapter: Adapter, base: Checkpoint, base_kind: str | None = None) -> BoundAdapter:
    """Match `adapter` to `base`. Raises MismatchError with every module or tensor that does not fit.

    `base_kind` is "original" or "residual" for PiSSA and DuDe, None to decide by evidence.
    """
    rename, others = _renaming(adapter, base)
    problems: list[Problem] = []
    if others:
        problems.append(
            Problem(
                "the adapter fits several parts of the base",
                got=", ".join(repr(prefix) for prefix in (rename.prefix, *others[:5])),
                hint="pass --prefix with the one that it was trained in",
            )
        )
    modules: list[BoundModule] = []
    for module in adapter.modules:
        found = bind_module(module, adapter, base, rename)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            modules += found
    modules = sized(modules)
    replacements: dict[str, TensorRef] = {}
    for name, ref in adapter.replacements.items():
        target = rename(name)
        old = base.tensors.get(target)
        if old is not None and old.shape != ref.shape and adapter.own_base is None and not is_resized(target, old, ref):
            problems.append(
                Problem(f"{target}: the adapter's tensor does not fit the base", str(old.shape), str(ref.shape))
            )
        if (
            old is None
            and adapter.own_base is None
            and not _is_saved_module(name, adapter)
            and target not in TIED_HEADS
        ):
            problems.append(
                Problem(
                    f"{target}: the base has no such tensor",
                    "a tensor of the base, or of a module in modules_to_save",
                    hint="an unknown tensor of the adapter is never written into a model",
                )
            )
        replacements[target] = ref
    problems += overlaps(modules)
    if problems:
        first = next(iter(base.tensors), "none")
        hint = (
            f"is {adapter.base_name or 'another model'} the base it was trained on? The base's names look like {first}"
        )
        raise_all([*problems[:20], *([Problem(f"... and {len(problems) - 20} more")] if len(problems) > 20 else []),
                   Problem("the adapter does not belong to this base", hint=hint)], MismatchError)  # fmt: skip
    bound = BoundAdapter(adapter, base, tuple(modules), replacements, "original")
    return with_base_kind(with_positional_projections(with_config(bound)), base_kind)


def _is_saved_module(name: str, adapter: Adapter) -> bool:
    """True for a tensor of a module that the adapter's config lists as saved in full: a head the base lacks."""
    saved = adapter.config.get("modules_to_save")
    names = [one for one in saved if isinstance(one, str)] if isinstance(saved, list) else []
    return any(f".{one}." in f".{name}" for one in names)


def _renaming(adapter: Adapter, base: Checkpoint) -> tuple[Renaming, tuple[str, ...]]:
    """How the adapter's names become the base's, and other ways that would do as well."""
    wanted: list[tuple[str, tuple[int, int] | None]] = []
    for module in adapter.modules:
        if isinstance(module, StackModule):
            wanted.append((f"{module.name}.", None))
        elif isinstance(module, BiasModule | TokenModule | VeraModule):
            wanted.append((f"{module.name}.{parameter_of(module)}", None))
        else:
            wanted.append((f"{module.name}.{parameter_of(module)}", module.shape))
    wanted.sort(key=lambda item: item[1] is None)
    if not wanted:
        wanted = [(name, None) for name in adapter.replacements]
    exempt = frozenset(name for name, _ in wanted if name.endswith(TIED_HEADS))
    resized = frozenset(name for name in adapter.base_layers)
    return find_renaming(wanted, base.tensors, exempt | resized, adapter.prefix)
