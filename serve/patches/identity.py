"""Identity of adapters in vLLM: by content, so that a replaced adapter of the same name is another one.

Up to 0.28 vLLM's prefix cache is keyed by the adapter's name alone; later versions add its path. And in every
version two LoRARequests are equal when their names are, so that of two adapters in one batch, the replaced one of
requests under way and its successor, only one is kept active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap_hash_keys(original: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """`original` is _gen_lora_extra_hash_keys: what a request's adapter adds to the keys of its blocks."""

    def _gen_lora_extra_hash_keys(request: Any) -> list[Any]:
        keys = original(request)
        if not request.lora_request:
            return keys
        path = request.lora_request.lora_path
        known = any(key == path or (isinstance(key, tuple) and path in key) for key in keys)
        return keys if known else [*keys, path]

    return _gen_lora_extra_hash_keys


def identity(request: Any) -> tuple[str, int, str]:
    """What makes two LoRARequests the same."""
    return (request.lora_name, request.lora_int_id, request.lora_path)


def same(self: Any, other: object) -> bool:
    """LoRARequest.__eq__."""
    return isinstance(other, self.__class__) and identity(self) == identity(other)


def hashed(self: Any) -> int:
    """LoRARequest.__hash__."""
    return hash(identity(self))
