"""Settings of an exported decoder: onnxruntime-genai's configuration, under its name or under another.

onnxruntime-genai ignores the input adapter_ids and would answer as the base: a batched export holds no
genai_config.json, so that it refuses the folder, and keeps the same settings as decoder_config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_merge.storage.checkpoint import read_json

GENAI = "genai_config.json"
OTHER = "decoder_config.json"


def decoder_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the decoder in `folder`; empty for a graph that torch.onnx traced."""
    for name in (GENAI, OTHER):
        if (folder / name).is_file():
            return dict(read_json(folder / name))
    return {}


def hide_from_genai(folder: Path) -> dict[str, Any]:
    """Give the settings in `folder` the name that onnxruntime-genai does not read; return them."""
    (folder / GENAI).rename(folder / OTHER)
    return decoder_settings(folder)
