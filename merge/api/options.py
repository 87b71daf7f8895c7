"""Options of the public functions: one frozen dataclass for each function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapter_merge.errors import InputError
from adapter_merge.formats.stated_settings import ReadOptions


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """Options of every function that writes a folder from an adapter."""

    base_kind: str | None = None  # PiSSA, DuDe: "original" or "residual"; None: decided by the base's weights
    reading: ReadOptions | None = None  # settings that the adapter's files do not hold
    overwrite: bool = False  # replace an output folder that adapter-merge wrote before
    dry_run: bool = False  # check everything, write nothing


@dataclass(frozen=True, kw_only=True)
class MergeOptions(WriteOptions):
    """Options of `merge`: how the merged model is computed and written.

    Example:
        >>> merge("base", "adapter", "merged-in-bfloat16", MergeOptions(dtype="bfloat16", dry_run=True)).dry_run
        True
    """

    dtype: str | None = None  # float32, float16 or bfloat16 for all float tensors; None: the dtype of each tensor
    write_as: str | None = None  # quantised base: float32, float16 or bfloat16 for its packed weights, or "same"
    min_retention: float = 0.5  # write_as "same": the smallest share of the change that passes, 0 to 1
    texts: Sequence[str] | None = None  # write_as "same": texts for the KL divergence to the live adapter
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    workers: int | None = None  # threads per device; None: the number that was measured to be fastest
    link: str = "auto"  # unchanged shards: auto, reflink, hardlink or copy
    hashes: bool = True  # write the sha256 of every file; restore, resume and the check of files need them
    keep_preimage: bool = False  # store the base's changed bytes, so that restore needs no base
    keep_partial: bool = False  # after a failure keep the finished shards, so that the next run resumes
    part: tuple[int, int] | None = None  # (i, n): write only the i-th of n groups of shards
    finish: bool = False  # check that all parts are written, and write the remaining files
    vram: int | None = None  # bytes of memory to use on each CUDA device; None: a quarter of the free memory
    max_shard_bytes: int | None = None  # bytes of tensors in one output file; None: the base's division into files
    ray: str | None = None  # the address of a Ray cluster, whose tasks write the weights; needs the extra ray


@dataclass(frozen=True, kw_only=True)
class DeltaOptions(WriteOptions):
    """Options of `delta`: how dense deltas are computed and written.

    Example:
        >>> delta("base", "adapter", "half-deltas", DeltaOptions(dtype="bfloat16")).artefact
        'deltas'
    """

    dtype: str = "float32"  # float32, float16 or bfloat16
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    workers: int | None = None  # threads per device; None: the number that was measured to be fastest
    hashes: bool = True  # write the sha256 of every file
    vram: int | None = None  # bytes of memory to use on each CUDA device; None: a quarter of the free memory
    ray: str | None = None  # the address of a Ray cluster, whose tasks write the deltas; needs the extra ray


@dataclass(frozen=True, kw_only=True)
class FactorOptions(WriteOptions):
    """Options of `factor`: the rank of the factors, their format, and how their error is measured.

    Example:
        >>> factor("base", "adapter", "rank-1", FactorOptions(rank=1)).exact
        False
    """

    rank: int | float | None = None  # a rank, or an energy below 1 such as 0.99 (share of ||dW||^2); None: exact
    budget: float | None = None  # MB (1e6 bytes) for all factors together
    keep_scale: bool = False  # keep the row scales of DoRA and DuDe exact, truncate only the low-rank part
    calibrate: str | Path | None = None  # a text file: minimise the error of the layers' outputs on it
    prompts: Sequence[str] | None = None  # texts for end_to_end; None: built-in texts
    end_to_end: bool = False  # compare the logits of the factors with those of the adapter as trained
    max_error: float | None = None  # the largest relative error of dW that passes, per weight
    format: str = "peft"  # "peft": a PEFT folder; "gguf": a llama.cpp LoRA adapter
    hash_base: bool = True  # hash the base's adapted weights in full; False: only their first and last bytes
    frozen_positions: bool = False  # DeBERTa: the reader of the folder keeps positional queries frozen

    @property
    def is_truncation(self) -> bool:
        """True where a rank or a budget is stated."""
        return self.rank is not None or self.budget is not None

    device: str = "auto"  # auto, cpu, cuda or cuda:N


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(WriteOptions):
    """Options of `convert`.

    Example:
        >>> convert("adapter", "safe-copy", ConvertOptions(dry_run=True)).dry_run
        True
    """

    base: str | Path | None = (
        None  # needed for a DuDe folder of PEFT, and to find the trained heads of a DCFT checkpoint
    )


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Options of `extract`: the rank and form of the extracted LoRA.

    Example:
        >>> ExtractOptions(rank=0.99, row_scale=True).rank
        0.99
    """

    rank: int | float = 16  # a rank, or an energy below 1 that each weight keeps (share of ||W1 - W0||^2)
    row_scale: bool = False  # True: write a DoRA instead of a LoRA
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    overwrite: bool = False  # replace an output folder that adapter-merge wrote before
    dry_run: bool = False  # check everything, write nothing


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """Options of `restore`: where the base's bytes come from.

    Example:
        >>> RestoreOptions(base="base").link
        'auto'
    """

    base: str | Path | None = None  # the original base; None: the pre-image that the merge kept
    link: str = "auto"  # files of the base: auto, reflink, hardlink or copy
    overwrite: bool = False  # replace an output folder that adapter-merge wrote before
    dry_run: bool = False  # check everything, write nothing


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `verify`: what is compared, and which differences pass.

    Example:
        >>> merge("base", "adapter", "merged-again").artefact
        'merged model'
        >>> verify("base", "adapter", "merged-again", VerifyOptions(weights_only=True)).passed
        True
    """

    base_kind: str | None = None  # PiSSA, DuDe: "original" or "residual"; None: decided by the base's weights
    reading: ReadOptions | None = None  # settings that the adapter's files do not hold
    prompts: Sequence[str] | None = None  # texts; None: built-in texts, or random tokens without a tokenizer
    generated: int = 32  # greedy tokens per prompt
    tolerance: float | None = None  # largest |dlogit| that passes; None: 1e-4 in float32, none after rounding
    weights_only: bool = False  # compare weights only, run no model
    min_retention: float = 0.5  # requantised model: the smallest share of the change that passes


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `inspect`.

    Example:
        >>> inspect("adapter", "base", InspectOptions(base_kind="original")).fits
        True
    """

    base_kind: str | None = None  # PiSSA, DuDe: "original" or "residual"; None: decided by the base's weights
    reading: ReadOptions | None = None  # settings that the adapter's files do not hold


def parse_rank(text: str) -> int | float:
    """Parse "16" as a rank and "0.99" as an energy. Raises InputError for other texts."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = math.nan
    if not (isinstance(value, int) and value >= 1) and not 0 < value < 1:
        raise InputError(f"--rank {text}: neither a rank nor an energy", expected="16, or 0.99")
    return value


def read_prompts(file: Path) -> list[str]:
    """Return the non-empty lines of a text file. Raises InputError for a file that is no text or has no such line."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text", got=str(error)) from error
    if not lines:
        raise InputError(f"{file}: holds no prompts", expected="one prompt per line")
    return lines
