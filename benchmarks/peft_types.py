"""Every type of the installed PEFT and what is made of it: python benchmarks/peft_types.py > docs/peft_types.md

Of each type that PEFT's own layer merges, a pico adapter with random values is trained on a pico Llama. Its edit of
every weight and bias in float64 is compared with PEFT's live, unmerged model in float64: the layer's answers to unit
vectors. Norms that replace the base's are compared by their answers to random inputs.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "merge"))

from peft_cases import BASES  # type: ignore[import-not-found]
from peft_layer_cases import LAYER_CASES, SCALES  # type: ignore[import-not-found]
from pico_bases import quiet, train  # type: ignore[import-not-found]

from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.formats.peft.folder import METHODS
from adapter_merge.formats.peft.layer_types import LAYER_TYPES, REFUSED_TYPES, REPLACED_TYPES
from adapter_merge.methods.block_edits import WholeReplaced
from adapter_merge.storage.tensor_io import read_tensor

OWN = "exact, by a formula of its own; parity in README.md"
HEAD = """# Every type of PEFT {version}

Written by `python benchmarks/peft_types.py`. merge: what `adapter-merge merge` does with a folder of the type. worst
error: of W' in float64 against PEFT's live, unmerged model in float64, the largest ||W' - live|| / ||live - W0|| over
all adapted weights and biases of a pico Llama. 0 is measured: a layer whose forward applies W' itself gives W' back for
unit vectors without a rounding. LoRA factors: what `factor` does; where they are exact, the largest
||B A - dW|| / ||dW|| in float64. These types change a weight by a matrix of low rank (which does not depend on the
base's weights in DELORA, GRALORA, MISS, PVERA and VBLORA). MISS with init_weights "bat" is truncated with --rank.
Layers are nn.Linear.

| peft_type | merge | LoRA factors | worst error |
|---|---|---|---|"""


@torch.no_grad()
def worst_error(base: Path, folder: Path, live: Any) -> float:
    """Return the largest relative error of the changed weights and biases."""
    worst = 0.0
    bound = open_pair(base, folder)
    for name, ref in bound.replacements.items():
        layer = live.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        x = torch.randn(8, ref.shape[0], dtype=torch.float64)
        replaced = copy.deepcopy(layer.get_base_layer())
        replaced.weight.copy_(read_tensor(ref))
        figure = float((replaced(x) - layer(x)).norm() / (layer(x) - layer.get_base_layer()(x)).norm())
        if not math.isfinite(figure):
            raise SystemExit(f"{name}: {figure}")
        worst = max(worst, figure)
    for item in bound.modules:
        layer = live.get_submodule(f"base_model.model.{item.module.name}")
        before = item.oriented_weight().to(torch.float64)
        edit = item.stored_edit(torch.float64)
        assert isinstance(edit, WholeReplaced)
        inner = layer.get_base_layer().in_features
        offset = layer(torch.zeros(1, inner, dtype=torch.float64))
        want = offset[0]
        if item.module.parameter == "weight":
            want = (layer(torch.eye(inner, dtype=torch.float64)) - offset).T
        error = torch.linalg.vector_norm(edit.after.reshape(want.shape) - want)
        effect = torch.linalg.vector_norm(want - before)
        figure = float(error / effect)
        if not math.isfinite(figure):  # also where an adapter has no effect, which would prove nothing
            raise SystemExit(f"{item.name}: error {float(error)}, effect {float(effect)}")
        worst = max(worst, figure)
    return worst


@torch.no_grad()
def factor_error(base: Path, folder: Path) -> float:
    """Return the largest ||B A - dW|| / ||dW||, dW by PEFT's layer, factors and products in float64."""
    worst = 0.0
    for item in open_pair(base, folder).modules:
        edit, form = item.stored_edit(torch.float64), item.form(torch.float64)
        assert isinstance(edit, WholeReplaced)
        change = edit.after - edit.before.to(torch.float64)
        worst = max(worst, float((form.up @ form.down - change).norm() / change.norm()))
    return worst


def main() -> None:
    import peft

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = dict.fromkeys(METHODS, (OWN, "exact, or truncated with --rank", ""))
    rows["TRAINABLE_TOKENS"] = (OWN, "refused: it replaces rows of an embedding", "")
    rows |= {kind: (f"refused: {why}", "refused", "") for kind, why in REFUSED_TYPES.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, (base, config, arguments) in LAYER_CASES.items():
            folder = Path(scratch) / base
            with quiet():
                if not folder.exists():
                    BASES[base](folder)
                live = train(
                    folder, getattr(peft, config)(**arguments), Path(scratch) / kind, scale=SCALES.get(kind, 0.1)
                ).to(torch.float64)
            error = worst_error(folder, Path(scratch) / kind, live)
            if kind in REPLACED_TYPES:
                rows[kind] = ("exact: trained norms replace the base's", "refused: no weight matrix", f"{error:.1e}")
                continue
            both = LAYER_TYPES[kind].changes
            what = "weight and bias" if len(both) == 2 else both[0]
            factors = "truncated with --rank" if both == ("weight",) else "refused: the bias changes as well"
            if LAYER_TYPES[kind].low_rank:
                factors = f"exact ({factor_error(folder, Path(scratch) / kind):.1e}), or truncated with --rank"
            rows[kind] = (f"exact, by PEFT's own layer ({what})", factors, f"{error:.1e}")
    print(HEAD.format(version=peft.__version__))
    for kind, (merged, factors, worst) in sorted(rows.items()):
        print(f"| {kind} | {merged} | {factors} | {worst} |")


if __name__ == "__main__":
    main()
