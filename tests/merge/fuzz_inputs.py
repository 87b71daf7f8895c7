"""Cases of changed bases, recipes, and folders that adapter-merge wrote: refused, or right by a reader of another hand.

benchmarks/fuzz.py runs them, beside those of adapters (fuzz_folders.py), pickles (pickle_files.py) and headers. Case i
of a seed is always the same.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_folders as folders
import torch
from merge_models import RANK, base_tensors, write_base, write_lora
from safetensors.torch import load, load_file, save, save_file

from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, RestoreOptions
from adapter_merge.api.restore import restore
from adapter_merge.combine.recipe import read_recipe
from adapter_merge.errors import AdapterMergeError
from adapter_merge.outputs.attestation import attest
from adapter_merge.outputs.integrity import check_integrity
from adapter_merge.outputs.manifest_seal import sealed

Files = dict[str, bytes]
CPU = MergeOptions(device="cpu", workers=1, link="copy")
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "dtype": "bfloat16",
    "_name_or_path": "org/base", "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 50, "auto_map": {},
    "rope_parameters": {"rope_type": "default"}, "text_config": None,
}  # fmt: skip
BLOCK = 32


class Wrong(AssertionError):
    """What was read is not what another reader reads."""


def files_of(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def change_json(files: Files, pick: random.Random) -> None:
    """Another value at any place of one of the JSON files, or a key more or less; a manifest is mostly sealed again."""
    name = pick.choice([name for name in sorted(files) if name.endswith(".json")] or sorted(files))
    try:
        content = json.loads(files[name])
    except ValueError:
        return
    for _ in range(pick.choice((1, 1, 2))):
        target, key = content, None
        while isinstance(target, dict | list) and target and (key is None or pick.random() < 0.7):
            key = pick.choice(sorted(target) if isinstance(target, dict) else range(len(target)))
            if not isinstance(target[key], dict | list) or not target[key]:
                break
            target, key = target[key], None
        if key is None or not isinstance(target, dict | list):
            continue
        if isinstance(target, dict) and pick.random() < 0.2:
            del target[key]
        elif isinstance(target, dict) and pick.random() < 0.1:
            other = pick.choice(["x", "", "..", "/etc/passwd", "a" * 300, "a\nb"])
            target[other] = copy.deepcopy(target[key])
        else:
            target[key] = copy.deepcopy(pick.choice([*folders.WEIRD, "..", "/etc/passwd", "\x1b[31m"]))
    if name.endswith("adapter_merge.json") and isinstance(content, dict) and pick.random() < 0.8:
        try:
            content = sealed(content)
        except (ValueError, UnicodeEncodeError):
            return
    files[name] = json.dumps(content).encode("utf-8", "surrogatepass")


def change_bytes(files: Files, pick: random.Random) -> None:
    action = pick.choice((folders.truncate_file, folders.flip_bytes, folders.flip_bytes, folders.random_file,
                          folders.lie_about_length, folders.drop_file, folders.append_bytes))  # fmt: skip
    action(files, pick)


# -- bases -----------------------------------------------------------------------------------------------


def fp8_base(folder: Path) -> Path:
    """Weights in float8 with a scale for each block of 32 x 32, as DeepSeek's are stored."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in base_tensors(layers=1, dtype=torch.float32).items():
        if ".layers." not in name or tensor.dim() < 2:
            tensors[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            continue
        grid = (-(-tensor.shape[0] // BLOCK), -(-tensor.shape[1] // BLOCK))
        scale = 0.01 + 0.001 * torch.arange(math.prod(grid), dtype=torch.float32).view(grid)
        tensors[name] = (tensor / spread(scale, tensor.shape)).clamp(-400, 400).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantisation}))
    return folder


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


class Bases:
    """Changed bases: config, index, headers, shards, pickles, scales. Oracle: the formula in float64."""

    def __init__(self, work: Path) -> None:
        tensors = base_tensors(layers=1)
        self.adapter = write_lora(work / "adapter", tensors)
        self.seeds = {
            "sharded": files_of(write_base(work / "sharded", tensors, 2, CONFIG)),
            "fp8": files_of(fp8_base(work / "fp8")),
        }
        stream = io.BytesIO()
        torch.save(tensors, stream)
        self.seeds["pickled"] = {"pytorch_model.bin": stream.getvalue(), "config.json": json.dumps(CONFIG).encode()}

    def case(self, pick: random.Random, place: Path) -> str:
        kind = pick.choice(sorted(self.seeds))
        files = dict(self.seeds[kind])
        weights = {name: data for name, data in files.items() if name.endswith((".safetensors", ".bin"))}
        how = pick.choice(("json", "bytes", "header", "values"))
        if how == "json":
            change_json(files, pick)
        elif how == "bytes":
            change_bytes(files, pick)
        else:
            name = pick.choice(sorted(weights))
            one = {name: files[name]}
            (folders.change_header if how == "header" else folders.change_tensors)(one, pick)
            files |= one
        base = write(place / "base", files)
        options = MergeOptions(device="cpu", workers=1, link="copy", write_as="bfloat16" if kind == "fp8" else None)
        merge(base, self.adapter, place / "out", options)
        self.compare(base, load_file_all(place / "out"), kind)
        return f"{how} of {kind}"

    def compare(self, base: Path, merged: dict[str, torch.Tensor], kind: str) -> None:
        held = load_file_all(base)
        factors = load_file(self.adapter / "adapter_model.safetensors")
        scale = json.loads((self.adapter / "adapter_config.json").read_text())["lora_alpha"] / RANK
        for name, after in merged.items():
            before = held[name].double() if held[name].is_floating_point() else held[name]
            inverse = held.get(f"{name}_scale_inv")
            if kind == "fp8" and inverse is not None and held[name].dtype == torch.float8_e4m3fn:
                before = before * spread(inverse.double(), before.shape)
            a, step = None, torch.zeros(())
            for prefix in ("base_model.model.", "base_model.model.model."):  # a base's names may lack "model."
                module = f"{prefix}{name.removesuffix('.weight')}"
                if f"{module}.lora_A.weight" in factors:
                    a, b = (factors[f"{module}.lora_{part}.weight"].double() for part in "AB")
            if a is not None:
                step = torch.finfo(after.dtype).eps * before.abs()  # the library's own dequantisation rounds too
                before = before + scale * b @ a
            elif held[name].dtype == after.dtype:
                if held[name].reshape(-1).view(torch.uint8).tolist() != after.reshape(-1).view(torch.uint8).tolist():
                    raise Wrong(f"{name} was to be carried over, and differs")
                continue
            off = (after.double() - before).abs()
            step = step + torch.finfo(after.dtype).eps * before.abs() + 1e-6 * before.abs().max()
            if not bool((off <= step).all()):
                raise Wrong(f"{name} is off by {float(off.max()):.3g}")


def load_file_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load(file.read_bytes())
    for file in sorted(folder.glob("pytorch_model.bin")):
        found |= torch.load(file, weights_only=True)
    return found


# -- what adapter-merge wrote ------------------------------------------------------------------------------


class Outputs:
    """Changed merged models with their pre-images. Oracle: the base's files, and the bytes that were written."""

    def __init__(self, work: Path) -> None:
        tensors = base_tensors(layers=1)
        self.base = write_base(work / "base", tensors, 2, CONFIG)
        self.adapter = write_lora(work / "adapter", tensors)
        merge(self.base, self.adapter, work / "merged", MergeOptions(device="cpu", keep_preimage=True))
        self.files, self.base_files = files_of(work / "merged"), files_of(self.base)
        self.tensors = load_file_all(self.base)

    def case(self, pick: random.Random, place: Path) -> str:
        files = dict(self.files)
        how = pick.choice(("json", "json", "bytes"))
        (change_json if how == "json" else change_bytes)(files, pick)
        folder, out = write(place / "merged", files), place / "out"
        jobs: dict[str, Callable[[], object]] = {
            "check": lambda: check_integrity(folder),
            "attest": lambda: attest(folder),
            "restore": lambda: restore(folder, out),
            "restore from base": lambda: restore(folder, out, RestoreOptions(base=self.base)),
            "inspect": lambda: inspect(folder),
            "merge again": lambda: merge(folder, self.adapter, out, MergeOptions(device="cpu", dry_run=True)),
            "replace": lambda: merge(self.base, self.adapter, folder, MergeOptions(device="cpu", overwrite=True)),
        }
        job = pick.choice(sorted(jobs))
        jobs[job]()
        changed = {name for name in files.keys() | self.files.keys() if files.get(name) != self.files.get(name)}
        manifest = changed == {"adapter_merge.json"}
        if job in ("check", "attest") and changed and not manifest and "adapter_merge.json" not in changed:
            raise Wrong(f"{job} passes with {sorted(changed)[:3]} changed")
        if job.startswith("restore"):
            for name, data in files_of(out).items():
                if data != self.base_files.get(name, data):
                    raise Wrong(f"{name} is not the base's")
        if job == "replace":
            check_integrity(folder)
        return f"{job} after {how}"


class Recipes:
    """Changed recipes. Oracle: the weighted sum of the deltas in float64, for the method linear."""

    def __init__(self, work: Path) -> None:
        tensors = base_tensors(layers=1, dtype=torch.float32)
        self.base, self.tensors = write_base(work / "base", tensors, 1, CONFIG), tensors
        self.adapters = {name: write_lora(work / name, tensors, alpha=alpha) for name, alpha in (("a", 8), ("b", 4))}
        entries = [{"name": name, "path": str(path), "weight": 0.5} for name, path in self.adapters.items()]
        self.recipe: dict[str, Any] = {"method": "linear", "seed": 0, "gamma": 0, "density": 1, "adapters": entries}

    def case(self, pick: random.Random, place: Path) -> str:
        content = self.recipe | {"method": pick.choice(("linear", "linear", "ties", "dare", "in-turn"))}
        files = {"recipe.json": json.dumps(content).encode()}
        if pick.random() < 0.9:
            (change_json if pick.random() < 0.8 else change_bytes)(files, pick)
        place = write(place / "recipe", files)
        recipe = read_recipe(place / "recipe.json")
        merge(self.base, recipe, place / "out", CPU)
        if recipe.settings.method == "linear" and all(not item.options for item in recipe.ingredients):
            self.compare(load_file_all(place / "out"), [(item.path, item.weight) for item in recipe.ingredients])
        return recipe.settings.method

    def compare(self, merged: dict[str, torch.Tensor], weighted: list[tuple[str, float]]) -> None:
        for name, before in self.tensors.items():
            wanted = before.double()
            for path, weight in weighted:
                factors = load_file(Path(path) / "adapter_model.safetensors")
                alpha = json.loads((Path(path) / "adapter_config.json").read_text())["lora_alpha"]
                module = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{module}.lora_A.weight" in factors:
                    up, down = factors[f"{module}.lora_B.weight"].double(), factors[f"{module}.lora_A.weight"].double()
                    wanted = wanted + weight * alpha / RANK * up @ down
            size = max(1.0, *(abs(weight) for _, weight in weighted))
            off = float((merged[name].double() - wanted).abs().max())
            if not off <= 1e-5 * size:
                raise Wrong(f"{name} is off by {off:.3g}")


class CacheEntries:
    """Changed entries of the serving cache: never whole, and read without an error."""

    def __init__(self, work: Path) -> None:
        from adapter_merge.serve.conversion.cache import Cache

        self.cache = Cache(work / "cache")

        def make(folder: Path) -> dict[str, Any]:
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK}))
            (folder / "adapter_model.safetensors").write_bytes(save({"a": torch.ones(3)}))
            return {"adapter": "a", "base": "b"}

        with self.cache.obtain("a" * 64, make) as lease:
            self.folder = lease.folder
        self.files = files_of(self.folder)

    def case(self, pick: random.Random, place: Path) -> str:
        from adapter_merge.serve.conversion.cache import find_damage

        files = dict(self.files)
        (change_json if pick.random() < 0.6 else change_bytes)(files, pick)
        write(self.folder, files)
        changed = {name for name in files.keys() | self.files.keys() if files.get(name) != self.files.get(name)}
        self.cache.entries()
        if changed - {"entry.json"} and not find_damage(self.folder):
            raise Wrong(f"a changed entry is whole: {sorted(changed)}")
        if not changed and find_damage(self.folder):
            raise Wrong("an unchanged entry is damaged")
        return "damaged" if find_damage(self.folder) else "whole"


TARGETS: dict[str, Callable[[Path], Any]] = {
    "bases": Bases,
    "outputs": Outputs,
    "recipes": Recipes,
    "cache": CacheEntries,
}


def run_case(target: Any, number: int, seed: int, place: Path) -> tuple[str, str]:
    """(outcome, detail): refused, passed, or what is wrong."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        return "passed", target.case(random.Random(f"{seed}:{number}"), place)
    except AdapterMergeError as error:
        if (place / "out").exists():
            return "an output although refused", str(error)
        return "refused", str(error)
