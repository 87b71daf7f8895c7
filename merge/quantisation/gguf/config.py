"""config.json and tokenizer of a GGUF file without such files beside it, as transformers' GGUF loading makes them.

transformers ignores metadata that it does not know; the model could then compute something else. Here every metadata
key of the architecture must be one that config.json can express. The frequency factors of Llama 3's rotary embedding,
which llama.cpp stores as a tensor, are converted to settings of config.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapter_merge.errors import FileFormatError, MissingDependencyError, Problem, UnsupportedError, raise_all
from adapter_merge.files.installation import install_command
from adapter_merge.storage.gguf_header import GgufHeader

from .names import COMMON_KEYS, Architecture, architecture_named

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# tokenizer.ggml.pre of byte-level BPE vocabularies that transformers splits by its default, GPT-2's expression.
DEFAULT_SPLITS = ("gpt-2",)
SMOLLM = "smollm"
OWN_FILES = "put the model's config.json and tokenizer files beside the .gguf file: they are used as they are"


def require_transformers(what: str) -> None:
    """Raise MissingDependencyError unless transformers and gguf are installed."""
    missing = [
        name for name in ("transformers", "gguf", "accelerate") if find_spec(name) is None and name != "accelerate"
    ]
    if missing:
        raise MissingDependencyError(f"{what} needs {' and '.join(missing)}", hint=install_command("gguf"))


def make_config(header: GgufHeader) -> dict[str, Any]:
    """Return the content of config.json.

    Raises UnsupportedError for an architecture, metadata or a rotary embedding that config.json cannot express.
    """
    architecture = architecture_named(header.architecture, header.file)
    _check_keys(header, architecture)
    require_transformers("reading a GGUF model")
    with quiet():
        transformers: Any = import_module("transformers")
        known: Any = import_module("transformers.integrations.ggml").GGUF_CONFIG_MAPPING
        prefixed = {f"{architecture.name}.{key}": name for key, name in known[architecture.name].items()}
        prefixed |= {f"tokenizer.{key}": name for key, name in known["tokenizer"].items()}
        stated = {prefixed[key]: value for key, value in header.metadata.items() if prefixed.get(key) is not None}
        stated.setdefault("vocab_size", header.metadata.get("tokenizer.ggml.tokens"))
        model_type = architecture.model_types[0]
        read = transformers.AutoConfig.for_model(model_type, **stated)
        kind = transformers.AutoModelForCausalLM._model_mapping[type(read)]
        config: dict[str, Any] = read.to_diff_dict() | stated
    config = {name: value for name, value in config.items() if not name.startswith("_") and name != "unk_token_id"}
    config |= {"architectures": [kind.__name__], "model_type": model_type, "dtype": "float32"}
    config["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in header.tensors)
    config |= _stated_values(header, architecture)
    config["rope_parameters"] = _rope(header, config)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # read by older versions of transformers
    if config["rope_parameters"]["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    return dict(sorted(config.items()))


def _check_keys(header: GgufHeader, architecture: Architecture) -> None:
    """Raise UnsupportedError with every metadata key of the architecture that config.json cannot express."""
    prefix = f"{architecture.name}."
    known = {prefix + key for key in (*COMMON_KEYS, *architecture.keys)}
    neutral = {f"{prefix}rope.scaling.type": "none"}
    unknown = [
        key
        for key, value in header.metadata.items()
        if key.startswith(prefix) and key not in known and (key not in neutral or value != neutral[key])
    ]
    problems = [
        Problem(
            f"{header.file}: config.json cannot express {key}", got=f"{header.metadata[key]!r:.100}", hint=OWN_FILES
        )
        for key in unknown
    ]
    if header.metadata.get("split.count", 1) not in (0, 1):
        problems.append(
            Problem(
                f"{header.file}: one part of a split model", hint="join the parts: llama-gguf-split --merge FIRST OUT"
            )
        )
    raise_all(problems, UnsupportedError)


def _stated_values(header: GgufHeader, architecture: Architecture) -> dict[str, Any]:
    """Return settings that transformers' GGUF loading does not read, or reads with float32 rounding errors."""

    def stated(key: str) -> Any:
        return header.metadata.get(f"{architecture.name}.{key}")

    values: dict[str, Any] = {"rms_norm_eps": shortest(stated("attention.layer_norm_rms_epsilon"))}
    heads, width = stated("attention.head_count"), stated("embedding_length")
    head = stated("attention.key_length")
    if head is None and isinstance(heads, int) and isinstance(width, int) and heads:
        head = width // heads
    values["head_dim"] = head
    problems = []
    for key in ("attention.value_length", "rope.dimension_count"):
        if stated(key) not in (None, head):
            problems.append(
                Problem(
                    f"{header.file}: {architecture.name}.{key} is not the size of a head",
                    str(head),
                    str(stated(key)),
                    OWN_FILES,
                )
            )
    raise_all(problems, UnsupportedError)
    if architecture.name == "llama":
        values["attention_bias"] = any(tensor.name == "blk.0.attn_q.bias" for tensor in header.tensors)
    for key, name in (
        ("attention.sliding_window", "sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if stated(key) is not None:
            values[name] = shortest(stated(key))
    return values


def _rope(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_parameters of config.json. Raises UnsupportedError for frequency factors other than Llama 3's."""
    theta = shortest(header.metadata.get(f"{header.architecture}.rope.freq_base", 10000.0))
    stored = next((tensor for tensor in header.tensors if tensor.name == ROPE_FACTORS), None)
    if stored is None:
        return {"rope_type": "default", "rope_theta": theta}
    with header.file.open("rb") as stream:
        stream.seek(stored.start)
        raw = stream.read(stored.stop - stored.start)
    if stored.type != "F32" or stored.shape != (config["head_dim"] // 2,):
        raise FileFormatError(f"{header.file}: {ROPE_FACTORS} is wrong", got=f"{stored.type} {stored.shape}")
    factors = struct.unpack(f"<{stored.shape[0]}f", raw)
    settings = {"rope_type": "llama3", "factor": shortest(max(factors)), **LLAMA3}
    wanted = llama3_factors(settings, theta, config["head_dim"])
    if any(abs(got - want) > 1e-4 * want for got, want in zip(factors, wanted, strict=True)):
        raise UnsupportedError(
            f"{header.file}: {ROPE_FACTORS} are not the frequency factors of Llama 3",
            expected=f"those of {json.dumps(settings)}",
            hint=OWN_FILES,
        )
    return settings | {"rope_theta": theta}


def llama3_factors(settings: Mapping[str, Any], theta: float, head: int) -> list[float]:
    """Return the factor of the wavelength of each pair of dimensions.

    Source: _compute_llama3_parameters in transformers' modeling_rope_utils.py.
    """
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    context, factor = settings["original_max_position_embeddings"], settings["factor"]
    factors = []
    for pair in range(head // 2):
        turns = context / (2 * math.pi * theta ** (2 * pair / head))  # of the pair in the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return factors


def shortest(value: Any) -> Any:
    """Return the shortest decimal that is the same float32: GGUF stores 1e-05 as 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def write_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Write the tokenizer's files into `folder`; do nothing where the GGUF file has no tokenizer.

    Raises UnsupportedError for a pre-tokenizer that transformers does not know: it would split text as GPT-2's does,
    and give other tokens.
    """
    model, pre = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model in (None, "none", "no_vocab"):
        return
    require_transformers("reading a GGUF model")
    with quiet():
        splits: Any = import_module("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    known = (*splits, *DEFAULT_SPLITS, SMOLLM)
    if model not in ("llama", "gpt2") or (model == "gpt2" and pre not in known):
        raise UnsupportedError(
            f"{header.file}: the pre-tokenizer of its vocabulary is not supported",
            expected=f"tokenizer.ggml.model llama, or gpt2 with tokenizer.ggml.pre {', '.join(sorted(known))}",
            got=f"{model!r:.50} with {pre!r:.50}",
            hint=OWN_FILES,
        )
    read_tokenizer(header.file, pre).save_pretrained(folder)


def read_tokenizer(file: Path, pre: object) -> Any:
    """Return the tokenizer of a GGUF file as transformers reads it, with the splitting that `pre` names."""
    with quiet():
        from tokenizers import pre_tokenizers

        transformers: Any = import_module("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        if pre == SMOLLM:  # single digits, then GPT-2's expression; transformers reads it as GPT-2's alone
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of transformers; errors still surface as exceptions."""
    # Imported before stderr is redirected: its log handler must keep the real one. Partly untyped, hence Any.
    hf_logging: Any = import_module("transformers.utils.logging")
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
