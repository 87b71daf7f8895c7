"""Download of a model or adapter from the Hugging Face hub: only the files that are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from adapter_merge.errors import InputError

# Layouts of a model's or adapter's weights in one folder; the first one that is there is read.
LAYOUTS = (
    re.compile(r"(diffusion_pytorch_)?model((-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index\.json)"),
    re.compile(r"(diffusion_)?pytorch_model((-\d{5}-of-\d{5})?\.bin|\.bin\.index\.json)"),
    re.compile(r"[^/]+\.safetensors"),
    re.compile(r"[^/]+\.(bin|pt|pth|ckpt)"),
    re.compile(r"[^/]+\.gguf"),
    re.compile(r"[^/]+\.onnx(\.data|_data)?"),
)
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx\.data|onnx_data|tflite|npz|nemo|ot|mlmodel|pkl)"
    r"|.*\.index\.json"
)
ADAPTER_CONFIG = "adapter_config.json"
PIPELINE_CONFIG = "model_index.json"  # of diffusers, whose models are in folders of their own


def wanted_files(files: Sequence[str], inside: str = "") -> list[str]:
    """Return those of a repository's `files` that are read, of the folder `inside` (with a slash at its end).

    Of several layouts of the same weights one is read, and of weights in further folders only those of a diffusers
    pipeline. An adapter has more than one safetensors file. Raises InputError for several GGUF files.
    """
    here = [name.removeprefix(inside) for name in files if name.startswith(inside)]
    weights = [name for name in here if WEIGHTS.fullmatch(name) and name != PIPELINE_CONFIG]
    folders = {""} if PIPELINE_CONFIG not in here else {name.rpartition("/")[0] for name in weights}
    layouts = LAYOUTS[2:] if ADAPTER_CONFIG in here else LAYOUTS
    found = [name for folder in sorted(folders) for name in _chosen(weights, folder, layouts)]
    models = [name for name in found if name.endswith(".gguf")]
    if len(models) > 1:
        raise InputError(
            "the repository holds several GGUF models",
            expected="one file, downloaded and given as BASE",
            got=", ".join(models[:20]),
            hint=f"hf download REPOSITORY {models[0]}",
        )
    rest = [name for name in here if name not in weights and not _is_hidden(name)]
    return [inside + name for name in (*rest, *found)]


def _chosen(weights: Sequence[str], folder: str, layouts: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the weights in `folder` of the first layout that is there."""
    names = [name for name in weights if name.rpartition("/")[0] == folder]
    for layout in layouts:
        kept = [name for name in names if layout.fullmatch(name.rpartition("/")[2])]
        if kept:
            return kept
    return []


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def download(repository: str, revision: str | None = None, inside: str = "", hint: str | None = None) -> Path:
    """Return the folder of the hub's cache with the files of `repository` that are read.

    Without a connection, or with HF_HUB_OFFLINE=1, the files that the cache holds. Raises InputError where there are
    none, with `hint`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    prefix = f"{inside}/" if inside else ""
    try:
        try:
            siblings = HfApi().model_info(repository, revision=revision).siblings or []
            files = [sibling.rfilename for sibling in siblings]
        except HfHubHTTPError:
            raise
        except Exception as unreachable:  # no connection: the client's own errors differ between its versions
            try:
                known = [f"{prefix}*config.json"]  # a part that every download has: the whole is never in the cache
                cached = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=known)
            except (LocalEntryNotFoundError, OSError):
                raise ConnectionError(str(unreachable)) from unreachable
            return Path(cached) / inside
        if prefix and not any(name.startswith(prefix) for name in files):
            raise InputError(f"{repository}: has no folder {inside}", got=", ".join(_folders(files)) or "none")
        names = wanted_files(files, prefix)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names)) / inside
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{repository}: no such folder, and it could not be fetched from the hub",
            got=str(error).split("\n")[0],
            hint=hint or "check the name and the network (--token or HF_TOKEN for a private model)",
        ) from error


def _folders(files: Sequence[str]) -> list[str]:
    return sorted({name.rpartition("/")[0] for name in files if "/" in name and not _is_hidden(name)})[:20]
