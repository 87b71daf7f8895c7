"""Settings of an exported decoder: onnxruntime-genai's configuration, in genai_config.json or decoder_config.json.

onnxruntime-genai ignores the input adapter_ids and would compute the base for every row. A batched export therefore
stores the same settings as decoder_config.json: without genai_config.json, onnxruntime-genai refuses the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_merge.storage.checkpoint import read_json

GENAI = "genai_config.json"
HIDDEN_FROM_GENAI = "decoder_config.json"


def decoder_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the decoder in `folder`; empty for a graph that torch.onnx traced."""
    for name in (GENAI, HIDDEN_FROM_GENAI):
        if (folder / name).is_file():
            return dict(read_json(folder / name))
    return {}


def hide_from_genai(folder: Path) -> dict[str, Any]:
    """Rename the settings in `folder` to a name that onnxruntime-genai does not read; return them."""
    (folder / GENAI).rename(folder / HIDDEN_FROM_GENAI)
    return decoder_settings(folder)
