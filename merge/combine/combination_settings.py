"""Methods of a combination and their settings, without torch: a recipe is checked before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("linear", "ties", "dare", "dare-ties", "magnitude-prune", "breadcrumbs")


@dataclass(frozen=True)
class Settings:
    """The method of a combination of deltas and its parameters.

    Sources: TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), Model Breadcrumbs (arXiv 2312.06795).

    Example:
        >>> Settings("ties", density=0.5).elects
        True
    """

    method: str = "linear"  # one of METHODS, or "in-turn"
    density: float = 1.0  # share of the elements of each delta that is kept, above 0 to 1
    gamma: float = 0.0  # breadcrumbs: share of the largest elements that is dropped, from 0 to below 1
    seed: int = 0  # of the random numbers of dare and dare-ties

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
