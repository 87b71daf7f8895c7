"""llama.cpp's LoRA adapters: NAME.lora_a (R, in) and NAME.lora_b (out, R) in one GGUF file.

W' = W0 + alpha / R lora_b lora_a, with alpha = adapter.lora.alpha, or a scale of 1 where that is 0 (get_scale in
llama.cpp's llama-adapter.h). Tensors have llama.cpp's names, and the rows of Llama's queries and keys are interleaved.
The base's config gives the architecture, which decides both.
"""

from __future__ import annotations

import math
from pathlib import Path

from adapter_merge.errors import AdapterError, InputError, Problem, UnsupportedError, raise_all
from adapter_merge.methods.adapter import Adapter, AdapterFormat
from adapter_merge.methods.lora import LoraModule, lora_scale
from adapter_merge.quantisation.gguf.blocks import gguf_tensor
from adapter_merge.quantisation.gguf.names import architecture_of, gguf_name, require_gguf, rotated_heads
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.gguf_header import GgufTensor, read_gguf_header

PARTS = (".lora_a", ".lora_b")


def holds_gguf_lora(names: tuple[str, ...]) -> bool:
    """Return True when the tensors' names are those of a llama.cpp LoRA."""
    return any(name.endswith(".weight.lora_a") for name in names)


def read_gguf_lora(file: Path, base: Checkpoint | None) -> Adapter:
    """Read the adapter in `file`. Raises InputError without a base, AdapterError with every problem of its tensors."""
    header = read_gguf_header(file)
    stated = {key: header.metadata.get(f"{key}.type") for key in ("general", "adapter")}
    if stated != {"general": "adapter", "adapter": "lora"}:
        raise UnsupportedError(
            f"{file}: not a LoRA", expected="general.type adapter, adapter.type lora", got=str(stated)
        )
    if base is None:
        raise InputError(
            f"{file}: the tensors of a llama.cpp adapter have llama.cpp's names",
            expected="BASE, whose config states the architecture",
        )
    require_gguf("reading a llama.cpp adapter")
    architecture = architecture_of(base.config, base.folder)
    alpha, layers = header.metadata.get("adapter.lora.alpha"), base.config.get("num_hidden_layers")
    problems = []
    if header.architecture != architecture.name:
        problems.append(
            Problem(
                f"{file}: the adapter belongs to another architecture than the base",
                architecture.name,
                header.architecture,
            )
        )
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        problems.append(Problem(f"{file}: adapter.lora.alpha is wrong", "a number", f"{alpha!r:.50}"))
    if not isinstance(layers, int):
        problems.append(Problem(f"{base.folder}: config.json does not state num_hidden_layers", got=f"{layers!r:.50}"))
    raise_all(problems, AdapterError)
    assert isinstance(alpha, float) and isinstance(layers, int)
    names = {gguf_name(architecture, layers, name): name for name in base.tensors}
    pairs: dict[str, dict[str, GgufTensor]] = {}
    for tensor in header.tensors:
        name, dot, part = tensor.name.rpartition(".lora_")
        if not dot or f".lora_{part}" not in PARTS or name not in names or not name.endswith(".weight"):
            problems.append(
                Problem(
                    f"{file}: unknown tensor {tensor.name!r:.200}",
                    "NAME.lora_a and NAME.lora_b for a weight NAME of the base",
                )
            )
            continue
        pairs.setdefault(name, {})[part] = tensor
    modules = []
    for name, parts in pairs.items():
        a, b = parts.get("a"), parts.get("b")
        shape = base.tensors[names[name]].shape
        fits = a is not None and b is not None and len(a.shape) == len(b.shape) == 2 and a.shape[0] > 0
        if not fits or (b.shape[0], a.shape[1]) != shape or b.shape[1] != a.shape[0]:  # type: ignore[union-attr]
            shapes = ", ".join(f"lora_{part} {tensor.shape}" for part, tensor in parts.items())
            problems.append(Problem(f"{file}: the factors of {name} do not fit", f"lora_b lora_a of {shape}", shapes))
            continue
        assert a is not None and b is not None
        heads = rotated_heads(architecture, name, base.config)
        scale = lora_scale(alpha, a.shape[0], rslora=False) if alpha else 1.0
        modules.append(
            LoraModule(names[name].removesuffix(".weight"), gguf_tensor(a, file), gguf_tensor(b, file, heads), scale)
        )
    if not modules and not problems:
        problems.append(Problem(f"{file}: holds no factors"))
    raise_all(problems[:20], AdapterError)
    return Adapter(
        folder=file.parent,
        format=AdapterFormat.GGUF,
        method="LoRA",
        modules=tuple(modules),
        replacements={},
        config={},
        files=(file,),
    )
