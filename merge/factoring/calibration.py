"""Activation statistics from text: the second moment of the input of every adapted layer, with the adapter active.

The error of a layer's output on those texts is E ||(dW - T) x||^2 = ||(dW - T) S||_F^2 with S S^T = E x x^T. Directions
that do not occur in the activations add no error, so they take no rank. The moment is shrunk slightly towards the
identity, because later inputs have directions that a short text does not have.
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
from adapter_merge.files.hashing import file_sha256
from adapter_merge.files.input_errors import reading
from adapter_merge.methods.lora import LoraModule
from adapter_merge.verification.live_adapter import quiet_libraries
from adapter_merge.verification.live_model import trained_model

from .end_to_end import find_submodule

WINDOW = 256  # tokens per forward pass
LIMIT = 32_768  # tokens in total, at most
LEAST = 64  # tokens in total, at least
SHRINKAGE = 0.01  # share of the mean variance that is added to every variance
MEMORY = 2 << 30  # bytes of moments gathered in one pass over the text


@dataclass
class Moments:
    """Second moments E x x^T (in, in), float32, of the adapted modules' inputs; equal inputs share one moment."""

    file: Path
    tokens: int
    sources: Mapping[str, str]  # module -> the module whose moment it shares
    moments: Mapping[str, Tensor]
    _roots: dict[str, Tensor] = field(default_factory=dict)

    def root(self, module: str) -> Tensor | None:
        """Return S (in, in), float32, lower triangular, with S S^T the shrunk moment; None for an embedding."""
        source = self.sources.get(module)
        if source is None:
            return None
        if source not in self._roots:
            self._roots[source] = square_root(self.moments[source])
        return self._roots[source]

    def as_json(self) -> dict[str, Any]:
        """Return the manifest's entry on the calibration text."""
        digest = file_sha256(self.file)
        return {"file": self.file.name, "sha256": digest, "tokens": self.tokens, "shrinkage": SHRINKAGE}


def square_root(moment: Tensor) -> Tensor:
    """Return the lower Cholesky factor (in, in), float32, of moment + SHRINKAGE * mean variance * identity."""
    wide = moment.to(torch.float64)
    mean = float(wide.diagonal().mean())
    wide.diagonal().add_(SHRINKAGE * (mean if mean > 0 else 1.0))
    factor: Tensor = torch.linalg.cholesky(wide)
    return factor.to(torch.float32)


def read_windows(folder: Path, file: Path) -> list[Tensor]:
    """Return the token ids of the text in `file`, (1, T) int64 each with T <= WINDOW.

    Raises InputError for a file that is not UTF-8, fewer than LEAST tokens, or a base folder without tokenizer.
    """
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
    """Run the text in `file` through the model as trained, in float32, and collect every adapted layer's moment.

    Raises InputError as `read_windows` does, and for adapted modules that the text does not reach.
    """
    batches = read_windows(bound.base.folder, file)
    model = trained_model(bound)
    names = [
        item.module.name
        for item in bound.modules
        if not (isinstance(item.module, LoraModule) and item.module.embedding)
    ]
    layers = {name: find_submodule(model, name) for name in names}
    sources, widths = _find_shared_inputs(model, layers, batches[0][:, :8])
    not_run = [name for name in names if name not in sources]
    if not_run:
        raise InputError(
            f"{len(not_run)} adapted modules did not run on {file.name}",
            got=", ".join(not_run[:5]),
            hint="calibrate on another text",
        )
    moments: dict[str, Tensor] = {}
    for group in _group_by_memory(widths):
        moments |= _compute_moments(model, {name: layers[name] for name in group}, widths, batches)
    return Moments(file, sum(batch.shape[1] for batch in batches), sources, moments)


def _find_shared_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor
) -> tuple[dict[str, str], dict[str, int]]:
    """Return, per module, the first module that was called with the same tensor; and the width of each such tensor."""
    sources: dict[str, str] = {}
    widths: dict[str, int] = {}
    seen: list[tuple[Tensor, str]] = []  # holds the tensors, so that none is freed and its memory used again

    def make_hook(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for tensor, source in seen:
                if tensor is inputs[0]:
                    sources[name] = source
                    return
            seen.append((inputs[0], name))
            sources[name] = name
            widths[name] = int(inputs[0].shape[-1])

        return hook

    _run_with_hooks(model, {name: make_hook(name) for name in layers}, layers, [ids])
    return sources, widths


def _group_by_memory(widths: Mapping[str, int]) -> list[list[str]]:
    """Split the modules into groups whose moments fit into MEMORY together."""
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


def _compute_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], widths: Mapping[str, int], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Run all batches and return the mean of x x^T (in, in), float32, per layer."""
    sums = {name: torch.zeros(widths[name], widths[name]) for name in layers}
    counts = dict.fromkeys(layers, 0)

    def make_hook(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].reshape(-1, widths[name]).float()
            sums[name].addmm_(rows.T, rows)
            counts[name] += rows.shape[0]

        return hook

    _run_with_hooks(model, {name: make_hook(name) for name in layers}, layers, batches)
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def _run_with_hooks(
    model: nn.Module, hooks: Mapping[str, Any], layers: Mapping[str, nn.Module], batches: Sequence[Tensor]
) -> None:
    """Run the model on every batch with these forward pre-hooks, and remove them afterwards."""
    handles = [layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        for ids in batches:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
