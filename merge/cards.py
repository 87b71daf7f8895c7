"""The README.md of what is written: model cards with the hub's metadata.

Keys after the hub's model card specification (huggingface_hub, "Model Cards"): base_model,
base_model_relation (adapter or merge), library_name, tags.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def card(title: str, base: str | None, relation: str, library: str, tags: Iterable[str], body: str) -> str:
    """A model card with YAML front matter."""
    front = ["---", f"library_name: {library}"]
    if base:
        front += [f"base_model: {json.dumps(base)}", f"base_model_relation: {relation}"]
    front += ["tags:", *(f"- {tag}" for tag in tags), "---", ""]
    return "\n".join(front) + f"# {title}\n\n{body.rstrip()}\n"


def adapter_table(adapters: Iterable[Mapping[str, Any]]) -> str:
    """A table of the adapters in a manifest's form."""
    lines = ["| adapter | method | weights | sha256 |", "|---|---|---|---|"]
    for entry in adapters:
        lines.append(f"| {entry['name']} | {entry['method']} | {entry['modules']} | `{entry['sha256'][:16]}` |")
    return "\n".join(lines)
