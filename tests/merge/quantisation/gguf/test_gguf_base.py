"""GGUF models as bases: bit-equal to what transformers loads from the same file; refused where they would differ."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf_files import Kind
from safetensors.torch import load_file

from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.cli.main import group
from adapter_merge.errors import (
    AdapterMergeError,
    FileFormatError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from adapter_merge.quantisation.dense_view import open_base
from adapter_merge.quantisation.gguf import config as gguf_config
from adapter_merge.quantisation.gguf.config import llama3_factors, shortest
from adapter_merge.storage.tensor_io import read_bytes, read_tensor
from adapter_merge.verification.live_adapter import quiet_libraries

CPU = MergeOptions(device="cpu", write_as="float32")


def in_transformers(file: Path) -> Any:
    """The model as transformers reads the file, in float32."""
    import transformers

    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return files.pico("llama")


@pytest.fixture(scope="module")
def q8(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write(tmp_path_factory.mktemp("gguf") / "q8.gguf", llama, "llama", Kind.Q8_0)


def lora(model: Any, folder: Path, **settings: Any) -> Any:
    """A PEFT adapter with random factors on `model`, saved to `folder`; the live PEFT model."""
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(model, config)
        for name, parameter in live.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        live.save_pretrained(folder)
    return live


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
)
def test_every_tensor_is_what_transformers_reads(llama: Any, tmp_path: Path, kind: str) -> None:
    file = files.write(tmp_path / f"{kind}.gguf", llama, "llama", Kind[kind])
    base = open_base(file)
    wanted = in_transformers(file).state_dict()
    assert set(base.tensors) == set(wanted)
    for name, ref in base.tensors.items():
        assert torch.equal(read_tensor(ref).float(), wanted[name]), name
        first, stop = ref.row_bytes * 3 + 5, min(ref.nbytes, ref.row_bytes * 40 + 7)  # from and to the middle of a row
        if len(ref.shape) > 1:
            whole = read_tensor(ref).view(-1).view(torch.uint8)
            assert torch.equal(read_bytes(ref, first, stop), whole[first:stop]), name


@pytest.mark.parametrize(
    ("architecture", "tied", "settings"),
    [
        ("llama", True, {"attention_bias": True}),
        ("qwen2", True, {}),
        ("qwen3", False, {"head_dim": 32}),
        ("gemma2", True, {"sliding_window": 32, "final_logit_softcapping": 20.0}),
    ],
)
def test_every_architecture_is_the_model_that_was_converted(
    tmp_path: Path, architecture: str, tied: bool, settings: dict[str, Any]
) -> None:
    import transformers

    model = files.pico(architecture, tied, **settings)
    file = files.write(tmp_path / "a.gguf", model, architecture)
    output = tmp_path / "merged"
    lora(model, tmp_path / "lora")
    base = open_base(file)
    config = transformers.AutoConfig.from_pretrained(str(base.folder))
    for key, value in model.config.to_dict().items():
        if key not in ("dtype", "architectures", "transformers_version", "_name_or_path", "use_cache"):
            assert getattr(config, key) == value, key
    merge(file, tmp_path / "lora", output, CPU)
    with quiet_libraries(), torch.no_grad():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
        ids = torch.arange(60)[None]
        # `model` now has the adapter in it
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=2e-5)
        assert float((loaded(ids).logits - files.pico(architecture, tied, **settings)(ids).logits).abs().max()) > 1e-3


@pytest.fixture(scope="module")
def q4_k_m(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mix of types that llama.cpp calls Q4_K_M: Q4_K, with Q6_K for the embedding, attn_v and ffn_down."""
    kinds = dict.fromkeys(("token_embd", "attn_v", "ffn_down"), Kind.Q6_K)
    return files.write(tmp_path_factory.mktemp("gguf") / "q4_k_m.gguf", llama, "llama", Kind.Q4_K, kinds=kinds)


@pytest.mark.parametrize(("kind", "settings"), [("q8", {}), ("q8", {"use_dora": True}), ("q4_k_m", {})])
def test_a_merge_is_rounded_once_and_verify_sees_it(
    kind: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(kind)
    live = lora(in_transformers(base), tmp_path / "lora", **settings)
    merge(base, tmp_path / "lora", tmp_path / "out", MergeOptions(device="cpu", write_as="bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = live.to(torch.float64).merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert set(got) == set(wanted)
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        exact = wanted[name].to(torch.bfloat16)
        if "norm" in name or "v_proj" in name or "embed" in name:
            assert torch.equal(tensor, exact), name
        # A tie may fall to the other side in float32, and where W0 and dW cancel its rounding shows.
        near = (tensor.float() - exact.float()).abs() <= exact.float().abs() * 2**-7 + 1e-8
        assert bool(near.all()), name
        assert float((tensor != exact).float().mean()) < 1e-3, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    manifest = json.loads((tmp_path / "out" / "adapter_merge.json").read_text())
    assert manifest["base"]["path"] == str(base)
    report = verify(base, tmp_path / "lora", tmp_path / "out", VerifyOptions(weights_only=True))
    assert report.passed, report.problems
    spoiled = {**got, "model.layers.1.self_attn.q_proj.weight": got["model.layers.1.self_attn.q_proj.weight"].flip(0)}
    from safetensors.torch import save_file

    save_file(spoiled, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert not verify(base, tmp_path / "lora", tmp_path / "out", VerifyOptions(weights_only=True)).passed


def test_the_config_beside_a_file_is_used(llama: Any, q8: Path, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "hf")
    shutil.copy(q8, tmp_path / "hf" / "model.gguf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    base = open_base(tmp_path / "hf")
    assert base.config["rope_parameters"]["factor"] == 2.0
    assert Path("config.json") in base.side_files
    assert open_base(base.folder).folder == base.folder  # opened again by its folder
    config["model_type"] = "qwen2"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    shutil.copy(q8, tmp_path / "hf" / "other.gguf")
    (tmp_path / "hf" / "model.gguf").unlink()
    with pytest.raises(FileFormatError, match="its architecture differs"):
        open_base(tmp_path / "hf")


def test_the_input_files_are_left_alone(q8: Path) -> None:
    before = q8.stat()
    base = open_base(q8)
    assert sorted(path.name for path in q8.parent.iterdir()) == ["q8.gguf"]
    assert base.folder != q8.parent
    assert q8.stat() == before


def test_a_folder_with_several_asks_for_one(q8: Path, tmp_path: Path) -> None:
    for name in ("Q4_K_M.gguf", "Q8_0.gguf"):
        shutil.copy(q8, tmp_path / name)
    with pytest.raises(InputError, match="several GGUF models") as caught:
        open_base(tmp_path)
    assert caught.value.problems[0].got == "Q4_K_M.gguf, Q8_0.gguf"
    assert open_base(tmp_path / "Q8_0.gguf").tensors


Key = dict[str, tuple[str, Any] | None]


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({"llama.rope.scaling.type": ("string", "yarn")}, {}, r"cannot express llama\.rope\.scaling\.type"),
        ({"llama.expert_count": ("uint32", 4)}, {}, r"cannot express llama\.expert_count"),
        ({"llama.attention.value_length": ("uint32", 32)}, {}, "is not the size of a head"),
        ({"llama.rope.dimension_count": ("uint32", 16)}, {}, "is not the size of a head"),
        ({"split.count": ("uint16", 3)}, {}, "part of a split model"),
        (
            {"tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.pre": ("string", "new")},
            {},
            "the pre-tokenizer of its vocabulary",
        ),
        ({"tokenizer.ggml.model": ("string", "bert")}, {}, "the pre-tokenizer of its vocabulary"),
        ({"general.type": ("string", "adapter")}, {}, "not a model"),
        ({"llama.feed_forward_length": ("uint32", 500)}, {}, "ffn_down.weight has a wrong shape"),
        ({"llama.block_count": ("uint32", 3)}, {}, r"has no model\.layers\.2"),
        ({"llama.block_count": ("uint32", 1)}, {}, r"blk\.1\.attn_q\.weight belongs to no tensor"),
        ({}, {"blk.0.attn_v.weight": None}, r"has no model\.layers\.0\.self_attn\.v_proj\.weight"),
        ({}, {"blk.0.extra.weight": np.zeros((2, 2), np.float32)}, r"blk\.0\.extra\.weight belongs to no tensor"),
        ({}, {"rope_freqs.weight": np.full(32, 3.0, np.float32)}, "not the frequency factors of Llama 3"),
        ({}, {"rope_freqs.weight": np.ones(5, np.float32)}, "rope_freqs.weight is wrong"),
    ],
)
def test_what_would_give_another_model_is_refused(
    llama: Any, tmp_path: Path, keys: Key, tensors: dict[str, Any], said: str
) -> None:
    file = files.write(tmp_path / "a.gguf", llama, "llama", keys=keys, tensors=tensors)
    with pytest.raises(AdapterMergeError, match=said):
        open_base(file)


def test_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="not supported") as caught:
        open_base(tmp_path / "a.gguf")
    assert caught.value.problems[0].got == "falcon"


def test_a_missing_package_is_named(q8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_config, "find_spec", lambda name: None)
    shutil.copy(q8, tmp_path / "a.gguf")
    with pytest.raises(MissingDependencyError, match="transformers and gguf"):
        open_base(tmp_path / "a.gguf")


def test_a_block_without_a_finite_scale_is_refused(llama: Any, tmp_path: Path) -> None:
    file = files.write(tmp_path / "a.gguf", llama, "llama", Kind.Q8_0)
    base = open_base(file)
    place = base.tensors["model.layers.0.mlp.up_proj.weight"].source.parts["blocks"]  # type: ignore[attr-defined]
    with file.open("r+b") as stream:
        stream.seek(place.start)
        stream.write(b"\x00\x7e")  # NaN in float16
    with pytest.raises(FileFormatError, match="no finite scale"):
        read_tensor(base.tensors["model.layers.0.mlp.up_proj.weight"])


def test_llama_3_s_frequency_factors_become_settings(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    model = files.pico("llama", rope_parameters=settings)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, device="cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    factors = plain / scaled
    assert torch.allclose(torch.tensor(llama3_factors(settings, 500000.0, 64)), factors, rtol=1e-5)
    file = files.write(
        tmp_path / "a.gguf",
        model,
        "llama",
        keys={"llama.rope.freq_base": ("float32", 500000.0)},
        tensors={"rope_freqs.weight": factors.numpy()},
    )
    assert open_base(file).config["rope_parameters"] == settings


@pytest.mark.parametrize("value", [1e-5, 1e-6, 10000.0, 0.1, 1.0, 1e6, 3.4e-41])
def test_float32_values_are_written_short(value: float) -> None:
    assert shortest(float(np.float32(value))) == value


def test_the_command_line_takes_a_file(q8: Path, tmp_path: Path) -> None:
    lora(in_transformers(q8), tmp_path / "lora")
    arguments = ["merge", str(q8), str(tmp_path / "lora"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    run = CliRunner().invoke(group, arguments)
    assert isinstance(run.exception, InputError)
    assert "--as" in str(run.exception)
    assert "gguf Q8_0" in str(run.exception)
    run = CliRunner().invoke(group, [*arguments, "--as", "float16"])
    assert run.exit_code == 0, run.output
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    run = CliRunner().invoke(group, ["inspect", str(tmp_path / "lora"), "--base", str(q8)])
    assert run.exit_code == 0, run.output
    assert "gguf Q8_0" in run.output
