"""Tokens per CPU second of mixed traffic in vLLM: base, plain LoRA and DuDe of equal rank, 1 to 16 adapters at once.

    python benchmarks/serve_throughput.py [--layers 30] [--rank 16] [--requests 32] [--tokens 16] [--rounds 3]
        [--counts 1 4 16] [--engines no-lora stock plugin] [--json]

A random Llama with the shape of SmolLM2-135M (--layers takes a thinner slice of it) and random adapters on all its
linear layers: speed does not depend on the values. Three engines, each in a process of its own: vLLM without LoRA,
stock vLLM with LoRA (our plugin off), and vLLM with the plugin. In the last one base, LoRA and DuDe traffic alternate,
so that drift of the machine hits all. CPU seconds are those of the engine's process; the machine may do other things
meanwhile. --counts and --engines take a part of the whole, for machines where a long run does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COUNTS = (1, 4, 16)
# traffic in each engine, and its VLLM_PLUGINS
ENGINES: dict[str, tuple[list[str], str | None]] = {
    "no-lora": ([], ""),
    "stock": (["lora"], ""),
    "plugin": (["lora", "dude", "base"], None),
}
HIDDEN, INNER, HEADS, KV_HEADS, VOCAB_PER_LAYER = 576, 1536, 9, 3, 49152 // 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def make_base(folder: Path, layers: int) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB_PER_LAYER * layers,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def make_adapter(folder: Path, layers: int, rank: int, scaled: bool, seed: int) -> None:
    """A factor folder with random values: LoRA, or what a DuDe adapter of half the rank becomes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors, scales = {}, {}
    for layer in range(layers):
        for module, (out, inner) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) / inner**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.01
            if scaled:
                tensors[f"{name}.lora_magnitude_vector"] = torch.ones(out)
                scales[f"{name}.row_scale"] = 1 + 0.05 * torch.randn(out, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    if scaled:
        save_file(scales, folder / "row_scale.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "use_dora": scaled}
    config["target_modules"] = sorted({name.split(".")[1] for name in SHAPES})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def engine(job: dict[str, Any]) -> None:
    """In a process of its own: every measurement of one engine, as JSON into job["out"]."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if job["kinds"]:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        # A slot for every adapter of every kind: no traffic pays for another's loading.
        slots = len(job["kinds"]) * max(job["counts"]) + 1
        options = {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": job["rank"]}
        options["lora_target_modules"] = targets
    llm: Any = LLM(
        job["base"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        distributed_executor_backend="uni",
        **options,
    )
    chooser = random.Random(1)
    prompts = [[chooser.randrange(VOCAB_PER_LAYER * job["layers"]) for _ in range(32)] for _ in range(job["requests"])]
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    numbers = {name: number for number, name in enumerate(job["adapters"], start=1)}

    def run(names: list[str | None]) -> float:
        requests = [None if name is None else LoRARequest(name, numbers[name], job["adapters"][name]) for name in names]
        began = time.process_time()
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=requests if job["kinds"] else None,
            use_tqdm=False,
        )
        return len(names) * job["tokens"] / (time.process_time() - began)

    results: dict[str, list[float]] = {}
    for count in job["counts"] if job["kinds"] else (0,):
        for spread in ("uniform", "skewed") if count > 1 else ("uniform",):
            weights = [1.0 if spread == "uniform" else 1 / (n + 1) for n in range(count)]
            chosen = random.Random(2).choices(range(count), weights, k=job["requests"]) if count else []
            for number in range(job["rounds"] + 1):
                for kind in job["kinds"] or ["base"]:
                    names = [f"{kind}-{n}" for n in chosen] if kind != "base" else [None] * job["requests"]
                    speed = run(names)
                    if number:  # the first round loads the adapters
                        results.setdefault(f"{kind} {count} {spread}", []).append(speed)
    Path(job["out"]).write_text(json.dumps(results))


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "engine":
        engine(json.loads(sys.stdin.read()))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 30), ("rank", 16), ("requests", 32), ("tokens", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="adapters in one traffic")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base", options.layers)
        adapters = {}
        for number in range(max(options.counts)):
            for kind in ("lora", "dude"):
                name = f"{kind}-{number}"
                make_adapter(folder / name, options.layers, options.rank, kind == "dude", number)
                adapters[name] = str(folder / name)
        found = {}
        for name in options.engines:
            kinds, plugins = ENGINES[name]
            found[name] = measure(folder, options, kinds, adapters, plugins)
    if options.json:
        print(json.dumps({"options": vars(options), "tokens_per_cpu_second": found}, indent=2))
        return
    print_table(found)


def measure(
    folder: Path, options: Any, kinds: list[str], adapters: dict[str, str], plugins: str | None
) -> dict[str, float]:
    """The median speed of each traffic in one engine, tokens per CPU second."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    out = folder / "result.json"
    job = {**vars(options), "base": str(folder / "base"), "kinds": kinds, "adapters": adapters, "out": str(out)}
    command = [sys.executable, __file__, "engine"]
    subprocess.run(command, input=json.dumps(job), text=True, env=environment, check=True, stdout=sys.stderr)
    results = json.loads(out.read_text())
    return {name: sorted(speeds)[len(speeds) // 2] for name, speeds in results.items()}


def print_table(found: dict[str, dict[str, float]]) -> None:
    """What was measured, engine by engine; DuDe : LoRA from the one engine that serves both."""
    if "no-lora" in found:
        print(f"vLLM without LoRA: {found['no-lora']['base 0 uniform']:.1f} tokens per CPU second\n")
    stock, plugin = found.get("stock", {}), found.get("plugin", {})
    traffics = list(dict.fromkeys(name.partition(" ")[2] for name in (*stock, *plugin)))
    if traffics:
        print("| adapters | traffic | stock LoRA | LoRA, plugin | DuDe | DuDe : LoRA | base in the LoRA engine |")
        print("|---|---|---|---|---|---|---|")
    for traffic in traffics:
        lora, dude, base = (plugin.get(f"{kind} {traffic}") for kind in ("lora", "dude", "base"))
        ratio = dude / lora if dude and lora else None
        speeds = [_cell(stock.get(f"lora {traffic}")), _cell(lora), _cell(dude)]
        row = [*traffic.split(" "), *speeds, _cell(ratio, 3), _cell(base)]
        print("| " + " | ".join(row) + " |")


def _cell(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
