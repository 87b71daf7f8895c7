"""Methods of a combination and their settings, without torch: a recipe is checked before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("linear", "ties", "dare", "dare-ties", "magnitude-prune", "breadcrumbs")


@dataclass(frozen=True)
class Settings:
    """The method of a combination; `density` is the share of elements kept, `gamma` that of largest ones dropped."""

    method: str = "linear"
    density: float = 1.0
    gamma: float = 0.0
    seed: int = 0

    @property
    def by_size(self) -> bool:
        """True when elements are kept by their magnitude."""
        return self.method in ("ties", "magnitude-prune", "breadcrumbs")

    @property
    def random(self) -> bool:
        """True when elements are dropped at random."""
        return self.method in ("dare", "dare-ties")

    @property
    def elects(self) -> bool:
        """True when a sign is elected per element."""
        return self.method in ("ties", "dare-ties")
