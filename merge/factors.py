"""LoRA-equivalent factors of any adapter, as a PEFT folder: the whole job behind `adapter-merge factor`.

Plain (LoRA, rsLoRA, PiSSA, DCFT)    a LoRA of the exact rank: use_dora false, init true, scale 1; PEFT, vLLM and others
                                     load it without us
Row-scaled (DoRA, DuDe)              a DoRA of rank <= 2r on the original base, loaded exactly by PEFT, plus
                                     row_scale.safetensors (m / rownorm), so that a server needs no base weights;
                                     use_dora stays true, so that no LoRA server takes it for a LoRA
--rank R | ENERGY                    a plain LoRA, truncated: its error stands per weight in the manifest
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import AdaptedModule, Adapter
from .binding import BoundAdapter, BoundModule, bind
from .cards import adapter_table, card
from .checkpoint import open_checkpoint
from .devices import choose_device
from .engine import Progress
from .errors import InputError, UnsupportedError
from .formats import ReadOptions, open_adapter
from .headers import TensorRef
from .lora import LoraModule
from .merging import adapter_sha256, describe_inputs
from .output import MANIFEST, check_output, manifest, sha256, staged, write_json, write_text
from .peft_format import PREFIX
from .tensors import read_tensor, write_safetensors
from .truncation import reduce_rank, truncate

ROW_SCALES = "row_scale.safetensors"
REPLACEMENTS = "replacements.safetensors"


@dataclass(frozen=True)
class Factored:
    """The factors of one weight and what they cost."""

    name: str  # module path
    up: Tensor  # (out, R)
    down: Tensor  # (R, in)
    magnitude: Tensor | None  # (out,)
    row_scale: Tensor | None  # (out,)
    relative_error: float | None  # ||dW - factors|| / ||dW||; None: exact by construction, and no base was read


def factor(
    base: str | Path | None,
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | float | None = None,
    device: str = "auto",
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the adapter's factors to `output` and return the manifest.

    base: needed for DoRA and DuDe (row norms), PiSSA without stored initial factors, and `rank`; its weights are read
    only then. rank: an int, or an energy below 1 such as 0.99, for a truncated plain LoRA.
    Raises AdapterMergeError; nothing is left behind then.
    """
    output = Path(output)
    checkpoint = open_checkpoint(base) if base is not None else None
    opened = open_adapter(adapter, options, checkpoint)
    bound = bind(opened, checkpoint, base_kind) if checkpoint is not None else None
    if bound is None and opened.own_base is not None:
        bound = bind(opened, opened.own_base, base_kind)
    if (
        rank is not None
        and not (isinstance(rank, int) and rank >= 1)
        and not (isinstance(rank, float) and 0 < rank < 1)
    ):
        raise InputError("--rank is wrong", expected="a rank >= 1, or an energy between 0 and 1", got=str(rank))
    if bound is None and (rank is not None or any(_needs_base(module) for module in opened.modules)):
        raise InputError(
            f"{adapter}: its factors cannot be found without the base",
            expected="BASE and ADAPTER",
            hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
        )
    inputs = (opened.folder,) if bound is None else (opened.folder, bound.base.folder)
    check_output(output, overwrite, inputs)
    opened.check_values()
    content = manifest(
        "factors",
        describe_inputs((bound,)) if bound is not None else adapter_only(opened),
        {"rank": rank, "device": device},
    )
    if dry_run:
        return content | {"dry_run": True}

    chosen = choose_device(device)
    factored = []
    for module, weight in _pairs(opened, bound):
        one = _truncated(weight, rank, chosen) if rank is not None and weight else _exact(module, weight, chosen)
        factored.append(one)
        if progress is not None:
            progress(sum(ref.nbytes for ref in module.refs))
    scaled = any(one.magnitude is not None for one in factored)
    replacements = dict(bound.replacements if bound is not None else opened.replacements)
    content["form"] = "lora+row_scale" if scaled else "lora"
    content["exact"] = rank is None
    content["layers"] = {
        one.name: {"rank": one.down.shape[0], "relative_error": one.relative_error} for one in factored
    }
    with staged(output, overwrite) as folder:
        conv1d = opened.fan_in_fan_out or (bound is not None and any(item.transposed for item in bound.modules))
        _write(folder, opened, factored, replacements, conv1d)
        write_text(folder / "README.md", _card(content, opened, scaled, output.name))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        content["files"] = {path.name: sha256(path) for path in files}
        write_json(folder / MANIFEST, content)
    return content


def _needs_base(module: AdaptedModule) -> bool:
    return module.needs_base or (isinstance(module, LoraModule) and module.magnitude is not None)


def _pairs(opened: Adapter, bound: BoundAdapter | None) -> Iterator[tuple[AdaptedModule, BoundModule | None]]:
    if bound is None:
        yield from ((module, None) for module in opened.modules)
    else:
        yield from ((item.module, item) for item in bound.modules)


def adapter_only(opened: Adapter) -> dict[str, Any]:
    """The manifest's account of an adapter that no base was given for."""
    entry = {
        "name": opened.folder.resolve().name,
        "path": str(opened.folder),
        "format": opened.format,
        "method": opened.method,
        "modules": len(opened.modules),
        "replacements": sorted(opened.replacements),
        "sha256": adapter_sha256(opened),
    }
    return {"base": {"name": opened.base_name, "fingerprint": None}, "adapters": [entry]}


def _exact(module: AdaptedModule, weight: BoundModule | None, device: torch.device) -> Factored:
    """The exact factors in float32, of the smallest rank; with magnitudes their row scale as well."""

    def no_base() -> Tensor:
        raise AssertionError("a module that needs its base has one")

    wide = torch.float64
    form = module.form(read_tensor, weight.oriented_weight if weight else no_base, wide)
    if form.col_scale is not None or form.needs_columns:
        raise UnsupportedError(
            f"{module.name}: a scale of the input columns has no LoRA form", hint="merge this adapter instead"
        )
    folded = form.folded()
    up, down = reduce_rank(folded.up, folded.down)
    plain = replace(folded, up=up.to(torch.float32), down=down.to(torch.float32), magnitude=None, row_scale=None)
    magnitude, row_scale, error = form.magnitude, form.row_scale, None
    if weight is not None and (magnitude is not None or form.residual is not None):
        base = weight.oriented_weight().to(device=device, dtype=wide)
        if magnitude is not None:
            norm = torch.linalg.vector_norm(torch.addmm(base, plain.up.to(base), plain.down.to(base)), dim=1)
            row_scale = torch.where(norm == 0, torch.ones_like(norm), magnitude.to(base) / norm)
        mine = replace(
            plain.to(device, wide), row_scale=None if row_scale is None else row_scale.to(torch.float32).to(base)
        )
        exact = form.to(device).delta(base)
        error = float(torch.linalg.vector_norm(mine.delta(base) - exact) / torch.linalg.vector_norm(exact))
    return Factored(
        module.name,
        plain.up,
        plain.down,
        None if magnitude is None else magnitude.to(torch.float32),
        None if row_scale is None else row_scale.to("cpu", torch.float32),
        error,
    )


def _truncated(weight: BoundModule, rank: int | float, device: torch.device) -> Factored:
    """The best plain LoRA of that rank, with its measured error."""
    base = weight.oriented_weight().to(device=device, dtype=torch.float32)
    delta = weight.form().to(device).delta(base)
    up, down = truncate(delta, rank)
    error = float(torch.linalg.vector_norm(delta - up @ down) / torch.linalg.vector_norm(delta))
    return Factored(weight.module.name, up.cpu(), down.cpu(), None, None, error)


def _write(
    folder: Path,
    opened: Adapter,
    factored: list[Factored],
    replacements: Mapping[str, TensorRef],
    conv1d: bool,
) -> None:
    scaled = any(one.magnitude is not None for one in factored)
    embeddings = {module.name for module in opened.modules if isinstance(module, LoraModule) and module.embedding}
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for one in factored:
        if one.name in embeddings:  # PEFT keeps an embedding's factors the other way round
            tensors[f"{PREFIX}{one.name}.lora_embedding_A"] = one.up.T.contiguous()
            tensors[f"{PREFIX}{one.name}.lora_embedding_B"] = one.down.T.contiguous()
            continue
        tensors[f"{PREFIX}{one.name}.lora_A.weight"] = one.down
        tensors[f"{PREFIX}{one.name}.lora_B.weight"] = one.up.contiguous()
        if one.magnitude is not None:
            assert one.row_scale is not None
            tensors[f"{PREFIX}{one.name}.lora_magnitude_vector"] = one.magnitude
            scales[f"{PREFIX}{one.name}.row_scale"] = one.row_scale
    adapted = {one.name for one in factored}
    heads = {name: read_tensor(ref) for name, ref in replacements.items()}
    saved, bias = set(), "none"
    for name, tensor in heads.items():
        module, _, kind = name.rpartition(".")
        if module in adapted:
            bias = "lora_only"
            tensors[f"{PREFIX}{module}.base_layer.{kind}"] = tensor
        else:
            saved.add(module)
            tensors[f"{PREFIX}{name}"] = tensor
    config = peft_config(opened, factored, scaled, sorted(saved) or None, bias, conv1d)
    write_json(folder / "adapter_config.json", config)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    if scales:
        write_safetensors(folder / ROW_SCALES, scales, {"format": "pt"})
    if heads:
        write_safetensors(folder / REPLACEMENTS, heads, {"format": "pt"})


def peft_config(
    opened: Adapter,
    factored: list[Factored],
    scaled: bool,
    modules_to_save: list[str] | None,
    bias: str,
    conv1d: bool,
) -> dict[str, Any]:
    """adapter_config.json of the factors: alpha == rank everywhere, so that the scale is 1."""
    ranks = {one.name: one.down.shape[0] for one in factored}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    targets = opened.config.get("target_modules")
    if not isinstance(targets, list | str) or targets == "all-linear":
        targets = sorted(ranks)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": opened.base_name,
        "task_type": opened.config.get("task_type"),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": bias,
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "use_dora": scaled,
        "init_lora_weights": True,
        "modules_to_save": modules_to_save,
    }


def parse_rank(text: str) -> int | float:
    """16 is a rank, 0.99 an energy. Raises InputError."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = math.nan
    if not (isinstance(value, int) and value >= 1) and not 0 < value < 1:
        raise InputError(f"--rank {text}: neither a rank nor an energy", expected="16, or 0.99")
    return value


def _card(content: Mapping[str, Any], opened: Adapter, scaled: bool, title: str) -> str:
    if scaled:
        use = (
            "Low-rank factors and one magnitude per output row (DoRA form). `peft.PeftModel.from_pretrained` loads "
            "them exactly; `row_scale.safetensors` holds magnitude / row norm for servers that keep no base weights in "
            "reach. Not a plain LoRA: `use_dora` stays true."
        )
    else:
        use = "A plain LoRA: `peft.PeftModel.from_pretrained`, vLLM and every LoRA server load it as it is."
    body = f"""{use}

Made by adapter-merge {content["versions"]["adapter-merge"]} from:

{adapter_table(content["adapters"])}

`{MANIFEST}` holds rank and error of every weight.
"""
    return card(title, opened.base_name, "adapter", "peft", ["adapter-merge", "lora"], body)
