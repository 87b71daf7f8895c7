"""The quantization_config of a checkpoint, checked against a list of known keys and values for each method.

An unknown key is refused, because it may change how the weights have to be read. Keys that do not affect the weights
(how the model was calibrated, which kernel runs it) are listed in `IGNORED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapter_merge.errors import FileFormatError, Problem, UnsupportedError, raise_all
from adapter_merge.storage.checkpoint import Checkpoint, read_json

SIDE_FILE = "hf_quant_config.json"  # ModelOpt's copy of the config; some models have no other
MODELOPT_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8")
LOCATIONS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Configuration:
    """A checked quantization_config. `where` is its file and key, for messages."""

    method: str
    settings: Mapping[str, Any]
    where: str

    def notes(self) -> tuple[str, ...]:
        """Return what a user of the dense weights has to know: run-time quantisation, and rescaled inputs of layers."""
        settings, notes = self.settings, []
        groups = settings.get("config_groups")
        activations = any(isinstance(group, dict) and group.get("input_activations")
                          for group in (groups.values() if isinstance(groups, dict) else ()))  # fmt: skip
        if activations or self.method in ("fp8", "fbgemm_fp8") or settings.get("quant_algo") == "FP8":
            notes.append("loaders of the quantised base also quantise the activations; a dense model does not")
        if settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo"):
            notes.append("the quantised base asks for a quantised key-value cache; a dense model does not")
        if self.method == "awq":
            notes.append(
                "AWQ rescales the inputs of layers: an adapter that was trained on the unquantised model does not fit"
            )
        return tuple(notes)

    def refuse(self, key: str, expected: str, hint: str | None = None) -> UnsupportedError:
        """Return the error for an unsupported value of `key`."""
        return UnsupportedError(
            f"{self.where}: {self.method}: unsupported value of {key}",
            expected=expected,
            got=f"{key} {self.settings.get(key)!r}"[:200],
            hint=hint,
        )


# Keys without effect on the stored weights: calibration, kernels, activations, the list of dense modules.
_GPTQ_IGNORED = frozenset({
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path", "quantizer",
    "model_file_base_name", "meta", "act_group_aware", "tokenizer", "dataset", "backend", "model_seqlen", "batch_size",
    "block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id", "max_input_length", "mse",
    "cache_block_outputs", "modules_in_block_to_quantize", "use_cuda_fp16", "use_exllama", "disable_exllama",
    "exllama_config", "use_exllama_v2", "mock_quantization", "lm_head", "desc_act", "sym", "act_order",
})  # fmt: skip
IGNORED: Mapping[str, frozenset[str]] = {
    "fp8": frozenset({
        "activation_scheme", "dequantize", "modules_to_not_convert", "ignored_layers", "modules_to_convert",
        "scale_fmt", "kv_cache_scheme", "act_per_tensor",
    }),
    "fbgemm_fp8": frozenset({"activation_scale_ub", "modules_to_not_convert"}),
    "compressed-tensors": frozenset({
        "kv_cache_scheme", "global_compression_ratio", "version", "dequantize", "run_compressed",
        "use_optimized_inference",
    }),
    "modelopt": frozenset({
        "producer", "kv_cache_scheme", "kv_cache_quant_algo", "config_groups", "ignore", "exclude_modules", "weights",
        "input_activations",
    }),
    "gptq": _GPTQ_IGNORED,
    "awq": _GPTQ_IGNORED | {"do_fuse", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert"},
    "bitsandbytes": frozenset({
        "_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit", "llm_int8_threshold",
        "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant", "bnb_4bit_quant_type",
    }),
    "mxfp4": frozenset({"modules_to_not_convert", "dequantize"}),
}  # fmt: skip
# Keys whose values are checked: unsupported values are refused, or the file of the scheme reads them.
Check = Callable[[Any], bool]


def _one_of(*values: object) -> Check:
    return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values)


def _empty(value: object) -> bool:
    return value is None or value == {} or value == []


def _block(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)
    )


def _group(value: object) -> bool:
    return type(value) is int and (value == -1 or value > 0)


def _dense_sparsity(value: object) -> bool:
    return _empty(value) or (isinstance(value, dict) and value.get("format") == "dense")


def _known_layers(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(layer, dict) and layer.get("quant_algo") in MODELOPT_ALGORITHMS for layer in value.values())
    )


def _lower(check: Check) -> Check:
    return lambda value: check(value.lower() if isinstance(value, str) else value)


CHECKED: Mapping[str, Mapping[str, tuple[Check, str]]] = {
    "fp8": {
        "weight_block_size": (_block, "null or two positive sizes"),
        "fmt": (_one_of("e4m3", "float8_e4m3fn", None), "e4m3"),
        "weight_per_tensor": (_one_of(False, None), "false: blocks, or null for one scale"),
        "expert_dtype": (_one_of("fp8", None), "fp8"),
    },
    "fbgemm_fp8": {},
    "compressed-tensors": {
        "config_groups": (lambda value: isinstance(value, dict) and bool(value), "an object with one group or more"),
        "format": (
            _one_of("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized",
                    "mxfp4-pack-quantized", "mixed-precision"),
            "pack-, float-, int-, naive-, nvfp4-pack-, mxfp4-pack-quantized or mixed-precision",
        ),
        "quantization_status": (_one_of("compressed", "frozen"), "compressed, or frozen as older files state it"),
        "ignore": (lambda value: value is None or isinstance(value, list), "a list of module names and patterns"),
        "sparsity_config": (_dense_sparsity, "no sparsity"),
        "transform_config": (_empty, "no transforms: they rotate weights and activations"),
        "moe_sparsity_config": (_empty, "no sparsity"),
    },
    "modelopt": {
        "quant_algo": (_one_of(*MODELOPT_ALGORITHMS, "MIXED_PRECISION"),
                       ", ".join((*MODELOPT_ALGORITHMS, "MIXED_PRECISION"))),
        "quantized_layers": (_known_layers, "layers of " + ", ".join(MODELOPT_ALGORITHMS)),
        "group_size": (_one_of(16, None), "16"),
    },
    "gptq": {
        "bits": (_one_of(4, 8), "4 or 8"),
        "group_size": (_group, "a positive size, or -1"),
        "format": (_lower(_one_of("gptq", "gptq_v2", None)), "gptq or gptq_v2"),
        "checkpoint_format": (_lower(_one_of("gptq", "gptq_v2", None)), "gptq or gptq_v2"),
        "pack_dtype": (_one_of("int32", None), "int32"),
        "is_marlin_format": (_one_of(False, None), "false"),
        "dynamic": (lambda value: value is None or isinstance(value, dict), "an object"),
        "adapter": (_empty, "no adapter inside the quantised model"),
        "method": (_one_of("gptq"), "gptq"),
        "rotation": (_empty, "no rotation of weights and activations"),
        "activation": (_empty, "16-bit activations"),
    },
    "awq": {
        "bits": (_one_of(4), "4"),
        "group_size": (_group, "a positive size, or -1"),
        "zero_point": (_one_of(True, False), "true or false"),  # false: all stored zero points are 8 (GPTQModel)
        "version": (_lower(_one_of("gemm", None)), "gemm"),
        "format": (_lower(_one_of("gemm", None)), "gemm"),
        "checkpoint_format": (_lower(_one_of("gemm", None)), "gemm"),
        "method": (_one_of("awq"), "awq"),
        "pack_dtype": (_one_of("int32", None), "int32"),
        "dynamic": (_empty, "no settings per module"),
    },
    "bitsandbytes": {"llm_int8_has_fp16_weight": (_one_of(False, None), "false")},
    "mxfp4": {},
}  # fmt: skip
REQUIRED = {
    "compressed-tensors": ("config_groups", "format", "quantization_status"),
    "modelopt": ("quant_algo",),
    "gptq": ("bits", "group_size"),
    "awq": ("bits", "group_size", "zero_point"),
}


def read_configuration(base: Checkpoint) -> Configuration | None:
    """Return the checked quantization_config of `base`, or None where it has none.

    Reads config.json, its text_config, and ModelOpt's hf_quant_config.json. Raises UnsupportedError with all unknown
    keys and unsupported values, and FileFormatError for a config that is not a JSON object.
    """
    stated, where = _stated(base)
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise FileFormatError(f"{where} is not a JSON object", got=repr(stated)[:100])
    method = stated.get("quant_method", "compressed-tensors" if "config_groups" in stated else None)
    if not isinstance(method, str) or method not in CHECKED:
        raise UnsupportedError(
            f"{where}: this quantisation method is not supported",
            expected=", ".join(CHECKED),
            got=f"quant_method {method!r}"[:200],
            hint="use the unquantised model as the base",
        )
    checked, problems = CHECKED[method], []
    unknown = sorted(set(stated) - set(checked) - IGNORED[method] - {"quant_method"})
    if unknown:
        known = sorted({*checked, *IGNORED[method], "quant_method"})
        problems.append(Problem(f"{where}: unknown keys for quant_method {method}", ", ".join(known),
                                ", ".join(f"{key} {stated[key]!r}"[:100] for key in unknown)))  # fmt: skip
    for key in REQUIRED.get(method, ()):
        if key not in stated:
            problems.append(Problem(f"{where}: {method} without {key}", checked[key][1], f"no {key}"))
    for key, (check, expected) in checked.items():
        if key in stated and not check(stated[key]):
            problems.append(
                Problem(f"{where}: {method}: unsupported value of {key}", expected, repr(stated[key])[:200])
            )
    raise_all(problems, UnsupportedError)
    return Configuration(method, stated, where)


def _stated(base: Checkpoint) -> tuple[Any, str]:
    """Return the quantization_config as it is stored (None where there is none), and its file and key."""
    text = base.config.get("text_config")
    for holder, path in ((base.config, ""), (text if isinstance(text, dict) else {}, "text_config.")):
        for location in LOCATIONS:
            if holder.get(location) is not None:
                return holder[location], f"{base.folder / 'config.json'}: {path}{location}"
    file = base.folder / SIDE_FILE
    if not file.is_file():
        return None, ""
    stated = read_json(file).get("quantization")
    if isinstance(stated, dict):
        stated = {"quant_method": "modelopt", **stated}
    return stated, f"{file}: quantization"
