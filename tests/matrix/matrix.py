"""One cell of the matrix: an artefact of an adapter passes verify, and copies of it that were spoiled do not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from artefact_files import tensors_in
from artefacts import ARTEFACTS, ONNX, NotForItError, Verdict, judge, judge_hashes
from sabotage import MANIFEST_SABOTAGES, TENSOR_SABOTAGES, NotApplicableError, forge, spoil
from trained_adapters import MAIN, OTHER, Trained, Trainer

from adapter_merge.errors import AdapterMergeError

OF_TENSORS = (*TENSOR_SABOTAGES, "untouched")
OF_INPUTS = ("another adapter", "another base")
OF_MANIFESTS = tuple(MANIFEST_SABOTAGES)
SABOTAGES = (*OF_TENSORS, *OF_INPUTS, *OF_MANIFESTS)


@dataclass
class Cell:
    """What came of one artefact of one kind of adapter."""

    refused: str | None = None  # why there is no such artefact, in the command's words
    failed: str | None = None  # why the right artefact did not pass
    tried: list[str] = field(default_factory=list)  # sabotages that changed something
    missed: list[str] = field(default_factory=list)  # of these: passed, or crashed the check
    skipped: list[str] = field(default_factory=list)  # there was nothing to do it to

    @property
    def mark(self) -> str:
        """For a table."""
        if self.refused is not None:
            return "refused"
        state = "PASS" if self.failed is None else "FAIL"
        return f"{state} {len(self.tried) - len(self.missed)}/{len(self.tried)}"


def run_cell(
    trainer: Trainer,
    kind: str,
    artefact: str,
    place: Path,
    sabotages: Sequence[str] = SABOTAGES,
    seeds: Sequence[int] = (0,),
    *,
    logits: bool = False,
) -> Cell | None:
    """Make the artefact below `place`, check it, and check it spoiled in each of the ways; None where there is none.

    logits: compare logits of the right artefact too; spoiled ones are held to their weights alone. seeds: which
    tensors are spoiled.
    """
    cell = Cell()
    onnx = artefact in ONNX
    make = (ARTEFACTS | ONNX)[artefact]
    place.mkdir(parents=True)
    try:
        trained = trainer.trained(kind, MAIN, onnx)
        folder = make(trained, place)
    except NotForItError:
        return None
    except AdapterMergeError as refusal:
        cell.refused = refusal.problems[0].cause
        return cell
    verdict = judge(trained, artefact, folder, place, weights_only=not logits)
    if not verdict.passed:
        cell.failed = verdict.why
    base = tensors_in(trained.base if trained.base is not None else Path(str(trained.adapter)))
    for sabotage in sabotages:
        for seed in seeds if sabotage in OF_TENSORS else (0,):
            copy = place / "spoiled" / folder.name
            try:
                if sabotage in OF_TENSORS:
                    what = spoil(sabotage, folder, copy, seed, base)
                elif sabotage in OF_MANIFESTS:
                    what = forge(sabotage, folder, copy)
                else:
                    copy = _of_other(trainer, kind, artefact, place / "spoiled", sabotage)
                    what = sabotage
                    _require_change(folder, copy)
            except NotApplicableError as reason:
                cell.skipped.append(f"{sabotage}: {reason}")
                shutil.rmtree(place / "spoiled", ignore_errors=True)
                continue
            verdict = _judge_spoiled(trained, artefact, place, copy, sabotage)
            cell.tried.append(sabotage)
            if verdict.passed or verdict.crash:
                cell.missed.append(f"{sabotage} ({what}): {'passed' if verdict.passed else verdict.why}")
            shutil.rmtree(place / "spoiled")
    return cell


def _judge_spoiled(trained: Trained, artefact: str, place: Path, copy: Path, sabotage: str) -> Verdict:
    verdict = judge(trained, artefact, copy, place)
    if verdict.passed and sabotage in OF_MANIFESTS and not sabotage.startswith("manifest covers"):
        return judge_hashes(copy)  # a false word about right weights: `verify ARTEFACT` may be the one that sees it
    return verdict


def _of_other(trainer: Trainer, kind: str, artefact: str, place: Path, sabotage: str) -> Path:
    """The same artefact of another adapter of the kind, or on another base. Raises NotApplicableError."""
    onnx = artefact in ONNX
    place.mkdir()
    try:
        if sabotage == "another base":
            return (ARTEFACTS | ONNX)[artefact](trainer.on_other_base(kind, onnx), place)
        return (ARTEFACTS | ONNX)[artefact](trainer.trained(kind, OTHER, onnx), place)
    except AdapterMergeError as refusal:
        raise NotApplicableError(f"it cannot be made: {refusal.problems[0].cause}") from refusal


def _require_change(folder: Path, copy: Path) -> None:
    """Raise NotApplicableError where both hold the same values: LoRA's factors are the same on every base."""
    right, other = tensors_in(folder), tensors_in(copy)
    if right.keys() == other.keys() and all(torch.equal(value, other[place]) for place, value in right.items()):
        raise NotApplicableError("the artefact holds the same values")
