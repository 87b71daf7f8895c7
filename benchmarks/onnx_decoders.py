"""Speed, size and parity of ONNX exports of a decoder, everything in one run, alternating.

    python benchmarks/onnx_decoders.py [--base FOLDER] [--work FOLDER] [--rounds 5] [--threads 2] [--only speed]

Compared: onnxruntime-genai's own builder (as it comes), our merged export, our switchable export with no adapter
and with random LoRA adapters of rank 8 and 16 on every linear, transformers eager and, with --optimum, a graph made
by optimum-onnx. All sessions are open in one process and decode in bursts of BURST steps, in another order in every
sweep. A ratio is that of two bursts of one sweep, about a second apart, so that the machine's own changes of speed
cancel; reported are the median and the quartiles of all sweeps, and the median of every round: a round opens all
sessions anew, because where the weights happen to lie in memory moves a session by up to 4 %. On a machine that others
use as well, --clock cpu --threads 1 counts the process's own CPU seconds. Parity: the shipped DCFT and DuDe adapters
and a LoRA, in all three modes, against torch; greedy answers of 200 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPT, PREFILLS = 256, 4
SWEEPS, BURST, PAUSE = 24, 7, 0.05
DECODE = SWEEPS * BURST
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter
GREEDY = 200


def random_lora(base: Path, folder: Path, rank: int, seed: int) -> Path:
    """A PEFT LoRA folder with small random factors on every linear of the layers."""
    from safetensors.torch import save_file

    from adapter_merge.storage.checkpoint import open_checkpoint

    generator = torch.Generator().manual_seed(seed)
    tensors, modules = {}, set()
    for name, ref in open_checkpoint(base).tensors.items():
        if ".layers." in name and len(ref.shape) == 2:
            module = name.removesuffix(".weight")
            out, inner = ref.shape
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * inner**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.02
            modules.add(module.rpartition(".")[2])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "bias": "none",
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class OnnxRunner:
    """An export with one adapter, or none: seconds of a prefill, then of single steps."""

    def __init__(self, folder: Path, adapter: str | None, threads: int) -> None:
        from adapter_merge.export.engine.decoder_session import Decoder

        self.decoder, self.adapter = Decoder(folder, threads=threads), adapter

    def prefill(self) -> float:
        self.cache = self.decoder.start(PROMPT + DECODE, self.adapter)
        start = clock()
        self.decoder.step(self.cache, (np.arange(PROMPT) % 1000 + 5)[None])
        return clock() - start

    def step(self, token: int) -> float:
        start = clock()
        self.decoder.step(self.cache, np.array([[token + 7]]))
        return clock() - start


class EagerRunner:
    """The same for transformers eager in float32."""

    def __init__(self, base: Path, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    @torch.no_grad()
    def prefill(self) -> float:
        ids = (torch.arange(PROMPT) % 1000 + 5)[None]
        start = clock()
        self.cache = self.model(input_ids=ids, use_cache=True).past_key_values
        return clock() - start

    @torch.no_grad()
    def step(self, token: int) -> float:
        start = clock()
        self.model(input_ids=torch.tensor([[token + 7]]), past_key_values=self.cache, use_cache=True)
        return clock() - start


def plain_build(base: Path, folder: Path) -> None:
    """onnxruntime-genai's own builder with its defaults; stamped, so that our runner reads it."""
    import onnx_ir as ir

    from adapter_merge.export.folder.contents import save_graph
    from adapter_merge.export.graph.insertion import stamp
    from adapter_merge.export.graph.targets import Layout

    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(base), "-o", str(folder)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(folder.parent / "cache"), "--extra_options", "hf_token=false"]
    subprocess.run(command, check=True, capture_output=True)
    model = ir.load(folder / "model.onnx")
    stamp(model, Layout("merged", "", "fp32", "float32", (), {}))
    save_graph(model, folder / "model.onnx")


def alternate(runners: dict[str, Any], order: random.Random) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every prefill but the first, and a step's median in every burst, the runners taking turns.

    A burst follows a pause of the others' threads: onnxruntime's spin for a while, and would take a core. Its first
    step warms up.
    """
    prefill: dict[str, list[float]] = {name: [] for name in runners}
    decode: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(PREFILLS + 1):
        for name in order.sample(list(runners), len(runners)):
            time.sleep(PAUSE)
            prefill[name].append(runners[name].prefill())
    for sweep in range(0, DECODE, BURST):
        for name in order.sample(list(runners), len(runners)):
            time.sleep(PAUSE)
            burst = [runners[name].step(sweep + index) for index in range(BURST)]
            decode[name].append(statistics.median(burst[1:]))
    return {name: found[1:] for name, found in prefill.items()}, decode


class OptimumRunner:
    """The same for an export of optimum-onnx: a plain graph that returns a new cache with every step."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def _run(self, ids: np.ndarray[Any, Any]) -> float:
        start = clock()
        binding = self.session.io_binding()
        total = self.length + ids.shape[1]
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if "position_ids" in self.inputs:
            binding.bind_cpu_input("position_ids", np.arange(self.length, total)[None])
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        self.cache = {name: values[name.replace("past_key_values", "present")] for name in self.cache}
        self.length = total
        values["logits"].numpy()
        return clock() - start

    def prefill(self) -> float:
        import onnxruntime

        self.length, self.cache = 0, {}
        for name, value in self.inputs.items():
            if name.startswith("past_key_values"):
                empty = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
                self.cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        return self._run((np.arange(PROMPT) % 1000 + 5)[None])

    def step(self, token: int) -> float:
        return self._run(np.array([[token + 7]]))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def speed(base: Path, work: Path, rounds: int, threads: int, optimum: Path | None) -> dict[str, Any]:
    """Medians, ratios, sizes, switch and add times."""
    from adapter_merge.export.adding import add_adapters
    from adapter_merge.export.engine.decoder_session import Decoder
    from adapter_merge.export.exporting import export_model

    adapters = {f"r{rank}": work / f"r{rank}" for rank in (8, 16)}
    if not (work / "switchable").exists():  # the folders of an earlier run are taken as they are
        for rank in (8, 16):
            random_lora(base, adapters[f"r{rank}"], rank, rank)
        plain_build(base, work / "builder")
        export_model(base, {"r16": adapters["r16"]}, work / "merged", mode="merged")
        export_model(base, adapters, work / "switchable", mode="switchable")
    start = time.perf_counter()
    add_adapters(work / "switchable", {"late": adapters["r16"]}, overwrite=True)
    adding = time.perf_counter() - start
    from adapter_merge.demo.walkthrough import adapter_folder

    start = time.perf_counter()
    add_adapters(work / "switchable", {"dude": adapter_folder("dude-json")}, overwrite=True)
    adding_dude = time.perf_counter() - start

    openers: dict[str, Callable[[], OnnxRunner | EagerRunner]] = {
        "builder": lambda: OnnxRunner(work / "builder", None, threads),
        "merged": lambda: OnnxRunner(work / "merged", None, threads),
        "switchable, none": lambda: OnnxRunner(work / "switchable", None, threads),
        "switchable, rank 8": lambda: OnnxRunner(work / "switchable", "r8", threads),
        "switchable, rank 16": lambda: OnnxRunner(work / "switchable", "r16", threads),
        "transformers eager": lambda: EagerRunner(base, threads),
    }
    if optimum is not None:
        openers["optimum-onnx"] = lambda: OptimumRunner(optimum, threads)
    prefills: dict[str, list[list[float]]] = {name: [] for name in openers}  # one list a round
    steps: dict[str, list[list[float]]] = {name: [] for name in openers}
    for index in range(rounds):
        order = random.Random(index)
        runners = {name: openers[name]() for name in order.sample(list(openers), len(openers))}
        prefill, decode = alternate(runners, order)
        for name in openers:
            prefills[name].append(prefill[name])
            steps[name].append(decode[name])
        del runners
    decoder = Decoder(work / "switchable", threads=threads)
    loads, switches = [], []
    for name in ("r8", "r16", "dude", "late"):
        start = time.perf_counter()
        decoder.load(name)
        loads.append(time.perf_counter() - start)
    for _ in range(20):
        for name in ("r8", "r16"):
            start = time.perf_counter()
            decoder.load(name)
            switches.append(time.perf_counter() - start)

    def ratio(seen: dict[str, list[list[float]]], name: str, other: str) -> dict[str, Any]:
        found = [
            [theirs / mine for mine, theirs in zip(*pair, strict=True)]
            for pair in zip(seen[name], seen[other], strict=True)
        ]
        low, middle, high = np.quantile(np.concatenate(found), (0.25, 0.5, 0.75)).round(3).tolist()
        by_round = [round(statistics.median(values), 3) for values in found]
        return {"median": middle, "quartiles": [low, high], "rounds": by_round}

    report: dict[str, Any] = {}
    for name in openers:
        report[name] = {
            "prefill_tokens_per_second": round(PROMPT / float(np.median(prefills[name])), 1),
            "decode_tokens_per_second": round(1 / float(np.median(steps[name])), 2),
        }
        for other in ("builder", "merged", "transformers eager"):
            report[name][f"decode_vs_{other.split()[-1]}"] = ratio(steps, name, other)
            report[name][f"prefill_vs_{other.split()[-1]}"] = ratio(prefills, name, other)
    report["load_an_adapter_ms"] = round(statistics.median(loads) * 1e3, 2)
    report["switch_ms"] = round(statistics.median(switches) * 1e3, 4)
    report["add_lora_seconds"] = round(adding, 2)
    report["add_dude_seconds"] = round(adding_dude, 2)
    files = sum(path.stat().st_size for path in (work / "switchable").glob("*.onnx_adapter"))
    report["bytes"] = {
        "builder": size(work / "builder"),
        "switchable without its adapters": size(work / "switchable") - files,
        "adapters": files,
    }
    return report


def parity(base: Path, work: Path) -> list[dict[str, Any]]:
    """Every adapter in every mode: largest logit difference over 256 tokens, greedy answers of GREEDY tokens."""
    from adapter_merge.demo.walkthrough import adapter_folder
    from adapter_merge.export.checking.verdict import reference_model
    from adapter_merge.export.checking.verification import torch_greedy, verify_onnx
    from adapter_merge.export.engine.decoder_session import Decoder
    from adapter_merge.export.exporting import export_model

    adapters = {"lora": work / "r8", "dcft": adapter_folder("dcft-pirate"), "dude": adapter_folder("dude-json")}
    export_model(base, adapters, work / "parity-switchable", mode="switchable")
    export_model(base, adapters, work / "parity-batched", mode="batched")
    prompt = [(37 * index + 11) % 40000 for index in range(48)]
    found = []
    for name, source in ((None, None), *adapters.items()):
        model = reference_model(base, source)
        wanted = torch_greedy(model, prompt, GREEDY)
        del model
        merged = work / "parity-merged"
        shutil.rmtree(merged, ignore_errors=True)
        export_model(base, {name: source} if name and source else {}, merged, mode="merged")
        for mode in ("merged", "switchable", "batched"):
            folder = work / f"parity-{mode}"
            report = verify_onnx(base, source, folder, name=name)
            decoder = Decoder(folder)
            cache = decoder.start(len(prompt) + GREEDY, None if mode == "merged" else name)
            logits, chosen = decoder.step(cache, np.asarray([prompt])), []
            for _ in range(GREEDY):
                chosen.append(int(logits[0, -1].argmax()))
                logits = decoder.step(cache, np.asarray([chosen[-1:]]))
            found.append(
                {
                    "adapter": name or "base",
                    "mode": mode,
                    "max_difference": report["logits"]["max_difference"],
                    "effect": report["logits"]["effect"],
                    "passed": report["passed"],
                    "greedy_equal": sum(a == b for a, b in zip(chosen, wanted, strict=True)),
                    "greedy_total": GREEDY,
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("smollm2-135m"))
    parser.add_argument("--work", type=Path, default=Path("onnx-benchmark"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu with --threads 1: a busy machine")
    parser.add_argument("--only", choices=("speed", "parity"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--optimum", type=Path, help="an export of optimum-onnx to compare with")
    options = parser.parse_args()
    global clock
    clock = CLOCKS[options.clock]
    from adapter_merge.demo.smollm2 import obtain_base

    base = obtain_base(options.base) if not options.base.exists() else options.base
    options.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"clock": options.clock, "threads": options.threads, "rounds": options.rounds}
    if options.only != "parity":
        report["speed"] = speed(base, options.work, options.rounds, options.threads, options.optimum)
        for name, found in report["speed"].items():
            print(f"{name}: {json.dumps(found)}", flush=True)
    elif not (options.work / "r8").exists():
        random_lora(base, options.work / "r8", 8, 8)
    if options.only != "speed":
        report["parity"] = parity(base, options.work)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
