"""mergekit's YAML as a recipe, where both mean the same: weighted sums of adapters on one base.

    merge_method: task_arithmetic      # W = W0 + lambda sum_i w_i dW_i; normalize divides by sum_i w_i
    merge_method: linear               # W = sum_i w_i W_i of whole models, normalised unless `normalize: false`
    base_model: org/base
    models:
      - model: org/base+./german       # base and adapter, as mergekit writes them
        parameters: {weight: 0.7}

Everything else is refused with its reason, because the same settings would give another model: linear weights that are
not normalised and do not sum to 1 also scale the base, mergekit's ties divides by the weights that agree, and its dare
draws other random numbers. Source: mergekit/config.py (MergeConfiguration), merge_methods/linear.py and
generalized_task_arithmetic.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all

METHODS = {"linear": True, "task_arithmetic": False}  # whether weights are normalised when nothing says so
KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
PARAMETERS = ("weight", "normalize", "lambda", "int8_mask")  # int8_mask only sets the dtype of mergekit's masks


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Return True for the content of a mergekit configuration."""
    return "merge_method" in content


def from_mergekit(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the content of the equivalent recipe.

    Raises UnsupportedError for other methods of mergekit, InputError with every problem of the values.
    """
    method = content["merge_method"]
    if method not in METHODS:
        raise UnsupportedError(
            f"{file}: mergekit's method {method!r} has no equivalent in adapter-merge",
            expected=" or ".join(METHODS),
            hint="write an adapter-merge recipe: method, density, adapters (adapter-merge merge --help)",
        )
    problems = [
        Problem(f"{file}: {key} has no equivalent in adapter-merge", ", ".join(KEYS), repr(content[key])[:80])
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
        owner = f"{file}: model {number}"
        parameters = {**common, **(entry.get("parameters") or {})}
        problems += _check_parameters(parameters, owner)
        name = entry.get("model")
        if not isinstance(name, str):
            problems.append(Problem(f"{owner} is not a text", "base+adapter", repr(name)[:80]))
            continue
        base_name, separator, adapter = name.partition("+")
        base = base if base is not None else base_name
        if base_name != base:
            problems.append(
                Problem(
                    f"{owner} has another base", str(base), base_name, "adapter-merge extract gives a model's adapter"
                )
            )
        weight = parameters.get("weight")
        if weight is None or not _is_number(weight):
            problems.append(Problem(f"{owner}: weight is missing, or differs from tensor to tensor", "one number"))
            continue
        if separator or method == "linear":  # the base itself has no task vector
            total += weight
        if separator:
            label = Path(adapter).name.partition("@")[0]
            same_label_count = sum(item["name"].startswith(label) for item in adapters)
            unique_label = f"{label}-{same_label_count + 1}" if same_label_count else label
            adapters.append({"name": unique_label, "path": _absolute_if_present(adapter), "weight": weight})
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
        "base": _absolute_if_present(str(base)),
        "adapters": [{**item, "weight": item["weight"] * factor} for item in adapters],
    }


def _absolute_if_present(name: str) -> str:
    """Return the absolute path of an existing file or folder (mergekit uses the working directory), or the hub id."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _check_parameters(parameters: Mapping[str, Any], owner: str) -> list[Problem]:
    """Return a problem for each parameter that is unknown or has a wrong value; `owner` begins the message."""
    problems = [
        Problem(f"{owner}: the parameter {key} has no equivalent in adapter-merge", ", ".join(PARAMETERS))
        for key in parameters
        if key not in PARAMETERS
    ]
    if not isinstance(parameters.get("normalize", False), bool):
        problems.append(Problem(f"{owner}: normalize is wrong", "true or false", repr(parameters["normalize"])[:80]))
    if not _is_number(parameters.get("lambda", 1.0)):
        problems.append(Problem(f"{owner}: lambda is wrong", "one number", repr(parameters["lambda"])[:80]))
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def output_dtype(content: Mapping[str, Any]) -> str | None:
    """Return the stated dtype of the merged model (out_dtype, else dtype); None where the file states none."""
    stated = content.get("out_dtype") or content.get("dtype")
    return str(stated) if stated is not None else None
