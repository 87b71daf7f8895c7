"""mergekit's YAML as a recipe, where both mean the same: weighted sums of adapters on one base.

    merge_method: task_arithmetic      # W = W0 + lambda sum_i w_i dW_i; normalize divides by sum_i w_i
    merge_method: linear               # W = sum_i w_i W_i of whole models, normalised unless `normalize: false`
    base_model: org/base
    models:
      - model: org/base+./german       # base and adapter, as mergekit writes them
        parameters: {weight: 0.7}

Everything else is refused with its reason: linear weights that are not normalised and do not sum to 1 scale the base
too, mergekit's ties divides by the weights that agree and its dare draws other random numbers, so that the same words
would give another model. Source: mergekit/config.py (MergeConfiguration),
merge_methods/linear.py and generalized_task_arithmetic.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all

METHODS = {"linear": True, "task_arithmetic": False}  # whether weights are normalised when nothing says so
KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
PARAMETERS = ("weight", "normalize", "lambda", "int8_mask")  # int8_mask: how mergekit stores a mask, no meaning here


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """True for what mergekit reads."""
    return "merge_method" in content


def from_mergekit(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the recipe's content that means the same. Raises UnsupportedError, or InputError with all problems."""
    method = content["merge_method"]
    if method not in METHODS:
        raise UnsupportedError(
            f"{file}: mergekit's {method!r} does not mean the same here",
            expected=" or ".join(METHODS),
            hint="state it in this project's own words: method, density, adapters (adapter-merge merge --help)",
        )
    problems = [
        Problem(f"{file}: {key} has no counterpart here", ", ".join(KEYS), repr(content[key])[:80])
        for key in content
        if key not in KEYS
    ]
    models = content.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(entry, dict) for entry in models):
        raise InputError(f"{file}: models is missing or wrong", expected="a list of {model, parameters}")
    common = content.get("parameters") or {}
    base = content.get("base_model")
    adapters: list[dict[str, Any]] = []
    total = 0.0
    for number, entry in enumerate(models, 1):
        where = f"{file}: model {number}"
        own = {**common, **(entry.get("parameters") or {})}
        problems += _check_parameters(own, where)
        name = entry.get("model")
        if not isinstance(name, str):
            problems.append(Problem(f"{where} is not a text", "base+adapter", repr(name)[:80]))
            continue
        of, plus, adapter = name.partition("+")
        base = base if base is not None else of
        if of != base:
            problems.append(
                Problem(f"{where} has another base", str(base), of, "adapter-merge extract gives a model's adapter")
            )
        weight = own.get("weight")
        if weight is None or not _is_number(weight):
            problems.append(Problem(f"{where}: weight is missing, or differs from tensor to tensor", "one number"))
            continue
        if plus or method == "linear":  # the base itself has no task vector
            total += weight
        if plus:
            label = Path(adapter).name.partition("@")[0]
            taken = sum(item["name"].startswith(label) for item in adapters)
            adapters.append(
                {"name": label if not taken else f"{label}-{taken + 1}", "path": _from_here(adapter), "weight": weight}
            )
    raise_all(problems, InputError)
    if not adapters:
        problems.append(Problem(f"{file}: no adapters", "models written as base+adapter"))
    normal = common.get("normalize", METHODS[method])
    if normal and abs(total) < 1e-8:
        problems.append(Problem(f"{file}: the weights sum to 0, and normalize divides by their sum"))
    if method == "linear" and not normal and abs(total - 1) > 1e-6:
        problems.append(
            Problem(
                f"{file}: the weights are not normalised, so that the base is scaled as well",
                "a sum of 1",
                f"{total:g}",
            )
        )
    if method == "linear" and "lambda" in common:
        problems.append(Problem(f"{file}: mergekit's linear has no lambda"))
    raise_all(problems, InputError)
    factor = float(common.get("lambda", 1.0)) / (total if normal else 1.0)
    return {
        "method": "linear",
        "base": _from_here(str(base)),
        "adapters": [{**item, "weight": item["weight"] * factor} for item in adapters],
    }


def _from_here(name: str) -> str:
    """Return a path that exists from the working directory, as mergekit takes it; a hub id as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _check_parameters(own: Mapping[str, Any], where: str) -> list[Problem]:
    problems = [
        Problem(f"{where}: the parameter {key} has no counterpart here", ", ".join(PARAMETERS))
        for key in own
        if key not in PARAMETERS
    ]
    if not isinstance(own.get("normalize", False), bool):
        problems.append(Problem(f"{where}: normalize is wrong", "true or false", repr(own["normalize"])[:80]))
    if not _is_number(own.get("lambda", 1.0)):
        problems.append(Problem(f"{where}: lambda is wrong", "one number", repr(own["lambda"])[:80]))
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def output_dtype(content: Mapping[str, Any]) -> str | None:
    """Return the dtype that the merged model is to have, None where the file does not say."""
    stated = content.get("out_dtype") or content.get("dtype")
    return str(stated) if stated is not None else None
