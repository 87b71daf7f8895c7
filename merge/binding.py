"""Adapter meets base: every adapted module finds its weight and every replacement its tensor, or all problems show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import AdaptedModule, Adapter
from .checkpoint import Checkpoint
from .dude import ORIGINAL_ABOVE, RESIDUAL_BELOW, base_evidence
from .errors import AdapterError, MismatchError, Problem, raise_all
from .form import CanonicalForm
from .headers import FLOAT_DTYPES, TensorRef
from .lora import LoraModule
from .tensors import read_tensor

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
EVIDENCE_SAMPLES = 6
TIED_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class BoundModule:
    """One adapted module and the weight that it changes."""

    module: AdaptedModule
    weight: TensorRef  # in the base
    transposed: bool = False  # the base stores (in, out), as GPT-2's Conv1D does
    output: str | None = None  # the name to write, where it is not the weight's own (an untied head)

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return self.output or self.weight.name

    def oriented_weight(self) -> Tensor:
        """W0 (out, in) in the base's dtype, read whole."""
        weight = read_tensor(self.weight)
        return weight.T.contiguous() if self.transposed else weight

    def form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """The canonical form for W0 (out, in), on the CPU."""
        return self.module.form(read_tensor, self.oriented_weight, dtype)

    def stored_form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """The canonical form for the weight as the base stores it."""
        form = self.form(dtype)
        return form.transposed() if self.transposed else form


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter with every name found in its base."""

    adapter: Adapter
    base: Checkpoint
    modules: tuple[BoundModule, ...]
    replacements: dict[str, TensorRef]  # base tensor name -> trained tensor
    base_kind: str  # "original" or "residual"
    evidence: str | None = None  # why base_kind is what it is, where that was measured


def bind(adapter: Adapter, base: Checkpoint, base_kind: str | None = None) -> BoundAdapter:
    """Match `adapter` to `base`. Raises MismatchError with every module or tensor that does not fit.

    `base_kind` is "original" or "residual" for PiSSA and DuDe, None to decide by evidence.
    """
    rename = _renaming(adapter, base)
    tied = bool(base.config.get("tie_word_embeddings", False))
    conv1d = adapter.fan_in_fan_out or base.config.get("model_type") in CONV1D_MODELS
    problems: list[Problem] = []
    modules = []
    for module in adapter.modules:
        name = rename(f"{module.name}.weight")
        ref = base.tensors.get(name)
        output = None
        if ref is None and name.endswith(TIED_HEADS):
            ref = next((base.tensors[key] for key in base.tensors if key.endswith(EMBEDDINGS)), None) if tied else None
            output = name
        if ref is None:
            problems.append(Problem(f"the base has no weight for {module.name}", expected=name))
            continue
        bound = _fit(module, ref, conv1d, output)
        if isinstance(bound, Problem):
            problems.append(bound)
        else:
            modules.append(bound)
    replacements: dict[str, TensorRef] = {}
    for name, ref in adapter.replacements.items():
        target = rename(name)
        old = base.tensors.get(target)
        if old is not None and old.shape != ref.shape and adapter.own_base is None:
            problems.append(
                Problem(f"{target}: the adapter's tensor does not fit the base", str(old.shape), str(ref.shape))
            )
        replacements[target] = ref
    if problems:
        first = next(iter(base.tensors), "none")
        hint = (
            f"is {adapter.base_name or 'another model'} the base it was trained on? The base's names look like {first}"
        )
        raise_all([*problems[:20], *([Problem(f"... and {len(problems) - 20} more")] if len(problems) > 20 else []),
                   Problem("the adapter does not belong to this base", hint=hint)], MismatchError)  # fmt: skip
    return _with_base_kind(BoundAdapter(adapter, base, tuple(modules), replacements, "original"), base_kind)


def _fit(module: AdaptedModule, ref: TensorRef, conv1d: bool, output: str | None) -> BoundModule | Problem:
    if ref.dtype not in FLOAT_DTYPES:
        return Problem(f"{ref.name}: the base's weight is quantised", "/".join(FLOAT_DTYPES), ref.dtype,
                       "merge into the unquantised base, then quantise")  # fmt: skip
    embedding = isinstance(module, LoraModule) and module.embedding
    shape = module.shape
    straight, turned = ref.shape == shape, ref.shape == shape[::-1]
    if straight and turned:
        return BoundModule(module, ref, conv1d and not embedding, output)
    if straight:
        return BoundModule(module, ref, False, output)
    if turned and not embedding and conv1d:
        return BoundModule(module, ref, True, output)
    return Problem(f"{module.name}: the adapter's shape is not the weight's", str(ref.shape), str(shape))


def _renaming(adapter: Adapter, base: Checkpoint) -> Callable[[str], str]:
    """How the adapter's names become the base's: as they are, or with one leading path component more or less.

    Heads and backbones are saved with and without the backbone's prefix (bert., transformer., model.). One
    component is accepted only when it makes every adapted module fit.
    """
    names = [f"{module.name}.weight" for module in adapter.modules]
    held = set(base.tensors)
    heads = set(names) & set(TIED_HEADS)

    def fits(rename: Callable[[str], str]) -> bool:
        return all(rename(name) in held or name in heads for name in names)

    if fits(lambda name: name):
        return lambda name: name
    first = names[0] if names else ""
    for key in base.tensors:
        if key.endswith(f".{first}"):
            prefix = key[: -len(first)]
            if "." not in prefix[:-1] and fits(lambda name, p=prefix: p + name):  # type: ignore[misc]
                return lambda name: name if name in held else prefix + name
    top = first.split(".", 1)[0] + "."
    if fits(lambda name: name.removeprefix(top)):
        return lambda name: name if name in held else name.removeprefix(top)
    return lambda name: name


def _with_base_kind(bound: BoundAdapter, base_kind: str | None) -> BoundAdapter:
    """Decide whether the base is the original or the residual, and drop the residual step in the latter case."""
    principal = [m for m in bound.modules if isinstance(m.module, LoraModule) and m.module.initial is not None]
    if not principal:
        return bound
    evidence = None
    if base_kind is None:
        step = max(1, len(principal) // EVIDENCE_SAMPLES)
        cosines = []
        for item in principal[::step][:EVIDENCE_SAMPLES]:
            module = item.module
            assert isinstance(module, LoraModule)
            cosines.append(base_evidence(item.oriented_weight(), read_tensor(module.a), read_tensor(module.b)))
        evidence = f"cosine of base and B A: {min(cosines):.3f} .. {max(cosines):.3f} over {len(cosines)} weights"
        if min(cosines) >= ORIGINAL_ABOVE:
            base_kind = "original"
        elif max(cosines) <= RESIDUAL_BELOW:
            base_kind = "residual"
        else:
            raise AdapterError(
                "cannot tell whether the base is the original or the residual (subtracting twice would be silent)",
                expected=f"cosine >= {ORIGINAL_ABOVE} (original) or <= {RESIDUAL_BELOW} (residual) for every weight",
                got=evidence,
                hint="pass --base-kind original or --base-kind residual",
            )
    if base_kind == "original":
        return replace(bound, evidence=evidence)
    modules = tuple(
        replace(item, module=replace(item.module, initial=None)) if isinstance(item.module, LoraModule) else item
        for item in bound.modules
    )
    return replace(bound, modules=modules, base_kind="residual", evidence=evidence)
