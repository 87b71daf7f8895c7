"""Identity of adapters in vLLM: by content, so that a replaced adapter of the same name counts as another adapter.

Up to 0.28, vLLM's prefix cache is keyed by the adapter's name only; later versions add its path. In all versions two
LoRARequests with one name are equal. Where a batch holds a replaced adapter (of running requests) and its successor,
only one of them would be active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap_hash_keys(original: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """Wrap _gen_lora_extra_hash_keys (`original`), the keys of a request's cache blocks: add the adapter's path."""

    def _gen_lora_extra_hash_keys(request: Any) -> list[Any]:
        keys = original(request)
        if not request.lora_request:
            return keys
        path = request.lora_request.lora_path
        has_path = any(key == path or (isinstance(key, tuple) and path in key) for key in keys)
        return keys if has_path else [*keys, path]

    return _gen_lora_extra_hash_keys


def identity(request: Any) -> tuple[str, int, str]:
    """Return name, id and path, which together identify a LoRARequest."""
    return (request.lora_name, request.lora_int_id, request.lora_path)


def equals(self: Any, other: object) -> bool:
    """Replace LoRARequest.__eq__: compare name, id and path."""
    return isinstance(other, self.__class__) and identity(self) == identity(other)


def compute_hash(self: Any) -> int:
    """Replace LoRARequest.__hash__: hash name, id and path."""
    return hash(identity(self))
