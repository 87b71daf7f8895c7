"""Activation statistics from text: the second moment of every adapted layer's input, with the adapter at work.

The error of a layer's output on those texts is E ||(dW - T) x||^2 = ||(dW - T) S||_F^2 with S S^T = E x x^T: directions
that the activations never take cost nothing there, and a rank is not spent on them. The moment is shrunk a little
towards the identity, since the texts are few and their directions are not all there will be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.errors import InputError
from adapter_merge.methods.lora import LoraModule
from adapter_merge.storage.hashing import file_sha256
from adapter_merge.storage.input_errors import reading
from adapter_merge.verification.live_adapter import quiet_libraries
from adapter_merge.verification.live_model import trained_model

from .end_to_end import submodule

WINDOW = 256  # tokens that run at once
LIMIT = 32_768  # tokens in all
LEAST = 64
SHRINKAGE = 0.01  # of the mean variance
MEMORY = 2 << 30  # bytes of moments gathered in one pass over the text


@dataclass
class Moments:
    """E x x^T (in, in), float32, per adapted module; modules that read the same tensor share one."""

    file: Path
    tokens: int
    sources: Mapping[str, str]  # module -> the module whose moment it shares
    moments: Mapping[str, Tensor]
    _roots: dict[str, Tensor] = field(default_factory=dict)

    def root(self, module: str) -> Tensor | None:
        """S (in, in) float32, lower triangular, S S^T the shrunk moment; None for an embedding, which has no input."""
        source = self.sources.get(module)
        if source is None:
            return None
        if source not in self._roots:
            self._roots[source] = square_root(self.moments[source])
        return self._roots[source]

    def as_json(self) -> dict[str, Any]:
        digest = file_sha256(self.file)
        return {"file": self.file.name, "sha256": digest, "tokens": self.tokens, "shrinkage": SHRINKAGE}


def square_root(moment: Tensor) -> Tensor:
    """The Cholesky factor (in, in) of moment + SHRINKAGE * its mean variance; float32."""
    wide = moment.to(torch.float64)
    mean = float(wide.diagonal().mean())
    wide.diagonal().add_(SHRINKAGE * (mean if mean > 0 else 1.0))
    factor: Tensor = torch.linalg.cholesky(wide)
    return factor.to(torch.float32)


def windows(folder: Path, file: Path) -> list[Tensor]:
    """Token ids (1, T <= WINDOW) of the text in `file`. Raises InputError for too little text, or no tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        raise InputError(f"{folder}: has no tokenizer", hint="--calibrate reads text with the base's tokenizer")
    import transformers

    try:
        with reading(file):
            text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file", expected="UTF-8") from error
    with quiet_libraries():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][:, :LIMIT]
    if ids.shape[1] < LEAST:
        raise InputError(
            f"{file}: too little text to calibrate on",
            expected=f"at least {LEAST} tokens; some thousand are better",
            got=str(ids.shape[1]),
        )
    return [ids[:, start : start + WINDOW] for start in range(0, ids.shape[1], WINDOW)]


@torch.no_grad()
def collect(bound: BoundAdapter, file: Path) -> Moments:
    """Run the text in `file` through the model as trained, in float32, and gather every adapted layer's moment."""
    batches = windows(bound.base.folder, file)
    model = trained_model(bound)
    names = [
        item.module.name
        for item in bound.modules
        if not (isinstance(item.module, LoraModule) and item.module.embedding)
    ]
    layers = {name: submodule(model, name) for name in names}
    sources, widths = _shared_inputs(model, layers, batches[0][:, :8])
    unseen = [name for name in names if name not in sources]
    if unseen:
        raise InputError(
            f"{len(unseen)} adapted modules did not run on {file.name}", got=", ".join(unseen[:5]), hint="other text"
        )
    moments: dict[str, Tensor] = {}
    for group in _groups(widths):
        moments |= _gather(model, {name: layers[name] for name in group}, widths, batches)
    return Moments(file, sum(batch.shape[1] for batch in batches), sources, moments)


def _shared_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor
) -> tuple[dict[str, str], dict[str, int]]:
    """module -> the first module that was called on the very same tensor, and the width of each such tensor."""
    sources: dict[str, str] = {}
    widths: dict[str, int] = {}
    seen: list[tuple[Tensor, str]] = []  # kept alive, so that no address is used twice

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for tensor, source in seen:
                if tensor is inputs[0]:
                    sources[name] = source
                    return
            seen.append((inputs[0], name))
            sources[name] = name
            widths[name] = int(inputs[0].shape[-1])

        return hook

    _run(model, {name: hook_of(name) for name in layers}, layers, [ids])
    return sources, widths


def _groups(widths: Mapping[str, int]) -> list[list[str]]:
    """Modules whose moments fit into MEMORY together."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, width in widths.items():
        size = 4 * width * width
        if groups[-1] and used + size > MEMORY:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _gather(
    model: nn.Module, layers: Mapping[str, nn.Module], widths: Mapping[str, int], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    sums = {name: torch.zeros(widths[name], widths[name]) for name in layers}
    counts = dict.fromkeys(layers, 0)

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].reshape(-1, widths[name]).float()
            sums[name].addmm_(rows.T, rows)
            counts[name] += rows.shape[0]

        return hook

    _run(model, {name: hook_of(name) for name in layers}, layers, batches)
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def _run(
    model: nn.Module, hooks: Mapping[str, Any], layers: Mapping[str, nn.Module], batches: Sequence[Tensor]
) -> None:
    handles = [layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        for ids in batches:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
