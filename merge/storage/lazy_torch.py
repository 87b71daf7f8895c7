"""torch, imported when it is first used: reading headers and configs, all that `inspect` does, needs none of it.

A bare `import torch` costs more than a second. Modules that only describe files use `from .lazy_torch import torch`;
those that compute import torch itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Stands for the torch module; every attribute is looked up in it once."""

        def __getattr__(self, name: str) -> Any:
            import torch as module

            value = getattr(module, name)
            setattr(self, name, value)
            return value

    torch = _Torch()
