"""Scaled rotary positions: the kinds that an export supports, and their tables by transformers' own formulas.

The model builder (onnxruntime-genai 0.18) implements one scaling for Llama, llama3, and exports the others unscaled
without an error; for yarn it needs betas that most configurations leave out. The tables of cosines and sines are
therefore computed here from transformers' inverse frequencies (modeling_rope_utils.ROPE_INIT_FUNCTIONS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapter_merge.errors import Problem

PLAIN = ("default",)
FIXED = ("linear", "yarn", "llama3")  # frequencies that do not depend on the length of the text
TYPES: Mapping[str, tuple[str, ...]] = {
    "LlamaForCausalLM": (*PLAIN, *FIXED),
    "MistralForCausalLM": (*PLAIN, *FIXED),
    "Qwen2ForCausalLM": (*PLAIN, *FIXED),
    "Qwen3ForCausalLM": (*PLAIN, *FIXED),
    "Phi3ForCausalLM": (*PLAIN, "longrope"),
    "GemmaForCausalLM": PLAIN,
    "Gemma2ForCausalLM": PLAIN,
    "Gemma3ForCausalLM": PLAIN,
    "GraniteForCausalLM": PLAIN,
    "SmolLM3ForCausalLM": PLAIN,
}
REASONS: Mapping[str, str] = {
    "dynamic": "its frequencies change with the length of the text, and a graph's tables are fixed",
}
POSITIVE = ("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


def rope_settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rotary settings in a config.json, one per kind of layer.

    Sources: rope_scaling, or rope_parameters, flat or by layer type.
    """
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [dict(value) for value in stated.values() if isinstance(value, dict)]
    return nested or [dict(stated)]


def rope_problems(config: Mapping[str, Any], source: Path) -> list[Problem]:
    """Return why the rotary positions of this decoder cannot be exported exactly; nothing when they can."""
    architecture = (config.get("architectures") or [""])[0]
    allowed = TYPES.get(architecture, PLAIN)
    problems = []
    for settings in rope_settings(config):
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind not in allowed:
            reason = REASONS.get(kind, "the export has no tables for it")
            problems.append(
                Problem(
                    f"{source}: {kind} rotary positions of {architecture}: {reason}",
                    expected=f"rope_type {', '.join(allowed)}",
                    got=str(kind),
                    hint="merge it (adapter-merge merge) and serve it with vLLM",
                )
            )
            continue
        missing = [key for key in NEEDED.get(kind, ()) if settings.get(key, config.get(key)) is None]
        if missing:
            problems.append(Problem(f"{source}: {kind} rotary positions without {', '.join(missing)}"))
        problems += [
            Problem(f"{source}: {kind} rotary positions", f"{key}: {expected}", f"{value!r}"[:80])
            for key, expected, value in _find_wrong_numbers(settings, config)
        ]
    return problems


def _find_wrong_numbers(settings: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return (setting, expected value, stated value) of each setting that its formula cannot use."""
    wrong: list[tuple[str, str, Any]] = []
    for key in POSITIVE:
        value = settings.get(key)
        if value is not None and not _is_positive(value):
            wrong.append((key, "a number above 0", value))
    heads = int(config.get("num_attention_heads") or 1)
    size = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    count = int(size * float(settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))) // 2
    for key in ("short_factor", "long_factor"):
        value = settings.get(key)
        if value is not None and not (
            isinstance(value, list) and len(value) == count and all(map(_is_positive, value))
        ):
            wrong.append((key, f"{count} numbers above 0", value))
    key = "original_max_position_embeddings"
    inner, outer = settings.get(key), config.get(key)
    if None not in (inner, outer) and inner != outer:  # the builder reads the outer value, transformers the inner one
        wrong.append((key, f"{outer}, as outside of the rotary settings", inner))
    return wrong


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def compute_fixed_frequencies(config: Any) -> tuple[Any, float] | None:
    """Return inverse frequencies (rotary dims / 2,) float32 and the factor of cosines and sines.

    None for a transformers config without FIXED scaling.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in FIXED:
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device="cpu")
    return frequencies.float(), float(factor)


def scaled_context(config: Any) -> int:
    """Return the number of positions of a model with FIXED scaling.

    It is the config's number, or the original number times the factor where the config still states the original one
    (Qwen2 with yarn, linear scaling).
    """
    limit, rope = int(config.max_position_embeddings), config.rope_parameters
    original = int(rope.get("original_max_position_embeddings") or limit)
    return max(limit, int(original * rope["factor"])) if rope["rope_type"] in ("linear", "yarn") else limit


def use_transformers_tables(model_class: Any, config: Any) -> None:
    """Make the builder's `model_class` use tables of transformers' formulas, and set `config` to unscaled positions.

    For longrope, the builder's tables are kept and get the factor of cosines and sines that transformers computes.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        factor = float(ROPE_INIT_FUNCTIONS["longrope"](config, device="cpu", seq_len=1)[1])
        config.rope_parameters = {**rope, "type": "longrope", "short_mscale": factor, "long_mscale": factor}
        return
    tables = compute_fixed_frequencies(config)
    if tables is None:
        return
    import torch

    frequencies, factor = tables
    config.max_position_embeddings = scaled_context(config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}

    def caches(self: Any) -> tuple[Any, Any]:
        angles = torch.outer(torch.arange(self.rope_attrs["cache_length"], dtype=torch.float32), frequencies)
        doubled = torch.cat((angles, angles), dim=-1)  # (positions, rotary dims)
        return doubled.cos() * factor, doubled.sin() * factor

    model_class.make_rotary_embedding_caches_from_scratch = caches
