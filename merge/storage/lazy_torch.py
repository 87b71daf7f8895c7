"""Proxy of torch that imports it on first use, so that reading headers and configs (`inspect`) does not import torch.

`import torch` takes more than a second. Modules that only describe files use `from .lazy_torch import torch`;
modules that compute import torch itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """A proxy of the torch module; each attribute is looked up in torch once."""

        def __getattr__(self, name: str) -> Any:
            import torch as module

            value = getattr(module, name)
            setattr(self, name, value)
            return value

    torch = _Torch()
