"""Settings of an adapter that its files do not hold, so that the user states them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReadOptions:
    """Settings that the user states where an adapter's files do not hold them; None: as the files say.

    Example:
        >>> print(load_adapter("adapter", ReadOptions(format="peft")).method)
        LoRA
    """

    alpha: float | None = None  # lora_alpha, where no config holds it
    ranknum: float | None = None  # DCFT: ranknum, where loralib's lora_state_dict() dropped it
    format: str | None = None  # a name of detection.py: the format to read, instead of the detected one
    magnitudes: Path | None = None  # DoRA, DuDe: a file or PEFT folder with the magnitudes that PEFT dropped
    init_adapter: Path | None = None  # PiSSA and others: the PEFT folder saved before training
    residual_dtype: str | None = None  # PiSSA, DuDe: the dtype of the frozen residual, where not the base's
    prefix: str | None = None  # prefix of the adapter's module names in the base
    trained_on: str | None = None  # how the base was quantised at training: "nf4-double", ... (simulated_4bit.py)
    force: bool | None = None  # use the adapter where evidence contradicts the base or a statement about it
    magnitude_axis: str | None = None  # "out" or "in": the dimension of a magnitude of a square weight
