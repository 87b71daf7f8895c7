"""factor --format gguf: the file's layout by the gguf package, its numbers against PEFT's merge in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from factor_models import base_weights, dcft_adapter, load, merged_weights, peft_adapter, pico_model
from safetensors.torch import load_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from adapter_merge.api.factor import factor
from adapter_merge.api.merge import merge
from adapter_merge.api.options import FactorOptions, MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.cli.main import group
from adapter_merge.errors import AdapterMergeError, InputError, UnsupportedError
from adapter_merge.formats.detection import open_adapter
from adapter_merge.quantisation.dense_view import open_base

GGUF = FactorOptions(format="gguf", device="cpu")
HEADS, KEY_HEADS = 4, 2  # of the pico model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("gguf") / "base")


def lora(base: Path, folder: Path, **settings: Any) -> Path:
    """A PEFT LoRA with random factors."""
    import peft

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    return folder


def deltas(file: Path) -> dict[str, torch.Tensor]:
    """float64 dW by GGUF name, as llama.cpp applies the file: alpha / R lora_b lora_a (llama-adapter.h, get_scale)."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data, dtype=np.float64)) for tensor in reader.tensors}
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert set(tensors) == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")}
    return {
        name: alpha / tensors[f"{name}.lora_a"].shape[0] * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        for name in names
    }


def in_hugging_face_order(name: str, delta: torch.Tensor) -> torch.Tensor:
    """Undo llama.cpp's order of query and key rows as transformers does when it loads a GGUF model."""
    config = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    return torch.from_numpy(np.array(LlamaTensorProcessor(config).process(delta.numpy(), name).weights))


def check(base: Path, adapter: Path, output: Path, exact: bool = True) -> dict[str, torch.Tensor]:
    """Hold every dW of `output` against PEFT's merge of `adapter`; return them by GGUF name."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = load(base).to(torch.float64 if exact else torch.float32)
        model = peft.PeftModel.from_pretrained(live, str(adapter)).merge_and_unload()
    after = {name.removesuffix(".weight"): tensor.double() for name, tensor in model.state_dict().items()}
    before = base_weights(base)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = deltas(output / "adapter.gguf")
    changed = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert {names.get_name(name) + ".weight" for name in changed} == set(found)
    for name, wanted in changed.items():
        stored = names.get_name(name) + ".weight"
        got = in_hugging_face_order(stored, found[stored])
        assert torch.linalg.vector_norm(got - wanted) <= (1e-6 if exact else 1e-4) * torch.linalg.vector_norm(wanted), (
            name
        )
    return found


def test_the_file_is_laid_out_as_llama_cpp_reads_it(base: Path, tmp_path: Path) -> None:
    adapter = lora(base, tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    result = factor(base, adapter, tmp_path / "out", GGUF)
    assert result.exact
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter.gguf", "adapter_merge.json", "README.md"}
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    stated = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert stated == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "general.file_type": 0,
    }
    shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    assert shapes["blk.1.attn_q.weight.lora_a"] == (4, 48)
    assert shapes["blk.1.attn_q.weight.lora_b"] == (48, 4)
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (4, 96)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert len(shapes) == 8


def test_a_lora_of_several_ranks_is_exact_under_one_alpha(base: Path, tmp_path: Path) -> None:
    ranks = {"k_proj": 7, "layers.1.self_attn.q_proj": 3}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
    adapter = lora(base, tmp_path / "lora", target_modules=targets, rank_pattern=ranks, use_rslora=True)
    factor(base, adapter, tmp_path / "out", GGUF)
    found = check(base, adapter, tmp_path / "out")
    assert "output.weight" in found
    with pytest.raises(AssertionError):  # the order of the rows matters to this comparison
        wrong = found["blk.0.attn_k.weight"]
        torch.testing.assert_close(in_hugging_face_order("blk.0.attn_k.weight", wrong), wrong)


def test_pissa_is_exact(base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(base, tmp_path / "pissa", init_lora_weights="pissa")
    factor(base, adapter, tmp_path / "out", GGUF)
    check(base, adapter, tmp_path / "out", exact=False)  # PEFT repeats the SVD, in float32


def test_a_dcft_is_exact(base: Path, tmp_path: Path) -> None:
    adapter = dcft_adapter(base, tmp_path / "dcft")
    factor(base, adapter, tmp_path / "out", GGUF)
    found = deltas(tmp_path / "out" / "adapter.gguf")
    trained = {name: value.double() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    modules = {name.rpartition(".")[0] for name in trained}
    assert len(modules) == len(found) == 8
    for module in modules:
        a, b, c = (trained[f"{module}.lora_{part}"] for part in "ABC")
        image = (a.T @ b.T)[None, None]
        delta = torch.nn.functional.conv_transpose2d(image, c, stride=4)[0, 0].T * 8 / (4 + 1e-5)
        name = names.get_name(module.removeprefix("base_model.model.")) + ".weight"
        got = in_hugging_face_order(name, found[name])
        assert torch.linalg.vector_norm(got - delta) <= 1e-6 * torch.linalg.vector_norm(delta), name


def test_the_file_is_verified_and_merged_like_any_adapter(base: Path, tmp_path: Path) -> None:
    adapter = lora(base, tmp_path / "lora", target_modules=["q_proj", "k_proj", "o_proj"], rank_pattern={"k_proj": 3})
    output = tmp_path / "out"
    factor(base, adapter, output, GGUF)
    report = verify(base, adapter, output, VerifyOptions(generated=4))
    assert report.passed, report.problems
    merge(base, adapter, tmp_path / "merged", MergeOptions(device="cpu"))
    merge(base, output, tmp_path / "again", MergeOptions(device="cpu"))
    merge(base, output / "adapter.gguf", tmp_path / "file", MergeOptions(device="cpu"))
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    for folder in ("again", "file"):
        got = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.allclose(got[name], wanted[name], atol=1e-7) for name in wanted)
    rewrite(
        output / "adapter.gguf", lambda name, values: values[::-1] if name == "blk.1.attn_k.weight.lora_b" else values
    )
    assert not verify(base, adapter, output, VerifyOptions(weights_only=True)).passed
    truncated = tmp_path / "truncated"
    factor(base, adapter, truncated, FactorOptions(format="gguf", rank=2, device="cpu"))
    assert verify(base, adapter, truncated, VerifyOptions(weights_only=True)).passed


def rewrite(file: Path, change: Callable[[str, Any], Any], **metadata: Any) -> None:
    """Write an adapter's file again with changed tensors (None: left out) and metadata."""
    reader = gguf.GGUFReader(file)
    keys = {"architecture": "llama", "type": "lora", "alpha": 4.0, **metadata}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(file, keys["architecture"])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", keys["type"])
    writer.add_float32("adapter.lora.alpha", keys["alpha"])
    for name, values in tensors.items():
        changed = change(name, values)
        if changed is not None:
            writer.add_tensor(name, np.ascontiguousarray(changed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "metadata", "said"),
    [
        (lambda name, values: None if name == "blk.0.attn_q.weight.lora_a" else values, {}, "do not fit"),
        (lambda name, values: values[:, :-1] if name == "blk.0.attn_q.weight.lora_b" else values, {}, "do not fit"),
        (lambda name, values: values, {"architecture": "qwen2"}, "another architecture"),
        (lambda name, values: values, {"alpha": float("nan")}, "alpha is wrong"),
        (lambda name, values: values, {"type": "control_vector"}, "not a LoRA"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, change: Callable[[str, Any], Any], metadata: dict[str, Any], said: str
) -> None:
    factor(base, lora(base, tmp_path / "lora", target_modules=["q_proj"]), tmp_path / "out", GGUF)
    rewrite(tmp_path / "out" / "adapter.gguf", change, **metadata)
    with pytest.raises(AdapterMergeError, match=said):
        merge(base, tmp_path / "out", tmp_path / "merged", MergeOptions(device="cpu"))


def test_an_alpha_of_zero_is_a_scale_of_one_and_no_base_is_refused(base: Path, tmp_path: Path) -> None:
    factor(base, lora(base, tmp_path / "lora", target_modules=["q_proj"]), tmp_path / "out", GGUF)
    rewrite(tmp_path / "out" / "adapter.gguf", lambda name, values: values, alpha=0.0)
    opened = open_adapter(tmp_path / "out", base=open_base(base))
    assert {module.scale for module in opened.modules} == {1.0}  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"llama\.cpp's names"):
        open_adapter(tmp_path / "out")


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_dora": True, "init_lora_weights": "pissa"}])
def test_a_row_scale_is_refused_unless_it_is_truncated(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = peft_adapter(base, tmp_path / "scaled", **settings)
    options = FactorOptions(format="gguf", base_kind="original", device="cpu")
    with pytest.raises(UnsupportedError, match="no row scale") as caught:
        factor(base, adapter, tmp_path / "out", options)
    assert "--rank" in str(caught.value)
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "out").exists()
    rank = FactorOptions(format="gguf", base_kind="original", device="cpu", rank=48)  # full: nothing is cut off
    factor(base, adapter, tmp_path / "out", rank)
    found = deltas(tmp_path / "out" / "adapter.gguf")
    after, before = merged_weights(base, adapter), base_weights(base)
    if settings.get("init_lora_weights") is None:
        for layer in range(2):
            module = f"model.layers.{layer}.self_attn.q_proj"
            got = in_hugging_face_order(f"blk.{layer}.attn_q.weight", found[f"blk.{layer}.attn_q.weight"])
            wanted = after[module] - before[module]
            assert torch.linalg.vector_norm(got - wanted) <= 1e-4 * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens.weight: an adapted embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight: trained as a whole tensor"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(base: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    adapter = lora(base, tmp_path / "lora", **settings)
    with pytest.raises(UnsupportedError, match=said):
        factor(base, adapter, tmp_path / "out", GGUF)
    assert not (tmp_path / "out").exists()


def test_a_base_is_needed_and_its_architecture_must_be_known(base: Path, tmp_path: Path) -> None:
    import transformers

    adapter = lora(base, tmp_path / "lora", target_modules=["q_proj"])
    with pytest.raises(InputError, match="needs the base's names"):
        factor(None, adapter, tmp_path / "out", GGUF)
    config = transformers.GPTNeoXConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    other = lora(tmp_path / "neox", tmp_path / "other", target_modules=["dense"])
    with pytest.raises(UnsupportedError, match=r"names of its tensors in llama\.cpp are not known") as caught:
        factor(tmp_path / "neox", other, tmp_path / "out", GGUF)
    assert "gpt_neox" in str(caught.value)


@pytest.mark.parametrize("options", [{"end_to_end": True}, {"keep_scale": True, "rank": 2}, {"format": "onnx"}])
def test_options_of_a_peft_folder_are_refused(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = lora(base, tmp_path / "lora", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"PEFT folder|format is wrong"):
        factor(base, adapter, tmp_path / "out", FactorOptions(**{"format": "gguf", **options}))


def test_the_command_line_writes_it(base: Path, tmp_path: Path) -> None:
    adapter = lora(base, tmp_path / "lora", target_modules=["q_proj"])
    arguments = ["factor", str(base), str(adapter), "-o", str(tmp_path / "out"), "--format", "gguf"]
    run = CliRunner().invoke(group, arguments)
    assert run.exit_code == 0, run.output
    assert "lora, rank 4" in run.output
    check(base, adapter, tmp_path / "out")
    both = [
        *arguments[:-3],
        str(tmp_path / "both"),
        "--format",
        "peft",
        "--format",
        "gguf",
    ]  # what is read, and written
    run = CliRunner().invoke(group, both)
    assert run.exit_code == 0, run.output
    assert (tmp_path / "both" / "adapter.gguf").is_file()
