"""LoRA-equivalent factors of any adapter, as a PEFT folder: the whole job behind `adapter-merge factor`.

Plain (LoRA, rsLoRA, PiSSA, DCFT)    a LoRA of the exact rank: use_dora false, init true, scale 1; PEFT, vLLM and others
                                     load it without us
Row-scaled (DoRA, DuDe)              a DoRA of rank <= 2r on the original base, loaded exactly by PEFT, plus
                                     row_scale.safetensors (m / rownorm), so that a server needs no base weights;
                                     use_dora stays true, so that no LoRA server takes it for a LoRA
rank R | ENERGY, budget MB           a plain LoRA, truncated: its error stands per weight in the manifest
the same with keep_scale             the row scale stays, the low-rank part is truncated
A linear combination                 one LoRA, or DoRA, of the sum of its adapters' ranks or less; other combinations
                                     are of full rank: truncated
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapter_merge.binding.positional import SHARED
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.open_inputs import AdapterInput, adapter_only, describe_inputs, input_folders, snapshot_of
from adapter_merge.engine.devices import choose_device
from adapter_merge.engine.weight_pool import WeightMap, weight_pool
from adapter_merge.errors import InputError, Problem, raise_all
from adapter_merge.factoring.certificate import check_errors, summary
from adapter_merge.factoring.factor_folder import write_factors
from adapter_merge.factoring.rank_budget import allot, bytes_of
from adapter_merge.factoring.supported import (
    MaybeBoundModule,
    check_positional_queries,
    check_supported,
    needs_base,
    open_factored,
    pairs_of,
    unproved_heads,
)
from adapter_merge.factoring.truncated_svd import Spectrum
from adapter_merge.factoring.weight_factors import Factored, Factoriser
from adapter_merge.formats.detection import ReadOptions
from adapter_merge.outputs.model_card import factor_card
from adapter_merge.outputs.staging import check_output, manifest, sha256, staged, write_manifest, write_text
from adapter_merge.storage.input_snapshot import InputSnapshot
from adapter_merge.storage.tensor_io import read_tensor

if TYPE_CHECKING:
    from adapter_merge.factoring.calibration import Moments

Progress = Callable[[int], None]
BUDGET_ROUNDS = 6
EXACT = 1e-5  # relative error of dW: what float32 factors of a small dW on a large W0 can be off by


def factor(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    *,
    rank: int | float | None = None,
    budget: float | None = None,
    keep_scale: bool = False,
    calibrate: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    end_to_end: bool = False,
    max_error: float | None = None,
    device: str = "auto",
    base_kind: str | None = None,
    options: ReadOptions | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    frozen_positions: bool = False,
) -> dict[str, Any]:
    """Write the adapter's factors to `output` and return the manifest.

    adapter: a folder, file or hub id, or a Recipe of several, whose heads and biases are combined as by a merge.
    base: needed for DoRA and DuDe (row norms) and PiSSA without stored initial factors; its weights are read
    only then. rank: an int, or an energy below 1 such as 0.99. budget: MB (1e6 bytes) for all factors together, ranks
    allotted where they buy most error. keep_scale: keep the row scales exact and truncate the low-rank part only.
    calibrate: a text file; the error is then minimised at the layers' outputs on that text. end_to_end: hold the
    folder's logits against the adapter as trained, on `prompts` or built-in ones. max_error: the largest relative
    error of a weight that passes. progress: called with the bytes of each finished module.
    frozen_positions: whoever reads the folder looks at `frozen_positions` in its manifest and leaves a DeBERTa's
    positional queries alone where it is true (DCFT on a base with share_att_key; PEFT would adapt them as well).
    Raises AdapterMergeError (ParityError beyond max_error); nothing is left behind then.
    """
    output = Path(output)
    limited = rank is not None or budget is not None
    _check_options(rank, budget, keep_scale, calibrate, max_error)
    rank = _plain_rank(rank)
    opened, bound = open_factored(base, adapter, base_kind, options)
    inputs = opened.snapshot if bound is None else snapshot_of(bound)
    if calibrate is not None:
        inputs += InputSnapshot([Path(calibrate)])
    check_positional_queries(opened, bound, frozen_positions)
    pairs = pairs_of(opened, bound)
    check_supported(pairs, exact=not limited)
    if bound is None and (
        calibrate is not None or end_to_end or prompts or any(needs_base(module) for module, _ in pairs)
    ):
        raise InputError(
            f"{adapter}: its factors cannot be found without the base",
            expected="BASE and ADAPTER",
            hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
        )
    check_output(output, overwrite, (opened.folder,) if bound is None else input_folders(bound))
    opened.check_values()
    if budget is not None:
        shapes = [module.shape for module, _ in pairs]
        allot([torch.ones(1)] * len(pairs), shapes, int(budget * 1e6))  # refuses a hopeless budget now
    settings: dict[str, Any] = {
        "rank": rank,
        "budget": budget,
        "scale": "exact" if keep_scale else None,
        "calibrate": None if calibrate is None else Path(calibrate).name,
        "max_error": max_error,
        "device": device,
    }
    if isinstance(bound, CombinedBound):
        settings["combination"] = bound.recipe.as_json()
    described = describe_inputs(bound, options) if bound is not None else adapter_only(opened)
    content = manifest("factors", described, settings)
    content["warnings"] = unproved_heads(opened, base)
    content["frozen_positions"] = bound is not None and SHARED in bound.config_changes
    if dry_run:
        return content | {"dry_run": True}

    started = time.perf_counter()
    chosen = choose_device(device)
    moments: Moments | None = None
    if calibrate is not None:
        from adapter_merge.factoring.calibration import collect

        assert bound is not None
        moments = collect(bound, Path(calibrate))
        content["calibration"] = moments.as_json()

    def start(pair: MaybeBoundModule) -> Factoriser:
        module, weight = pair
        root = None if moments is None else moments.root(module.name)
        return Factoriser(module, weight, chosen, keep_scale=keep_scale, root=root)

    def one(pair: MaybeBoundModule) -> Factored:
        work = start(pair)
        if rank is None:
            return work.exact()
        spectrum = work.spectrum(rank)
        found = rank if isinstance(rank, int) else spectrum.rank_for(rank)
        assert found is not None, "the spectrum reaches as far as was asked"
        return work.truncated(spectrum, found)

    with weight_pool(chosen) as run:
        if budget is None:
            factored = []
            for pair, result in zip(pairs, run(one, pairs), strict=True):
                factored.append(result)
                if progress is not None:
                    progress(sum(ref.nbytes for ref in pair[0].refs))
        else:
            factored = _budgeted(pairs, int(budget * 1e6), start, run)
        if any(item.magnitude is not None for item in factored):
            factored = [
                item if item.magnitude is not None or weight is None else start((module, weight)).with_unit_scale(item)
                for item, (module, weight) in zip(factored, pairs, strict=True)
            ]
    content["seconds"] = round(time.perf_counter() - started, 2)
    layers = {item.name: item.figures for item in factored}
    if max_error is not None:
        check_errors(layers, max_error)
    scaled = any(item.magnitude is not None for item in factored)
    replaced = bound.replacements if bound is not None else opened.replacements
    replacements = {name: read_tensor(ref) for name, ref in replaced.items()}
    if isinstance(bound, CombinedBound):
        replacements |= bound.whole_tensors()
    content["form"] = "lora+row_scale" if scaled else "lora"
    worst = max((item.figures.relative_error for item in factored), default=0.0)
    content["exact"] = not limited and worst <= EXACT
    if not limited and worst > EXACT:
        content["warnings"] += [
            f"not exact: relative error of dW up to {worst:.2g}. The residual beside which the adapter was trained was "
            "rounded to half precision, which no low-rank factor expresses: merge it, or factor it on the residual base"
        ]
    content["certificate"] = summary(layers)
    content["layers"] = {name: figures.as_json() for name, figures in layers.items()}
    with staged(output, overwrite, inputs) as folder:
        conv1d = opened.fan_in_fan_out or (bound is not None and any(item.transposed for item in bound.modules))
        write_factors(folder, opened, factored, replacements, conv1d)
        if end_to_end or prompts:
            from adapter_merge.factoring.end_to_end import compare

            assert bound is not None
            content["certificate"]["end_to_end"] = compare(bound, folder, prompts)
        write_text(folder / "README.md", factor_card(content, opened, folder, output.name))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        content["files"] = {path.name: sha256(path) for path in files}
        content["bytes"] = sum(path.stat().st_size for path in files)
        write_manifest(folder, content)
    return content


def _check_options(
    rank: int | float | None,
    budget: float | None,
    keep_scale: bool,
    calibrate: str | Path | None,
    max_error: float | None,
) -> None:
    problems = []
    plain = _plain_rank(rank)
    if plain is not None and not (plain >= 1 if isinstance(plain, int) else 0 < plain < 1):
        problems.append(Problem("--rank is wrong", "a rank >= 1, or an energy between 0 and 1", str(rank)))
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        problems.append(Problem("--budget is wrong", "a number of MB above 0", str(budget)))
    if rank is not None and budget is not None:
        problems.append(Problem("--rank and --budget exclude each other", hint="give the one that must hold"))
    if rank is None and budget is None and (keep_scale or calibrate is not None):
        option = "--scale exact" if keep_scale else "--calibrate"
        problems.append(
            Problem(
                f"{option} is about a truncation", "--rank or --budget as well", "the exact form, which loses nothing"
            )
        )
    if max_error is not None and not max_error >= 0:
        problems.append(Problem("--max-error is wrong", "a relative error >= 0", str(max_error)))
    if calibrate is not None and not Path(calibrate).is_file():
        problems.append(Problem(f"{calibrate}: no such file", "a text file"))
    raise_all(problems, InputError)


def _plain_rank(rank: object) -> int | float | None:
    """A rank or an energy as Python's own number, whatever number it is; NaN for anything else."""
    if rank is None or isinstance(rank, bool):
        return None if rank is None else math.nan
    if isinstance(rank, Integral):
        return int(rank)
    return float(rank) if isinstance(rank, Real) else math.nan


def _budgeted(
    pairs: Sequence[MaybeBoundModule],
    budget: int,
    start: Callable[[MaybeBoundModule], Factoriser],
    run: WeightMap,
) -> list[Factored]:
    """Factors of all weights under `budget` bytes. Spectra grow where the allotment reaches their end."""
    shapes = [module.shape for module, _ in pairs]
    uniform = max(1, budget // sum(bytes_of(shape, 1) for shape in shapes))
    wanted = dict.fromkeys(range(len(pairs)), 2 * uniform)
    works: dict[int, Factoriser] = {}
    spectra: dict[int, Spectrum] = {}

    def widen(item: tuple[int, int]) -> tuple[int, Factoriser, Spectrum]:
        index, want = item
        work = works.get(index) or start(pairs[index])
        found = work.spectrum(want)
        work.close()
        return index, work, found.stored()

    for _ in range(BUDGET_ROUNDS):
        for index, work, found in run(widen, list(wanted.items())):
            works[index], spectra[index] = work, found
        ranks = allot([spectra[index].squares for index in range(len(pairs))], shapes, budget)
        wanted = {
            index: 2 * ranks[index]
            for index in range(len(pairs))
            if not spectra[index].full and ranks[index] >= spectra[index].rank
        }
        if not wanted:
            break
    results = run(lambda index: works[index].truncated(spectra[index], ranks[index]), range(len(pairs)))
    return list(results)


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises InputError."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text", got=str(error)) from error
    if not lines:
        raise InputError(f"{file}: holds no prompts", expected="one prompt a line")
    return lines


def parse_rank(text: str) -> int | float:
    """16 is a rank, 0.99 an energy. Raises InputError."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = math.nan
    if not (isinstance(value, int) and value >= 1) and not 0 < value < 1:
        raise InputError(f"--rank {text}: neither a rank nor an energy", expected="16, or 0.99")
    return value
