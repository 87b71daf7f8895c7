"""Evidence of the base that an adapter was trained on: what agrees with a given base, and what contradicts it.

An adapter fits every base of its shapes, so a merge into the wrong base runs without an error. The evidence is:

magnitudes       DoRA and DuDe start from the norms of the base's rows, and training moves them little
residual base    the base of PiSSA, OLoRA and DuDe without its principal part has no energy along the trained factors
own base         a DCFT checkpoint holds the weights that it was trained on; they are compared across dtypes
fingerprints     folders that adapter-merge wrote hold those of the base weights that they adapt (base_weights.py)
merged before    a merged model's manifest names the adapters merged into it and into the bases that it was made from
statements       options of the user against what the adapter's files hold (formats/, binding/base_kind.py)
names            base_model_name_or_path against the base's own names: an indication, never a contradiction

A contradiction is an error. Where the user states `force` it is accepted and recorded in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from adapter_merge.binding.bind import BoundAdapter, BoundModule, bind
from adapter_merge.binding.bound import Origin
from adapter_merge.errors import MismatchError, Problem, raise_all
from adapter_merge.methods.adapter import Adapter
from adapter_merge.methods.lora import LoraModule
from adapter_merge.storage.checkpoint import Checkpoint
from adapter_merge.storage.lazy_torch import torch
from adapter_merge.storage.safetensors_header import FLOAT_DTYPES, TensorRef
from adapter_merge.storage.tensor_comparison import same_but_for_rounding
from adapter_merge.storage.tensor_io import TORCH_DTYPES, read_into, read_tensor

from .adapter_hashes import MANIFEST, hashes_of_merged_adapters, list_identities, read_manifest_of
from .base_weights import compare_weights

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 1 << 20
FEWEST = 8  # magnitudes of one weight: fewer correlate, or do not, by chance
SAMPLES = 6  # weights that are compared, spread over the model
ALIKE = 0.9  # correlation of magnitudes and row norms from which they count as agreeing
UNLIKE = 0.3  # correlation below which they contradict each other, where the magnitudes vary by at least SPREAD
SPREAD = 0.05  # standard deviation of log m: below it the drift of training may hide the norms
FAR = 1.1  # median |log(m / row norm)| above which the magnitudes contradict the norms: a factor of 3
ORTHOGONAL = 0.5  # a residual base has less than this share of a random matrix's energy along the trained factors


def bind_checked(adapter: Adapter, base: Checkpoint, base_kind: str | None = None) -> BoundAdapter:
    """Bind `adapter` to `base` and check all evidence of the base that it was trained on.

    Raises MismatchError where the adapter does not fit, and where evidence contradicts the base or a statement about it
    and the adapter is not forced.
    """
    bound = bind(adapter, base, base_kind)
    origin = find_origin(bound)
    if not adapter.forced:
        raise_all(list(origin.contradictions), MismatchError)
    return replace(bound, origin=origin)


def find_origin(bound: BoundAdapter) -> Origin:
    """Return what agrees with the base, what contradicts it, and what differs without a contradiction."""
    recorded = _compare_recorded(bound)
    stated = Origin(contradictions=bound.adapter.contradictions)
    origin = stated + bound.origin + recorded + _compare_own_base(bound) + _check_earlier_merges(bound)
    # A matching fingerprint is stronger evidence, and factors that adapter-merge wrote have other magnitudes.
    if not recorded.findings:
        origin = origin + _check_magnitudes(bound) + _check_residual(bound)
    return origin + _compare_names(bound, bool(origin.findings))


def sample_modules(items: Sequence[BoundModule]) -> Iterator[BoundModule]:
    """Yield up to SAMPLES small modules, one from each of as many stretches of the model."""
    count = min(SAMPLES, len(items))
    bounds = [number * len(items) // count for number in range(count + 1)] if count else []
    for first, stop in pairwise(bounds):
        yield min(items[first:stop], key=lambda item: item.module.shape[0] * item.module.shape[1])


def _check_magnitudes(bound: BoundAdapter) -> Origin:
    """Compare the magnitudes of DoRA and DuDe with the norms of the base's rows, or columns (magnitude_dim 1)."""
    scaled = [
        item
        for item in bound.modules
        if isinstance(item.module, LoraModule)
        and item.module.magnitude is not None
        and not item.module.own_magnitude
        and item.weight.dtype in FLOAT_DTYPES
    ]
    levels, likeness, spreads = [], [], []
    for item in sample_modules(scaled):
        module = item.module
        assert isinstance(module, LoraModule) and module.magnitude is not None
        norms = _compute_norms(item, module, bound.base_kind == "residual").clamp_min(1e-12).log()
        trained = read_tensor(module.magnitude).float().reshape(-1).abs().clamp_min(1e-12).log()
        if norms.shape != trained.shape or norms.numel() < FEWEST:
            continue
        levels.append(float((trained - norms).abs().median()))
        spreads.append(float(trained.std(correction=0)))
        centred, centred_norms = trained - trained.mean(), norms - norms.mean()
        scale = torch.linalg.vector_norm(centred) * torch.linalg.vector_norm(centred_norms)
        likeness.append(float((centred @ centred_norms) / scale.clamp_min(1e-20)))
    if not levels:
        return Origin()
    level, correlation = median(levels), median(likeness)
    text = f"correlation {correlation:.2f}, median difference {level:.1%} over {len(levels)} weights"
    if level > FAR or (correlation < UNLIKE and median(spreads) >= SPREAD):
        return Origin(
            contradictions=(
                Problem(
                    "the adapter was not trained on this base: its magnitudes are not the norms of the base's rows",
                    expected=f"a correlation above {UNLIKE} and a difference below a factor of 3",
                    got=text,
                    hint="give the base of the training; --force accepts this base",
                ),
            )
        )
    if correlation >= ALIKE:
        return Origin((f"magnitudes follow the base's row norms ({text})",))
    if correlation < UNLIKE:  # all magnitudes are nearly equal, so their correlation is no evidence
        return Origin()
    return Origin(doubts=(f"magnitudes follow the base's row norms only loosely ({text})",))


def _compute_norms(item: BoundModule, module: LoraModule, with_factors: bool) -> Tensor:
    """Return the norms of the rows (magnitude_dim 0) or columns of W0 (out, in), or of W0 + s B A."""
    by_rows = (module.magnitude_dim == 0) != item.transposed
    start, stop = item.rows or (0, item.weight.rows)
    sums = torch.zeros(stop - start if by_rows else item.weight.shape[-1])
    a, b = read_tensor(module.a).float(), read_tensor(module.b).float()
    first_factor, second_factor = (a.T, b.T) if item.transposed else (b, a)
    for first, block in _read_blocks(item):
        if with_factors:
            block += module.scale * (first_factor[first : first + len(block)] @ second_factor)
        squares = block.square_()
        if by_rows:
            torch.sum(squares, 1, out=sums[first : first + len(block)])
        else:
            sums += squares.sum(0)
    return sums.sqrt_()


def _read_blocks(item: BoundModule) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, float32 block) of the stored weight, or of its adapted rows, about BLOCK_BYTES each.

    All blocks lie in one buffer: the next one replaces the last. New buffers between small results that are kept would
    leave holes in the heap, as many as there are blocks.
    """
    ref = item.weight
    start, stop = item.rows or (0, ref.rows)
    step = min(stop - start, max(1, BLOCK_BYTES // (4 * ref.shape[-1])))
    raw, buffer = torch.empty(step * ref.row_bytes, dtype=torch.uint8), torch.empty(step, ref.shape[-1])
    for first in range(start, stop, step):
        count = min(step, stop - first)
        stored = raw[: count * ref.row_bytes]
        read_into(ref, first * ref.row_bytes, stored)
        yield first - start, buffer[:count].copy_(stored.view(TORCH_DTYPES[ref.dtype]).reshape(count, -1))


def _check_residual(bound: BoundAdapter) -> Origin:
    """Measure the energy of a residual base along the trained factors: their initial product was subtracted from it."""
    if bound.base_kind != "residual" or bound.evidence is None or bound.origin.contradictions:
        return Origin()
    loras = [
        item
        for item in bound.modules
        if isinstance(item.module, LoraModule) and not item.module.embedding and item.weight.dtype in FLOAT_DTYPES
    ]
    shares = []
    for item in sample_modules(loras):
        module = item.module
        assert isinstance(module, LoraModule)
        if module.rank >= min(module.shape):
            continue
        columns, _ = torch.linalg.qr(read_tensor(module.b).float())
        rows, _ = torch.linalg.qr(read_tensor(module.a).float().T)
        if item.transposed:
            columns, rows = rows, columns
        products, row_energy, total = torch.zeros(columns.shape[1], rows.shape[0]), torch.zeros(()), torch.zeros(())
        for first, block in _read_blocks(item):  # of the stored weight, (rows, columns)
            products += columns[first : first + len(block)].T @ block
            row_energy += (block @ rows).square().sum()
            total += block.square().sum()
        scale = total.clamp_min(1e-30) * module.rank
        left_share = products.square().sum() / scale * columns.shape[0]
        right_share = row_energy / scale * rows.shape[0]
        shares.append(float(torch.minimum(left_share, right_share)))
    if not shares:
        return Origin()
    share = median(shares)
    text = f"{share:.0%} of a random matrix's energy along the trained factors, over {len(shares)} weights"
    if share <= ORTHOGONAL:
        return Origin((f"the base lacks the part that was subtracted before training ({text})",))
    return Origin(
        contradictions=(
            Problem(
                "the adapter was trained on another base: this one is neither its original nor its residual",
                expected=f"at most {ORTHOGONAL:.0%} of a random matrix's energy along the trained factors",
                got=text,
                hint="give the base of the training; --force accepts this base",
            ),
        )
    )


def _compare_own_base(bound: BoundAdapter) -> Origin:
    """Compare the weights that a DCFT checkpoint was trained on with those of the given base, whatever their dtypes."""
    own_base = bound.adapter.own_base
    if own_base is None:
        return Origin()
    if own_base.folder.resolve() == bound.base.folder.resolve():
        return Origin(("the checkpoint holds the base that it was trained on",))
    items = [
        item
        for item in bound.modules
        if item.module.parameter == "weight"
        and not item.transposed
        and (trained_weight := own_base.tensors.get(f"{item.module.name}.weight")) is not None
        and trained_weight.shape == item.weight.shape
    ]
    if not items or bound.base.stored is not None:
        return Origin(doubts=("the checkpoint's frozen weights could not be compared with this base's",))
    compared_whole = {item.weight.name for item in sample_modules(items)}
    different = [
        item.weight.name
        for item in items
        if not _are_equal(
            own_base.tensors[f"{item.module.name}.weight"], item.weight, whole=item.weight.name in compared_whole
        )
    ]
    if not different:
        text = f"{len(items)} compared, {len(compared_whole)} of them in whole, the others by first and last row"
        return Origin((f"the checkpoint's frozen weights are this base's ({text})",))
    return Origin(
        contradictions=(
            Problem(
                "the checkpoint was trained on another base: its frozen weights are not this base's",
                got=f"{len(different)} of {len(items)} compared weights differ, for example {different[0]}",
                hint="leave BASE out, since the checkpoint holds its base; --force accepts this base",
            ),
        )
    )


def _are_equal(trained: TensorRef, base_weight: TensorRef, whole: bool) -> bool:
    """Compare two weights of one shape but for the rounding of their dtypes, in whole or by first and last row."""
    if whole:
        return same_but_for_rounding(trained, base_weight)
    return all(
        same_but_for_rounding(_select_row(trained, row), _select_row(base_weight, row)) for row in (0, trained.rows - 1)
    )


def _select_row(ref: TensorRef, row: int) -> TensorRef:
    """Return the reference of one row of a stored tensor, (1, columns)."""
    place = ref.start + row * ref.row_bytes
    return replace(ref, shape=(1, ref.shape[-1]), start=place, stop=place + ref.row_bytes)


def _compare_recorded(bound: BoundAdapter) -> Origin:
    """Compare the base with the fingerprints that the adapter's folder recorded, where adapter-merge wrote it."""
    stated = read_manifest_of(bound.adapter.folder).get("base")
    if not isinstance(stated, dict) or not isinstance(stated.get("fingerprint") or stated.get("weights"), str | dict):
        return Origin()
    if stated.get("fingerprint") == bound.base.fingerprint:
        return Origin(("the adapter's folder names this base's fingerprint",))
    weights = stated.get("weights")
    comparison = compare_weights(weights if isinstance(weights, dict) else {}, bound)
    count = comparison.equal + len(comparison.different)
    if comparison.different or (not count and stated.get("layout") == bound.base.layout):
        return Origin(
            contradictions=(
                Problem(
                    f"{bound.adapter.folder / MANIFEST}: names another base: the same tensors with other values",
                    got=f"{len(comparison.different)} of {count} adapted weights differ"
                    if count
                    else "another fingerprint",
                    hint="give the base that it names; --force accepts this base",
                ),
            )
        )
    if comparison.equal:
        return Origin((f"the adapter's folder names this base's weights ({count} compared)",))
    return Origin(doubts=("the adapter's folder names a base of another dtype or other names than this one",))


def _check_earlier_merges(bound: BoundAdapter) -> Origin:
    """Return a contradiction where the base is a merged model whose manifest lists this adapter."""
    folder = (bound.base.stored or bound.base).folder
    merged = hashes_of_merged_adapters(folder)
    if not merged or not merged & list_identities(bound.adapter):
        return Origin()
    return Origin(
        contradictions=(
            Problem(
                f"{folder}: the adapter is already merged into this base",
                got=f"{MANIFEST} lists its weights, or those that it was made from, among the merged adapters",
                hint="give the base before that merge; --force merges it a second time",
            ),
        )
    )


def _compare_names(bound: BoundAdapter, has_findings: bool) -> Origin:
    """Compare the name of the base in the adapter's config with the base's own names."""
    stated = bound.adapter.base_name
    if not stated:
        return Origin()
    base_names = _own_names(bound.base)
    if _bare_name(stated) in {_bare_name(name) for name in base_names}:
        return Origin((f"the adapter names {stated}, and so does the base",))
    before = _name_before_merge(bound.base)
    if not has_findings and before is not None and _bare_name(stated) == _bare_name(before):
        return Origin(doubts=(f"the adapter names {stated}; this base is {before} with adapters merged into it",))
    published = [name for name in base_names if "/" in name]
    if not has_findings and published and "/" in stated and not Path(stated).exists():
        return Origin(doubts=(f"the adapter names {stated}; this base calls itself {published[0]}",))
    return Origin()


def _own_names(base: Checkpoint) -> list[str]:
    """Return the base's names: by its config, by the hub's cache, and by its folder."""
    names = []
    stated = base.config.get("_name_or_path")
    if isinstance(stated, str) and stated:
        names.append(stated)
    names += [
        part.removeprefix("models--").replace("--", "/") for part in base.folder.parts if part.startswith("models--")
    ]
    return [*names, base.folder.resolve().name]


def _bare_name(name: str) -> str:
    """Return a model's name without its organisation, folders and revision, in lower case."""
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def _name_before_merge(base: Checkpoint) -> str | None:
    """Return the name of the model that a merged model was made from, by its manifest; None for any other base."""
    manifest = read_manifest_of((base.stored or base).folder)
    stated = manifest.get("base") if manifest.get("artefact") == "merged model" else None
    name = stated.get("name") if isinstance(stated, dict) else None
    return name if isinstance(name, str) else None
