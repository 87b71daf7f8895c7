"""The configuration of a DCFT adapter in PEFT, written to adapter_config.json as adapter-merge reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from adapter_merge.errors import InputError
from adapter_merge.formats.native import FORMAT_VERSION

PEFT_TYPE = "DCFT"


@dataclass
class DCFTConfig(PeftConfig):  # type: ignore[misc, unused-ignore]
    """How DCFT (arXiv 2503.01419) adapts a model: y = x W0^T + x Delta lora_alpha / (r + 1e-5).

    Delta (in, out) is the transposed convolution of an image P = A^T B^T (in/k0, out/k1) of rank r with a kernel
    (k0, k1). An adapted weight has r (in/k0 + out/k1) + k0 k1 trained numbers, and Delta has the rank r min(k0, k1) at
    most. Raises InputError for a kernel or stride that is no whole number >= 1 or a pair of them.

    Example: `get_peft_model(model, DCFTConfig(kernel_size=8, target_modules="all-linear", task_type="CAUSAL_LM"))`
    """

    r: int = field(default=1, metadata={"help": "Rank of the image P; 1 in the paper."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Scale: Delta is multiplied by lora_alpha / r."})
    kernel_size: int | list[int] | None = field(
        default=8, metadata={"help": "Size of the kernel, k or [k0, k1], along (in, out)."}
    )
    stride: int | list[int] | None = field(
        default=None, metadata={"help": "Stride, s or [s0, s1]; without it the kernel's size, as in the paper."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input while it trains."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear', as in LoraConfig."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules that are not adapted."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained in whole."})
    init_weights: bool = field(
        default=True, metadata={"help": "True: B is 0 and training starts as the base; False: all factors are random."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the folder's format."})
    form: str | None = field(default=None, metadata={"help": "None: the transposed form, the only one trained here."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.kernel_size = _pair("kernel_size", self.kernel_size)
        self.stride = list(self.kernel_size) if self.stride is None else _pair("stride", self.stride)
        if self.r < 1:
            raise InputError("DCFT: r is not a rank", expected="a whole number >= 1", got=str(self.r))
        if self.format_version != FORMAT_VERSION or self.form is not None:
            raise InputError(
                "DCFT: this folder cannot be trained on in PEFT",
                expected=f"format_version {FORMAT_VERSION} and the transposed form",
                got=f"format_version {self.format_version}, form {self.form}",
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise InputError("DCFT: layers_to_transform has no effect on target_modules that is a regular expression")


def _pair(name: str, value: Any) -> list[int]:
    """Return [value, value] for a whole number, and a pair as it is."""
    pair = [value, value] if isinstance(value, int) and not isinstance(value, bool) else list(value or ())
    if len(pair) != 2 or not all(isinstance(part, int) and not isinstance(part, bool) and part >= 1 for part in pair):
        raise InputError(f"DCFT: {name} is wrong", expected="a whole number >= 1, or two", got=repr(value))
    return pair
