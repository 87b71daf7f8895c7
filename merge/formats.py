"""Which kind of folder or file is this? Decided by content, never by name; adding a format touches this and one file.

`detect` says how sure it is: "certain" where the file names its format or holds tensors that no other format has,
"likely" where the tensors' names are shared by several tools and the shapes decide, "stated" where the user said so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .adapter import Adapter
from .checkpoint import CANDIDATES, Checkpoint, open_checkpoint, read_json, resolve
from .dcft_checkpoint import holds_dcft, read_dcft_checkpoint
from .errors import AdapterError, InputError
from .native_format import read_native
from .peft_format import WEIGHT_FILES, PeftExtras, read_peft

NATIVE_TYPES = ("DCFT", "DUDE")
FORMATS = ("peft", "native", "dcft")
FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ReadOptions:
    """What a user may add to an adapter whose files do not say everything."""

    alpha: float | None = None  # lora_alpha, where no config says it
    ranknum: float | None = None  # DCFT: ranknum, where loralib's lora_state_dict() dropped it
    format: str | None = None  # one of FORMATS: what to read it as, whatever it looks like
    magnitudes: Path | None = None  # DoRA, DuDe: a file or PEFT folder with the magnitudes that PEFT dropped
    init_adapter: Path | None = None  # PiSSA and others: the PEFT folder saved before training
    residual_dtype: str | None = None  # PiSSA, DuDe: what the frozen residual was kept in, where not the base's dtype
    prefix: str | None = None  # what stands before the adapter's names in the base
    magnitude_axis: str | None = None  # "out" or "in": what a magnitude of a square weight belongs to


@dataclass(frozen=True)
class Detected:
    """What a folder or file seems to be."""

    format: str  # one of FORMATS
    certainty: str  # certain, likely or stated
    reason: str


def detect(path: Path, stated: str | None = None) -> Detected:
    """The format of an adapter's folder or file. Raises AdapterError where it is none that is known."""
    if stated is not None:
        if stated not in FORMATS:
            raise InputError(f"--format {stated}: unknown", expected=", ".join(FORMATS))
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
        raise AdapterError(
            f"{path}: a model without an adapter in it",
            expected="adapter_config.json, or a DCFT checkpoint with lora_A, lora_B and lora_C tensors",
            hint="a merged model has nothing left to merge",
        )
    got = path.name
    if path.is_dir():
        got = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "an empty folder"
    raise AdapterError(
        f"{path}: not an adapter",
        expected=f"adapter_config.json with {WEIGHT_FILES[0]}, or a DCFT checkpoint",
        got=got,
    )


def open_adapter(folder: str | Path, options: ReadOptions | None = None, base: Checkpoint | None = None) -> Adapter:
    """The adapter in `folder` (a path or hub id), whatever its format. Raises AdapterError or UnsupportedError."""
    from dataclasses import replace

    path = Path(folder) if Path(folder).is_file() else resolve(folder)
    options = options or ReadOptions()
    found = detect(path, options.format)
    adapter = _read(path, found, options, base)
    return replace(adapter, certainty=found.certainty, prefix=options.prefix)


def _read(path: Path, found: Detected, options: ReadOptions, base: Checkpoint | None) -> Adapter:
    if found.format == "native":
        return read_native(path, options.alpha, options.ranknum)
    if found.format == "peft":
        return read_peft(path, PeftExtras(options.magnitudes, options.init_adapter, options.residual_dtype))
    return read_dcft_checkpoint(open_checkpoint(path), options.alpha, base, options.ranknum)
