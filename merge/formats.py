"""Which kind of folder is this? Decided by content, never by name; adding a format touches this table and one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .adapter import Adapter
from .checkpoint import CANDIDATES, Checkpoint, open_checkpoint, read_json, resolve
from .dcft_checkpoint import holds_dcft, read_dcft_checkpoint
from .errors import AdapterError
from .native_format import read_native
from .peft_format import read_peft

NATIVE_TYPES = ("DCFT", "DUDE")


@dataclass(frozen=True)
class ReadOptions:
    """What a user may add to an adapter whose files do not say everything."""

    alpha: float | None = None  # DCFT: lora_alpha, where the config does not say it
    ranknum: float | None = None  # DCFT: ranknum, where loralib's lora_state_dict() dropped it


def open_adapter(folder: str | Path, options: ReadOptions | None = None, base: Checkpoint | None = None) -> Adapter:
    """The adapter in `folder` (a path or hub id), whatever its format. Raises AdapterError or UnsupportedError."""
    folder = resolve(folder)
    options = options or ReadOptions()
    config_file = folder / "adapter_config.json"
    if config_file.is_file():
        config = read_json(config_file)
        if config.get("peft_type") in NATIVE_TYPES:
            return read_native(folder, options.alpha, options.ranknum)
        return read_peft(folder)
    if any((folder / name).is_file() for name in CANDIDATES):
        checkpoint = open_checkpoint(folder)
        if holds_dcft(checkpoint):
            return read_dcft_checkpoint(checkpoint, options.alpha, base, options.ranknum)
        raise AdapterError(
            f"{folder}: a model without an adapter in it",
            expected="adapter_config.json, or a DCFT checkpoint with lora_A, lora_B and lora_C tensors",
            hint="a merged model has nothing left to merge",
        )
    raise AdapterError(
        f"{folder}: not an adapter folder",
        expected="adapter_config.json with adapter_model.safetensors, or a DCFT checkpoint",
        got=", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "an empty folder",
    )
