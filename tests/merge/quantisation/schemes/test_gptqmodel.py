"""GPTQ and AWQ checkpoints that GPTQModel 7.7 made: every dense weight has the bytes that GPTQModel computes with.

benchmarks/gptqmodel_bases.py made the files: `GPTQModel.quantize` quantised them, `GPTQModel.save` wrote them,
`GPTQModel.load` read them, and its inference kernel dequantised them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from pico_bases import quiet, train
from quantised_bases import config_of
from safetensors.torch import load_file, save_file

from adapter_merge.cli.main import group
from adapter_merge.errors import UnsupportedError
from adapter_merge.quantisation.dense_view import open_base, packed_weights
from adapter_merge.storage.tensor_io import read_bytes, read_tensor

FILES = Path(__file__).parent / "gptqmodel_files"
SCHEMES = {
    "gptq": {"gptq int4 g32"},
    "gptq-asymmetric": {"gptq int4 g32"},
    "gptq-v2": {"gptq int4 g32"},
    "gptq-int8": {"gptq int8 g32"},
    "gptq-mixed": {"gptq int4 g32", "gptq int8 g32"},  # o_proj is left dense, down_proj has 8 bits
    "awq": {"awq int4 g32"},
    "awq-symmetric": {"awq int4 g32"},
}


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of every quantised weight's dense bytes, as they are read here."""
    base = open_base(folder)
    return {
        name: hashlib.sha256(read_tensor(base.tensors[name]).numpy().tobytes()).hexdigest()
        for name in packed_weights(base)
    }


@pytest.mark.parametrize("kind", SCHEMES)
def test_dense_weights_have_gptqmodel_s_bytes(kind: str) -> None:
    wanted = json.loads((FILES / kind / "dense.json").read_text("utf-8"))
    base = open_base(FILES / kind)
    found = packed_weights(base)
    assert len(found) == (6 if kind == "gptq-mixed" else 7)
    assert {weight.scheme for weight in found.values()} == SCHEMES[kind]
    assert sums(FILES / kind) == wanted
    for name in found:  # and read from the middle of a row to the middle of another
        ref = base.tensors[name]
        whole = read_tensor(ref).view(-1).view(torch.uint8)
        first, stop = ref.row_bytes * 5 + 6, ref.row_bytes * 19 + 10
        assert torch.equal(read_bytes(ref, first, stop), whole[first:stop]), name


def test_awq_bases_have_other_inputs_than_the_model_they_were_made_from() -> None:
    """GPTQModel's AWQ changes the norms before the adapted layers, its GPTQ does not."""
    norms = {
        kind: read_tensor(open_base(FILES / kind).tensors["model.layers.0.input_layernorm.weight"])
        for kind in ("gptq", "gptq-v2", "awq")
    }
    assert torch.equal(norms["gptq"], norms["gptq-v2"])
    assert not torch.equal(norms["gptq"], norms["awq"])
    assert any("rescales the inputs of layers" in note for note in open_base(FILES / "awq").notes)
    assert open_base(FILES / "gptq").notes == ()


def test_a_merge_into_an_awq_base_prints_the_note(tmp_path: Path) -> None:
    settings = config_of(FILES / "awq")
    del settings["quantization_config"]
    with quiet():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings))
        model.save_pretrained(tmp_path / "plain")
        train(tmp_path / "plain", peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "lora")
    command = ["merge", str(FILES / "awq"), str(tmp_path / "lora"), "-o", str(tmp_path / "out"), "--as", "float16"]
    result = CliRunner().invoke(group, command)
    assert result.exit_code == 0, result.output
    assert "note: AWQ rescales the inputs of layers" in result.stderr


@pytest.mark.parametrize(
    ("kind", "change"), [("gptq-asymmetric", "gptq_v2"), ("gptq-v2", "gptq"), ("gptq", "codes"), ("awq", "codes")]
)
def test_the_sums_notice_another_reading(tmp_path: Path, kind: str, change: str) -> None:
    shutil.copytree(FILES / kind, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text("utf-8"))
    settings = config["quantization_config"]
    if change == "codes":
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        words = tensors["model.layers.0.mlp.up_proj.qweight"]
        words[0, 0] ^= 1
        save_file(tensors, file, {"format": "pt"})
    else:
        settings |= {"format": change, "checkpoint_format": change}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), "utf-8")
    wanted = json.loads((FILES / kind / "dense.json").read_text("utf-8"))
    differ = [name for name, total in sums(tmp_path / "base").items() if total != wanted[name]]
    assert sorted(differ) == (["model.layers.0.mlp.up_proj.weight"] if change == "codes" else sorted(wanted))


@pytest.mark.parametrize(
    ("setting", "value"), [("checkpoint_format", "gemv_fast"), ("method", "qqq"), ("zero_point", "yes")]
)
def test_awq_settings_of_another_layout_are_refused(tmp_path: Path, setting: str, value: str) -> None:
    shutil.copytree(FILES / "awq", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text("utf-8"))
    config["quantization_config"][setting] = value
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnsupportedError, match=f"unsupported value of {setting}"):
        open_base(tmp_path / "base")
