"""What every command does on a small base of every quantisation scheme: python benchmarks/quantised_matrix.py

A Llama of two layers (gpt-oss for MXFP4 experts), quantised by the scheme's own library where that packs on a CPU, and
a LoRA and a DoRA that PEFT made beside the unquantised model (a LoRA for gpt-oss). One line per scheme, the worst of
both adapters; what is right comes from PEFT in float64 on the library's dequantised weights:

    dequantised     elements that differ from the library's own dequantisation, of all
    bfloat16        elements of --as bfloat16 that are not the nearest to the right weight, of all adapted ones
    float32         largest |W' - right| / max |right| of --as float32
    same            retention of --as same, and its error |Q(W') - W'| / |dW|
    factor          max |dlogit| of the exact factors in PEFT from the live adapter, beside the adapter's effect
    verify          of --as float32, --as same and the factors, by weights and logits; and whose weights its models have
    serve           the conversion that `serve` hands to vLLM, verified in the same way (no engine runs here)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge" / "api"))

import packed_bases  # type: ignore[import-not-found]
import peft
import test_merge_schemes as oracle  # type: ignore[import-not-found]
import transformers
from pico_bases import TOKENS, quiet, train  # type: ignore[import-not-found]
from quantised_bases import OTHER_PRESETS, PRESETS, config_of, llama, quantised  # type: ignore[import-not-found]
from torch import Tensor

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.quantisation.dense_view import open_base, packed_weights
from adapter_merge.serve.conversion.cache import Cache
from adapter_merge.serve.conversion.served_folder import Converter
from adapter_merge.storage.tensor_io import read_tensor
from adapter_merge.verification.own_quantiser import own_quantiser

SCHEMES = (*PRESETS, *OTHER_PRESETS, "nf4", "int8", *packed_bases.KINDS, "gpt-oss")
READ_ONLY = packed_bases.KINDS
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Dense = dict[str, Tensor]


def make_base(scheme: str, folder: Path) -> tuple[Path, Dense]:
    """Return the base, and its weights as the scheme's library dequantises them."""
    if scheme == "gpt-oss":
        return packed_bases.gpt_oss_base(folder)  # type: ignore[no-any-return]
    if scheme in packed_bases.KINDS:
        return packed_bases.packed_base(scheme, folder, 256)  # type: ignore[no-any-return]
    return quantised(scheme, folder, 256)  # type: ignore[no-any-return]


def make_adapters(scheme: str, base: Path, folder: Path) -> list[Path]:
    """Return adapters that PEFT made beside the unquantised model."""
    plain = folder / "plain"
    with quiet():
        if scheme == "gpt-oss":
            kind = transformers.GptOssForCausalLM
            settings = {key: value for key, value in config_of(base).items() if key != "quantization_config"}
            kind(kind.config_class.from_dict(settings)).save_pretrained(plain)
            configs = [peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS)]
        else:
            llama(256).save_pretrained(plain)
            targets = ["q_proj", "gate_proj", "down_proj"]
            configs = [
                peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora) for dora in (False, True)
            ]
    for number, config in enumerate(configs):
        train(plain, config, folder / str(number))
    return [folder / str(number) for number in range(len(configs))]


def dequantised(base: Path, dense: Dense) -> str:
    view, differ, count = open_base(base), 0, 0
    for name in packed_weights(view):
        got = read_tensor(view.tensors[name])
        differ += int((got != dense[name]).sum())
        count += got.numel()
    return f"{differ} of {count:,}"


def merged_errors(base: Path, folder: Path, right: Dense, dense: Dense) -> tuple[int, int, float]:
    """Of adapted quantised weights: the elements that are not the nearest to the right ones, all, the largest error."""
    wrong = count = 0
    worst = 0.0
    found = oracle.tensors_of(folder)
    for name in packed_weights(open_base(base)):
        value, exact = found[name], right[name]
        if torch.equal(exact, dense[name].double()):
            continue
        wrong += int((value != exact.to(value.dtype)).sum())
        count += value.numel()
        worst = max(worst, float((value.double() - exact).abs().max() / exact.abs().max()))
    return wrong, count, worst


@torch.no_grad()
def row(scheme: str, place: Path) -> str:
    base, dense = make_base(scheme, place / "base")
    cells: dict[str, list[Any]] = {name: [] for name in ("wrong", "worst", "same", "factor", "verify", "serve")}
    count, checks = 0, VerifyOptions(generated=2)
    for adapter in make_adapters(scheme, base, place):
        live = oracle.live_model(dense, config_of(base), adapter)
        expected = live(TOKENS).logits
        with live.disable_adapter():
            effect = float((live(TOKENS).logits - expected).abs().max())
        right = oracle.pefts_weights(live)
        for kind in ("bfloat16", "float32"):
            merge(base, adapter, place / kind, MergeOptions(write_as=kind, overwrite=True))
        wrong, elements, _ = merged_errors(base, place / "bfloat16", right, dense)
        cells["wrong"].append(wrong)
        count += elements
        cells["worst"].append(merged_errors(base, place / "float32", right, dense)[2])
        cells["verify"].append(verify(base, adapter, place / "float32", checks).passed)
        if scheme not in READ_ONLY:
            options = MergeOptions(write_as="same", min_retention=0.0, overwrite=True)
            figures = merge(base, adapter, place / "same", options).as_json()["certificate"]
            cells["same"].append((figures["retention"], figures["relative_error"]))
            cells["verify"].append(verify(base, adapter, place / "same", checks).passed)
        if scheme != "gpt-oss":
            factor(base, adapter, place / "factors", FactorOptions(overwrite=True))
            off = oracle.live_model(dense, config_of(base), place / "factors")(TOKENS).logits - expected
            cells["factor"].append((float(off.abs().max()), effect))
            cells["verify"].append(verify(base, adapter, place / "factors", checks).passed)
            served = Converter(base, Cache(place / "cache")).obtain(adapter)
            cells["serve"].append(verify(base, adapter, served.folder, checks).passed)
    same = " / ".join(f"{kept:.2f}, {error:.2f}" for kept, error in cells["same"]) or "-"
    off = max(cells["factor"])[0] if cells["factor"] else None
    factors = "-" if off is None else f"{off:.1g} of {min(effect for _, effect in cells['factor']):.2g}"
    source = "transformers" if own_quantiser(open_base(base)) is not None else "read here"
    verdicts = f"{sum(cells['verify'])} of {len(cells['verify'])} pass, {source}"
    serve = f"{sum(cells['serve'])} of {len(cells['serve'])}" if cells["serve"] else "-"
    return (
        f"| {scheme} | {dequantised(base, dense)} | {sum(cells['wrong'])} of {count:,} | {max(cells['worst']):.1g} | "
        f"{same} | {factors} | {verdicts} | {serve} |"
    )


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        "| scheme | dequantised | bfloat16 | float32 | same: retention, error (LoRA / DoRA) | factor | verify | serve |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for scheme in sys.argv[1:] or SCHEMES:
        place = Path(tempfile.mkdtemp())
        try:
            print(row(scheme, place), flush=True)
        finally:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
