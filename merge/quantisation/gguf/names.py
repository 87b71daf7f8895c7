"""Tensor names and row orders of llama.cpp's architectures, and their Hugging Face counterparts.

llama.cpp's converter renames every tensor (gguf.tensor_mapping). For some architectures it also changes values: it
interleaves Llama's query and key rows for the rotary embedding, and stores w + 1 for Gemma's norms (LlamaModel.permute
and Gemma2Model.modify_tensors in convert_hf_to_gguf.py). Only the architectures in `ARCHITECTURES` are supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import FileFormatError, MissingDependencyError, UnsupportedError
from adapter_merge.files.installation import install_command
from adapter_merge.storage.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROTATED = re.compile(r"blk\.\d+\.attn_(?P<kind>[qk])\.(weight|bias)")
_NORM = re.compile(r".*norm\.weight")


@dataclass(frozen=True)
class Architecture:
    """The changes that llama.cpp's converter makes to the tensors of one architecture."""

    name: str  # general.architecture
    model_types: tuple[str, ...]  # transformers' model types that become this architecture
    interleaved: bool = False  # rows of q and k are stored as (head, half, 2), not (head, 2, half)
    offset_norms: bool = False  # norms hold w + 1
    keys: tuple[str, ...] = ()  # its metadata keys, in addition to COMMON_KEYS


# Metadata keys of every architecture, without their prefix, that config.json can express.
COMMON_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count",
)  # fmt: skip
ARCHITECTURES = {
    entry.name: entry
    for entry in (
        Architecture("llama", ("llama", "mistral"), interleaved=True),
        Architecture("qwen2", ("qwen2",)),
        Architecture("qwen3", ("qwen3",)),
        Architecture(
            "gemma2",
            ("gemma2",),
            offset_norms=True,
            keys=("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        ),
    )
}


def architecture_named(name: str, where: object) -> Architecture:
    """Return the architecture called `name` in GGUF. Raises UnsupportedError."""
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: its GGUF architecture is not supported",
            expected=", ".join(ARCHITECTURES),
            got=name or "none",
            hint="use the model's Hugging Face folder as BASE",
        )
    return ARCHITECTURES[name]


def architecture_of(config: Mapping[str, Any], where: object) -> Architecture:
    """Return the GGUF architecture of a model with this config.json. Raises UnsupportedError."""
    for architecture in ARCHITECTURES.values():
        if config.get("model_type") in architecture.model_types:
            return architecture
    raise UnsupportedError(
        f"{where}: the names of its tensors in llama.cpp are not known",
        expected=", ".join(kind for entry in ARCHITECTURES.values() for kind in entry.model_types),
        got=f"model_type {config.get('model_type')!r:.100}",
    )


def require_gguf(what: str) -> Any:
    """Return the gguf package. Raises MissingDependencyError with `what` as the purpose."""
    if find_spec("gguf") is None:
        raise MissingDependencyError(f"{what} needs the package gguf", hint=install_command("gguf"))
    return import_module("gguf")


def gguf_name(architecture: Architecture, layers: int, name: str) -> str | None:
    """Return the GGUF name of the Hugging Face tensor `name`, or None where GGUF has no such tensor."""
    found = _names_in(architecture.name, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    return found if isinstance(found, str) else None


@cache
def _names_in(architecture: str, layers: int) -> Any:
    """Return the gguf package's TensorNameMap."""
    gguf = require_gguf("a name in llama.cpp")
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], layers)


def rotated_heads(architecture: Architecture, name: str, config: Mapping[str, Any]) -> int | None:
    """Return the number of heads of the GGUF tensor `name` if its rows are interleaved, else None."""
    match = _ROTATED.fullmatch(name)
    if not architecture.interleaved or match is None:
        return None
    heads = config.get("num_attention_heads")
    if match["kind"] == "k":
        heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or heads <= 0:
        raise FileFormatError(f"config.json: the number of heads is wrong ({heads!r:.50})")
    return heads


def is_offset_norm(architecture: Architecture, name: str) -> bool:
    """Tell whether the GGUF tensor `name` holds a norm's weight plus one."""
    return architecture.offset_norms and _NORM.fullmatch(name) is not None


def stored_rows(rows: int, heads: int, where: str) -> Tensor:
    """Return, for each row of the Hugging Face tensor, its row in the GGUF tensor, int64 (rows,)."""
    half = _half(rows, heads, where)
    return torch.arange(rows).view(heads, half, 2).transpose(1, 2).reshape(-1)


def written_rows(rows: int, heads: int, where: str) -> Tensor:
    """Return, for each row of the GGUF tensor, its row in the Hugging Face tensor, int64 (rows,)."""
    half = _half(rows, heads, where)
    return torch.arange(rows).view(heads, 2, half).transpose(1, 2).reshape(-1)


def _half(rows: int, heads: int, where: str) -> int:
    if rows % (2 * heads):
        raise FileFormatError(
            f"{where}: the number of rows is not divisible into {heads} heads of even size", got=str(rows)
        )
    return rows // heads // 2
