"""How fast and in how much memory a quantised base merges into bfloat16, beside `cp` of the base and of the output.

    python benchmarks/quantised_merge.py SCRATCH [--size 8b] [--scheme fp8 int4 gptq nf4] [--as bfloat16] [--rounds 1]

Bases have real models' shapes and random codes and scales (benchmarks/synthetic.py); a LoRA of rank 16 adapts every
linear. What is measured:

    cp in       wall time of `cp` of the base's weights, until they are on the disk
    cp out      the same for the merged weights, which are two to four times as large
    process     `adapter-merge merge --as ...` from start to end: imports, checks, hashes of all files, manifest
    rss         peak of the whole process (VmHWM), and what a process that only imports torch has
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from merge_speed import BARE, PROCESS, clear, copy, python, warm
from synthetic import SIZES, Size, tensors, write_adapter

from adapter_merge.storage.safetensors_header import ITEM_BYTES, layout

Entry = tuple[str, str, tuple[int, ...]]
GROUP, BLOCK = 128, 128
PIECE = 16 << 20
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None,
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "output_activations": None,
                                  "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                                              "group_size": GROUP, "dynamic": False}}},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "int4": COMPRESSED,
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
             "checkpoint_format": "gptq"},
}  # fmt: skip


def packed(scheme: str, name: str, shape: tuple[int, ...]) -> list[Entry]:
    """The stored tensors of one linear."""
    module, (out, inner) = name.removesuffix(".weight"), shape
    if scheme == "fp8":
        grid = (-(-out // BLOCK), -(-inner // BLOCK))
        return [(name, "F8_E4M3", shape), (f"{name}_scale_inv", "F32", grid)]
    if scheme == "int4":
        return [(f"{name}_packed", "I32", (out, inner // 8)), (f"{name}_scale", "BF16", (out, inner // GROUP)),
                (f"{name}_shape", "I64", (2,))]  # fmt: skip
    return [(f"{module}.qweight", "I32", (inner // 8, out)), (f"{module}.qzeros", "I32", (inner // GROUP, out // 8)),
            (f"{module}.scales", "F16", (inner // GROUP, out)), (f"{module}.g_idx", "I32", (inner,))]  # fmt: skip


def stored(scheme: str, size: Size) -> Iterator[Entry]:
    for name, dtype, shape in tensors(size):
        yield from packed(scheme, name, shape) if "_proj" in name else [(name, dtype, shape)]


def content(entry: Entry, dense: tuple[int, ...] | None, noise: torch.Tensor) -> Iterator[bytes]:
    """The bytes of one stored tensor."""
    name, dtype, shape = entry
    count = torch.Size(shape).numel()
    if name.endswith("_shape"):
        assert dense is not None
        yield torch.tensor(dense).numpy().tobytes()
    elif name.endswith("g_idx"):
        yield (torch.arange(count) // GROUP).int().numpy().tobytes()
    elif dtype in ("F32", "F16", "BF16"):
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
        values = (torch.rand(min(count, PIECE)) * 1e-3 + 1e-4).to(kind).view(torch.uint8).numpy().tobytes()
        left = count * ITEM_BYTES[dtype]
        while left:
            yield values[:left]
            left -= min(left, len(values))
    else:
        left = count * ITEM_BYTES[dtype]
        while left:
            yield noise.numpy().data[: min(left, PIECE)]
            left -= min(left, PIECE)


def write_base(folder: Path, scheme: str, size_name: str) -> None:
    """The quantised base, once."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    size = SIZES[size_name]
    entries = list(stored(scheme, size))
    shapes = {name.removesuffix(".weight"): shape for name, _, shape in tensors(size)}
    total = sum(torch.Size(shape).numel() * ITEM_BYTES[dtype] for _, dtype, shape in entries)
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if (
            held > total / size.shards
            and len(shards) < size.shards
            and not entry[0].endswith(("scale_inv", "_scale", "_shape", "qzeros", "scales", "g_idx"))
        ):
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += torch.Size(entry[2]).numel() * ITEM_BYTES[entry[1]]
    noise = torch.randint(0, 255, (PIECE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise[noise & 0x7F == 0x7F] = 0  # NaN in E4M3
    weight_map = {}
    for number, part in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        head, refs = layout(file, part, {"format": "pt"})
        with file.open("wb") as stream:
            stream.write(head)
            for ref in refs:
                weight_map[ref.name] = file.name
                module = ref.name.rpartition(".")[0]
                for piece in content((ref.name, ref.dtype, ref.shape), shapes.get(module), noise):
                    stream.write(piece)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "vocab_size": size.vocabulary,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "quantization_config": CONFIGS[scheme],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--size", default="1.1b", choices=sorted(SIZES))
    parser.add_argument("--scheme", nargs="+", default=["fp8", "int4", "gptq"], choices=sorted(CONFIGS))
    parser.add_argument("--as", dest="write_as", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-hashes", action="store_true")
    given = parser.parse_args()
    adapter = given.scratch / given.size / "lora"
    write_adapter(adapter, given.size, "lora")
    print("scheme   base GB  output GB  cp in  cp out  process  rss MB")
    for scheme in given.scheme:
        base, out = given.scratch / given.size / scheme, given.scratch / "out"
        write_base(base, scheme, given.size)
        files = sorted(base.glob("*.safetensors"))
        rows = []
        for _ in range(given.rounds):
            warm(files)
            _, read = copy(files, given.scratch / "copy")
            clear(given.scratch / "copy")
            clear(out)
            extra = ["--as", given.write_as, *(["--no-hashes"] if given.no_hashes else [])]
            whole = python(PROCESS, base, adapter, out, "--device", "cpu", *extra)
            made = sorted(out.glob("*.safetensors"))
            written = sum(file.stat().st_size for file in made)
            _, write = copy(made, given.scratch / "copy")
            clear(given.scratch / "copy")
            clear(out)
            rows.append((read, write, whole["process"], whole["rss"] / 1e6))
        read, write, process, rss = (statistics.median(column) for column in zip(*rows, strict=True))
        size = sum(file.stat().st_size for file in files)
        print(f"{scheme:8} {size / 1e9:7.2f} {written / 1e9:10.2f} {read:6.1f} {write:7.1f} {process:8.1f} {rss:7.0f}")
    print(f"bare import torch: {python(BARE)['rss'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
