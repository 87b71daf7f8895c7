"""The key-value cache of transformers' models under the name that the installed version gives it."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def cache_name() -> str:
    """Return the name of the cache in a model's arguments and outputs: `cache`, before 5.24 `past_key_values`."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = CausalLMOutputWithPast.__dataclass_fields__
    return "cache" if "cache" in fields else "past_key_values"


def cache_argument(cache_value: Any) -> dict[str, Any]:
    """Return the arguments of a forward that continues from `cache_value`; an empty dict where it is None."""
    return {} if cache_value is None else {cache_name(): cache_value}


def cache_of(result: Any) -> Any:
    """Return the cache in a forward's output; None for a model without one."""
    return getattr(result, cache_name(), None)
