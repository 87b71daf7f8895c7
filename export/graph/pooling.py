"""Pooling of a sentence encoder: the computation of one vector from hidden states, as sentence-transformers stores it.

modules.json lists the modules: Transformer, Pooling and perhaps Normalize. Pooling's settings are in the config.json of
its folder (1_Pooling): one pooling_mode_* is true, or pooling_mode names it
(sentence_transformers/models/Pooling.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import FileFormatError, UnsupportedError
from adapter_merge.storage.checkpoint import read_json

if TYPE_CHECKING:
    from torch import Tensor

MODES = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "last": "lasttoken"}
NAMES = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}  # of pooling_mode, where it is a text
FOLDER = "1_Pooling"
MODULES = "modules.json"


@dataclass(frozen=True)
class Pooling:
    """The computation of a sentence's vector from its hidden states."""

    mode: str  # "mean", "cls" (the first token), "max" or "last" (the last token), of the tokens whose mask is 1
    normalised: bool  # to length 1

    def __str__(self) -> str:
        return f"{self.mode}, normalised" if self.normalised else self.mode


def read_pooling(folder: Path) -> Pooling | None:
    """Return the pooling that the modules of sentence-transformers in `folder` state; None without modules.json.

    Raises FileFormatError for a damaged modules.json, UnsupportedError for an unknown module or mode.
    """
    file = folder / MODULES
    if not file.is_file():
        return None
    try:
        modules = [
            (str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in json.loads(file.read_text())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{file}: not a list of modules with type and path", got=str(error)) from error
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"{file}: its modules are not supported",
            expected="Transformer, Pooling and perhaps Normalize",
            got=", ".join(kinds),
            hint="state --pooling: the export then has no other modules",
        )
    settings = read_json(folder / modules[1][1] / "config.json")
    return Pooling(_mode(settings, folder / modules[1][1] / "config.json"), len(kinds) == 3)


def _mode(settings: dict[str, Any], file: Path) -> str:
    named = settings.get("pooling_mode")
    if named is None:
        prefix = "pooling_mode_"
        names = [key.removeprefix(prefix) for key, value in settings.items() if key.startswith(prefix) and value]
        chosen = [mode for mode, name in MODES.items() if names == [name]]
    else:
        names = [named] if isinstance(named, str) else list(named)
        chosen = [NAMES[names[0]]] if len(names) == 1 and names[0] in NAMES else []
    if len(chosen) != 1 or settings.get("include_prompt") is False:
        raise UnsupportedError(
            f"{file}: its pooling is not supported",
            expected="one of " + ", ".join(MODES.values()) + ", over prompts too",
            got=", ".join(names) + ("" if settings.get("include_prompt", True) else ", without prompts"),
            hint="state another with --pooling",
        )
    return chosen[0]


def write_modules(folder: Path, pooling: Pooling, width: int) -> None:
    """Write modules.json and the pooling's config.json into `folder`, as sentence-transformers reads them."""
    modules = [("", "models.Transformer"), (FOLDER, "models.Pooling")]
    if pooling.normalised:
        modules.append(("2_Normalize", "models.Normalize"))
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    settings: dict[str, Any] = {"word_embedding_dimension": width}
    settings |= {f"pooling_mode_{name}": mode == pooling.mode for mode, name in MODES.items()}
    (folder / FOLDER).mkdir(exist_ok=True)
    for file, content in ((folder / MODULES, entries), (folder / FOLDER / "config.json", settings)):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def pool(
    hidden: Tensor,  # (batch, sequence, width)
    mask: Tensor,  # (batch, sequence), 1 for tokens
    pooling: Pooling,
) -> Tensor:
    """Return the sentences' vectors (batch, width), by operations that torch.onnx traces."""
    import torch

    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling.mode == "mean":
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    elif pooling.mode == "max":
        pooled = torch.where(weights > 0, hidden, torch.full_like(hidden, -1e4)).amax(1)
    else:
        places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device) * mask
        if pooling.mode == "cls":
            places = torch.where(mask > 0, -places, torch.full_like(places, -hidden.shape[1] - 1))
        index = places.argmax(1)[:, None, None].expand(-1, 1, hidden.shape[2])
        pooled = hidden.gather(1, index).squeeze(1)
    if pooling.normalised:
        pooled = pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return pooled
