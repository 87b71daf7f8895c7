"""Low-rank factors of any adapter, as a PEFT folder or a GGUF file: the job behind `adapter-merge factor`.

LoRA, rsLoRA, PiSSA, DCFT    an exact LoRA (use_dora false, init_lora_weights true, scale 1), which PEFT, vLLM and other
                             servers load without this project
DoRA, DuDe                   an exact DoRA of rank <= 2r on the original base, which PEFT loads, and
                             row_scale.safetensors (m / rownorm), with which a server needs no base weights. use_dora is
                             true, so that a server of plain LoRA refuses the folder
rank or budget               a truncated plain LoRA; the manifest states the error of every weight
... with keep_scale          the row scale stays exact, and only the low-rank part is truncated
format "gguf"                the plain LoRA as one GGUF file for llama.cpp; a row scale is refused
stacked experts              PEFT's target_parameters, exact (expert_factors.py)
linear combination           one LoRA or DoRA whose rank is at most the sum of the adapters' ranks; other combinations
                             have full rank and are truncated
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapter_merge.binding.bind import BoundAdapter
from adapter_merge.binding.positional import SHARED
from adapter_merge.combine.base_weights import check_whole_base, fingerprint_weights, hash_whole_weights
from adapter_merge.combine.combined_adapter import CombinedBound
from adapter_merge.combine.open_inputs import (
    AdapterInput,
    describe_adapter_alone,
    describe_inputs,
    input_folders,
    parts_of,
    snapshot_of,
)
from adapter_merge.engine.devices import choose_device
from adapter_merge.engine.weight_pool import WeightMap, weight_pool
from adapter_merge.errors import InputError, Problem, UnsupportedError, raise_all
from adapter_merge.factoring.certificate import LayerFigures, check_errors, summary
from adapter_merge.factoring.expert_factors import expert_factors
from adapter_merge.factoring.factor_folder import write_factors
from adapter_merge.factoring.gguf_adapter import check_gguf, write_gguf_adapter
from adapter_merge.factoring.rank_choice import allot_ranks, bytes_of
from adapter_merge.factoring.supported import (
    MaybeBoundModule,
    check_convolutions,
    check_experts,
    check_positional_queries,
    check_single_experts,
    check_supported,
    has_experts,
    kernels_of,
    needs_base,
    open_factored,
    pairs_of,
    warn_unproved_heads,
)
from adapter_merge.factoring.truncated_svd import Spectrum
from adapter_merge.factoring.weight_factors import Factored, Factoriser
from adapter_merge.files.hashing import file_sha256
from adapter_merge.files.input_snapshot import InputSnapshot
from adapter_merge.methods.adapter import Adapter
from adapter_merge.outputs.manifest import make_manifest, write_manifest
from adapter_merge.outputs.model_card import factor_card
from adapter_merge.outputs.staging import check_output, staged, write_text
from adapter_merge.storage.tensor_io import read_tensor

from .options import FactorOptions
from .results import FactorResult

if TYPE_CHECKING:
    from adapter_merge.factoring.calibration import Moments

Progress = Callable[[int], None]
BUDGET_ROUNDS = 6
FORMATS = ("peft", "gguf")
EXACT = 1e-5  # relative error of dW that float32 factors of a small dW on a large W0 can have


def factor(
    base: str | Path | None,
    adapter: AdapterInput,
    output: str | Path,
    options: FactorOptions = FactorOptions(),
    *,
    progress: Progress | None = None,
) -> FactorResult:
    """Write the adapter's low-rank factors to `output`, as PEFT folder or GGUF file, exact or truncated.

    dW = up @ down with up (out, R) and down (R, in), written in float32 with a scale of 1; for DoRA and DuDe W' =
    diag(row_scale) (W0 + up @ down). A truncation is the best approximation of its rank (Eckart-Young-Mirsky).
    base: needed for DoRA and DuDe (row norms) and for PiSSA without stored initial factors; None for other adapters.
    progress: called with the bytes of each finished module.
    Raises InputError for wrong options or a missing base, UnsupportedError where the adapter has no such factors,
    ParityError where a weight's relative error is above `max_error`; no output is left behind then.

    Example:
        >>> factor("base", "adapter", "factors", FactorOptions(rank=2)).certificate.ranks
        (2, 2)
    """
    output = Path(output)
    _check_options(options)
    opened, bound = open_factored(base, adapter, options.base_kind, options.reading)
    pairs = _check_inputs(opened, bound, options)
    check_output(output, options.overwrite, (opened.folder,) if bound is None else input_folders(bound))
    opened.check_values()
    inputs = opened.snapshot if bound is None else snapshot_of(bound)
    if options.calibrate is not None:
        inputs += InputSnapshot([Path(options.calibrate)])
    described = describe_inputs(bound, options.reading) if bound is not None else describe_adapter_alone(opened)
    if bound is not None:
        parts = parts_of(bound)
        described["base"]["weights"] = {name: sha for part in parts for name, sha in fingerprint_weights(part).items()}
        if options.hash_base:
            for part in parts:
                check_whole_base(part)
            hashes = {name: sha for part in parts for name, sha in hash_whole_weights(part).items()}
            described["base"]["whole_weights"] = hashes
    content = make_manifest("factors", described, _options_as_json(options, bound))
    content["warnings"] = warn_unproved_heads(opened, base)
    content["frozen_positions"] = bound is not None and SHARED in bound.config_changes
    if options.dry_run:
        return FactorResult(output, content | {"dry_run": True})

    started = time.perf_counter()
    moments: Moments | None = None
    if options.calibrate is not None:
        from adapter_merge.factoring.calibration import collect

        assert bound is not None
        moments = collect(bound, Path(options.calibrate))
        content["calibration"] = moments.as_json()
    factored = _find_factors(pairs, options, moments, progress)
    experts = expert_factors(opened, bound) if bound is not None and not isinstance(bound, CombinedBound) else []
    content["seconds"] = round(time.perf_counter() - started, 2)
    layers = {item.name: item.figures for item in factored} | {item.path: item.figures for item in experts}
    if options.max_error is not None:
        check_errors(layers, options.max_error)
    content |= _summarise(factored, layers, options)
    content["experts"] = len(experts)
    worst = content["certificate"]["max_relative_error"]
    if not options.is_truncation and not content["exact"]:
        content["warnings"] += [
            f"not exact: relative error of dW up to {worst:.2g}. The adapter was trained on a residual that was "
            "rounded to half precision, and no low-rank factor holds that rounding: merge it, or factor it "
            "on the residual base"
        ]
    with staged(output, options.overwrite, inputs) as folder:
        conv1d = opened.fan_in_fan_out or any(item is not None and item.transposed for _, item in pairs)
        if options.format == "gguf":
            assert bound is not None
            write_gguf_adapter(folder, bound, pairs, factored)
        else:
            kernels, replaced = kernels_of(pairs, bound), _read_replacements(opened, bound)
            write_factors(folder, opened, factored, replaced, conv1d, kernels, experts)
        if options.end_to_end or options.prompts:
            from adapter_merge.factoring.end_to_end import compare

            assert bound is not None
            content["certificate"]["end_to_end"] = compare(bound, folder, options.prompts)
        write_text(folder / "README.md", factor_card(content, opened, folder, output.name))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        content["files"] = {path.name: file_sha256(path) for path in files}
        content["bytes"] = sum(path.stat().st_size for path in files)
        write_manifest(folder, content)
    return FactorResult(output, content)


def _check_inputs(opened: Adapter, bound: BoundAdapter | None, options: FactorOptions) -> list[MaybeBoundModule]:
    """Return the modules with their base weights. Raises where they cannot be factored, or not without the base."""
    check_positional_queries(opened, bound, options.frozen_positions)
    pairs = pairs_of(opened, bound)
    runs_model = options.calibrate is not None or options.end_to_end or bool(options.prompts)
    experts = has_experts(opened) and not isinstance(bound, CombinedBound)
    if experts:
        check_experts(opened, pairs, bound, exact_folder=options.format == "peft" and not options.is_truncation)
    check_supported(pairs, exact=not options.is_truncation, experts=experts)
    if experts and runs_model:
        raise UnsupportedError(
            f"{opened.folder}: adapts experts, which --end-to-end does not run", hint="compare with verify, afterwards"
        )
    check_single_experts(pairs, keeps_scale=not options.is_truncation or options.keep_scale)
    check_convolutions(opened, pairs, bound)
    if options.calibrate is not None and kernels_of(pairs, bound):
        raise UnsupportedError(
            f"{opened.folder}: adapts convolutions, and --calibrate measures inputs of linear layers",
            hint="leave --calibrate out",
        )
    if options.format == "gguf":
        check_gguf(bound, pairs, options.is_truncation)
    if bound is None and (runs_model or any(needs_base(module) for module, _ in pairs)):
        raise InputError(
            f"{opened.folder}: its factors cannot be found without the base",
            expected="BASE and ADAPTER",
            hint=f"its base seems to be {opened.base_name}" if opened.base_name else None,
        )
    if options.budget is not None:  # raises InputError for a budget that allows no rank
        shapes = [module.shape for module, _ in pairs]
        allot_ranks([torch.ones(1)] * len(pairs), shapes, int(options.budget * 1e6))
    return pairs


def _options_as_json(options: FactorOptions, bound: BoundAdapter | None) -> dict[str, Any]:
    """Return the options as the manifest holds them."""
    stated: dict[str, Any] = {
        "format": options.format,
        "rank": _normalise_rank(options.rank),
        "budget": options.budget,
        "scale": "exact" if options.keep_scale else None,
        "calibrate": None if options.calibrate is None else Path(options.calibrate).name,
        "max_error": options.max_error,
        "device": options.device,
    }
    if isinstance(bound, CombinedBound):
        stated["combination"] = bound.recipe.as_json()
    return stated


def _find_factors(
    pairs: Sequence[MaybeBoundModule], options: FactorOptions, moments: Moments | None, progress: Progress | None
) -> list[Factored]:
    """Return the factors of every weight: exact, of the stated rank or energy, or of ranks that share a budget."""
    device, rank = choose_device(options.device), _normalise_rank(options.rank)

    def start(pair: MaybeBoundModule) -> Factoriser:
        module, weight = pair
        root = None if moments is None else moments.root(module.name)
        return Factoriser(module, weight, device, keep_scale=options.keep_scale, root=root)

    def factors_of(pair: MaybeBoundModule) -> Factored:
        work = start(pair)
        if rank is None:
            return work.exact()
        spectrum = work.spectrum(rank)
        chosen = rank if isinstance(rank, int) else spectrum.rank_for(rank)
        assert chosen is not None, "the spectrum is too short for the energy"
        return work.truncated(spectrum, chosen)

    with weight_pool(device) as run:
        if options.budget is None:
            factored = []
            for pair, result in zip(pairs, run(factors_of, pairs), strict=True):
                factored.append(result)
                if progress is not None:
                    progress(sum(ref.nbytes for ref in pair[0].refs))
        else:
            factored = _factor_within_budget(pairs, int(options.budget * 1e6), start, run)
        if any(item.magnitude is not None for item in factored):  # a PEFT folder is either a LoRA or a DoRA
            factored = [
                item if item.magnitude is not None or weight is None else start((module, weight)).with_unit_scale(item)
                for item, (module, weight) in zip(factored, pairs, strict=True)
            ]
    return factored


def _summarise(
    factored: Sequence[Factored], layers: Mapping[str, LayerFigures], options: FactorOptions
) -> dict[str, Any]:
    """Return the manifest's entries on the factors: their form, whether they are exact, and their errors."""
    scaled = any(item.magnitude is not None for item in factored)
    worst = max((figures.relative_error for figures in layers.values()), default=0.0)
    return {
        "form": "lora+row_scale" if scaled else "lora",
        "exact": not options.is_truncation and worst <= EXACT,
        "certificate": summary(layers),
        "layers": {name: figures.as_json() for name, figures in layers.items()},
    }


def _read_replacements(opened: Adapter, bound: BoundAdapter | None) -> dict[str, torch.Tensor]:
    """Return the full tensors that replace tensors of the base; those of a combination are combined first."""
    replaced = bound.replacements if bound is not None else opened.replacements
    tensors = {name: read_tensor(ref) for name, ref in replaced.items()}
    return tensors | bound.merged_tensors() if isinstance(bound, CombinedBound) else tensors


def _check_options(options: FactorOptions) -> None:
    problems = []
    rank = _normalise_rank(options.rank)
    if rank is not None and not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        problems.append(Problem("--rank is wrong", "a rank >= 1, or an energy between 0 and 1", str(options.rank)))
    if options.budget is not None and not (math.isfinite(options.budget) and options.budget > 0):
        problems.append(Problem("--budget is wrong", "a number of MB above 0", str(options.budget)))
    if options.format not in FORMATS:
        problems.append(Problem("the format is wrong", " or ".join(FORMATS), f"{options.format!r:.50}"))
    if options.format == "gguf" and (options.keep_scale or options.end_to_end or options.prompts):
        option = "--scale exact" if options.keep_scale else "--end-to-end"
        problems.append(Problem(f"{option} applies to a PEFT folder only", "--format peft", "--format gguf"))
    if options.rank is not None and options.budget is not None:
        problems.append(Problem("--rank and --budget exclude each other", hint="state the limit that must be kept"))
    if options.rank is None and options.budget is None and (options.keep_scale or options.calibrate is not None):
        option = "--scale exact" if options.keep_scale else "--calibrate"
        problems.append(
            Problem(
                f"{option} applies to truncated factors only", "--rank or --budget as well", "neither: the exact form"
            )
        )
    if options.max_error is not None and not options.max_error >= 0:
        problems.append(Problem("--max-error is wrong", "a relative error >= 0", str(options.max_error)))
    if options.calibrate is not None and not Path(options.calibrate).is_file():
        problems.append(Problem(f"{options.calibrate}: no such file", "a text file"))
    raise_all(problems, InputError)


def _normalise_rank(rank: object) -> int | float | None:
    """Return a rank as int or an energy as float, from any numeric type; NaN for a value that is no number."""
    if rank is None or isinstance(rank, bool):
        return None if rank is None else math.nan
    if isinstance(rank, Integral):
        return int(rank)
    return float(rank) if isinstance(rank, Real) else math.nan


def _factor_within_budget(
    pairs: Sequence[MaybeBoundModule],
    budget: int,
    start: Callable[[MaybeBoundModule], Factoriser],
    run: WeightMap,
) -> list[Factored]:
    """Return the factors of all weights in at most `budget` bytes.

    A spectrum is computed to twice the rank that its weight was given, and again where the next allotment needs more.
    """
    shapes = [module.shape for module, _ in pairs]
    uniform = max(1, budget // sum(bytes_of(shape, 1) for shape in shapes))
    ranks_needed = dict.fromkeys(range(len(pairs)), 2 * uniform)
    factorisers: dict[int, Factoriser] = {}
    spectra: dict[int, Spectrum] = {}

    def widen(item: tuple[int, int]) -> tuple[int, Factoriser, Spectrum]:
        index, rank = item
        factoriser = factorisers.get(index) or start(pairs[index])
        spectrum = factoriser.spectrum(rank)
        factoriser.close()
        return index, factoriser, spectrum.stored()

    for _ in range(BUDGET_ROUNDS):
        for index, factoriser, spectrum in run(widen, list(ranks_needed.items())):
            factorisers[index], spectra[index] = factoriser, spectrum
        ranks = allot_ranks([spectra[index].squares for index in range(len(pairs))], shapes, budget)
        ranks_needed = {
            index: 2 * ranks[index]
            for index in range(len(pairs))
            if not spectra[index].full and ranks[index] >= spectra[index].rank
        }
        if not ranks_needed:
            break
    results = run(lambda index: factorisers[index].truncated(spectra[index], ranks[index]), range(len(pairs)))
    return list(results)
