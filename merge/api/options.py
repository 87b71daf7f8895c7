"""What each job of the public interface is told: one frozen dataclass a job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapter_merge.errors import InputError
from adapter_merge.formats.read_options import ReadOptions


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What every job that writes a folder is told."""

    base_kind: str | None = None  # PiSSA, DuDe: "original" or "residual"; None decides by evidence
    reading: ReadOptions | None = None  # what the adapter's files do not say
    overwrite: bool = False  # replace a folder that adapter-merge wrote before
    dry_run: bool = False  # check everything, write nothing


@dataclass(frozen=True, kw_only=True)
class MergeOptions(WriteOptions):
    """How a merged model is made and written.

    Example:
        MergeOptions(dtype="bfloat16", keep_preimage=True)
    """

    dtype: str | None = None  # float32, float16 or bfloat16 for all float tensors; None keeps each tensor's own
    write_as: str | None = None  # quantised base: float32, float16 or bfloat16 for its packed weights, or "same"
    min_retention: float = 0.5  # write_as "same": the least share of the change that must be kept
    texts: Sequence[str] | None = None  # write_as "same": texts to measure the KL divergence to the live adapter on
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    workers: int | None = None  # threads of each device; None takes what has been measured to be fastest
    link: str = "auto"  # how shards that no adapter touches get into the output: auto, reflink, hardlink or copy
    hashes: bool = True  # sha256 of every file; without them there is no verify, restore or resume
    keep_preimage: bool = False  # keep what is overwritten, so that restore needs no base
    keep_partial: bool = False  # leave the finished shards when this run fails, for the next one to go on
    part: tuple[int, int] | None = None  # (i, n): make only the i-th of n shares of the shards
    finish: bool = False  # check that all parts are there and write the rest
    vram: int | None = None  # bytes of tensors on each CUDA device; None takes a quarter of what is free
    max_shard_bytes: int | None = None  # bytes of tensors in one file of the output; None keeps the base's files


@dataclass(frozen=True, kw_only=True)
class DeltaOptions(WriteOptions):
    """How dense deltas are made and written."""

    dtype: str = "float32"  # float32, float16 or bfloat16
    device: str = "auto"
    workers: int | None = None
    hashes: bool = True
    vram: int | None = None


@dataclass(frozen=True, kw_only=True)
class FactorOptions(WriteOptions):
    """Which factors are wanted, and how their error is measured.

    Example:
        FactorOptions(rank=16, end_to_end=True)
    """

    rank: int | float | None = None  # a rank, or an energy below 1 such as 0.99; None: exact
    budget: float | None = None  # MB (1e6 bytes) for all factors together
    keep_scale: bool = False  # keep DoRA's and DuDe's row scales exact and truncate the low-rank part alone
    calibrate: str | Path | None = None  # a text file: minimise the error at the layers' outputs on that text
    prompts: Sequence[str] | None = None  # texts for end_to_end; built-in ones when None
    end_to_end: bool = False  # compare the folder's logits with the adapter as trained
    max_error: float | None = None  # the largest relative error of a weight that passes
    format: str = "peft"  # what is written: a PEFT folder, or "gguf", a llama.cpp LoRA adapter
    hash_base: bool = True  # read and record the adapted weights of the base whole; False: their ends only
    frozen_positions: bool = False  # whoever reads the folder keeps DeBERTa's positional queries frozen (its manifest)

    @property
    def is_truncation(self) -> bool:
        """Whether a rank or a budget was stated."""
        return self.rank is not None or self.budget is not None

    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(WriteOptions):
    """How an adapter is rewritten as a safe folder."""

    base: str | Path | None = None  # for a DuDe folder of PEFT, and to tell a DCFT checkpoint's trained heads


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Which LoRA is taken out of two checkpoints."""

    rank: int | float = 16  # a rank, or an energy below 1 that each weight keeps
    row_scale: bool = False  # a DoRA instead of a LoRA
    device: str = "auto"
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """Where the base's bytes come from."""

    base: str | Path | None = None  # the original base; None takes the pre-image
    link: str = "auto"
    overwrite: bool = False
    dry_run: bool = False  # check everything, write nothing


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is compared, and what passes."""

    base_kind: str | None = None
    reading: ReadOptions | None = None  # what the adapter's files do not say
    prompts: Sequence[str] | None = None  # texts; built-in ones when None, random tokens without a tokenizer
    generated: int = 32  # greedy tokens per prompt
    tolerance: float | None = None  # for max |dlogit|; None: 1e-4, and one rounding for half precision
    weights_only: bool = False  # compare weights alone, run no model
    min_retention: float = 0.5  # of a model that was quantised again: the least share of the change that passes


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What is stated of an adapter that is looked at."""

    base_kind: str | None = None
    reading: ReadOptions | None = None  # what the adapter's files do not say


def parse_rank(text: str) -> int | float:
    """16 is a rank, 0.99 an energy. Raises InputError."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = math.nan
    if not (isinstance(value, int) and value >= 1) and not 0 < value < 1:
        raise InputError(f"--rank {text}: neither a rank nor an energy", expected="16, or 0.99")
    return value


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises InputError."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text", got=str(error)) from error
    if not lines:
        raise InputError(f"{file}: holds no prompts", expected="one prompt a line")
    return lines
