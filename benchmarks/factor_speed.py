"""Time and error of rank-limited factors against a dense float64 SVD, and against PEFT's convert_to_lora.

    python benchmarks/factor_speed.py weights BASE ADAPTER --rank 16     every weight of a real adapter
    python benchmarks/factor_speed.py shapes --rank 16                   one weight of each shape of a 1.1B Llama
    python benchmarks/factor_speed.py peft BASE ADAPTER --rank 16        PEFT's way, on the adapter loaded by PEFT

One thread each (OMP_NUM_THREADS=1), warm cache. Errors are relative Frobenius errors of dW against float64.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_merge.combine.open_inputs import open_pair
from adapter_merge.factoring.delta_operator import DeltaOperator
from adapter_merge.factoring.randomised_svd import generator, randomised_spectrum
from adapter_merge.factoring.weight_factors import Factoriser
from adapter_merge.methods.canonical_form import CanonicalForm

LLAMA_1B = {"q_proj": (2048, 2048), "k_proj": (256, 2048), "gate_proj": (5632, 2048), "down_proj": (2048, 5632)}


class Rows:
    """A weight in memory, as the operator takes it."""

    resident = True

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape, self.device = weight, tuple(weight.shape), torch.device("cpu")

    def blocks(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.shape[0], 1024):
            yield start, self.weight[start : start + 1024].to(dtype)


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def dense_svd(delta: Tensor, rank: int) -> tuple[float, float]:
    """(seconds, relative error) of the float64 SVD."""
    started = time.perf_counter()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    _ = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return time.perf_counter() - started, norm(s[rank:]) / norm(s)


def shapes(given: argparse.Namespace) -> None:
    for name, (out, inner) in LLAMA_1B.items():
        torch.manual_seed(0)
        weight = (0.02 * torch.randn(out, inner)).to(torch.bfloat16).float()
        up, down = 0.02 * torch.randn(out, 16).double(), 0.02 * torch.randn(16, inner).double()
        magnitude = torch.linalg.vector_norm(weight, dim=1).double() * (1 + 0.01 * torch.randn(out).double())
        form = CanonicalForm(up, down, magnitude=magnitude)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            operator = DeltaOperator(form, Rows(weight))  # type: ignore[arg-type]
            spectrum = randomised_spectrum(operator, operator.total, given.rank, generator(name, torch.device("cpu")))
            left, right = spectrum.factors(given.rank)
            times.append(time.perf_counter() - started)
        delta = form.delta(weight.double())
        error = norm(delta - left @ right) / norm(delta)
        seconds, best = dense_svd(delta, given.rank)
        print(json.dumps({
            "weight": name, "shape": [out, inner], "rank": given.rank, "ours_s": round(min(times), 4),
            "svd_s": round(seconds, 3), "speedup": round(seconds / min(times), 1), "ours_error": round(error, 6),
            "svd_error": round(best, 6), "excess": f"{error / best - 1:.2e}",
        }), flush=True)  # fmt: skip


def weights(given: argparse.Namespace) -> None:
    bound = open_pair(given.base, given.adapter)
    ours = svd = worst = 0.0
    errors = []
    for item in bound.modules:
        started = time.perf_counter()
        work = Factoriser(item.module, item, torch.device("cpu"))
        left, right = work.spectrum(given.rank).factors(given.rank)
        ours += time.perf_counter() - started
        delta = work.delta.dense()
        seconds, best = dense_svd(delta, given.rank)
        svd += seconds
        errors.append(norm(delta - left @ right) / norm(delta))
        worst = max(worst, errors[-1] / best - 1)
    started = time.perf_counter()
    for item in bound.modules:
        work = Factoriser(item.module, item, torch.device("cpu"))
        work.truncated(work.spectrum(given.rank), given.rank)
    certified = time.perf_counter() - started
    print(json.dumps({
        "weights": len(errors), "rank": given.rank, "ours_s": round(ours, 3), "ours_certified_s": round(certified, 3),
        "svd_s": round(svd, 2), "speedup": round(svd / ours, 1), "mean_error": round(sum(errors) / len(errors), 6),
        "worst_excess_over_svd": f"{worst:.2e}",
    }))  # fmt: skip


def peft_way(given: argparse.Namespace) -> None:
    import peft
    import transformers

    from adapter_merge.verification.live_adapter import quiet_libraries

    model: Any
    with warnings.catch_warnings(), quiet_libraries():
        warnings.simplefilter("ignore")
        plain = transformers.AutoModelForCausalLM.from_pretrained(given.base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(plain, given.adapter)
        started = time.perf_counter()
        _, state = peft.convert_to_lora(model, rank=given.rank)
        seconds = time.perf_counter() - started
    bound = open_pair(given.base, given.adapter)
    theirs, ours = [], []
    mine = 0.0
    for item in bound.modules:
        name = item.module.name
        began = time.perf_counter()
        work = Factoriser(item.module, item, torch.device("cpu"))
        found = work.truncated(work.spectrum(given.rank), given.rank)
        mine += time.perf_counter() - began
        delta = work.delta.dense()
        ours.append(found.figures.relative_error)
        a, b = (next(t for key, t in state.items() if f"{name}.lora_{side}" in key).detach().double() for side in "AB")
        theirs.append(norm(delta - b @ a) / norm(delta))
    print(json.dumps({
        "weights": len(ours), "rank": given.rank, "peft_s": round(seconds, 2), "ours_s": round(mine, 2),
        "peft_mean_error": round(sum(theirs) / len(theirs), 4), "ours_mean_error": round(sum(ours) / len(ours), 4),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("weights", weights), ("shapes", shapes), ("peft", peft_way)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--rank", type=int, default=16)
        if name != "shapes":
            command.add_argument("base", type=Path)
            command.add_argument("adapter", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.run(given)


if __name__ == "__main__":
    main()
