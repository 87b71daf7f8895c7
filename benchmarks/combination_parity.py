"""Errors of combinations against their definitions, as a table: python benchmarks/combination_parity.py

A pico Llama in float32 and bfloat16 with a LoRA, an rsLoRA, a DoRA and a DuDe. Per method: the largest relative error
of dW over all weights of the merged model and of `delta`, against each adapter's own effect as PEFT merges it in
float64, combined by the papers' definitions; of `factor` (exact for linear, else rank 16) as its certificate says.
Elements beside a threshold, which float32 may take or leave, are counted apart. bfloat16 merges are held to one
rounding: elements that are not the correct rounding. PEFT: what its add_weighted_adapter makes of a linear combination.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge"))

import combination_oracle as oracle  # type: ignore[import-not-found]
import pico_bases
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions
from adapter_merge.combine.delta_ops import Settings, key_of, random_keep
from adapter_merge.combine.recipe import IN_TURN, Ingredient, make_recipe

WEIGHTS: dict[str, float] = oracle.WEIGHTS
SETTINGS = {
    "linear": Settings("linear"),
    "magnitude-prune": Settings("magnitude-prune", 0.4),
    "breadcrumbs": Settings("breadcrumbs", 0.4, 0.05),
    "ties": Settings("ties", 0.4),
    "dare": Settings("dare", 0.4, seed=3),
    "dare-ties": Settings("dare-ties", 0.4, seed=3),
}
RANK = 16


def wanted(key: str, effects: dict[str, dict[str, Tensor]], settings: Settings) -> Tensor:
    """The combined delta of one weight, by definition. DARE's dropping uses this project's random numbers."""
    names = [name for name in WEIGHTS if key in effects[name]]
    parts, weights = [effects[name][key] for name in names], [WEIGHTS[name] for name in names]
    if settings.random:
        masks = [
            random_keep(key_of(settings.seed, name, key), settings.density, 0, part.numel(), part.device)
            for name, part in zip(names, parts, strict=True)
        ]
        parts = [p * mask.view_as(p) / settings.density for p, mask in zip(parts, masks, strict=True)]
        return oracle.elect(parts, weights) if settings.elects else oracle.expected("linear", parts, weights)
    found: Tensor = oracle.expected(settings.method, parts, weights, settings.density, settings.gamma)
    return found


def compared(got: Tensor, want: Tensor, limit: float) -> tuple[float, int]:
    """The relative error of `got` without the elements that fell on the other side of a threshold, and their number."""
    other = (got - want).abs() > limit
    kept = torch.where(other, want, got)
    return float((kept - want).norm() / want.norm()), int(other.sum())


def row(method: str, base: Path, folder: Path, place: Path, effects: dict[str, dict[str, Tensor]]) -> str:
    settings = SETTINGS[method]
    recipe = oracle.recipe({name: folder / name for name in WEIGHTS}, WEIGHTS, **vars(settings))
    merge(base, recipe, place / "merged")
    delta(base, recipe, place / "delta")
    content = factor(
        base, recipe, place / "factors", FactorOptions(rank=None if method == "linear" else RANK)
    ).as_json()
    before, after = (load_file(path / "model.safetensors") for path in (base, place / "merged"))
    deltas = load_file(place / "delta" / "delta.safetensors")
    limit = 0.0 if method in ("linear", "dare") else 1e-4
    errors: list[list[float]] = [[], []]
    beside = rounded = total = 0
    for key, found in deltas.items():
        want, weight = wanted(key, effects, settings), before[key].double()
        error, count = compared(found.double(), want, limit or float("inf"))
        beside += count
        errors[1].append(error)
        if after[key].dtype == torch.float32:
            errors[0].append(compared(after[key].double() - weight, want, limit or float("inf"))[0])
        else:
            rounded += int((after[key] != (weight + want).to(after[key].dtype)).sum())
            total += after[key].numel()
    merged = f"{max(errors[0]):.1e}" if errors[0] else f"{rounded} of {total} not the rounding"
    certificate = content["certificate"]
    kind = "exact" if method == "linear" else f"rank {RANK}"
    return (
        f"{method:<16} merge {merged:<26} delta {max(errors[1]):.1e}  beside a threshold {beside:>3}  "
        f"factor ({kind}) {certificate['max_relative_error']:.1e}"
    )


def peft_linear(base: Path, folder: Path, effects: dict[str, dict[str, Tensor]]) -> str:
    """The relative error of PEFT's own linear combination of the two plain adapters."""
    import peft

    chosen = {"lora": WEIGHTS["lora"], "rslora": WEIGHTS["rslora"]}
    before = pico_bases.load(base, torch.float64).state_dict()
    errors = []
    for names in (list(chosen), ["rslora"]):
        live: Any = peft.PeftModel.from_pretrained(pico_bases.load(base), folder / names[0], names[0])
        for name in names[1:]:
            live.load_adapter(folder / name, name)
        weights = [chosen[name] for name in names] if len(names) > 1 else [1.0]
        with contextlib.suppress(ValueError):  # different ranks: it has svd and cat for them
            live.add_weighted_adapter(names, weights, "both", combination_type="cat" if len(names) > 1 else "linear")
            live.set_adapter("both")
            after = live.merge_and_unload(adapter_names=["both"]).double().state_dict()
            for key in before:
                parts = [w * effects[n][key] for n, w in zip(names, weights, strict=True) if key in effects[n]]
                if parts:
                    want = torch.stack(parts).sum(0)
                    errors.append(float((after[key] - before[key] - want).norm() / want.norm()))
    return f"PEFT's add_weighted_adapter (cat of both plain ones, linear of the rsLoRA alone): worst {max(errors):.1e}"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
            root = Path(scratch)
            base = pico_bases.llama(root / "base", dtype=dtype)
            effects = oracle.effects(base, oracle.train_all(base, root / "adapters"))
            print(f"{str(dtype).removeprefix('torch.')}: largest relative error of dW")
            for method in SETTINGS:
                print("  " + row(method, base, root / "adapters", root / method, effects))
            turns = ["dude", "lora", "dora", "rslora"]
            paths = [root / "adapters" / name for name in turns]
            made = make_recipe([Ingredient(path.name, str(path)) for path in paths], Settings(IN_TURN))
            merge(base, made, root / "turns")
            after, want = load_file(root / "turns" / "model.safetensors"), oracle.one_after_the_other(base, paths)
            if dtype == torch.float32:
                worst = max(float((after[key].double() - want[key]).abs().max()) for key in after)
                print(f"  in-turn          merge, max |d| of a weight {worst:.1e}")
                print("  " + peft_linear(base, root / "adapters", effects))
            else:
                off = sum(int((after[key] != want[key].to(dtype)).sum()) for key in after)
                print(f"  in-turn          merge {off} of {sum(v.numel() for v in after.values())} not the rounding")


if __name__ == "__main__":
    main()
