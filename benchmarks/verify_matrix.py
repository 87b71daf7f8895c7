"""What verify says of every artefact of every kind of adapter, and of spoiled ones: python benchmarks/verify_matrix.py

    python benchmarks/verify_matrix.py [KIND] [--artefact NAME] [--onnx] [--seeds N] [--weights-only]

One row per kind of adapter whose name holds KIND, one column per artefact: PASS or FAIL of the right artefact (weights
and logits), then how many sabotages were found out by a verdict, of those that changed something. Below the table:
every sabotage that passed or crashed the check, every right artefact that failed, and why commands refused. The
sabotages and how they choose tensors are in tests/matrix/sabotage.py; --seeds N spoils N tensors in each way.
ONNX exports take seconds each: they are their own table (--onnx).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.extend(
    str(Path(__file__).parents[1] / "tests" / name) for name in ("matrix", "merge", "merge/formats", "export")
)

from artefacts import ARTEFACTS, ONNX  # type: ignore[import-not-found]
from matrix import SABOTAGES, run_cell  # type: ignore[import-not-found]
from trained_adapters import KINDS, Trainer, on_onnx  # type: ignore[import-not-found]


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser()
    parser.add_argument("kind", nargs="?", default="")
    parser.add_argument("--artefact", default="")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--weights-only", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    artefacts = [name for name in (ONNX if arguments.onnx else ARTEFACTS) if arguments.artefact in name]
    notes: list[str] = []
    reasons: dict[str, str] = {}
    tried: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    passed = failed = 0
    started = time.perf_counter()
    print(f"| adapter | {' | '.join(artefacts)} |\n|{'---|' * (len(artefacts) + 1)}")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(Path(scratch) / "trained")
        for row, kind in enumerate(name for name in KINDS if arguments.kind in name):
            if arguments.onnx and not on_onnx(kind):
                continue
            marks = []
            for column, artefact in enumerate(artefacts):
                place = Path(scratch) / f"{row}-{column}"
                cell = run_cell(
                    trainer, kind, artefact, place, SABOTAGES, range(arguments.seeds),
                    logits=not arguments.weights_only,
                )  # fmt: skip
                if cell is None:
                    marks.append("-")
                    continue
                if cell.refused is not None:
                    text = cell.refused.replace(scratch, "").split(": ", 1)[-1]
                    marks.append(f"refused {reasons.setdefault(text, chr(ord('a') + len(reasons)))}")
                    continue
                marks.append(cell.mark)
                passed, failed = passed + (cell.failed is None), failed + (cell.failed is not None)
                tried.update(cell.tried)
                missed.update(text.partition(" (")[0] for text in cell.missed)
                notes += [f"missed  {kind} | {artefact} | {text.replace(scratch, '')}" for text in cell.missed]
                if cell.failed is not None:
                    notes.append(f"failed  {kind} | {artefact} | {cell.failed.replace(scratch, '')}")
            print(f"| {kind} | {' | '.join(marks)} |", flush=True)
    print(f"\n{passed} artefacts passed, {failed} failed; {time.perf_counter() - started:.0f} s")
    print(f"{sum(tried.values()) - sum(missed.values())} of {sum(tried.values())} sabotages found out")
    for name in SABOTAGES:
        print(f"  {name:<36} {tried[name] - missed[name]}/{tried[name]}")
    for text, letter in reasons.items():
        print(f"refused {letter}: {text}")
    print("\n".join(notes))


if __name__ == "__main__":
    main()
