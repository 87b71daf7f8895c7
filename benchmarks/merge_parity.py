"""Parity of merges and factors with PEFT and the DCFT formula, as a table: python benchmarks/merge_parity.py

Pico models of six architectures, float32: max |dlogit| of the merged model and of the factor folder in plain PEFT
against the live, unmerged adapter; bf16: elements that differ from PEFT's merge_and_unload(safe_merge=False), and how
many of each are not the correct rounding of the float64 result; DCFT: relative error of dW from its float32 factors.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "merge"))

import pico  # type: ignore[import-not-found]

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.methods.dcft import dcft_factors


def load(folder: Path, kind: str) -> Any:
    return type(pico.pico_model(kind)).from_pretrained(folder, dtype="auto").eval()


def distance(got: torch.Tensor, want: torch.Tensor) -> str:
    equal = "" if torch.equal(got.argmax(-1), want.argmax(-1)) else " GREEDY DIFFERS"
    return f"{float((got - want).abs().max()):.1e}{equal}"


def peft_row(kind: str, method: str, place: Path) -> str:
    import peft

    model = pico.pico_model(kind)
    base = pico.save_base(model, place / "base")
    want = pico.logits(pico.peft_adapter(model, kind, place / "adapter", **pico.METHODS[method]))
    merge(base, place / "adapter", place / "merged")
    factor(base, place / "adapter", place / "factors")
    factors = peft.PeftModel.from_pretrained(load(base, kind), place / "factors").eval()
    merged = distance(pico.logits(load(place / "merged", kind)), want)
    return f"{merged} / {distance(pico.logits(factors), want)}"


def dcft_row(kind: str, place: Path) -> str:
    import peft

    if kind == "gpt2":
        return "- (the reference adapts nn.Linear only)"
    model = pico.dcft_model(kind)
    want = pico.logits(model)
    checkpoint = pico.save_dcft_checkpoint(model, place / "checkpoint")
    merge(None, checkpoint, place / "merged")
    factor(None, checkpoint, place / "factors")
    base = pico.save_base(pico.pico_model(kind), place / "base")
    factors = peft.PeftModel.from_pretrained(load(base, kind), place / "factors").eval()
    merged = distance(pico.logits(load(place / "merged", kind)), want)
    return f"{merged} / {distance(pico.logits(factors), want)}"


def bits(method: str, place: Path) -> str:
    import peft

    model = pico.pico_model("llama", torch.bfloat16)
    base = pico.save_base(model, place / "base")
    live = pico.peft_adapter(model, "llama", place / "adapter", **pico.METHODS[method])
    exact = {}
    for name, layer in live.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            after = layer.get_base_layer().weight.double() + layer.scaling["default"] * (b @ a)
            if "default" in layer.lora_magnitude_vector:
                after *= (layer.lora_magnitude_vector["default"].weight.double() / after.norm(dim=1))[:, None]
            exact[name.removeprefix("base_model.model.") + ".weight"] = after.to(torch.bfloat16)
    want = live.merge_and_unload().state_dict()
    merge(base, place / "adapter", place / "merged")
    got = load(place / "merged", "llama").state_dict()
    differ = sum(int((got[name] != tensor).sum()) for name, tensor in want.items())
    ours = sum(int((got[name] != right).sum()) for name, right in exact.items())
    theirs = sum(int((want[name] != right).sum()) for name, right in exact.items())
    count = sum(right.numel() for right in exact.values())
    return f"{differ} of {count} differ; from the rounded float64 result: ours {ours}, PEFT {theirs}"


def dcft_errors() -> None:
    for size in (2, 4, 8, 12, 16):
        torch.manual_seed(size)
        a, b, c = torch.randn(1, 48), torch.randn(17, 1), torch.randn(size, size)
        scale = 32 / (4 + 1e-5)
        image = (a.double().T @ b.double().T)[None, None]
        want = torch.nn.functional.conv_transpose2d(image, c.double()[None, None], stride=size)[0, 0].T * scale
        up, down = dcft_factors(a, b, c, (size, size), scale)
        error = float((up.float() @ down.float() - want).norm() / want.norm())
        print(f"k = {size:>2}, {want.shape[0]} x {want.shape[1]}, rank {down.shape[0]:>2}: {error:.1e}")


def main() -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        print("max |dlogit|, float32: merged / factors in PEFT")
        for kind in pico.ARCHITECTURES:
            for method in pico.METHODS:
                print(f"  {kind:<8} {method:<7} {peft_row(kind, method, root / f'{kind}-{method}')}")
            print(f"  {kind:<8} {'dcft':<7} {dcft_row(kind, root / f'{kind}-dcft')}")
        print("bf16 merge against PEFT's merge_and_unload, llama")
        for method in pico.METHODS:
            print(f"  {method:<7} {bits(method, root / f'bits-{method}')}")
    print("DCFT factors, relative error of dW")
    dcft_errors()


if __name__ == "__main__":
    main()
