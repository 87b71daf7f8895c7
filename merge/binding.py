"""Adapter meets base: every adapted module finds its weight and every replacement its tensor, or all problems show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .adapter import AdaptedModule, Adapter
from .checkpoint import Checkpoint
from .dude import ORIGINAL_ABOVE, RESIDUAL_BELOW, base_evidence
from .edits import BlockEdit, RowRange
from .errors import AdapterError, MismatchError, Problem, UnsupportedError, raise_all
from .form import CanonicalForm
from .headers import FLOAT_DTYPES, TensorRef
from .lora import BiasModule, ExpertModule, LoraModule, PartModule, StackModule
from .lora_format import LOST_HINT, LOST_INITS
from .names import DOWNS, GATES, UPS, Place, Renaming, find_renaming, places
from .tensors import read_tensor
from .tokens import TokenModule
from .vera import VeraModule

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "dbrx")  # stacked as (experts, in, out)
EVIDENCE_SAMPLES = 6
TIED_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
SHARED_EMBEDDINGS = ("shared.weight",)  # T5 and BART: encoder, decoder and head read one matrix


@dataclass(frozen=True)
class BoundModule:
    """One adapted module and the weight that it changes."""

    module: AdaptedModule
    weight: TensorRef  # in the base, or saved beside the adapter (a resized embedding)
    transposed: bool = False  # the base stores (in, out), as GPT-2's Conv1D does
    output: str | None = None  # the name to write, where it is not the weight's own (an untied head)
    rows: tuple[int, int] | None = None  # the rows of the weight's 2-D view that are adapted; None: all

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return self.output or self.weight.name

    def oriented_weight(self) -> Tensor:
        """W0 (out, in) in the base's dtype, read whole; only the adapted rows where they are some of them."""
        ref = self.weight
        if self.rows is not None:
            first, stop = self.rows
            start, size = ref.start, ref.row_bytes
            shape = (stop - first, ref.shape[-1])
            ref = replace(ref, shape=shape, start=start + first * size, stop=start + stop * size)
        weight = read_tensor(ref)
        return weight.T.contiguous() if self.transposed else weight

    def form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """The canonical form for W0 (out, in), on the CPU."""
        return self.module.form(read_tensor, self.oriented_weight, dtype)

    def stored_form(self, dtype: torch.dtype = torch.float32) -> CanonicalForm:
        """The canonical form for the weight as the base stores it. Raises UnsupportedError where there is none."""
        edit = self.stored_edit(dtype)
        if not isinstance(edit, CanonicalForm):
            raise UnsupportedError(
                f"{self.name}: this change of the weight has no low-rank form", hint="merge this adapter instead"
            )
        return edit

    def stored_edit(self, dtype: torch.dtype = torch.float32) -> BlockEdit:
        """What is done to the weight as the base stores it."""
        make = getattr(self.module, "edit", None)
        edit: BlockEdit = make(read_tensor, self.oriented_weight, dtype) if make is not None else self.form(dtype)
        if self.transposed:
            if not isinstance(edit, CanonicalForm):
                raise UnsupportedError(f"{self.name}: the residual saved beside the adapter is the other way round")
            edit = edit.transposed()
        return edit if self.rows is None else RowRange(edit, *self.rows)


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter with every name found in its base."""

    adapter: Adapter
    base: Checkpoint
    modules: tuple[BoundModule, ...]
    replacements: dict[str, TensorRef]  # base tensor name -> trained tensor
    base_kind: str  # "original" or "residual"
    evidence: str | None = None  # why base_kind is what it is, where that was measured
    copies: Mapping[str, TensorRef] = field(default_factory=dict)  # new name -> base tensor, written as it is
    config_changes: Mapping[str, Any] = field(default_factory=dict)  # what the merged model's config must say


def parameter_of(module: AdaptedModule) -> str:
    """Which tensor of its module is adapted: weight, bias, or a bare parameter."""
    return str(getattr(module, "parameter", "weight"))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config (of a vision-language model), or all of it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def is_tied(base: Checkpoint) -> bool:
    """True when the head reads the embeddings: stated, or left out (transformers' default) without a head stored."""
    said = base.config.get("tie_word_embeddings", text_config(base.config).get("tie_word_embeddings"))
    if isinstance(said, bool):
        return said
    return bool(base.config) and not any(name.endswith(TIED_HEADS) for name in base.tensors)


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
        found = _bind_module(module, adapter, base, rename)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            modules += found
    modules = _sized(modules)
    replacements: dict[str, TensorRef] = {}
    for name, ref in adapter.replacements.items():
        target = rename(name)
        old = base.tensors.get(target)
        if old is not None and old.shape != ref.shape and adapter.own_base is None and not _resized(target, old, ref):
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
    problems += _overlaps(modules)
    if problems:
        first = next(iter(base.tensors), "none")
        hint = (
            f"is {adapter.base_name or 'another model'} the base it was trained on? The base's names look like {first}"
        )
        raise_all([*problems[:20], *([Problem(f"... and {len(problems) - 20} more")] if len(problems) > 20 else []),
                   Problem("the adapter does not belong to this base", hint=hint)], MismatchError)  # fmt: skip
    bound = BoundAdapter(adapter, base, tuple(modules), replacements, "original")
    return _with_base_kind(_with_config(bound), base_kind)


def _bind_module(
    module: AdaptedModule, adapter: Adapter, base: Checkpoint, rename: Renaming
) -> list[BoundModule] | Problem:
    if isinstance(module, StackModule):
        return _bind_stack(module, base, rename)
    name = f"{module.name}.{parameter_of(module)}"
    conv1d = adapter.fan_in_fan_out or base.config.get("model_type") in CONV1D_MODELS
    own = adapter.base_layers.get(name)
    found = places(name, module.shape, rename)
    output = None
    if not found and rename(name).endswith(TIED_HEADS) and is_tied(base):
        ref = next((base.tensors[key] for key in base.tensors if key.endswith(EMBEDDINGS)), None)
        if ref is not None:
            found, output = (Place(ref),), rename(name)
    if not found:
        return Problem(f"the base has no {parameter_of(module)} for {module.name}", expected=rename(name))
    if own is not None and found[0].is_whole and found[0].ref.shape != own.shape:
        output, found = found[0].ref.name, (Place(own),)  # the vocabulary was resized before training
    bound = []
    for place in found:
        one = _fit(module, place, conv1d, output)
        if isinstance(one, Problem):
            return one
        bound.append(one)
    return bound


def _fit(module: AdaptedModule, place: Place, conv1d: bool, output: str | None) -> BoundModule | Problem:
    ref = place.ref
    if ref.dtype not in FLOAT_DTYPES:
        return Problem(f"{ref.name}: the base's weight is quantised", "/".join(FLOAT_DTYPES), ref.dtype,
                       "merge into the unquantised base, then quantise")  # fmt: skip
    wrong = Problem(f"{module.name}: the adapter's shape is not the weight's", str(ref.shape), str(module.shape))
    if isinstance(module, BiasModule):
        return BoundModule(module, ref, output=output) if ref.shape == module.shape[1:] else wrong
    if isinstance(module, TokenModule):
        if len(ref.shape) != 2 or ref.shape[1] != module.shape[1]:
            return wrong
        if max(module.indices, default=0) >= ref.shape[0]:
            return Problem(f"{module.name}: a trained token is beyond the embedding",
                           f"rows below {ref.shape[0]}", str(max(module.indices)))  # fmt: skip
        return BoundModule(module, ref, output=output)
    if not place.is_whole:
        if isinstance(module, LoraModule) and (module.initial is not None or module.magnitude_dim == 1):
            return Problem(
                f"{module.name}: was trained on a weight that this base keeps in another layout",
                hint="PiSSA, OLoRA and DuDe need the base as it was trained on",
            )
        if place.part is not None:
            if not isinstance(module, LoraModule):
                return Problem(f"{module.name}: only LoRA can be split over several weights")
            return BoundModule(PartModule(module, *place.part), ref)
        return BoundModule(module, ref, rows=place.rows)
    if isinstance(module, VeraModule):
        if len(ref.shape) != 2 or module.shape[0] not in ref.shape:
            return wrong
        turned = conv1d and ref.shape[1] == module.shape[0]
        if not turned and ref.shape[0] != module.shape[0]:
            return wrong
        return BoundModule(replace(module, inner=ref.shape[0 if turned else 1]), ref, turned, output)
    embedding = isinstance(module, LoraModule) and module.embedding
    shape = module.shape
    straight, turned = ref.shape == shape, ref.shape == shape[::-1]
    if straight and turned:
        return BoundModule(module, ref, conv1d and not embedding, output)
    if straight:
        return BoundModule(module, ref, False, output)
    if turned and not embedding and conv1d:
        return BoundModule(module, ref, True, output)
    return wrong


def _bind_stack(module: StackModule, base: Checkpoint, rename: Renaming) -> list[BoundModule] | Problem:
    """The experts of a stacked parameter: in one 3-D tensor, or one 2-D tensor each."""
    rows, columns = module.b.shape[0], module.a.shape[1]
    for parameter, rank, scale in module.targets:
        experts = module.a.shape[0] // rank

        def expert(index: int, part: tuple[int, int], experts: int = experts, scale: float = scale) -> ExpertModule:
            return ExpertModule(module.name, module.a, module.b, experts, index, scale, part)

        ref = base.tensors.get(rename(f"{module.name}.{parameter}"))
        if ref is not None and ref.dtype in FLOAT_DTYPES:
            if ref.shape == (rows, columns) and experts == 1:
                plain = LoraModule(module.name, module.a, module.b, scale, parameter=parameter)
                return [BoundModule(plain, ref)]
            turned = base.config.get("model_type") in TRANSPOSED_EXPERTS
            straight = ref.shape == (experts, rows, columns) and not (turned and rows == columns)
            if straight or (ref.shape == (experts, columns, rows) and turned):
                step = ref.shape[1]
                return [
                    BoundModule(expert(index, (0, rows)), ref, not straight, rows=(index * step, (index + 1) * step))
                    for index in range(experts)
                ]
        apart = _experts_apart(module.name, parameter, experts, (rows, columns), rename)
        if apart:
            return [BoundModule(expert(index, part), ref) for index, part, ref in apart]
    return Problem(
        f"{module.name}: none of the targeted parameters has the shape of the factors",
        f"a parameter ({', '.join(target[0] for target in module.targets)}) of (experts, {rows}, {columns})",
        f"A {module.a.shape}, B {module.b.shape}",
    )


def _experts_apart(
    name: str, parameter: str, experts: int, shape: tuple[int, int], rename: Renaming
) -> list[tuple[int, tuple[int, int], TensorRef]]:
    """(expert, rows, tensor) for every 2-D weight that together make the stacked `parameter`; [] if one is missing."""
    rows, columns = shape
    kinds = {"gate_up_proj": (GATES, UPS), "down_proj": (DOWNS,)}.get(parameter)
    if kinds is None or rows % len(kinds):
        return []
    part = rows // len(kinds)
    found = []
    for index in range(experts):
        for place, kind in enumerate(kinds):
            names = [form for one in kind for form in rename.forms(f"{name}.{index}.{one}.weight")]
            ref = next((rename.held[form] for form in names if form in rename.held), None)
            if ref is None or ref.shape != (part, columns) or ref.dtype not in FLOAT_DTYPES:
                return []
            found.append((index, (place * part, (place + 1) * part), ref))
    return found


def _sized(modules: list[BoundModule]) -> list[BoundModule]:
    """VeRA's shared matrices are as large as the largest adapted weight."""
    vera = [item.module for item in modules if isinstance(item.module, VeraModule)]
    if not vera:
        return modules
    sizes = (max(m.shape[0] for m in vera), max(m.shape[1] for m in vera))
    problems = []
    a, b = vera[0].projections.a, vera[0].projections.b
    if a is not None and b is not None and (a.shape[1] < sizes[1] or b.shape[0] < sizes[0]):
        problems.append(
            Problem("VeRA's shared matrices are smaller than the weights", str(sizes), f"A {a.shape}, B {b.shape}")
        )
    raise_all(problems, MismatchError)
    return [
        replace(item, module=replace(item.module, projections=replace(item.module.projections, sizes=sizes)))
        if isinstance(item.module, VeraModule)
        else item
        for item in modules
    ]


def _overlaps(modules: Iterable[BoundModule]) -> list[Problem]:
    """Two modules of one adapter on the same rows: a file that says two things about one weight."""
    seen: dict[str, list[tuple[float, float, bool]]] = {}
    problems = []
    for item in modules:
        first, stop = item.rows or (0, float("inf"))
        tokens = isinstance(item.module, TokenModule)
        for begin, end, other in seen.get(item.name, ()):
            if first < end and begin < stop and tokens == other:
                problems.append(Problem(f"{item.name} is adapted twice by one adapter"))
                break
        seen.setdefault(item.name, []).append((first, stop, tokens))
    return problems


def _resized(name: str, old: TensorRef, new: TensorRef) -> bool:
    """True for an embedding or head whose vocabulary was resized."""
    head = name.endswith((*EMBEDDINGS, *TIED_HEADS, *SHARED_EMBEDDINGS)) or name in ("lm_head.bias",)
    return head and len(old.shape) == len(new.shape) and old.shape[1:] == new.shape[1:]


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


def _with_config(bound: BoundAdapter) -> BoundAdapter:
    """What the config must say after the merge: untied heads, a resized vocabulary; and the head's copy if untied."""
    base = bound.base
    changes: dict[str, Any] = {}
    copies: dict[str, TensorRef] = {}
    changed = {item.name: item for item in bound.modules}
    touched = changed.keys() | bound.replacements.keys()
    embedding = next((name for name in base.tensors if name.endswith(EMBEDDINGS)), None)
    shared = next((name for name in base.tensors if name.endswith(SHARED_EMBEDDINGS)), None)
    heads = [name for name in touched if name.endswith(TIED_HEADS)]
    tied = is_tied(base)
    if shared in touched and tied:
        raise UnsupportedError(
            f"{shared}: encoder, decoder and head read this one matrix, and only some of them were adapted",
            hint="untie them in the base first (save it with tie_word_embeddings false)",
        )
    if tied and embedding in touched and not heads and _causal(bound):
        # PEFT trains a copy of the embeddings and leaves the head alone, except for single tokens and on request.
        tokens = embedding not in bound.replacements and isinstance(changed[embedding].module, TokenModule)
        if not tokens and not bound.adapter.tied:
            changes["tie_word_embeddings"] = False
            frozen = changed[embedding].weight if embedding in changed else base.tensors[embedding]
            copies["lm_head.weight"] = base.tensors[embedding] if embedding in bound.replacements else frozen
    elif tied and heads and not (embedding is not None and _same_bytes(bound, embedding, heads)):
        changes["tie_word_embeddings"] = False
    sizes = {
        ref.shape[0]
        for name, ref in [
            *bound.replacements.items(),
            *((item.name, item.weight) for item in bound.modules),
        ]
        if name.endswith((*EMBEDDINGS, *SHARED_EMBEDDINGS))
        and name in base.tensors
        and ref.shape[0] != base.tensors[name].shape[0]
    }
    if len(sizes) == 1:
        changes["vocab_size"] = sizes.pop()
        raise_all(_left_behind(bound, copies, changes["vocab_size"]), MismatchError)
    elif len(sizes) > 1:
        raise MismatchError("the adapter holds embeddings of different sizes", got=", ".join(map(str, sorted(sizes))))
    return replace(bound, config_changes=changes, copies={n: r for n, r in copies.items() if n not in base.tensors})


def _left_behind(bound: BoundAdapter, copies: dict[str, TensorRef], size: int) -> list[Problem]:
    """Heads that would keep the old vocabulary beside resized embeddings."""
    after = {**bound.base.tensors, **copies, **bound.replacements, **{m.name: m.weight for m in bound.modules}}
    return [
        Problem(
            f"{name}: the vocabulary was resized, but the adapter does not hold the resized head",
            f"{size} rows",
            f"{ref.shape[0]} rows",
            "PEFT leaves it out when the embeddings are targeted: save again with save_embedding_layers=True, "
            "or with the head in modules_to_save",
        )
        for name, ref in after.items()
        if name.endswith((*TIED_HEADS, *EMBEDDINGS))
        and len(ref.shape) == 2
        and ref.shape[0] != size
        and not (name not in copies and name not in bound.base.tensors)
    ]


def _causal(bound: BoundAdapter) -> bool:
    """True when the base is a model with a language-model head."""
    architectures = bound.base.config.get("architectures")
    said = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(said, str):
        return said.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM"))
    return bound.adapter.config.get("task_type") == "CAUSAL_LM"


def _same_bytes(bound: BoundAdapter, embedding: str, heads: list[str]) -> bool:
    """True when embedding and head are replaced by the same values: PEFT saves both of a tied pair."""
    from .dcft_checkpoint import same_bytes

    one = bound.replacements.get(embedding)
    others = [bound.replacements.get(name) for name in heads]
    return bool(others) and one is not None and all(other is not None and same_bytes(one, other) for other in others)


def _with_base_kind(bound: BoundAdapter, base_kind: str | None) -> BoundAdapter:
    """Decide whether the base is the original or the residual, and drop the residual step in the latter case."""
    principal = [m for m in bound.modules if isinstance(m.module, LoraModule) and m.module.initial is not None]
    if not principal:
        return _check_residual(bound) if base_kind is None else bound
    evidence = None
    stated = bound.adapter.config.get("base") if bound.adapter.config.get("peft_type") == "DUDE" else None
    initials = [m.module.initial for m in principal if isinstance(m.module, LoraModule) and m.module.initial]
    lost = next((i.method for i in initials if i.method in LOST_INITS and not i.refs), None)
    measurable = all(i.method in ("svd", "qr", "pissa_niter") for i in initials)
    if base_kind is None and not measurable:
        if lost is None and "loftq" not in {i.method for i in initials}:
            base_kind = "original"  # the initial factors were given: they are to be subtracted
        else:
            raise _lost(bound, str(lost or "loftq"))
    if base_kind is None:
        step = max(1, len(principal) // EVIDENCE_SAMPLES)
        cosines = []
        for item in principal[::step][:EVIDENCE_SAMPLES]:
            module = item.module
            assert isinstance(module, LoraModule) and module.initial is not None
            cosines.append(
                base_evidence(
                    item.oriented_weight(),
                    read_tensor(module.a),
                    read_tensor(module.b),
                    module.scale if module.initial.method == "qr" else None,
                )
            )
        evidence = f"cosine of base and B A: {min(cosines):.3f} .. {max(cosines):.3f} over {len(cosines)} weights"
        if min(cosines) >= ORIGINAL_ABOVE:
            base_kind = "original"
        elif max(cosines) <= RESIDUAL_BELOW and stated == "original":
            raise MismatchError(
                "the adapter was trained beside the original base, and this is not it",
                expected=f"cosine >= {ORIGINAL_ABOVE} for every weight",
                got=evidence,
                hint="another model, or the residual: pass --base-kind residual if it is",
            )
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
        if lost is not None:
            raise _lost(bound, lost)
        return replace(bound, modules=tuple(_dtyped(item) for item in bound.modules), evidence=evidence)
    modules = tuple(
        replace(item, module=replace(item.module, initial=None)) if isinstance(item.module, LoraModule) else item
        for item in bound.modules
    )
    return replace(bound, modules=modules, base_kind="residual", evidence=evidence)


def _check_residual(bound: BoundAdapter) -> BoundAdapter:
    """A DuDe folder that says it belongs to the residual must not meet the original: nothing would be subtracted."""
    if bound.adapter.config.get("peft_type") != "DUDE" or bound.adapter.config.get("base") != "residual":
        return bound
    step = max(1, len(bound.modules) // EVIDENCE_SAMPLES)
    cosines = [
        base_evidence(item.oriented_weight(), read_tensor(item.module.a), read_tensor(item.module.b))
        for item in bound.modules[::step][:EVIDENCE_SAMPLES]
        if isinstance(item.module, LoraModule)
    ]
    evidence = f"cosine of base and B A: {min(cosines):.3f} .. {max(cosines):.3f} over {len(cosines)} weights"
    if max(cosines) >= ORIGINAL_ABOVE:
        raise MismatchError(
            "the adapter was trained on the residual base, and this is the original",
            expected=f"cosine <= {RESIDUAL_BELOW} for every weight",
            got=evidence,
            hint="give the residual base, or pass --base-kind residual if you are sure that it is one",
        )
    return replace(bound, base_kind="residual", evidence=evidence)


def _dtyped(item: BoundModule) -> BoundModule:
    """Stored initial factors without a dtype: the residual was kept in the base's."""
    module = item.module
    if not isinstance(module, LoraModule) or module.initial is None or module.initial.dtype is not None:
        return item
    if not module.initial.refs:
        return item
    return replace(item, module=replace(module, initial=replace(module.initial, dtype=item.weight.dtype)))


def _lost(bound: BoundAdapter, method: str) -> UnsupportedError:
    config = bound.adapter.config
    return UnsupportedError(
        f"{bound.adapter.folder}: init_lora_weights {config.get('init_lora_weights')!r} {LOST_INITS[method]}",
        expected="the factors at initialisation, or the residual base"
        if method != "loftq"
        else "the base as it was left by the initialisation, with --base-kind residual",
        hint=LOST_HINT if method != "loftq" else None,
    )
