"""The model builder of onnxruntime-genai in a process of its own: python -m ...building.builder_process.

The builder changes sys.path, prints to stdout and keeps the model in memory; the end of the process undoes all three.
It reads some of transformers' configurations wrongly (onnxruntime-genai 0.18, transformers 5.23), so `repair` changes
them first:

- a sliding window without layer_types (Mistral, Phi-3): the builder treats every layer as full attention, silently;
- rope_parameters by layer type (Gemma 3): the builder expects them flat and fails with KeyError: 'rope_type';
- scaled rotary positions: see rotary.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def repair(config: Any) -> None:
    """Change a transformers config in place so that the builder reads it correctly."""
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "layer_types", None) is None and config.model_type in WINDOWED:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "gemma3_text" and "sliding_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(rope["full_attention"])


WINDOWED = ("mistral", "phi3")


def leave_positions_out(model_class: Any) -> None:
    """Make the builder's SmolLM3 leave rotary positions out of the layers that its config says have none.

    The builder only switches them off in the attention operator, and would then add separate nodes that compute them.
    """
    computed = model_class.make_attention_qk_rope

    def make_attention_qk_rope(self: Any, layer_id: int, **options: Any) -> tuple[str, str]:
        if not self.no_rope_layers[layer_id]:
            return "", ""
        names: tuple[str, str] = computed(self, layer_id, **options)
        return names

    model_class.make_attention_qk_rope = make_attention_qk_rope


def main() -> None:
    """Build the model that the one argument, a JSON object, describes: checkpoint, output, precision, provider, ..."""
    job = json.loads(sys.argv[1])
    from onnxruntime_genai.models import builder

    from .builder_quantisation import quantise_by_weight
    from .rotary import use_transformers_tables

    quantise_by_weight(builder.LlamaModel)
    leave_positions_out(builder.SmolLM3Model)
    checkpoint, output, cache = job["checkpoint"], job["output"], job["cache"]
    arguments = (checkpoint, checkpoint, output, job["precision"], job["provider"], cache)
    options = builder.parse_extra_options(*arguments, job["options"])
    config = options["hf_details"]["hf_config"]
    repair(config)
    use_transformers_tables(builder.LlamaModel.__mro__[1], config)
    builder.create_model(*arguments, **options)


if __name__ == "__main__":
    from .child_process import reporting

    reporting(main)
