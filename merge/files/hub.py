"""Download of a model or adapter from the Hugging Face hub: only the files that are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from adapter_merge.errors import InputError

# Layouts of the weights in a folder of a model or adapter; the first layout that exists is read.
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
PIPELINE_CONFIG = "model_index.json"  # of a diffusers pipeline, whose models are in sub-folders


def select_files(files: Sequence[str], inside: str = "") -> list[str]:
    """Return the names of a repository's `files` that are needed; `inside`: only those of this folder (ends with "/").

    Where weights exist in several layouts, one layout is downloaded; weights in sub-folders only for a diffusers
    pipeline. An adapter may have several safetensors files. Raises InputError for several GGUF files.
    """
    names = [name.removeprefix(inside) for name in files if name.startswith(inside)]
    weights = [name for name in names if WEIGHTS.fullmatch(name) and name != PIPELINE_CONFIG]
    folders = {""} if PIPELINE_CONFIG not in names else {name.rpartition("/")[0] for name in weights}
    layouts = LAYOUTS[2:] if ADAPTER_CONFIG in names else LAYOUTS
    selected_weights = [name for folder in sorted(folders) for name in _select_layout(weights, folder, layouts)]
    models = [name for name in selected_weights if name.endswith(".gguf")]
    if len(models) > 1:
        raise InputError(
            "the repository holds several GGUF models",
            expected="one file, which you download and state as BASE",
            got=", ".join(models[:20]),
            hint=f"hf download REPOSITORY {models[0]}",
        )
    others = [name for name in names if name not in weights and not _is_hidden(name)]
    return [inside + name for name in (*others, *selected_weights)]


def _select_layout(weights: Sequence[str], folder: str, layouts: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the weights in `folder` of the first layout that exists."""
    names = [name for name in weights if name.rpartition("/")[0] == folder]
    for layout in layouts:
        matching = [name for name in names if layout.fullmatch(name.rpartition("/")[2])]
        if matching:
            return matching
    return []


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def download(repository: str, revision: str | None = None, inside: str = "", hint: str | None = None) -> Path:
    """Download the files of `repository` that are needed; return their folder in the hub's cache.

    Without a connection, or with HF_HUB_OFFLINE=1, the files in the cache are used. Raises InputError, with `hint`,
    where the repository or its files cannot be downloaded.
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
        except Exception as unreachable:  # no connection: the exception type differs between versions of the client
            try:
                patterns = [
                    f"{prefix}*config.json"
                ]  # files that every download has; the cache never holds the whole repository
                cached = snapshot_download(
                    repository, revision=revision, local_files_only=True, allow_patterns=patterns
                )
            except (LocalEntryNotFoundError, OSError):
                raise ConnectionError(str(unreachable)) from unreachable
            return Path(cached) / inside
        if prefix and not any(name.startswith(prefix) for name in files):
            raise InputError(f"{repository}: has no folder {inside}", got=", ".join(_folders(files)) or "none")
        names = select_files(files, prefix)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names)) / inside
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{repository}: no such folder, and it could not be downloaded from the hub",
            got=str(error).split("\n")[0],
            hint=hint or "check the name and the network (--token or HF_TOKEN for a private model)",
        ) from error


def list_folders(repository: str, revision: str | None = None) -> tuple[str, list[str]]:
    """Return the commit of `repository` and the names of its top folders that hold an adapter. Raises InputError."""
    from huggingface_hub import HfApi

    try:
        about = HfApi().model_info(repository, revision=revision)
    except Exception as error:  # the type differs between versions of the client
        raise InputError(
            f"{repository}: cannot be read from the hub",
            got=str(error).split("\n")[0],
            hint="check the name and the network",
        ) from error
    names = [PurePosixPath(sibling.rfilename) for sibling in about.siblings or []]
    return str(about.sha), sorted({name.parts[0] for name in names if name.parts[1:] == (ADAPTER_CONFIG,)})


def _folders(files: Sequence[str]) -> list[str]:
    return sorted({name.rpartition("/")[0] for name in files if "/" in name and not _is_hidden(name)})[:20]
