"""Proof that an artefact computes what was trained: weights one by one, then logits and greedy tokens in float32.

weights   every adapted weight against the canonical form in float64; everything else byte for byte the base's
logits    the artefact against the live, unmerged adapter (reference.py) on prompts and on the tokens it generates
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .binding import BoundAdapter, BoundModule
from .checkpoint import CANDIDATES, Checkpoint, open_checkpoint, read_json, read_weights, resolve
from .dcft_checkpoint import OUTPUT_HEADS, same_bytes
from .edits import applied
from .errors import InputError, ParityError
from .formats import ReadOptions
from .headers import TensorRef
from .merging import open_pair
from .output import read_manifest
from .reference import (
    is_embedding,
    live_layer,
    load_model,
    quiet_libraries,
    replace_tensors,
    require,
    trained_model,
)
from .tensors import TORCH_DTYPES, read_tensor

LOGIT_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-5  # relative error of dW, float32
FLOAT32_ERROR = 8 * 2**-24  # a few roundings of a float32 sum, relative to its terms
GENERATED = 32
PROBES = 8
PROMPTS = (
    "What is the capital of France?",
    "How do I make a good cup of tea?",
    "Tell me about the sea.",
    "Write one sentence about a small dog.",
)


@dataclass(frozen=True)
class WeightFigures:
    """One adapted weight of the artefact against the exact one."""

    relative_error: float  # ||W' - exact|| / ||dW||
    excess_ulp: float  # worst element beyond float32 arithmetic and one correct rounding, in ulp of the dtype


@dataclass(frozen=True)
class LogitFigures:
    """The artefact's logits against the live adapter's."""

    max_difference: float
    mean_difference: float
    greedy_equal: int  # positions where both would choose the same token
    greedy_total: int
    effect: float  # max |dlogit| of the adapter itself: what would be lost without it


def verify(
    base: str | Path | None,
    adapter: str | Path,
    artefact: str | Path,
    *,
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    prompts: Sequence[str] | None = None,
    generated: int = GENERATED,
    tolerance: float | None = None,
    weights_only: bool = False,
    onnx: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Compare `artefact` (merged model, factors, deltas, converted adapter) with `adapter` on `base`.

    prompts: texts; built-in ones when None, random tokens where the base has no tokenizer. tolerance: for max
    |dlogit|; 1e-4 when None, and for a half-precision artefact none, since its weights are held to one rounding.
    onnx: what verifies an ONNX folder (the command line passes the export package's function).
    Returns the report; "passed" says whether all of it holds. Raises InputError for what is no artefact.
    """
    bound = open_pair(base, adapter, base_kind, options)
    folder = resolve(artefact)
    kind = artefact_kind(folder)
    if kind == "onnx":
        if onnx is None:
            raise InputError(f"{folder}: an ONNX folder", hint="pip install 'adapter-merge[onnx]'")
        return onnx(bound.base.folder, bound.adapter.folder, folder, prompts=prompts, bar=tolerance)
    report: dict[str, Any] = {
        "artefact": kind,
        "path": str(folder),
        "adapter": {"path": str(bound.adapter.folder), "method": bound.adapter.method},
        "base": {"path": str(bound.base.folder), "kind": bound.base_kind, "evidence": bound.evidence},
    }
    problems: list[str] = []
    report["notes"] = _other_base(folder, bound)
    half = None
    if kind == "merged model":
        merged = open_checkpoint(folder)
        layers, half = _merged_weights(bound, merged), _half_dtype(bound, merged)
        problems += _carried_over(bound, merged)
    elif kind == "deltas":
        layers = _delta_weights(bound, folder)
    elif kind == "factors":
        layers = _factor_weights(bound, folder)
    else:
        layers = {}
    report["layers"] = {name: asdict(figures) for name, figures in layers.items()}
    report["half_precision"] = half
    exact = _is_exact(folder)
    problems += _weight_problems(layers, half) if exact else []
    if not weights_only:
        limit = tolerance if tolerance is not None else (math.inf if half else LOGIT_TOLERANCE)
        report["tolerance"] = None if math.isinf(limit) else limit
        wrong = _independent(bound, trained_model(bound, torch.float64))
        if wrong:
            problems.append(f"the live adapter computes other weights in {len(wrong)} modules, first {wrong[0]}")
        paths = _paths(bound, prompts, generated)
        figures = _compare_logits(bound, folder, kind, paths, torch.float32)
        report["logits"] = asdict(figures)
        if not figures.max_difference <= limit:  # the weights, or float32 arithmetic? float64 tells
            figures = _compare_logits(bound, folder, kind, paths, torch.float64)
            report["logits_float64"] = asdict(figures)
        if not figures.max_difference <= limit:
            problems.append(f"max |dlogit| {figures.max_difference:.3g} is above {limit:.3g}")
        if figures.greedy_equal != figures.greedy_total and not half:
            problems.append(f"{figures.greedy_total - figures.greedy_equal} greedy tokens differ")
    report["problems"] = problems
    report["passed"] = not problems
    return report


def check(report: Mapping[str, Any]) -> None:
    """Raise ParityError when the report did not pass."""
    if not report["passed"]:
        raise ParityError(
            f"{report.get('path')}: does not compute what was trained",
            got="; ".join(report["problems"][:5]),
            hint="was it made from this base and this adapter?",
        )


def artefact_kind(folder: Path) -> str:
    """merged model, factors, deltas, adapter or onnx, by content. Raises InputError."""
    if any(folder.glob("*.onnx")):
        return "onnx"
    if (folder / "delta.safetensors").is_file():
        return "deltas"
    if (folder / "adapter_config.json").is_file():
        manifest = read_manifest(folder)
        converted = manifest is not None and manifest.get("artefact") == "adapter"
        native = read_json(folder / "adapter_config.json").get("peft_type") != "LORA"
        return "adapter" if converted or native else "factors"
    if any((folder / name).is_file() for name in CANDIDATES):
        return "merged model"
    raise InputError(f"{folder}: nothing to verify", expected="a merged model, factors, deltas or an ONNX export")


def _other_base(folder: Path, bound: BoundAdapter) -> list[str]:
    """A hint, not a verdict: the weights are compared one by one whatever the fingerprints say."""
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    stated = manifest.get("base", {}).get("fingerprint")
    if stated and stated != bound.base.fingerprint:
        return ["its manifest names a base of another fingerprint than this one"]
    return []


def _is_exact(folder: Path) -> bool:
    """False for truncated factors, whose weight errors are figures, not faults."""
    manifest = read_manifest(folder)
    return manifest is None or manifest.get("exact", True) is not False


def _half_dtype(bound: BoundAdapter, merged: Checkpoint) -> str | None:
    dtypes = {merged.tensors[item.name].dtype for item in bound.modules if item.name in merged.tensors}
    halves = sorted(dtypes & {"BF16", "F16"})
    return halves[0] if halves else None


def _exact_weight(item: BoundModule) -> tuple[Tensor, Tensor]:
    """W0 and W' as stored, float64."""
    base = read_tensor(item.weight).to(torch.float64)
    return base, applied(item.stored_edit(torch.float64), base)


def _figures(base: Tensor, exact: Tensor, got: Tensor, dtype: torch.dtype) -> WeightFigures:
    size = float(torch.linalg.vector_norm(exact - base))
    error = float(torch.linalg.vector_norm(got - exact))
    _, exponent = torch.frexp(exact.abs().clamp_min(torch.finfo(dtype).tiny))
    ulp = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 1)
    # Where W0 and dW cancel, float32 arithmetic is off by parts of their size, not of the small result's.
    typical = torch.linalg.vector_norm(base) / math.sqrt(base.numel())
    arithmetic = FLOAT32_ERROR * (base.abs() + (exact - base).abs() + typical)
    excess = float((((got - exact).abs() - arithmetic) / ulp - 0.5).max())
    if math.isnan(error) or math.isnan(excess):
        return WeightFigures(math.inf, math.inf)
    return WeightFigures(error / size if size else error, max(0.0, excess))


def _merged_weights(bound: BoundAdapter, merged: Checkpoint) -> dict[str, WeightFigures]:
    layers = {}
    for item in bound.modules:
        ref = merged.tensors.get(item.name)
        if ref is None:
            raise InputError(f"{merged.folder}: has no tensor {item.name}")
        base, exact = _exact_weight(item)
        dtype = TORCH_DTYPES[ref.dtype]
        layers[item.name] = _figures(base, exact, read_tensor(ref).to(torch.float64), dtype)
    return layers


def _delta_weights(bound: BoundAdapter, folder: Path) -> dict[str, WeightFigures]:
    refs = {ref.name: ref for ref in read_weights(folder / "delta.safetensors").tensors}
    extra = sorted(set(refs) - {item.name for item in bound.modules})
    if extra:
        raise ParityError(f"{folder}: has deltas of weights that the adapter does not change", got=", ".join(extra[:5]))
    layers = {}
    for item in bound.modules:
        if item.name not in refs:
            raise InputError(f"{folder}: has no delta of {item.name}")
        base, exact = _exact_weight(item)
        got = read_tensor(refs[item.name]).to(torch.float64)
        layers[item.name] = _figures(torch.zeros_like(base), exact - base, got, torch.float32)
    return layers


def _factor_weights(bound: BoundAdapter, folder: Path) -> dict[str, WeightFigures]:
    factors = open_pair(bound.base.folder, folder, "original")
    by_name = {item.name: item for item in factors.modules}
    extra = sorted(set(by_name) - {item.name for item in bound.modules})
    heads = [
        name
        for name in sorted(bound.replacements.keys() | factors.replacements.keys())
        if name not in bound.replacements
        or name not in factors.replacements
        or not _same(bound.replacements[name], factors.replacements[name])
    ]
    if extra or heads:
        raise ParityError(
            f"{folder}: holds other tensors than the adapter",
            expected="the adapter's weights, heads and biases",
            got=f"different or missing: {', '.join([*extra, *heads][:5])}",
        )
    layers = {}
    for item in bound.modules:
        if item.name not in by_name:
            raise InputError(f"{folder}: has no factors of {item.name}")
        base, exact = _exact_weight(item)
        got = by_name[item.name].stored_form(torch.float64).merged(base)
        layers[item.name] = _figures(base, exact, got, torch.float32)
    return layers


def _weight_problems(layers: Mapping[str, WeightFigures], half: str | None) -> list[str]:
    """What is wrong with the weights: more than float32 arithmetic and one rounding explain."""
    if half:
        bad = [name for name, figures in layers.items() if not figures.excess_ulp <= 0.01]
        text = f"weights beyond one rounding to {half}"
    else:
        bad = [name for name, figures in layers.items() if not figures.relative_error <= WEIGHT_TOLERANCE]
        text = f"weights with a relative error of dW above {WEIGHT_TOLERANCE:g}"
    return [f"{len(bad)} {text}, first {bad[0]}"] if bad else []


def _carried_over(bound: BoundAdapter, merged: Checkpoint) -> list[str]:
    """Tensors of the base that the merged model lacks or changed without being told to."""
    edited = {item.name for item in bound.modules}
    problems = []
    for name, ref in {**bound.base.tensors, **bound.replacements}.items():
        found = merged.tensors.get(name)
        if found is None:
            if not (name.endswith(OUTPUT_HEADS) and merged.config.get("tie_word_embeddings")):
                problems.append(f"{name} is missing")
        elif name not in edited and not _same(ref, found):
            problems.append(f"{name} was changed")
    return problems


def _same(ref: TensorRef, found: TensorRef) -> bool:
    if ref.dtype == found.dtype:
        return same_bytes(ref, found)
    return ref.shape == found.shape and torch.equal(read_tensor(ref).to(TORCH_DTYPES[found.dtype]), read_tensor(found))


# -- running the models --------------------------------------------------------------------------------


def _independent(bound: BoundAdapter, live: nn.Module) -> list[str]:
    """Modules whose live forward is not the W' that the weights were compared with.

    `live` is the adapter as trained, in float64. Each module gets random inputs X (PROBES, in); its answer without
    the bias must be X W'^T. The weight figures rest on the project's own algebra; this holds that algebra against code
    that does not share it, and a shared mistake cannot pass.
    """
    source = torch.Generator().manual_seed(0)
    wrong = []
    for item in bound.modules:
        layer = live_layer(live, item.module.name)
        base, exact = _exact_weight(item)
        if base.dim() != 2 or not hasattr(layer, "forward"):
            continue
        turned = exact.T if item.transposed else exact
        base = base.T if item.transposed else base
        if is_embedding(layer):
            ids = torch.randint(turned.shape[0], (PROBES,), generator=source)
            got, want, plain = layer(ids), turned[ids], base[ids]
        else:
            x = torch.randn(PROBES, turned.shape[1], generator=source, dtype=torch.float64)
            with torch.no_grad():
                got = layer(x) - layer(torch.zeros_like(x))
            want, plain = x @ turned.T, x @ base.T
        error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want - plain).clamp_min(1e-300)
        if not float(error) <= WEIGHT_TOLERANCE:
            wrong.append(item.name)
    return wrong


@dataclass(frozen=True)
class _Path:
    """Tokens to compare on: a prompt and what the live adapter says to it."""

    ids: Tensor  # (B, T)
    start: int  # the first position whose choice of a token is compared


def _paths(bound: BoundAdapter, prompts: Sequence[str] | None, generated: int) -> list[_Path]:
    live = trained_model(bound)
    found = []
    for ids in _token_batches(bound, prompts, live):
        if _generates(live):
            found.append(_Path(_greedy(live, ids, generated), ids.shape[1] - 1))
        else:
            found.append(_Path(ids, 0))
    return found


def _compare_logits(
    bound: BoundAdapter, folder: Path, kind: str, paths: Sequence[_Path], dtype: torch.dtype
) -> LogitFigures:
    """Base, live adapter and artefact on the same tokens, all computing in `dtype`; one model in memory at a time."""
    before = _all_logits(load_model(bound.base.folder).to(dtype), paths)
    expected = _all_logits(trained_model(bound, dtype), paths)
    found = _all_logits(_artefact_model(bound, folder, kind, dtype), paths)
    worst, mean, effect, equal, total = 0.0, 0.0, math.nan, 0, 0
    for path, base, want, got in zip(paths, before, expected, found, strict=True):
        difference = (got - want).abs()
        worst = max(worst, float(difference.max())) if not bool(difference.isnan().any()) else math.nan
        mean += float(difference.mean()) / len(paths)
        same = got.argmax(-1) == want.argmax(-1)
        same = same[:, path.start :] if same.dim() == 2 else same
        equal += int(same.sum())
        total += same.numel()
        if base.shape == want.shape:
            own = float((base - want).abs().max())
            effect = own if math.isnan(effect) else max(effect, own)
    return LogitFigures(worst, mean, equal, total, effect)


def _artefact_model(bound: BoundAdapter, folder: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    if kind == "merged model":
        return load_model(folder).to(dtype)
    if kind == "factors":
        require("peft")
        import peft

        model = load_model(bound.base.folder)
        with quiet_libraries():
            loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
        return loaded.to(dtype).eval()
    if kind == "adapter":
        return trained_model(open_pair(bound.base.folder, folder, bound.base_kind), dtype)
    model = load_model(bound.base.folder).to(dtype)
    state = model.state_dict()
    deltas = {ref.name: ref for ref in read_weights(folder / "delta.safetensors").tensors}
    names = _state_names(state, deltas)
    for name, ref in deltas.items():
        state[names[name]].add_(read_tensor(ref).to(dtype))
    replace_tensors(model, bound.replacements)
    return model


def _state_names(state: Mapping[str, Tensor], wanted: Mapping[str, TensorRef]) -> dict[str, str]:
    """The model's name of each tensor: as it is, or with a leading component more or less."""
    names = {}
    for name in wanted:
        short = name.partition(".")[2]
        longer = [key for key in state if key.partition(".")[2] == name]
        names[name] = name if name in state else short if short in state else longer[0] if longer else name
    return names


def _token_batches(bound: BoundAdapter, prompts: Sequence[str] | None, model: nn.Module) -> list[Tensor]:
    """Token ids (1, T) per prompt; two seeded random batches (2, 16) where the base has no tokenizer."""
    folder = bound.base.folder
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        import transformers

        with quiet_libraries():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            batches = []
            for prompt in prompts or PROMPTS:
                if getattr(tokenizer, "chat_template", None):
                    turn = [{"role": "user", "content": prompt}]
                    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
                    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
                else:
                    encoded = tokenizer(prompt, return_tensors="pt")
                batches.append(encoded["input_ids"])
        return batches
    if prompts:
        raise InputError(f"{folder}: has no tokenizer", hint="leave --prompt out: random tokens are used")
    size = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    source = torch.Generator().manual_seed(0)
    return [torch.randint(5, size, (2, 16), generator=source) for _ in range(2)]


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


@torch.no_grad()
def _greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """ids (B, T) followed by the model's own greedy tokens (B, T + count)."""
    with quiet_libraries():
        made: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
    return made


@torch.no_grad()
def _all_logits(model: nn.Module, paths: Sequence[_Path]) -> list[Tensor]:
    """Per path the logits (B, T, vocabulary), or (B, labels) for a classifier."""
    return [model(input_ids=path.ids, attention_mask=torch.ones_like(path.ids)).logits for path in paths]
