"""Latency of other requests while a server converts adapters: `adapter-merge serve --adapter-dir`, on this machine.

    python benchmarks/serve_conversions.py [--layers 6] [--rank 16] [--adapters 20] [--seconds 20] [--json]

A random Llama with the widths of SmolLM2-135M and DoRA adapters on all its linear layers. One client asks the base for
one token at a time, over and over: first alone, then while others ask at once for adapters that were never asked for.
The server converts each, loads it and answers. Milliseconds, as the client sees them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_throughput import SHAPES, make_base


def write_tokenizer(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_dora(folder: Path, base: Path, layers: int, rank: int, seed: int) -> None:
    """A PEFT DoRA folder whose magnitudes lie near the norms of the base's rows."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for layer in range(layers):
        for module, (out, inner) in SHAPES.items():
            name = f"model.layers.{layer}.{module}"
            tensors[f"base_model.model.{name}.lora_A.weight"] = (
                torch.randn(rank, inner, generator=generator) / inner**0.5
            )
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.01
            noise = 1 + 0.02 * torch.randn(out, generator=generator)
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = weights[f"{name}.weight"].norm(dim=1) * noise
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "use_dora": True}
    config["target_modules"] = sorted({name.split(".")[1] for name in SHAPES})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def ask(url: str, model: str) -> float:
    """Milliseconds for one token of `model`."""
    content = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()
    return (time.monotonic() - began) * 1000


def share(times: list[float], part: float) -> float:
    return sorted(times)[min(len(times) - 1, int(part * len(times)))]


def summary(times: list[float]) -> dict[str, float]:
    return {
        "requests": len(times),
        "p50": round(share(times, 0.5), 1),
        "p99": round(share(times, 0.99), 1),
        "max": round(max(times), 1),
    }


def measure(url: str, names: list[str], seconds: float) -> dict[str, dict[str, float]]:
    for _ in range(20):
        ask(url, "base")
    alone: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alone.append(ask(url, "base"))
    beside: list[float] = []
    done = threading.Event()

    def others() -> None:
        while not done.is_set():
            beside.append(ask(url, "base"))

    watcher = threading.Thread(target=others)
    watcher.start()
    with ThreadPoolExecutor(len(names)) as pool:
        first = list(pool.map(lambda name: ask(url, name), names))
    done.set()
    watcher.join()
    return {
        "the base, alone": summary(alone),
        f"the base, while {len(names)} adapters are converted": summary(beside),
        "the adapters' first requests": summary(first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 6), ("rank", 16), ("adapters", 20), ("seconds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as probe:
        folder = Path(temporary)
        make_base(folder / "base", options.layers)
        write_tokenizer(folder / "base")
        names = [f"dora-{number}" for number in range(options.adapters)]
        for number, name in enumerate(names):
            make_dora(folder / "adapters" / name, folder / "base", options.layers, options.rank, number)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, "-m", "adapter_merge", "serve", str(folder / "base")]
        command += ["--adapter-dir", str(folder / "adapters"), "--port", str(port), "--max-active", "4"]
        command += ["--", "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "256", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
        environment = {
            **os.environ,
            "ADAPTER_MERGE_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        server = subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno())
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except (urllib.error.URLError, OSError):
                    if server.poll() is not None:
                        raise SystemExit("the server did not start") from None
                    time.sleep(0.5)
            found = measure(f"http://127.0.0.1:{port}/v1", names, options.seconds)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=120)
    if options.json:
        print(json.dumps({"options": vars(options), "milliseconds": found}, indent=2))
        return
    print("| requests to | count | p50 ms | p99 ms | longest ms |\n|---|---|---|---|---|")
    for kind, row in found.items():
        print(f"| {kind} | {row['requests']:.0f} | {row['p50']} | {row['p99']} | {row['max']} |")


if __name__ == "__main__":
    main()
