"""Every kind of bad input: a clear error of our own, before anything is written, with the inputs as they were."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_merge import errors
from adapter_merge.api.convert import convert
from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import ConvertOptions, FactorOptions, MergeOptions
from adapter_merge.formats.stated_settings import ReadOptions


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico.save_base(pico.pico_model("llama"), tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter", use_dora=True)
    return tmp_path / "adapter"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return pico.save_dcft_checkpoint(pico.dcft_model("llama"), tmp_path / "checkpoint")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refuses(
    kind: type[errors.AdapterMergeError],
    text: str,
    tmp_path: Path,
    run: Callable[..., Any],
    *args: Any,
    options: object = None,
) -> errors.AdapterMergeError:
    """`run` must raise `kind` about `text`, write nothing and leave the inputs alone."""
    before = snapshot(tmp_path)
    with pytest.raises(kind) as caught:
        run(*args, tmp_path / "out", *([] if options is None else [options]))
    assert text in str(caught.value)
    assert all(problem.cause for problem in caught.value.problems)
    assert snapshot(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**config, **changes}.items() if value != "DROP"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def first(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def test_missing_alpha_is_asked_for_and_can_be_given(tmp_path: Path) -> None:
    model = pico.dcft_model("llama")
    folder = pico.save_dcft_checkpoint(model, tmp_path / "checkpoint", alpha=None)
    assert "--alpha" in str(refuses(errors.AdapterError, "lora_alpha", tmp_path, merge, None, folder))
    merge(None, folder, tmp_path / "merged", MergeOptions(reading=ReadOptions(alpha=32.0)))
    merged = type(pico.pico_model("llama")).from_pretrained(tmp_path / "merged").eval()
    assert float((pico.logits(merged) - pico.logits(model)).abs().max()) <= 1e-4


def test_missing_ranknum_is_asked_for_and_can_be_given(tmp_path: Path) -> None:
    model = pico.dcft_model("llama")
    folder = pico.save_dcft_checkpoint(model, tmp_path / "checkpoint", drop=".ranknum")
    error = refuses(errors.AdapterError, "ranknum", tmp_path, merge, None, folder)
    assert len(error.problems) >= 14, "every module's problem is named at once"
    merge(None, folder, tmp_path / "merged", MergeOptions(reading=ReadOptions(ranknum=4.0)))
    merged = type(pico.pico_model("llama")).from_pretrained(tmp_path / "merged").eval()
    assert float((pico.logits(merged) - pico.logits(model)).abs().max()) <= 1e-4


def test_missing_peft_alpha(tmp_path: Path, base: Path, adapter: Path) -> None:
    edit_config(adapter, lora_alpha="DROP")
    refuses(errors.AdapterError, "lora_alpha", tmp_path, merge, base, adapter)


def test_sizes_that_no_deconvolution_gives(tmp_path: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    name = first(state, "q_proj.lora_A")
    state[name] = state[name][:, :-2].clone()  # no stride makes 48 of 4 steps under a kernel of 8
    torch.save(state, checkpoint / "pytorch_model.bin")
    refuses(errors.AdapterError, "divisible", tmp_path, merge, None, checkpoint)


@pytest.mark.parametrize("role", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_wrong_shapes(role: str, tmp_path: Path, base: Path, adapter: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, role)
        tensors[name] = tensors[name][..., :-1]

    edit_tensors(adapter, cut)
    refuses(errors.InputError, "down_proj", tmp_path, merge, base, adapter)


def test_adapter_of_another_base(tmp_path: Path, adapter: Path) -> None:
    other = pico.save_base(pico.pico_model("gpt2"), tmp_path / "gpt2")
    error = refuses(errors.MismatchError, "does not belong to this base", tmp_path, merge, other, adapter)
    assert len(error.problems) > 10


def test_adapter_of_a_base_of_other_sizes(tmp_path: Path, adapter: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=120
    )
    other = pico.save_base(transformers.LlamaForCausalLM(config), tmp_path / "other")
    refuses(errors.MismatchError, "shape", tmp_path, merge, other, adapter)


def test_unknown_tensors(tmp_path: Path, base: Path, adapter: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_mystery"] = torch.ones(3)
        tensors["something_else"] = torch.ones(3)

    edit_tensors(adapter, add)
    error = refuses(errors.AdapterError, "lora_mystery", tmp_path, merge, base, adapter)
    assert "something_else" in str(error), "both at once"


def test_magnitudes_that_peft_dropped(tmp_path: Path, base: Path) -> None:
    """The fault of path_initial_model_for_weight_conversion, by PEFT itself."""
    import peft

    model = pico.pico_model("llama")
    live = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", use_dora=True),
    )
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(tmp_path / "initial")
    live.peft_config["default"].init_lora_weights = "pissa"
    live.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert not any("magnitude" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    error = refuses(errors.AdapterError, "magnitude", tmp_path, merge, base, tmp_path / "adapter")
    assert "path_initial_model_for_weight_conversion" in str(error)


def test_a_randomised_svd_cannot_be_repeated(tmp_path: Path, base: Path) -> None:
    config = {"init_lora_weights": "pissa_niter_4", "use_dora": True}
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter", **config)
    error = refuses(errors.AdapterMergeError, "pissa_niter_4", tmp_path, merge, base, tmp_path / "adapter")
    assert "hint" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_the_adapter(value: float, tmp_path: Path, base: Path, adapter: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first(tensors, "lora_A.weight")][0, 0] = value

    edit_tensors(adapter, spoil)
    for run in (merge, delta, factor):
        refuses(errors.NumericsError, "NaN or infinity", tmp_path, run, base, adapter)


def test_nan_in_the_base_is_not_written(tmp_path: Path, adapter: Path) -> None:
    model = pico.pico_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    spoiled = pico.save_base(model, tmp_path / "spoiled")
    refuses(errors.NumericsError, "up_proj", tmp_path, merge, spoiled, adapter)


def test_values_beyond_float16(tmp_path: Path, base: Path) -> None:
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "adapter", noise=300.0)
    refuses(
        errors.NumericsError,
        "float",
        tmp_path,
        merge,
        base,
        tmp_path / "adapter",
        options=MergeOptions(dtype="float16"),
    )


def truncate(data: bytes) -> bytes:
    return data[:-5]


def short_header(data: bytes) -> bytes:
    return data[:6]


def huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + data[8:]


def not_json(data: bytes) -> bytes:
    return data[:8] + b"!" + data[9:]


def rewrite(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def lying_shape(data: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        header[sorted(header)[1]]["shape"][0] += 1

    return rewrite(data, change)


def overlapping(data: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        names = sorted(name for name in header if name != "__metadata__")
        one = next(n for n in names if header[n]["data_offsets"][0] > 0)
        size = header[one]["data_offsets"][1] - header[one]["data_offsets"][0]
        header[one]["data_offsets"] = [0, size]

    return rewrite(data, change)


def negative(data: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        entry = header[sorted(header)[1]]
        entry["data_offsets"] = [-entry["data_offsets"][1], 0]

    return rewrite(data, change)


def unknown_dtype(data: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        header[sorted(header)[1]]["dtype"] = "F31"

    return rewrite(data, change)


LIES = (truncate, short_header, huge_header, not_json, lying_shape, overlapping, negative, unknown_dtype)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("victim", ["base", "adapter"])
def test_truncated_and_lying_safetensors(
    lie: Callable[[bytes], bytes], victim: str, tmp_path: Path, base: Path, adapter: Path
) -> None:
    folder = base if victim == "base" else adapter
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(lie(file.read_bytes()))
    refuses(errors.FileFormatError, file.name, tmp_path, merge, base, adapter)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7])
def test_an_index_that_leaves_its_folder(name: Any, tmp_path: Path, base: Path, adapter: Path) -> None:
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    text = "outside its folder" if isinstance(name, str) else "weight_map"
    refuses(errors.FileFormatError, text, tmp_path, merge, base, adapter)


def test_an_index_that_misplaces_a_tensor_or_names_no_file(tmp_path: Path, base: Path, adapter: Path) -> None:
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = list(content["weight_map"])
    content["weight_map"][names[0]] = content["weight_map"][names[-1]]
    index.write_text(json.dumps(content))
    refuses(errors.FileFormatError, names[0], tmp_path, merge, base, adapter)
    content["weight_map"][names[0]] = "model-9.safetensors"
    index.write_text(json.dumps(content))
    refuses(errors.FileFormatError, "model-9.safetensors", tmp_path, merge, base, adapter)


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize("run", [merge, convert])
def test_a_malicious_pickle_is_not_run(run: Any, tmp_path: Path, checkpoint: Path) -> None:
    bomb = tmp_path / "boom"
    file = checkpoint / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    target = next(name for name in members if name.endswith("data.pkl"))
    members[target] = pickle.dumps(Bomb(bomb), protocol=2)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    args = (None, checkpoint) if run is merge else (checkpoint,)
    refuses(errors.FileFormatError, "could run code", tmp_path, run, *args)
    assert not bomb.exists()


def test_a_full_disk_is_found_before_the_work(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuses(errors.OutputError, "disk is too small", tmp_path, merge, base, adapter)


def test_an_output_that_exists_is_kept(tmp_path: Path, base: Path, adapter: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(errors.OutputError):
            merge(base, adapter, out, MergeOptions(overwrite=overwrite))
    assert (out / "precious.txt").read_text() == "mine" and len(list(out.iterdir())) == 1
    merge(base, adapter, tmp_path / "ours")
    with pytest.raises(errors.OutputError):
        merge(base, adapter, tmp_path / "ours")
    merge(base, adapter, tmp_path / "ours", MergeOptions(overwrite=True))


def test_an_input_is_never_the_output(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = snapshot(tmp_path)
    for target in (base, adapter, tmp_path):
        with pytest.raises(errors.OutputError):
            merge(base, adapter, target, MergeOptions(overwrite=True))
    assert snapshot(tmp_path) == before


def test_a_file_is_never_overwritten(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(errors.OutputError):
        merge(base, adapter, tmp_path / "notes.txt", MergeOptions(overwrite=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_dude_folder_of_the_residual_on_the_original(tmp_path: Path, base: Path) -> None:
    """Converted beside the residual, merged on the original: nothing would be subtracted, silently."""
    import peft

    live = pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "peft", **pico.METHODS["dude"])
    for layer in live.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.lora_A.clear(), layer.lora_B.clear()
    residual = pico.save_base(live.unload(), tmp_path / "residual")
    convert(tmp_path / "peft", tmp_path / "adapter", ConvertOptions(base=residual))
    refuses(errors.MismatchError, "residual", tmp_path, merge, base, tmp_path / "adapter")
    assert (
        merge(residual, tmp_path / "adapter", tmp_path / "merged").as_json()["adapters"][0]["base_kind"] == "residual"
    )


def test_a_dude_folder_of_the_original_on_another_model(tmp_path: Path, base: Path) -> None:
    pico.peft_adapter(pico.pico_model("llama"), "llama", tmp_path / "peft", **pico.METHODS["dude"])
    convert(tmp_path / "peft", tmp_path / "adapter", ConvertOptions(base=base))
    other = pico.save_base(pico.pico_model("llama", seed=5), tmp_path / "other")
    refuses(errors.MismatchError, "original", tmp_path, merge, other, tmp_path / "adapter")


def test_a_dcft_checkpoint_on_another_base(tmp_path: Path, checkpoint: Path) -> None:
    other = pico.save_base(pico.pico_model("llama", seed=5), tmp_path / "other")
    refuses(errors.MismatchError, "trained on", tmp_path, merge, other, checkpoint)


@pytest.mark.parametrize("options", [{"alpha": float("nan")}, {"ranknum": 0.0}, {"ranknum": -1e-5}])
def test_numbers_that_are_none(options: dict[str, float], tmp_path: Path, checkpoint: Path) -> None:
    reading = ReadOptions(**options)
    refuses(errors.AdapterError, "usable", tmp_path, merge, None, checkpoint, options=MergeOptions(reading=reading))
    refuses(errors.AdapterError, "usable", tmp_path, convert, checkpoint, options=ConvertOptions(reading=reading))
    refuses(errors.AdapterError, "usable", tmp_path, factor, None, checkpoint, options=FactorOptions(reading=reading))


def test_a_cut_factor_is_no_odd_stride(tmp_path: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    name = first(state, "q_proj.lora_A")
    state[name] = state[name][:, :-1].clone()  # 5 steps of stride 10 under a kernel of 8 would give 48 as well
    torch.save(state, checkpoint / "pytorch_model.bin")
    refuses(errors.AdapterError, "gaps", tmp_path, merge, None, checkpoint)


@pytest.mark.parametrize("change", [{"r": 3}, {"kernel_size": [4, 4]}, {"kernel_size": "8"}])
def test_a_dcft_config_that_lies(change: dict[str, Any], tmp_path: Path, base: Path, checkpoint: Path) -> None:
    convert(checkpoint, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **change)
    refuses(errors.AdapterError, next(iter(change)), tmp_path, merge, base, tmp_path / "adapter")


def test_unknown_tensors_of_other_names(tmp_path: Path, base: Path, adapter: Path, checkpoint: Path) -> None:
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    state["model.layers.0.self_attn.q_proj.lora_E"] = torch.ones(3)
    torch.save(state, checkpoint / "pytorch_model.bin")
    refuses(errors.AdapterError, "lora_E", tmp_path, merge, None, checkpoint)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.foo.bar"] = torch.ones(3)

    edit_tensors(adapter, add)
    refuses(errors.MismatchError, "foo.bar", tmp_path, merge, base, adapter)


def test_an_adapter_without_a_base(tmp_path: Path, adapter: Path) -> None:
    refuses(errors.InputError, "BASE and ADAPTER", tmp_path, factor, None, adapter)
    refuses(errors.InputError, "BASE and ADAPTER", tmp_path, merge, None, adapter)


def test_a_folder_without_an_adapter(tmp_path: Path, base: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(errors.AdapterError, "not an adapter", tmp_path, merge, base, empty)
    refuses(errors.AdapterError, "without an adapter", tmp_path, merge, base, base)


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"peft_type": 3}', '{"peft_type": "LORA"}'])
def test_broken_configs(text: str, tmp_path: Path, base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text)
    refuses(errors.AdapterMergeError, "", tmp_path, merge, base, adapter)
