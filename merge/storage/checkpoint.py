"""Model folders in the Hugging Face layout: shards, index, config and side files, read from headers only."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapter_merge.errors import FileFormatError, InputError, Problem, raise_all
from adapter_merge.files.escaping import control_problems
from adapter_merge.files.input_errors import reading, require_utf8
from adapter_merge.files.input_snapshot import InputSnapshot
from adapter_merge.files.json_types import INDEX, MODEL_CONFIG, check_types
from adapter_merge.files.nearest_path import nearest_path
from adapter_merge.files.object_storage import fetch, is_url
from adapter_merge.files.symlinks import leads_outside

from .gguf_header import read_gguf_header, stored_tensor
from .safetensors_header import TensorRef, read_header

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
CANDIDATES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    # one model of a diffusers pipeline
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w-]*)"  # org/model, or a single name such as gpt2
    r"(/(?P<inside>[\w-][\w.-]*(/[\w-][\w.-]*)*))?(@(?P<revision>[\w./-]+))?"
)
SAMPLE_BYTES = 4096  # at each end of a tensor, for fingerprints
# Endings of the names of output heads; a tied head is a second name of the embeddings.
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")


HUB_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # names of the hub's blobs: sha256 of large files, git's of others


@dataclass(frozen=True)
class Shard:
    """One weights file: its tensors in the order of their bytes, and its metadata."""

    file: Path
    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str]
    is_whole: bool = True  # False: other tensors than those in the file, as in the dense view of a quantised base


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk, described by its headers and config; no weight is read to create it.

    stored: the checkpoint on disk, where this one is a view of it with computed tensors.
    """

    folder: Path
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    snapshot: InputSnapshot = field(
        default_factory=InputSnapshot, repr=False, compare=False
    )  # taken before the files were read
    stored: Checkpoint | None = None
    left_out: frozenset[str] = frozenset()  # names of side files that do not belong to this view
    notes: tuple[str, ...] = ()  # differences between this view and the checkpoint as its scheme's library runs it

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Every tensor by name."""
        return {ref.name: ref for shard in self.shards for ref in shard.tensors}

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights files on disk."""
        return tuple(shard.file for shard in (self.stored or self).shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def stem(self) -> str:
        """The beginning of the weights files' names; it differs between transformers and diffusers."""
        return "diffusion_pytorch_model" if "_class_name" in self.config else "model"

    @property
    def side_files(self) -> tuple[Path, ...]:
        """All files except the weights, relative to the folder: config, tokenizer, templates, remote code.

        Raises InputError with every link that leads out of the folder, since an output would contain a copy of its
        target.
        """
        files, problems = [], []
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            left_out = path.name in self.left_out
            if path.is_file() and not hidden and not left_out and not path.name.endswith(WEIGHT_SUFFIXES):
                require_utf8(path)
                if leads_outside(self.folder, path):
                    hint = "replace the link by the file, or remove it: outputs contain copies of these files"
                    problems.append(
                        Problem(f"{path}: is a link to a file outside its folder", got=str(path.resolve()), hint=hint)
                    )
                files.append(relative)
        raise_all(problems)
        return tuple(files)

    @cached_property
    def layout(self) -> str:
        """Return the sha256 over every tensor's name, dtype and shape: equal layouts make fingerprints comparable."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(f"{name}\0{self.tensors[name].dtype}\0{self.tensors[name].shape}\0".encode())
        return digest.hexdigest()

    @property
    def state(self) -> str:
        """Return the sha256 over the states of the weights files (`file_state`): it changes with every write to them.

        The fingerprint is equal for every copy of a base, but does not change with an edit in the middle of a tensor.
        The state differs between copies, except in the hub's cache.
        """
        return hashlib.sha256("\0".join(f"{file.name}\0{file_state(file)}" for file in self.files).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over every tensor's name, dtype, shape and first and last 4 KiB; it ignores the sharding.

        It distinguishes bases in milliseconds. It does not prove integrity; the hashes of files in the manifest do.
        """
        if self.stored is not None:
            return self.stored.fingerprint
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            ref = self.tensors[name]
            digest.update(f"{name}\0{ref.dtype}\0{ref.shape}\0".encode())
            digest.update(sample_bytes(ref, 0, ref.nbytes))
        return digest.hexdigest()


def file_state(file: Path) -> str:
    """Return a text that changes with every write to `file`: its hash in the hub's cache, else inode, size and times.

    A program can set back the time of the last write, but not that of the last change (ctime).
    """
    target = file.resolve()
    if target.parent.name == "blobs" and HUB_HASH.fullmatch(target.name):
        return target.name
    with reading(file):
        about = file.stat()
    return f"{about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"


def sample_bytes(ref: TensorRef, first: int, stop: int) -> bytes:
    """Return the first and the last 4 KiB of the bytes [first, stop) of a stored tensor."""
    size = min(SAMPLE_BYTES, stop - first)
    with reading(ref.file), ref.file.open("rb") as stream:
        stream.seek(ref.start + first)
        head = stream.read(size)
        stream.seek(ref.start + max(first, stop - SAMPLE_BYTES))
        return head + stream.read(size)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from `file`. Raises FileFormatError."""
    try:
        text = file.read_text("utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # a lone surrogate can be read, but not written
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except OSError as error:
        raise FileFormatError(f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{file}: not a JSON object", got=type(content).__name__)
    return content


def plain_name(name: object, source: Path) -> str:
    """Return `name` if it is a bare file name. Raises FileFormatError for anything that could leave the folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise FileFormatError(
            f"{source}: names a file outside its folder",
            expected="a plain file name",
            got=repr(name),
            hint="do not use this folder: it may be malicious",
        )
    return name


def resolve(name: str | Path) -> Path:
    """Return a local folder, or the folder in a cache with the downloaded files of a hub id or an address.

    A hub id is org/model, org/model@revision, org/model/folder for a folder of it, or a single name such as gpt2;
    hf://org/model is the same. Addresses are those of object storage: s3://bucket/folder (object_storage.py).
    Raises InputError where nothing exists there, with a similar path as hint.
    """
    if isinstance(name, str):
        name = name.removeprefix("hf://")
        if is_url(name):
            return fetch(name)
    path = Path(name)
    require_utf8(path)
    if path.is_dir():
        return path
    match = HUB_ID.fullmatch(str(name))
    if path.exists():
        raise InputError(f"{name}: not a folder", expected="a local folder, or a hub id such as org/model")
    near = nearest_path(path)
    hint = f"did you mean {near}?" if near is not None else None
    if match is None:
        raise InputError(f"{name}: no such folder", expected="a local folder, or a hub id such as org/model", hint=hint)
    from adapter_merge.files.hub import download

    return download(match["repo"], match["revision"], match["inside"] or "", hint)


def resolve_base(name: str | Path) -> Path:
    """Return a GGUF file, local or a copy from object storage, and anything else as `resolve` does."""
    if isinstance(name, str) and is_url(name) and name.endswith(".gguf"):
        return fetch(name)
    path = Path(name)
    require_utf8(path)
    return path if path.suffix == ".gguf" and path.is_file() else resolve(name)


def read_weights(file: Path) -> Shard:
    """Read the header of one weights file: safetensors, GGUF (its blocks as bytes) or a torch zip pickle."""
    if file.suffix == ".safetensors":
        header = read_header(file)
        return Shard(file, header.tensors, header.metadata)
    if file.suffix == ".gguf":
        return Shard(file, tuple(stored_tensor(tensor, file) for tensor in read_gguf_header(file).tensors), {})
    from .torch_pickle import read_pickle

    refs = sorted(read_pickle(file).values(), key=lambda ref: (ref.start, ref.name))
    return Shard(file, tuple(refs), {"format": "pt"})


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open the model in `folder` (a path or hub id). Raises InputError or FileFormatError with every problem."""
    checkpoint = _read_headers(resolve(folder))
    log.info(
        "%s: %d tensors, %.2f GB in %d files",
        checkpoint.folder, len(checkpoint.tensors), checkpoint.nbytes / 1e9, len(checkpoint.shards),
    )  # fmt: skip
    return checkpoint


def _read_headers(folder: Path) -> Checkpoint:
    """Read config, index and headers of a local folder. Raises InputError or FileFormatError with every problem."""
    config_file, weights_file = folder / "config.json", _find_weights_file(folder)
    has_config = config_file.is_symlink() or config_file.exists()
    snapshot = InputSnapshot([config_file] if has_config else [])
    config = read_json(config_file) if has_config else {}
    check_types(config, MODEL_CONFIG, config_file)
    if not weights_file.name.endswith(".index.json"):
        snapshot += InputSnapshot([weights_file], may_be_linked=True)
        shard = read_weights(weights_file)
        raise_all(_unprintable((shard,)), FileFormatError)
        return Checkpoint(folder, (shard,), config, snapshot)
    snapshot += InputSnapshot([weights_file])
    weight_map = _read_weight_map(weights_file)
    names = list(dict.fromkeys(weight_map.values()))
    snapshot += InputSnapshot([folder / name for name in names], may_be_linked=True)
    shards = tuple(read_weights(folder / name) for name in names)
    raise_all([*_unprintable(shards), *_compare_with_index(weights_file, weight_map, shards)], FileFormatError)
    return Checkpoint(folder, shards, config, snapshot)


def _find_weights_file(folder: Path) -> Path:
    """Return the weights file or the index in a model's folder. Raises InputError where it has neither."""
    for candidate in CANDIDATES:
        if (folder / candidate).is_file():
            return folder / candidate
    if (folder / "model_index.json").is_file():
        parts = sorted(path.name for path in folder.iterdir() if any((path / name).is_file() for name in CANDIDATES))
        raise InputError(
            f"{folder}: a pipeline of several models",
            expected="the folder of one of them as BASE",
            got=", ".join(parts) or "no folder with weights",
            hint=f"merge into each that the adapter changes, such as {folder / parts[0]}" if parts else None,
        )
    raise InputError(
        f"{folder}: holds no model weights",
        expected=" or ".join(CANDIDATES),
        got=", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "an empty folder",
    )


def _read_weight_map(index_file: Path) -> dict[str, str]:
    """Return tensor name -> name of its shard. Raises FileFormatError for shards that do not exist."""
    index = read_json(index_file)
    check_types(index, INDEX, index_file)
    if not index.get("weight_map"):
        raise FileFormatError(f"{index_file}: has no weight_map")
    weight_map = {str(name): plain_name(shard, index_file) for name, shard in index["weight_map"].items()}
    problems = [
        Problem(f"{index_file}: names a shard that does not exist", got=name)
        for name in dict.fromkeys(weight_map.values())
        if not (index_file.parent / name).is_file()
    ]
    raise_all(problems, FileFormatError)
    return weight_map


def _compare_with_index(index_file: Path, weight_map: Mapping[str, str], shards: tuple[Shard, ...]) -> list[Problem]:
    """Return a problem for each tensor that the shards and the index do not agree on."""
    problems = []
    shard_of = {ref.name: shard.file.name for shard in shards for ref in shard.tensors}
    for name, stated in weight_map.items():
        if shard_of.get(name) != stated:
            got = f"in {shard_of[name]}" if name in shard_of else "in no shard"
            problems.append(
                Problem(f"{index_file}: tensor {name!r} is not in the shard that the index names", stated, got)
            )
    if sum(len(shard.tensors) for shard in shards) != len(shard_of):
        problems.append(Problem(f"{index_file}: some tensors are in two shards"))
    extra = sorted(set(shard_of) - set(weight_map))
    if extra:
        problems.append(
            Problem(f"{index_file}: the shards hold tensors that the index does not name", got=", ".join(extra[:5]))
        )
    return problems


def _unprintable(shards: tuple[Shard, ...]) -> list[Problem]:
    """Return a problem for each tensor whose name holds a control character."""
    return control_problems({ref.name: f"{shard.file}: the tensor's name" for shard in shards for ref in shard.tensors})
