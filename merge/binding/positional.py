"""DeBERTa-v2 and v3: the weights of the positional queries and keys after a merge.

With `share_att_key` a base projects its relative embeddings r by query_proj and key_proj, which also project the
tokens. DCFT's authors (github Godz-z/DCFT, commit 38f71d2, modeling_deberta_v2.py, line 804) train with

    positional queries   nn.Linear.forward(self.query_proj, r)     the frozen weight, without the delta
    positional keys      self.key_proj(r)                          with the delta

so one merged query_proj cannot be used for both tokens and positions. The merge writes a model without
`share_att_key`, where pos_query_proj is the frozen query_proj and pos_key_proj the merged key_proj. PEFT and the
reshape form of DCFT (github youseefmoemen/DCFT) replace the layer in transformers' model, so that both uses include
the delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import Problem, UnsupportedError, raise_all
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.dcft import DcftModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef

if TYPE_CHECKING:  # inspect reads headers without torch, which bound.py needs
    from .bound import BoundAdapter, BoundModule

QUERY, KEY = "attention.self.query_proj", "attention.self.key_proj"
POSITIONAL_TERMS = ("c2p", "p2c")  # scores of transformers: content to position, position to content
SHARED = "share_att_key"


def add_positional_projections(bound: BoundAdapter) -> BoundAdapter:
    """Return `bound` with separate positional projections where the positional queries use the frozen weight.

    New tensors are in `copies` (the frozen query_proj, biases) and in `modules` (the merged key_proj); the config
    changes to `share_att_key: false`. All layers get them, since the config applies to all.
    Raises UnsupportedError where the authors' forward is not known for this base.
    """
    if not keeps_queries_frozen(bound.adapter, bound.base):
        return bound
    terms = shared_terms(bound.base.config)
    tensors = {**bound.base.tensors, **bound.replacements}
    keys = {item.weight.name: item for item in bound.modules if f".{item.weight.name}".endswith(f".{KEY}.weight")}
    modules: list[BoundModule] = []
    copies: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        if not is_projection(name) or (".key_proj." in name and "c2p" not in terms):
            continue
        if name in keys:
            modules.append(replace(keys[name], output=positional_name(name)))
        else:
            copies[positional_name(name)] = ref
    raise_all(
        [
            Problem(f"{bound.base.folder}: holds {name} although its config sets {SHARED}", f"{SHARED} false, or none")
            for name in (*copies, *(item.name for item in modules))
            if name in bound.base.tensors
        ],
        UnsupportedError,
    )
    return replace(
        bound,
        modules=(*bound.modules, *modules),
        copies={**bound.copies, **copies},
        config_changes={**bound.config_changes, SHARED: False},
    )


def check_together(parts: Sequence[tuple[str, BoundAdapter]], in_turn: bool) -> list[Problem]:
    """Return the problems of combining named adapters that treat the positional projections differently."""
    apart = [name for name, bound in parts if SHARED in bound.config_changes]
    if not apart or len(parts) == 1:
        return []
    hint = "merge them one after the other, each on the base that it was trained on"
    if in_turn:
        return [
            Problem(
                f"{apart[0]!r} uses the frozen query_proj for positions: it cannot be applied in turn with others",
                hint=hint,
            )
        ]
    problems = []
    for name, bound in parts:
        adapted = () if name in apart else tuple(item.weight.name for item in bound.modules)
        touched = [tensor for tensor in (*adapted, *bound.replacements) if is_projection(tensor)]
        if touched:
            problems.append(
                Problem(
                    f"{touched[0]}: {name!r} adapts it for positions, {apart[0]!r} uses the frozen weight for them",
                    "adapters that treat the positional queries in the same way",
                    hint=hint,
                )
            )
    return problems


def is_projection(name: str) -> bool:
    """Return True for a tensor of a projection that DeBERTa's tokens and positions may share."""
    return f".{name.rpartition('.')[0]}".endswith((f".{QUERY}", f".{KEY}"))


def adapted_queries(adapter: Adapter) -> list[str]:
    """Return the names of DeBERTa query projections that a DCFT (its authors' form) adapts."""
    return [
        module.name
        for module in adapter.modules
        if isinstance(module, DcftModule) and f".{module.name}".endswith(f".{QUERY}")
    ]


def keeps_queries_frozen(adapter: Adapter, base: Checkpoint) -> bool:
    """Return True where `adapter` changes the token queries of `base`, but not the positional ones.

    Raises UnsupportedError where the authors' forward is not known for this base.
    """
    return bool(adapted_queries(adapter)) and "p2c" in shared_terms(base.config)


def is_positional(item: BoundModule) -> bool:
    """Return True for a module that `add_positional_projections` added for positions."""
    return item.output is not None and ".pos_key_proj." in item.output


def positional_name(name: str) -> str:
    """Return the name of the positional projection for a tensor of query_proj or key_proj."""
    return name.replace(".self.query_proj.", ".self.pos_query_proj.").replace(".self.key_proj.", ".self.pos_key_proj.")


def shared_terms(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the positional scores ("c2p", "p2c") for which a DeBERTa base shares query_proj and key_proj; or ().

    Raises UnsupportedError for a base that the authors' forward does not cover.
    """
    kind = config.get("model_type")
    if kind is None:
        raise UnsupportedError(
            "the base's config.json does not name its model_type",
            expected=f"the config of a DeBERTa model: DCFT's positional queries depend on {SHARED}",
            hint="put the base's config.json beside its weights",
        )
    if not config.get("relative_attention", False):
        return ()
    stated = config.get("pos_att_type") or ()
    terms = tuple(term.strip() for term in stated.lower().split("|")) if isinstance(stated, str) else tuple(stated)
    unknown = [term for term in terms if term not in POSITIONAL_TERMS]
    shares = bool(config.get(SHARED, False))
    if unknown or (shares and kind != "deberta-v2"):
        raise UnsupportedError(
            f"DCFT on this base: its authors' forward is not known for {kind} with pos_att_type {', '.join(terms)}",
            expected="deberta-v2 (DeBERTa-v2 and v3) with c2p and p2c",
            hint="their p2p scores fail on their own tensors, and transformers has none" if unknown else None,
        )
    return terms if shares else ()
