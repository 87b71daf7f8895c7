"""Put trained adapters into production: merge, factor, export and serve them, and verify the result against training.

    import adapter_merge as am

    result = am.merge("base", "adapter", "merged", am.MergeOptions(dtype="bfloat16"))
    report = am.verify("base", "adapter", "merged")
    assert report.passed

Every name in `__all__` is public. Its module is imported when the name is first used (PEP 562), so that importing the
package does not import torch. All other names are private.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of _PUBLIC for type checkers; a test compares the two
    from adapter_merge.api.convert import convert
    from adapter_merge.api.delta import delta
    from adapter_merge.api.extract import extract
    from adapter_merge.api.factor import factor
    from adapter_merge.api.inspect import inspect
    from adapter_merge.api.load import load_adapter
    from adapter_merge.api.merge import merge
    from adapter_merge.api.options import (
        ConvertOptions,
        DeltaOptions,
        ExtractOptions,
        FactorOptions,
        InspectOptions,
        MergeOptions,
        RestoreOptions,
        VerifyOptions,
    )
    from adapter_merge.api.restore import restore
    from adapter_merge.api.results import (
        AdapterEntry,
        Certificate,
        ConvertResult,
        DeltaResult,
        ExtractResult,
        FactorResult,
        Inspection,
        MergeResult,
        ParityFigures,
        RestoreResult,
        Verification,
        WeightFactors,
    )
    from adapter_merge.api.verify import verify
    from adapter_merge.combine.delta_ops import Settings
    from adapter_merge.combine.recipe import Ingredient, Recipe, make_recipe, read_recipe
    from adapter_merge.engine.weight_change import WeightChange
    from adapter_merge.errors import (
        AdapterError,
        AdapterMergeError,
        FileFormatError,
        InputError,
        MismatchError,
        MissingDependencyError,
        NumericsError,
        OutputError,
        ParityError,
        UnsupportedError,
    )
    from adapter_merge.formats.stated_settings import ReadOptions
    from adapter_merge.methods.adapter import Adapter

_PUBLIC = {  # module -> names
    "api.convert": ["convert"],
    "api.delta": ["delta"],
    "api.extract": ["extract"],
    "api.factor": ["factor"],
    "api.inspect": ["inspect"],
    "api.load": ["load_adapter"],
    "api.merge": ["merge"],
    "api.options": [
        "ConvertOptions",
        "DeltaOptions",
        "ExtractOptions",
        "FactorOptions",
        "InspectOptions",
        "MergeOptions",
        "RestoreOptions",
        "VerifyOptions",
    ],
    "api.restore": ["restore"],
    "api.results": [
        "AdapterEntry",
        "Certificate",
        "ConvertResult",
        "DeltaResult",
        "ExtractResult",
        "FactorResult",
        "Inspection",
        "MergeResult",
        "ParityFigures",
        "RestoreResult",
        "Verification",
        "WeightFactors",
    ],
    "api.verify": ["verify"],
    "combine.delta_ops": ["Settings"],
    "combine.recipe": ["Ingredient", "Recipe", "make_recipe", "read_recipe"],
    "engine.weight_change": ["WeightChange"],
    "errors": [
        "AdapterError",
        "AdapterMergeError",
        "FileFormatError",
        "InputError",
        "MismatchError",
        "MissingDependencyError",
        "NumericsError",
        "OutputError",
        "ParityError",
        "UnsupportedError",
    ],
    "formats.stated_settings": ["ReadOptions"],
    "methods.adapter": ["Adapter"],
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [
    "Adapter",
    "AdapterEntry",
    "AdapterError",
    "AdapterMergeError",
    "Certificate",
    "ConvertOptions",
    "ConvertResult",
    "DeltaOptions",
    "DeltaResult",
    "ExtractOptions",
    "ExtractResult",
    "FactorOptions",
    "FactorResult",
    "FileFormatError",
    "Ingredient",
    "InputError",
    "InspectOptions",
    "Inspection",
    "MergeOptions",
    "MergeResult",
    "MismatchError",
    "MissingDependencyError",
    "NumericsError",
    "OutputError",
    "ParityError",
    "ParityFigures",
    "ReadOptions",
    "Recipe",
    "RestoreOptions",
    "RestoreResult",
    "Settings",
    "UnsupportedError",
    "Verification",
    "VerifyOptions",
    "WeightChange",
    "WeightFactors",
    "__version__",
    "convert",
    "delta",
    "extract",
    "factor",
    "inspect",
    "load_adapter",
    "make_recipe",
    "merge",
    "read_recipe",
    "restore",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the module of the public name `name`, and return the object."""
    if name == "__version__":
        from importlib.metadata import version

        return version("adapter-merge")
    if name not in _MODULES:
        raise AttributeError(f"module 'adapter_merge' has no attribute {name!r}")
    value = getattr(import_module(f"adapter_merge.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
