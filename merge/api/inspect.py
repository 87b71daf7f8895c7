"""Description of an adapter and of how it fits a base: the job behind `adapter-merge inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from adapter_merge.errors import AdapterMergeError, Problem
from adapter_merge.formats.detection import open_adapter
from adapter_merge.methods.adapter import Adapter, MethodName
from adapter_merge.methods.peft_layer import PeftLayerModule

from .inspect_artefact import inspect_artefact
from .options import InspectOptions
from .results import Inspection

FROZEN_QUERIES = {
    "merge": "exact, one rounding; share_att_key becomes false: positional queries keep the frozen query_proj",
    "factor": "refused: a LoRA of query_proj would change the positional queries too; export --mode switchable can",
}


def inspect(
    adapter: str | Path, base: str | Path | None = None, options: InspectOptions = InspectOptions()
) -> Inspection:
    """Describe `adapter` from its headers and config, and how it fits `base` where one is given.

    With a base, a few small weights are read as evidence of the base that the adapter was trained on
    (combine/origin.py). A merged model, deltas or an ONNX export of this project is described from its manifest.
    Problems of the adapter or the base are not raised: `problems` of the result lists them.

    Example:
        >>> inspect("adapter", "base").problems
        ()
    """
    artefact = inspect_artefact(adapter)
    if artefact is not None:
        return Inspection(artefact)
    problems: list[Problem] = []
    report: dict[str, Any] = {"path": str(adapter)}
    from adapter_merge.binding.trained_base import evidence_of_training, open_trained_base
    from adapter_merge.quantisation.dense_view import packed_weights

    try:
        trained_on = options.reading.trained_on if options.reading is not None else None
        checkpoint = open_trained_base(base, trained_on) if base is not None else None
        opened = open_adapter(adapter, options.reading, checkpoint)
    except AdapterMergeError as error:
        report["problems"] = [vars(problem) for problem in error.problems]
        return Inspection(report)
    ranks = Counter(module.rank for module in opened.modules)
    kinds: dict[str, dict[str, Any]] = {}
    for module in opened.modules:
        kind = module.name.rpartition(".")[2]
        entry = kinds.setdefault(kind, {"count": 0, "shapes": [], "ranks": []})
        entry["count"] += 1
        for key, value in (("shapes", list(module.shape)), ("ranks", module.rank)):
            if value not in entry[key]:
                entry[key].append(value)
    report |= {
        "format": opened.format,
        "certainty": opened.certainty,
        "method": str(opened.method),
        "base_model": opened.base_name,
        "trained_on": evidence_of_training(opened, checkpoint, trained_on),
        "modules": len(opened.modules),
        "targets": kinds,
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "parameters": opened.parameters,
        "bytes": opened.nbytes,
        "replacements": sorted(opened.replacements),
        "notes": list(opened.notes),
        "holds_its_base": opened.own_base is not None,
        "would": _describe_commands(opened),
    }
    from adapter_merge.binding.positional import adapted_queries, keeps_queries_frozen

    weights = checkpoint or opened.own_base
    try:
        if weights is not None and keeps_queries_frozen(opened, weights):
            report["would"] = FROZEN_QUERIES
        elif weights is None and adapted_queries(opened):
            report["would"]["factor"] = "needs the base: refused where it has share_att_key"
    except AdapterMergeError as error:
        problems += error.problems
    if base is not None and not problems:
        from adapter_merge.binding.bind import bind
        from adapter_merge.combine.origin import find_origin
        from adapter_merge.combine.plausibility import sample_changes, warn_of_large_changes, warn_of_missing_layers

        try:
            assert checkpoint is not None
            bound = bind(opened, checkpoint, options.base_kind)
            origin = find_origin(bound)
            report["base"] = {
                "path": str(base),
                "kind": bound.base_kind,
                "evidence": bound.evidence,
                "origin": origin.text,
                "fingerprint": bound.base.fingerprint,
                "bytes": (bound.base.stored or bound.base).nbytes,
                "quantised": dict(Counter(weight.scheme for weight in packed_weights(bound.base).values())),
                "notes": list(bound.base.notes),
            }
            report["warnings"] = warn_of_missing_layers(bound) + warn_of_large_changes(sample_changes(bound))
            problems += [] if opened.forced else origin.contradictions
        except AdapterMergeError as error:
            problems += error.problems
    report["problems"] = [vars(problem) for problem in problems]
    return Inspection(report)


def _describe_commands(opened: Adapter) -> dict[str, str]:
    """Return what `merge` and `factor` would do with the adapter, as texts by command."""
    layers = [module for module in opened.modules if isinstance(module, PeftLayerModule)]
    if layers and all(module.low_rank is not None for module in layers):
        factors = "an exact plain LoRA (needs the base and peft)"
    elif layers:
        factors = "no exact LoRA; with --rank a truncated LoRA with its error stated"
    elif opened.method in (MethodName.DORA, MethodName.DUDE):
        factors = "exact factors plus row scales (needs the base's row norms); a plain LoRA only with --rank"
    elif any(module.needs_base for module in opened.modules):
        factors = "an exact plain LoRA of twice the rank (needs the base, to repeat its SVD)"
    else:
        factors = "an exact plain LoRA; no base weights are read"
    return {"merge": "exact, one rounding to the base's dtype", "factor": factors}
