"""A base, its oracle and adapters of every kind, and the other values that tests of serving pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from oracle import Oracle
from server import Server
from trained import MAKERS, Adapter, base_weights, make_base

Request = dict[str, Any]
RunEngine = Callable[..., dict[str, Any]]
Steps = Callable[..., list[Any]]
PART = ("q_proj", "v_proj", "up_proj", "down_proj")


@dataclass
class World:
    """A base, its oracle and one adapter of every kind (two of some, one on a part of the modules)."""

    family: str
    base: Path
    oracle: Oracle
    adapters: dict[str, Adapter]

    def raws(self, *names: str) -> dict[str, Path]:
        return {name: self.adapters[name].raw for name in names or self.adapters}

    def folders(self, *names: str) -> dict[str, Path]:
        return {name: self.adapters[name].folder for name in names or self.adapters}

    def expected(self, adapter: str | None, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        merged = {} if adapter is None else self.adapters[adapter].merged
        return self.oracle.greedy(merged, prompt, count)


def make_world(family: str, folder: Path) -> World:
    base = make_base(folder / "base", family)
    weights = base_weights(base)
    generator = torch.Generator().manual_seed(7)
    adapters = {}
    for kind, make in MAKERS.items():
        for number in (1, 2):
            name = f"{kind}-{number}"
            adapters[name] = make(name, folder / name, weights, generator, *([] if number == 1 else [PART]))
    return World(family, base, Oracle(base, weights), adapters)


def prompts(count: int, length: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (count, length), generator=generator).tolist()


@dataclass
class Running:
    world: World
    server: Server
    directory: Path
    cache: Path

    def tokens(self, adapter: str | None, prompt: list[int], count: int = 8) -> list[int]:
        return self.world.expected(adapter, prompt, count)[0]


def request(method: str, path: str, content: Any = None, key: str | None = None) -> tuple[Any, ...]:
    return ("request", method, path, content, key)
