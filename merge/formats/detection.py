"""Detection of an adapter's format by its content, never by its name, and the call of the format's reader.

`detect` states its certainty: "certain" where the file names its format or holds tensors that no other format has,
"likely" where several tools use the same tensor names and the shapes decide, "stated" where the user names it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_merge.errors import AdapterError, InputError, Problem, raise_all
from adapter_merge.files.escaping import control_problems
from adapter_merge.files.input_errors import require_utf8
from adapter_merge.files.input_snapshot import InputSnapshot, snapshot_folder
from adapter_merge.formats.dcft_reshape_file import read_dcft_reshape
from adapter_merge.formats.peft.folder import read_peft
from adapter_merge.formats.peft.initialisation import is_plain_init
from adapter_merge.formats.peft.layer_types import INDICES
from adapter_merge.formats.peft.tensors import WEIGHT_FILES, PeftExtras
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.peft_layer import PeftLayerModule
from adapter_merge.storage.checkpoint import CANDIDATES, Checkpoint, open_checkpoint, read_json, read_weights, resolve
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES

from .dcft_checkpoint import holds_dcft, read_dcft_checkpoint
from .diffusers_lora import holds_diffusers, read_diffusers
from .gguf_lora import holds_gguf_lora, read_gguf_lora
from .kohya import IMAGE_PREFIXES, PREFIXES, holds_kohya, read_kohya
from .mytransformers import read_mytransformers
from .native import NATIVE_TYPES, read_native
from .stated_settings import ReadOptions

log = logging.getLogger(__name__)

FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

CHECKPOINT = re.compile(r"checkpoint-\d+")  # folders that transformers' Trainer writes beside the final adapter

# The options that each format of a folder can use, beside format and prefix. USED_BY_TYPE overrides them by peft_type.
USED_OPTIONS: dict[str, tuple[str, ...]] = {
    "peft": (),
    "native": (),
    "dcft": ("alpha", "ranknum"),
}
USED_BY_TYPE = {
    "LORA": ("magnitudes", "init_adapter", "residual_dtype"),
    "DCFT": ("alpha", "ranknum"),
    "LYCORIS": ("alpha",),
}


@dataclass(frozen=True)
class Detected:
    """The detected format of a folder or file, with the evidence."""

    format: str  # a key of USED_OPTIONS or FILE_FORMATS
    certainty: str  # certain, likely or stated
    reason: str


@dataclass(frozen=True)
class FileFormat:
    """How a format of one weights file is recognised and read."""

    recognise: Callable[[tuple[str, ...]], str | None]  # tensor names -> "certain" or "likely"; None: another format
    evidence: str  # shown to users with the certainty
    options: tuple[str, ...]  # the fields of ReadOptions that it can use, beside format and prefix
    read: Callable[[Path, ReadOptions, Checkpoint | None], Adapter]  # (file, options, base) -> adapter


def _recognise_kohya(names: tuple[str, ...]) -> str | None:
    if not holds_kohya(names):
        return None
    prefixed = all(name.startswith((*PREFIXES, *IMAGE_PREFIXES)) for name in names)
    return "certain" if prefixed else "likely"


def _recognise_mytransformers(names: tuple[str, ...]) -> str | None:
    has_factors = all(any(name.endswith(suffix) for name in names) for suffix in (".weight_a", ".weight_b"))
    return "likely" if has_factors else None


def _recognise_dcft_reshape(names: tuple[str, ...]) -> str | None:
    return "likely" if any(name.endswith(".deconv.weight") for name in names) else None


# Formats of one weights file, in the order in which they are tried. A new format of this kind adds one row.
FILE_FORMATS: dict[str, FileFormat] = {
    "gguf": FileFormat(
        lambda names: "certain" if holds_gguf_lora(names) else None,
        "lora_a and lora_b tensors of llama.cpp",
        (),
        lambda file, options, base: read_gguf_lora(file, base),
    ),
    "diffusers": FileFormat(
        lambda names: "certain" if holds_diffusers(names) else None,
        "PEFT's factors under the names of a pipeline's components",
        (),
        lambda file, options, base: read_diffusers(file, base),
    ),
    "kohya": FileFormat(
        _recognise_kohya,
        "lora_down, lokr_ or hada_ tensors",
        ("alpha", "magnitude_axis"),
        lambda file, options, base: read_kohya(file, options.alpha, options.magnitude_axis, base),
    ),
    "mytransformers": FileFormat(
        _recognise_mytransformers,
        "weight_a and weight_b tensors",
        ("alpha", "magnitude_axis", "residual_dtype"),
        lambda file, options, base: read_mytransformers(
            file, options.alpha, options.magnitude_axis, base, options.residual_dtype
        ),
    ),
    "dcft-reshape": FileFormat(
        _recognise_dcft_reshape,
        "A, B and deconv.weight tensors",
        (),
        lambda file, options, base: read_dcft_reshape(file, base),
    ),
}


def detect(path: Path, stated: str | None = None, name: str | Path | None = None) -> Detected:
    """Return the format of an adapter's folder or file. Raises AdapterError where no known format fits.

    name: what the user calls `path`, such as a hub id.
    """
    if stated is not None:
        formats = (*USED_OPTIONS, *FILE_FORMATS)
        if stated not in formats:
            raise InputError(f"--format {stated}: unknown", expected=", ".join(formats))
        return Detected(stated, "stated", "--format")
    config_file = path / "adapter_config.json"
    if path.is_dir() and config_file.is_file():
        kind = read_json(config_file).get("peft_type")
        if isinstance(kind, str) and kind in NATIVE_TYPES:
            return Detected("native", "certain", f"peft_type {kind}, which PEFT does not have")
        return Detected("peft", "certain", f"peft_type {kind!r:.40}")
    if path.is_dir() and any((path / name).is_file() for name in CANDIDATES):
        checkpoint = open_checkpoint(path)
        if holds_dcft(checkpoint):
            return Detected("dcft", "certain", "a model with lora_A, lora_B and lora_C beside its weights")
        names = tuple(checkpoint.tensors)
        if any(name.endswith(".deconv.weight") for name in names):
            return Detected("dcft-reshape", "likely", "A, B and deconv.weight tensors")
        raise AdapterError(
            f"{path}: a model without an adapter in it",
            expected="adapter_config.json, or a DCFT checkpoint with lora_A, lora_B and lora_C tensors",
            hint="a merged model holds no adapter: give the adapter that was merged",
        )
    file = _single_file(path)
    if file is not None:
        names = tuple(ref.name for ref in read_weights(file).tensors)
        if any(name.startswith("base_model.") for name in names):
            raise AdapterError(
                f"{file}: a PEFT adapter's tensors without their adapter_config.json",
                expected="adapter_config.json beside it",
                hint="rank, alpha and method are only in that file: fetch the whole folder",
            )
        for name, file_format in FILE_FORMATS.items():
            certainty = file_format.recognise(names)
            if certainty is not None:
                return Detected(name, certainty, file_format.evidence)
    contents = path.name
    inside = adapters_inside(path)
    if inside:
        adapter_id, at, revision = str(name or path).partition(
            "@" if name is not None and not Path(name).exists() else "\0"
        )
        raise AdapterError(
            f"{name or path}: holds {len(inside)} adapters in folders of their own",
            expected="one of them as ADAPTER",
            got=", ".join(inside[:20]),
            hint=f"{adapter_id.rstrip('/')}/{inside[-1]}{at}{revision}",
        )
    if path.is_dir():
        contents = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "an empty folder"
    raise AdapterError(
        f"{path}: not an adapter",
        expected=f"adapter_config.json with {WEIGHT_FILES[0]}, or a DCFT checkpoint",
        got=contents,
    )


def adapters_inside(path: Path) -> list[str]:
    """Return the folders of `path` that hold an adapter: PEFT's named adapters, checkpoints of a training."""
    if not path.is_dir():
        return []
    return sorted((file.parent.name for file in path.glob("*/adapter_config.json")), key=_natural_sort_key)


def _natural_sort_key(name: str) -> list[str | int]:
    """Return a sort key that compares numbers by value: checkpoint-900 comes before checkpoint-1000."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _single_file(path: Path) -> Path | None:
    """Return `path` itself, or the only weights file of a folder (final.ckpt first); None where there are several."""
    if path.is_file():
        return path if path.suffix in FILE_SUFFIXES else None
    if not path.is_dir():
        return None
    files = sorted(entry for entry in path.iterdir() if entry.suffix in FILE_SUFFIXES and entry.is_file())
    final = [file for file in files if file.stem == "final"]
    return files[0] if len(files) == 1 else final[0] if len(final) == 1 else None


def open_adapter(folder: str | Path, options: ReadOptions | None = None, base: Checkpoint | None = None) -> Adapter:
    """Open the adapter in `folder` (a path or hub id), in any known format; reads headers and configs, no weights.

    `base` helps formats whose tensor names depend on it. Raises AdapterError with every problem, UnsupportedError for
    settings that change the weights in a way that is not supported, InputError for options without effect.

    Example: `open_adapter("adapter").method` is "LoRA".
    """
    require_utf8(Path(folder))
    path = Path(folder) if Path(folder).is_file() else resolve(folder)
    options = options or ReadOptions()
    snapshot = snapshot_folder(path)
    stated = _stated_files(options)
    snapshot += InputSnapshot(stated)
    detected = detect(path, options.format, folder)
    _refuse_unused(path, detected.format, options)
    adapter = _call_reader(path, detected, options, base)
    stated_wrongly = () if options.force else adapter.contradictions
    raise_all([*_check_names(path, adapter), *_check_dtypes(adapter), *stated_wrongly], AdapterError)
    files = dict.fromkeys([*adapter.files, *stated, *(ref.file for ref in adapter.refs)])
    snapshot = snapshot.of(files)
    if adapter.own_base is not None:
        snapshot += adapter.own_base.snapshot
    named = [inner for inner in adapters_inside(path) if not CHECKPOINT.fullmatch(inner)]
    notes = adapter.notes
    if named:
        notes += (f"{path}: the adapter of the folder itself is read; it also holds {', '.join(named[:20])}",)
    adapter = replace(adapter, prefix=options.prefix, forced=bool(options.force))
    log.info(
        "%s: %s, %d modules, read as %s (%s: %s)",
        path, adapter.method, len(adapter.modules), adapter.format, detected.certainty, detected.reason,
    )  # fmt: skip
    return replace(adapter, certainty=detected.certainty, snapshot=snapshot, notes=notes)


def _stated_files(options: ReadOptions) -> list[Path]:
    """Return the files that the options name, or those in the folders that they name."""
    files = []
    for path in (options.magnitudes, options.init_adapter):
        if path is not None:
            files += sorted(file for file in Path(path).iterdir() if file.is_file()) if path.is_dir() else [path]
    return files


def _refuse_unused(path: Path, format: str, options: ReadOptions) -> None:
    """Raise InputError with every option that has no effect on an adapter of this format."""
    used_options = FILE_FORMATS[format].options if format in FILE_FORMATS else USED_OPTIONS[format]
    kind = format
    if format in ("peft", "native"):
        config = read_json(path / "adapter_config.json")
        kind = str(config.get("peft_type"))
        used_options = USED_BY_TYPE.get(kind, used_options)
        if kind == "DCFT" and config.get("form") == "reshape":
            used_options = ()
        if format == "peft" and kind == "LORA" and not config.get("use_dora"):
            used_options = tuple(key for key in used_options if key != "magnitudes")
        if format == "peft" and kind == "LORA" and is_plain_init(config.get("init_lora_weights", True)):
            used_options = tuple(key for key in used_options if key not in ("init_adapter", "residual_dtype"))
    raise_all(
        [
            Problem(
                f"{path}: --{key.replace('_', '-')} has no effect on this adapter ({kind})",
                "an option that this adapter uses",
                f"{key} = {value}",
                "with several adapters, name the one that it belongs to: NAME=VALUE",
            )
            for key, value in vars(options).items()
            if value is not None and key not in (*used_options, "format", "prefix", "trained_on", "force")
        ],
        InputError,
    )


def _check_names(path: Path, adapter: Adapter) -> list[Problem]:
    """Return a problem for each name that is no text or holds a control character: of the base, modules, tensors."""
    stated = {key: adapter.config.get(key) for key in ("base_model_name_or_path", "task_type")}
    problems = [
        Problem(f"{path}: {key} is not a string", got=repr(value)[:100])
        for key, value in stated.items()
        if value is not None and not isinstance(value, str)
    ]
    names = {module.name: f"{path}: the module's name" for module in adapter.modules}
    names |= dict.fromkeys(adapter.replacements, f"{path}: the tensor's name")
    if isinstance(adapter.base_name, str):
        names[adapter.base_name] = f"{path}: the name of its base"
    if isinstance(stated["task_type"], str):
        names[stated["task_type"]] = f"{path}: task_type"
    return problems + control_problems(names)


def _check_dtypes(adapter: Adapter) -> list[Problem]:
    """Return a problem for each factor that is not floating-point (quantised without its scales, or damaged)."""
    refs = {
        ref.name: ref
        for module in adapter.modules
        for ref in module.refs
        if not (isinstance(module, PeftLayerModule) and ref.name.endswith(INDICES))
    }
    return [
        Problem(f"{ref.file}: tensor {name!r} holds no floating-point numbers", "/".join(FLOAT_DTYPES), ref.dtype)
        for name, ref in refs.items()
        if ref.dtype not in FLOAT_DTYPES
    ]


def _call_reader(path: Path, detected: Detected, options: ReadOptions, base: Checkpoint | None) -> Adapter:
    """Read the adapter by the reader of the detected format."""
    if detected.format == "native":
        return read_native(path, options.alpha, options.ranknum)
    if detected.format == "peft":
        return read_peft(path, PeftExtras(options.magnitudes, options.init_adapter, options.residual_dtype))
    if detected.format == "dcft":
        return read_dcft_checkpoint(open_checkpoint(path), options.alpha, base, options.ranknum)
    file = _single_file(path)
    if file is None:
        raise AdapterError(f"{path}: no single weights file", expected=f"one file ({', '.join(FILE_SUFFIXES)})")
    return FILE_FORMATS[detected.format].read(file, options, base)
