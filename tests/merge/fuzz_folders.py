"""A fuzzer of adapter folders: never a traceback, never a hang, never an output of something that is refused.

    python tests/merge/fuzz_folders.py --cases 20000 --seed 0

Every case takes one of the well-formed adapters below, changes it (bytes, headers, names, shapes, dtypes, values,
config, files), and merges, converts or factors it. It must end as AdapterMergeError within a few seconds with nothing
written, or as a finite result where the change was harmless; a change that cannot be harmless must be refused. Case i
of a seed is always the same.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

from adapter_merge.api.convert import convert
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, FactorOptions, MergeOptions
from adapter_merge.errors import AdapterMergeError
from adapter_merge.formats.stated_settings import ReadOptions

SECONDS = 10  # for one case
OUT, IN, RANK = 12, 8, 2
Q, V, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.embed_tokens"
EXPERTS = "model.layers.0.mlp.experts"
PREFIX = "base_model.model."
Files = dict[str, bytes]
Header = dict[str, Any]


class Hung(Exception):
    """A case took too long."""


def base_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        f"{EMBED}.weight": torch.randn(16, IN),
        f"{Q}.weight": torch.randn(OUT, IN),
        f"{Q}.bias": torch.randn(OUT),
        f"{V}.weight": torch.randn(IN, IN),
        "lm_head.weight": torch.randn(16, IN),
        f"{EXPERTS}.gate_up_proj": torch.randn(3, IN, IN),
        f"{EXPERTS}.down_proj": torch.randn(3, IN, 6),
    }


def base_model(folder: Path) -> Path:
    folder.mkdir()
    save_file(base_tensors(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return folder


def _pair(module: str, out: int, inner: int = IN) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(RANK, inner),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, RANK),
    }


def _moved(norms: torch.Tensor) -> torch.Tensor:
    """Magnitudes as after a training that began with `norms`."""
    return norms * (1 + 0.01 * torch.randn_like(norms))


def _pickled(tensors: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def seeds() -> dict[str, Files]:
    """Well-formed adapters of every format, as files in memory."""
    frozen = base_tensors()
    torch.manual_seed(1)
    plain: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    only_q = {"target_modules": ["q_proj"]}
    two = _pair(Q, OUT) | _pair(V, IN)
    rows, columns = (_moved(frozen[f"{Q}.weight"].norm(dim=dim)) for dim in (1, 0))
    magnitudes = {f"{PREFIX}{m}.lora_magnitude_vector": _moved(frozen[f"{m}.weight"].norm(dim=1)) for m in (Q, V)}
    lokr = {f"{PREFIX}{Q}.lokr_w1": torch.randn(4, 4), f"{PREFIX}{Q}.lokr_w2_a": torch.randn(3, 1),
            f"{PREFIX}{Q}.lokr_w2_b": torch.randn(1, 2)}  # fmt: skip
    loha = {f"{PREFIX}{Q}.hada_w{i}_{s}": torch.randn(*((OUT, RANK) if s == "a" else (RANK, IN))) for i in (1, 2)
            for s in "ab"}  # fmt: skip
    vera = {f"{PREFIX}{Q}.vera_lambda_b": torch.randn(OUT), f"{PREFIX}{Q}.vera_lambda_d": torch.randn(RANK),
            "base_model.vera_A": torch.randn(RANK, IN), "base_model.vera_B": torch.randn(OUT, RANK)}  # fmt: skip
    ada = {f"{PREFIX}{Q}.lora_A": torch.randn(RANK, IN), f"{PREFIX}{Q}.lora_B": torch.randn(OUT, RANK),
           f"{PREFIX}{Q}.lora_E": torch.randn(RANK, 1)}  # fmt: skip
    tokens = two | {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": torch.randn(3, IN)}
    heads = _pair(Q, OUT) | {
        f"{PREFIX}lm_head.weight": torch.randn(16, IN),
        f"{PREFIX}{Q}.lora_B.bias": torch.randn(OUT),
    }
    embeds = two | {f"{PREFIX}{EMBED}.lora_embedding_A": torch.randn(RANK, 16),
                    f"{PREFIX}{EMBED}.lora_embedding_B": torch.randn(IN, RANK)}  # fmt: skip
    dcft = {f"{PREFIX}{Q}.lora_A": torch.randn(1, 2), f"{PREFIX}{Q}.lora_B": torch.randn(3, 1),
            f"{PREFIX}{Q}.lora_C": torch.randn(1, 1, 4, 4), f"{PREFIX}{Q}.ranknum": torch.tensor([1.0])}  # fmt: skip
    dude = two | magnitudes
    kohya = {f"lora_te_{Q.replace('.', '_')}.lora_down.weight": torch.randn(RANK, IN),
             f"lora_te_{Q.replace('.', '_')}.lora_up.weight": torch.randn(OUT, RANK),
             f"lora_te_{Q.replace('.', '_')}.alpha": torch.tensor(1.0),
             f"lora_te_{Q.replace('.', '_')}.dora_scale": rows[:, None]}  # fmt: skip
    mine = {f"{Q}.weight_a": torch.randn(RANK, IN), f"{Q}.weight_b": torch.randn(OUT, RANK),
            f"{Q}.origin_magnitude": rows, f"{Q}.weight": torch.randn(OUT, IN)}  # fmt: skip
    reshape = {f"{Q}.B": torch.randn(2, RANK), f"{Q}.A": torch.randn(RANK, 3),
               f"{Q}.deconv.weight": torch.randn(1, 1, 4, 4), f"{Q}.deconv.bias": torch.randn(1)}  # fmt: skip

    several = {f"{PREFIX}{Q}.lora_A": torch.randn(2, 1, 2), f"{PREFIX}{Q}.lora_B": torch.randn(2, 3, 1),
               f"{PREFIX}{Q}.lora_C.weight": torch.randn(2, 1, 4, 4), f"{PREFIX}{Q}.lora_C.bias": torch.randn(1),
               f"{PREFIX}{Q}.ranknum": torch.tensor([1.0])}  # fmt: skip
    lycoris = {f"{PREFIX}{Q}.lokr_w1": torch.randn(4, 4), f"{PREFIX}{Q}.lokr_w2_a": torch.randn(3, RANK),
               f"{PREFIX}{Q}.lokr_w2_b": torch.randn(RANK, 2), f"{PREFIX}{Q}.alpha": torch.tensor(3.0),
               f"{PREFIX}{Q}.dora_scale": columns[None],
               **{f"{PREFIX}{V}.{key.partition(Q + '.')[2]}": torch.randn(*((IN, RANK) if key.endswith("a") else
                                                                          (RANK, IN))) for key in loha}}  # fmt: skip
    initial = {f"{PREFIX}{Q}.lora_A_init.weight": torch.randn(RANK, IN), f"{PREFIX}{V}.frozen.weight":
               frozen[f"{V}.weight"], f"{PREFIX}{Q}.lora_B_init.weight": torch.randn(OUT, RANK)}  # fmt: skip
    experts = {f"{PREFIX}{EXPERTS}.lora_A.weight": torch.randn(3 * RANK, 6),
               f"{PREFIX}{EXPERTS}.lora_B.weight": torch.randn(IN, 3 * RANK),
               f"{PREFIX}{EXPERTS}.base_layer.lora_A.weight": torch.randn(3 * RANK, IN),
               f"{PREFIX}{EXPERTS}.base_layer.lora_B.weight": torch.randn(IN, 3 * RANK)}  # fmt: skip

    def folder(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Files:
        return {
            "adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": save(tensors, {"format": "pt"}),
        }

    model = {f"{Q}.weight": frozen[f"{Q}.weight"], f"{Q}.bias": frozen[f"{Q}.bias"]}
    # fmt: off
    return {
        "lora": folder({**plain, "rank_pattern": {"q_proj": RANK}, "alpha_pattern": {"v_proj": 3}}, two),
        "dora": folder({**plain, "use_dora": True}, two | magnitudes),
        "pissa": folder({**plain, "init_lora_weights": "pissa"}, two),
        "heads": folder({**plain, "target_modules": ["q_proj"], "lora_bias": True,
                         "modules_to_save": ["lm_head"]}, heads),
        "embedding": folder({**plain, "target_modules": ["q_proj", "v_proj", "embed_tokens"]}, embeds),
        "tokens": folder({**plain, "trainable_token_indices": [1, 5, 7]}, tokens),
        "adalora": folder({"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 8, **only_q}, ada),
        "lokr": folder({"peft_type": "LOKR", "r": 1, "alpha": 3, **only_q}, lokr),
        "loha": folder({"peft_type": "LOHA", "r": RANK, "alpha": 3, **only_q}, loha),
        "vera": folder({"peft_type": "VERA", "r": RANK, "projection_prng_key": 3, **only_q}, vera),
        "dcft": folder({"peft_type": "DCFT", "format_version": 1, "lora_alpha": 8, "stride": [4, 4]}, dcft),
        "dude": folder({"peft_type": "DUDE", "format_version": 1, "r": RANK, "lora_alpha": 4, "base": "original",
                        "residual_dtype": "float32"}, dude),
        "pissa, safe": folder({"peft_type": "DUDE", "format_version": 1, "r": RANK, "lora_alpha": 4, "base": "original",
                               "residual_dtype": "float32", "magnitude": "none", "initial": "corda"}, two | initial),
        "dude, columns": folder({"peft_type": "DUDE", "format_version": 1, "r": RANK, "lora_alpha": 4,
                                 "initial": "none", "base": "original", "magnitude_axis": "in"},
                                _pair(Q, OUT) | {f"{PREFIX}{Q}.lora_magnitude_vector": columns}),
        "dcft, channels": folder({"peft_type": "DCFT", "format_version": 1, "lora_alpha": 8, "stride": [4, 4]},
                                 several),
        "dcft reshape, safe": folder({"peft_type": "DCFT", "format_version": 1, "form": "reshape"},
                                     {PREFIX + key: value for key, value in reshape.items()}),
        "lycoris, safe": folder({"peft_type": "LYCORIS", "format_version": 1}, lycoris),
        "experts": folder({**plain, "target_modules": [], "peft_version": "0.21.2",
                           "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, experts),
        "pickled": {"adapter_config.json": json.dumps(plain).encode(), "adapter_model.bin": _pickled(two)},
        "kohya": {"a.safetensors": save(kohya)},
        "mytransformers": {
            "final.ckpt": _pickled({"model_state_dict": mine}),
            "config.json": json.dumps({"lora_rank": RANK, "lora_scaler": 4, "use_dude": True}).encode(),
        },
        "dcft reshape": {"a.pt": _pickled(reshape)},
        "dcft checkpoint": {
            "pytorch_model.bin": _pickled(
                model
                | {key.removeprefix(PREFIX): value for key, value in dcft.items()}
            ),
            "config.json": json.dumps({"lora_alpha": 8, "apply_lora": True, "lora_type": "svd"}).encode(),
        },
    }
    # fmt: on


# -- changes: each returns True when what it left behind must be refused ---------------------------------


def _weights_file(files: Files) -> str:
    return next((name for name in files if not name.endswith(".json")), min(files))


def _header_of(data: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(header: Header, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def truncate_file(files: Files, pick: random.Random) -> bool:
    name = pick.choice(sorted(files))
    data = files[name]
    files[name] = data[: pick.randrange(len(data))]
    return True


def append_bytes(files: Files, pick: random.Random) -> bool:
    name = _weights_file(files)
    files[name] += pick.randbytes(pick.choice((1, 7, 8, 4096)))
    return name.endswith(".safetensors")


def flip_bytes(files: Files, pick: random.Random) -> bool:
    name = pick.choice(sorted(files))
    data = bytearray(files[name])
    limit = len(data) if pick.random() < 0.5 else min(len(data), 400)
    for _ in range(pick.choice((1, 1, 2, 8, 64))):
        data[pick.randrange(limit)] ^= 1 << pick.randrange(8)
    files[name] = bytes(data)
    return False


def random_file(files: Files, pick: random.Random) -> bool:
    files[_weights_file(files)] = pick.randbytes(pick.choice((0, 1, 7, 8, 9, 100, 5000)))
    return True


def lie_about_length(files: Files, pick: random.Random) -> bool:
    name = _weights_file(files)
    data = files[name]
    files[name] = (
        struct.pack("<Q", pick.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data), len(data) - 8))) + data[8:]
    )
    return True


# fmt: off
WEIRD: list[Any] = [None, True, False, 0, -1, 1, 2.5, 1e308, -1e-308, 10**40, "", "x", "q_proj", "(a+)+$", [], [1],
                    {}, {"a": 1}, float("nan"), float("inf"), "\ud800", "a" * 5000, {"q_proj": {}}, [None], 1 << 63]
# fmt: on


def change_header(files: Files, pick: random.Random) -> bool:
    name = _weights_file(files)
    if not name.endswith(".safetensors"):
        return flip_bytes(files, pick)
    header, body = _header_of(files[name])
    names = [key for key in header if key != "__metadata__"]
    key = pick.choice(names)
    entry = header[key]
    kind = pick.randrange(8)
    if kind == 0:
        entry["dtype"] = pick.choice(["F64", "F16", "BF16", "I8", "I64", "BOOL", "U8", "F8_E4M3", "X9", "", None, 3])
    elif kind == 1:
        entry["shape"] = pick.choice(
            [[], [0], [1], [-1, 2], [2**40, 2**40], "2x2", None, [1.5], [True], [[2]], [8, 12, 1]]
        )
    elif kind == 2:
        entry["data_offsets"] = pick.choice([[0, 0], [0], [5, 1], [-4, 4], [0, 2**62], None, "0", [0.0, 4.0]])
    elif kind == 3:
        del entry[pick.choice(sorted(entry))]
    elif kind == 4:
        header[key] = pick.choice(WEIRD)
    elif kind == 5:
        other = pick.choice(names)
        header[key], header[other] = header[other], header[key]
        files[name] = _with_header(header, body)
        return False
    elif kind == 6:
        header["__metadata__"] = pick.choice(WEIRD)
        files[name] = _with_header(header, body)
        return False
    else:
        text = json.dumps(header).encode()
        text = text[:-1] + b', "' + key.encode() + b'": ' + json.dumps(entry).encode() + b"}"
        files[name] = struct.pack("<Q", len(text)) + text + body
        return True
    files[name] = _with_header(header, body)
    return False


def _tensors(files: Files) -> tuple[str, dict[str, torch.Tensor]]:
    name = _weights_file(files)
    if name.endswith(".safetensors"):
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as stream:
            stream.write(files[name])
            stream.flush()
            return name, load_file(stream.name)
    content = torch.load(io.BytesIO(files[name]), weights_only=True)
    return name, dict(content.get("model_state_dict", content))


def _store(files: Files, name: str, tensors: dict[str, Any]) -> None:
    whole = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    files[name] = save(whole) if name.endswith(".safetensors") else _pickled(whole)


def change_tensors(files: Files, pick: random.Random) -> bool:
    """Names, shapes, dtypes and values of whole tensors, in a file that is well-formed itself."""
    name, tensors = _tensors(files)
    key = pick.choice(sorted(tensors))
    value = tensors[key]
    kind = pick.randrange(9)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        new = pick.choice([key + ".x", key[::-1], key.replace("lora", "loar"), "", "..", "a" * 3000, key.upper(),
                           key.replace("layers.0", "layers.7"), key.split(".", 1)[-1]])  # fmt: skip
        tensors[new] = tensors.pop(key)
    elif kind == 2:
        tensors[key] = value.reshape(-1)
    elif kind == 3:
        tensors[key] = value.repeat(*([2] * value.ndim)) if value.ndim else value.reshape(1, 1)
    elif kind == 4:
        tensors[key] = value.T if value.ndim == 2 else value[None]
    elif kind == 5:
        tensors[key] = value[:0] if value.ndim else value.reshape(0) if value.numel() == 0 else value
    elif kind == 6 and value.is_floating_point():
        wild = value.clone()
        wild.view(-1)[pick.randrange(wild.numel())] = pick.choice([math.nan, math.inf, -math.inf])
        tensors[key] = wild
        _store(files, name, tensors)
        return not key.endswith((".weight", ".bias")) or "lora" in key
    elif kind == 7:
        tensors[key] = value.to(pick.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool,
                                             torch.int64, torch.float8_e4m3fn]))  # fmt: skip
    else:
        tensors[pick.choice(["extra", PREFIX + "extra", f"{PREFIX}{Q}.lora_X.weight", f"{PREFIX}nobody.weight"])] = (
            value
        )
    if not tensors:
        tensors["nothing"] = value
    _store(files, name, tensors)
    return False


def change_config(files: Files, pick: random.Random) -> bool:
    name = next((name for name in files if name.endswith(".json")), None)
    if name is None:
        return change_tensors(files, pick)
    config = json.loads(files[name])
    known = [*config, "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "init_lora_weights", "fan_in_fan_out",
             "target_parameters", "trainable_token_indices", "base", "stride", "residual_dtype", "modules_to_save",
             "initial", "magnitude", "magnitude_axis", "form", "peft_version", "exclude_modules",
             "base_model_name_or_path", "task_type", "ensure_weight_tying", "token_indices"]  # fmt: skip
    for _ in range(pick.choice((1, 1, 2, 4))):
        key = pick.choice(known)
        if pick.random() < 0.2:
            config.pop(key, None)
        else:
            value = pick.choice(WEIRD)
            config[key] = {"q_proj": value} if key.endswith("_pattern") and pick.random() < 0.5 else value
    files[name] = json.dumps(config).encode("utf-8", "surrogatepass")
    return False


def break_config(files: Files, pick: random.Random) -> bool:
    name = next((name for name in files if name.endswith(".json")), None)
    if name is None:
        return truncate_file(files, pick)
    deep = [b"[" * 100_000, b'{"peft_type":' * 5000]
    files[name] = pick.choice([b"", b"[]", b"null", b"{", b"\xff\xfe", b"NaN", *deep])
    return True


def drop_file(files: Files, pick: random.Random) -> bool:
    name = pick.choice(sorted(files))
    del files[name]
    return name != "config.json"


def several(files: Files, pick: random.Random) -> bool:
    for _ in range(3):
        try:
            pick.choice((change_config, change_header, flip_bytes))(files, pick)
        except Exception:  # the one before left nothing to change
            return False
    return False


CHANGES: list[Callable[[Files, random.Random], bool]] = [
    truncate_file, append_bytes, flip_bytes, flip_bytes, random_file, lie_about_length, change_header, change_header,
    change_tensors, change_tensors, change_tensors, change_config, change_config, change_config, break_config,
    drop_file,
    several,
]  # fmt: skip


def run_case(number: int, seed: int, originals: dict[str, Files], base: Path, work: Path) -> tuple[str, str, str, str]:
    """(adapter, change, outcome, detail); the outcome is refused, merged, or what is wrong."""
    pick = random.Random(f"{seed}:{number}")
    kind = pick.choice(sorted(originals))
    change = pick.choice(CHANGES)
    files = dict(originals[kind])
    name = f"{change.__name__} of {kind}"
    must_refuse = change(files, pick)
    if must_refuse and files == originals[kind]:
        must_refuse = False
    folder, output = work / "adapter", work / "output"
    for path in (folder, output):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    axis = pick.choice([None, "out", "in"]) if pick.random() < 0.1 else None
    options = ReadOptions(magnitude_axis=axis, force=True)  # random factors: the base has no evidence for them
    base_kind = pick.choice([None, "original", "residual"]) if "dude" in kind or "pissa" in kind else None
    command = pick.choice(("merge", "merge", "merge", "merge", "merge", "merge", "convert", "factor"))
    name = f"{command}: {name}"
    outcome, detail = "merged", ""
    signal.alarm(SECONDS)
    try:
        if command == "merge":
            options_of_merge = MergeOptions(
                device="cpu", reading=options, base_kind=base_kind, workers=1, link="copy", hashes=False
            )
            merge(base, folder, output, options_of_merge)
        elif command == "convert":
            convert(folder, output, ConvertOptions(base=base, reading=options, base_kind=base_kind))
        else:
            factor(base, folder, output, FactorOptions(device="cpu", reading=options, base_kind=base_kind))
    except AdapterMergeError as error:
        outcome, detail = "refused", str(error)
    except Hung:
        outcome = "hung"
    except BaseException:
        outcome, detail = "traceback", traceback.format_exc()
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise
    finally:
        signal.alarm(0)
    left = [path.name for path in work.iterdir() if path.name not in ("adapter", "output")]
    if outcome == "refused" and (output.exists() or left):
        outcome, detail = "an output although refused", f"{left} {detail}"
    if outcome == "refused" and not detail.strip():
        outcome = "an error without a word"
    if outcome == "merged":
        after = load_file(output / ("model.safetensors" if command == "merge" else "adapter_model.safetensors"))
        if not all(bool(torch.isfinite(value).all()) for value in after.values()):
            outcome = "NaN or infinity written"
        elif must_refuse:
            outcome = "merged what cannot be right"
    return kind, name, outcome, detail


def fuzz(cases: int, seed: int, start: int = 0, report: Callable[[str], None] | None = None) -> Counter[str]:
    """Run the cases; outcomes by name. Anything but refused and merged is reported with how to repeat it."""

    def ring(*_: Any) -> None:
        raise Hung

    memory = Path("/dev/shm")
    work = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    previous = signal.signal(signal.SIGALRM, ring)
    outcomes: Counter[str] = Counter()
    try:
        base = base_model(work / "base")
        originals = seeds()
        (work / "case").mkdir()
        for number in range(start, start + cases):
            _, name, outcome, detail = run_case(number, seed, originals, base, work / "case")
            outcomes[outcome] += 1
            if outcome not in ("refused", "merged") and report is not None:
                report(f"case {number} of seed {seed}: {name}: {outcome}\n{detail[-3000:]}")
    finally:
        signal.signal(signal.SIGALRM, previous)
        shutil.rmtree(work, ignore_errors=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    outcomes = fuzz(arguments.cases, arguments.seed, arguments.start, lambda text: print(text, flush=True))
    print(f"{sum(outcomes.values())} cases in {time.perf_counter() - started:.0f} s: {dict(outcomes)}")
    return 0 if set(outcomes) <= {"refused", "merged"} else 1


if __name__ == "__main__":
    sys.exit(main())
