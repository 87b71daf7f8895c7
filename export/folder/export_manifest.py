"""The content of an export's adapter_merge.json, with the licence of the base."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Manifest:
    """The content of an export's adapter_merge.json."""

    kind: str  # "decoder", "encoder"
    mode: str  # "merged", "switchable", "batched"
    precision: str
    device: str
    base: Path
    fingerprint: str
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, dict[str, Any]] = field(default_factory=dict)  # figures of the export's own check
    license: dict[str, str] = field(default_factory=dict)  # license, license_name, license_link of the base's card

    @property
    def base_name(self) -> str:
        """The base's name on the hub where its folder says so (the hub's cache), else its folder's name."""
        repositories = [part for part in self.base.parts if part.startswith("models--")]
        return repositories[-1].removeprefix("models--").replace("--", "/") if repositories else self.base.name


def base_license(base: Path) -> dict[str, str]:
    """Return the licence keys of the model card in `base`; empty where the card has none."""
    from huggingface_hub.repocard import metadata_load

    try:
        metadata = metadata_load(base / "README.md") or {}
    except Exception:  # no card, or front matter that the hub's reader refuses (with yaml's own exceptions)
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}
