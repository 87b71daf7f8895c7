"""A GGUF file as a base model: tensors with their Hugging Face names, a config.json and a tokenizer.

Where the file's folder has a config.json, it and the other side files are used; otherwise they are made from the file's
metadata (config.py). They are copied, with a link to the GGUF file, into a temporary folder that is deleted when the
process ends. Code that needs a model's folder uses this one, and opening it gives the same base again.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from adapter_merge.errors import FileFormatError, InputError, Problem, raise_all
from adapter_merge.files.input_snapshot import InputSnapshot
from adapter_merge.files.symlinks import leads_outside
from adapter_merge.storage.checkpoint import CANDIDATES, OUTPUT_HEADS, WEIGHT_SUFFIXES, Checkpoint, Shard, read_json
from adapter_merge.storage.gguf_header import GgufHeader, read_gguf_header, stored_tensor
from adapter_merge.storage.lazy_torch import torch

from .blocks import gguf_tensor
from .config import ROPE_FACTORS, make_config, quiet, require_transformers, write_tokenizer
from .names import Architecture, architecture_named, gguf_name, is_offset_norm, rotated_heads

SUFFIX = ".gguf"
HEAD = "output.weight"
_FOLDERS: dict[tuple[str, int, int], Path] = {}  # temporary folders by real path, size and modification time


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file at `path`, or the only one in the folder `path`; None where the model is in other files.

    Raises InputError for a folder with several GGUF files and no other weights.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if any((path / name).is_file() for name in CANDIDATES):
        return None
    files = sorted(file for file in path.glob(f"*{SUFFIX}") if file.is_file())
    if len(files) > 1:
        raise InputError(
            f"{path}: holds several GGUF models",
            expected="one of them as BASE",
            got=", ".join(file.name for file in files[:20]),
            hint=f"{path / files[0].name}",
        )
    return files[0] if files else None


def open_gguf(file: Path) -> Checkpoint:
    """Open the model in `file` as the Hugging Face checkpoint that llama.cpp converted; no weight is read.

    Raises FileFormatError with every tensor that is missing, unknown or of a wrong shape, UnsupportedError for an
    unsupported architecture, setting or tokenizer, MissingDependencyError without gguf and transformers.
    """
    snapshot = InputSnapshot([file], may_be_linked=True)
    header = read_gguf_header(file)
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{file}: not a model", expected='general.type "model"', got=f"{kind!r:.50}")
    architecture = architecture_named(header.architecture, file)
    require_transformers("reading a GGUF model")
    folder = model_folder(header)
    snapshot += InputSnapshot([folder / "config.json"])
    config = read_json(folder / "config.json")
    if config.get("model_type") not in architecture.model_types:
        raise FileFormatError(
            f"{file}: its architecture differs from the config.json in its folder",
            expected=" or ".join(architecture.model_types),
            got=f"{config.get('model_type')!r:.100}",
        )
    names = _names(header, architecture, config, _shapes(folder))
    weights = tuple(
        gguf_tensor(
            tensor,
            file,
            rotated_heads(architecture, tensor.name, config),
            is_offset_norm(architecture, tensor.name),
            names[tensor.name],
        )
        for tensor in header.tensors
        if tensor.name in names
    )
    own = tuple(stored_tensor(tensor, file) for tensor in header.tensors)
    stored = Checkpoint(file, (Shard(file, own, {}),), {}, snapshot)
    return Checkpoint(folder, (Shard(file, weights, {}, is_whole=False),), config, snapshot, stored)


def model_folder(header: GgufHeader) -> Path:
    """Return a temporary folder with copies of the model's side files and a link to its GGUF file.

    Raises InputError for a side file that is a symbolic link to a place outside the model's folder.
    """
    state = header.file.stat()
    key = (os.path.realpath(header.file), state.st_size, state.st_mtime_ns)
    if key in _FOLDERS:
        return _FOLDERS[key]
    place = Path(tempfile.mkdtemp(prefix="adapter-merge-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = place / header.file.stem
    folder.mkdir()
    beside = header.file.parent
    if (beside / "config.json").is_file():
        for path in beside.iterdir():
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_SUFFIXES):
                if leads_outside(beside, path):
                    raise InputError(f"{path}: is a link out of its folder", got=str(path.resolve()))
                shutil.copyfile(path, folder / path.name)
    else:
        _make_side_files(header, folder)
    (folder / header.file.name).symlink_to(header.file.resolve())
    _FOLDERS[key] = folder
    return folder


def _make_side_files(header: GgufHeader, folder: Path) -> None:
    config = make_config(header)
    write_tokenizer(header, folder)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    for name, content in (("config.json", config), ("generation_config.json", tokens)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, by name, of the model that the folder's config.json describes."""
    with quiet():
        transformers: Any = import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _names(
    header: GgufHeader, architecture: Architecture, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Return the Hugging Face name of each GGUF tensor. Raises FileFormatError with all missing and unknown tensors."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise FileFormatError(f"{header.file}: the number of layers is not known", got=f"{layers!r:.50}")
    stored = {tensor.name: tensor for tensor in header.tensors}
    names: dict[str, str] = {}
    problems = []
    for name, shape in shapes.items():
        found = gguf_name(architecture, layers, name)
        if name in OUTPUT_HEADS and HEAD not in stored and config.get("tie_word_embeddings"):
            continue
        if found is None or found not in stored:
            problems.append(Problem(f"{header.file}: has no {name}", found))
            continue
        names[found] = name
        if stored[found].shape != shape:
            problems.append(
                Problem(f"{header.file}: {found} has a wrong shape", f"{shape}, as {name}", str(stored[found].shape))
            )
    if HEAD in stored and config.get("tie_word_embeddings"):
        problems.append(Problem(f"{header.file}: holds {HEAD}, and the config ties the head to the embedding"))
    problems += [
        Problem(f"{header.file}: {name} belongs to no tensor of a {config.get('model_type')} model")
        for name in stored
        if name not in names and name not in (ROPE_FACTORS, HEAD)
    ]
    raise_all(problems[:20], FileFormatError)
    return names
