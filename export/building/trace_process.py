"""Trace by torch.onnx of models that the builder does not support: python -m ...building.trace_process.

The graph is exported unoptimised, so that weights keep the checkpoint's names and every node has the path of its module
in its metadata (pkg.torch.onnx.name_scopes). Products are matched with modules by that path, not by their shapes. The
trace runs in a process of its own, because torch.export prints warnings and keeps the model in memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from adapter_merge.export.graph.encoder_task import HEADS
from adapter_merge.export.graph.pooling import Pooling, pool
from adapter_merge.storage.module_paths import is_same_module

OPSET = 21
BODIES = ("bert", "roberta", "mpnet", "distilbert", "model", "deberta")  # attribute of the body in a model with a head
ROOT = "model"  # the only attribute of the traced wrapper; every name in the graph begins with it


def main() -> None:
    """Trace the model that the argument, a JSON object, describes, and write model.onnx, its weights and config.json.

    Its keys: checkpoint and output (folders), class (of transformers), outputs (names), pooling (mode and whether it is
    normalised, or null), labels (their number, or null), keep (names of weights that are not stored transposed).
    """
    job = json.loads(sys.argv[1])
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(job["checkpoint"])
    if job["labels"] is not None:
        config.num_labels = job["labels"]
    implementation = "eager" if config.model_type == "gpt2" else None
    loader = getattr(transformers, job["class"])
    torch.manual_seed(0)  # initialises a head that the checkpoint does not have
    model = loader.from_pretrained(
        job["checkpoint"], config=config, dtype=torch.float32, attn_implementation=implementation
    ).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.model_type == "gpt2":
        program = _trace_gpt2(model, config)
    else:
        program = _trace_encoder(model, config, job["outputs"], Pooling(*job["pooling"]) if job["pooling"] else None)
    _strip_root(program.model)
    heads = (*HEADS, *(f"{body}.pooler." for body in BODIES))
    _fold_transposes(program.model, frozenset(job["keep"]), heads)
    import onnx_ir as ir

    folder = Path(job["output"])
    ir.save(program.model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    config.architectures = [job["class"]]  # the exported class; it may be the body of the checkpoint's class
    config.save_pretrained(folder)


def _trace_encoder(model: Any, config: Any, outputs: list[str], pooling: Pooling | None) -> Any:
    """Trace input_ids, attention_mask and token_type_ids (if the model has several types) -> `outputs`."""
    import torch

    names = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # each (batch, sequence)
            result = self.model(**dict(zip(names, inputs, strict=True)))
            results = dict(result)
            if pooling is not None:
                results["sentence_embedding"] = pool(result.last_hidden_state, inputs[1], pooling)
            return tuple(results[key] for key in outputs)

    ids = torch.randint(5, min(100, config.vocab_size), (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    samples = (ids, mask, torch.zeros_like(ids))[: len(names)]
    batch = torch.export.Dim("batch_size", min=1, max=65536)
    length = torch.export.Dim("sequence_length", min=2, max=_longest(config))
    return torch.onnx.export(
        Encoder(),
        samples,
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=OPSET,
        input_names=names,
        output_names=outputs,
        dynamic_shapes=(tuple({0: batch, 1: length} for _ in names),),
    )


def _longest(config: Any) -> int:
    """Return the largest sequence length; the positions of RoBERTa and MPNet begin after the padding index."""
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    return int(config.max_position_embeddings) - offset


def _trace_gpt2(model: Any, config: Any) -> Any:
    """Trace input_ids, attention_mask, past_key_values.N.key|value -> logits, present.N.key|value."""
    import torch
    from transformers import DynamicCache

    from adapter_merge.verification.key_value_cache import cache_argument, cache_of

    layers = config.n_layer

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,  # (batch, new)
            attention_mask: torch.Tensor,  # (batch, past + new)
            *past: torch.Tensor,  # key, value of every layer: (batch, heads, past, head size)
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache()
            for layer in range(layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past[0].shape[2] :]
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=True,
                **cache_argument(cache),
            )
            after = cache_of(result).layers
            return (result.logits, *(tensor for layer in after for tensor in (layer.keys, layer.values)))

    heads, size = config.n_head, config.n_embd // config.n_head
    batch, new, past = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(100, config.vocab_size), (batch, new), generator=generator)
    caches = tuple(torch.zeros(batch, heads, past, size) for _ in range(2 * layers))
    names = [f"{{}}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    auto = torch.export.Dim.DYNAMIC
    return torch.onnx.export(
        Decoder(),
        (ids, torch.ones(batch, past + new, dtype=torch.int64), *caches),
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=OPSET,
        input_names=["input_ids", "attention_mask", *(name.format("past_key_values") for name in names)],
        output_names=["logits", *(name.format("present") for name in names)],
        dynamic_shapes=({0: auto, 1: auto}, {0: auto, 1: auto}, tuple({0: auto, 2: auto} for _ in caches)),
    )


def _strip_root(model: Any) -> None:
    """Rename initialisers to the checkpoint's names; set the metadata of every node to its module's path."""
    for value in list(model.graph.initializers.values()):
        if value.name.startswith(f"{ROOT}."):
            name = value.name.removeprefix(f"{ROOT}.")
            del model.graph.initializers[value.name]
            value.name = name
            value.const_value.name = name
            model.graph.register_initializer(value)
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        path = json.loads(scopes.replace("'", '"'))[-2] if scopes else ""
        node.metadata_props.clear()
        if path:
            node.metadata_props["module"] = path.removeprefix(f"{ROOT}.")


def _fold_transposes(model: Any, keep: frozenset[str], heads: tuple[str, ...]) -> None:
    """Store a matrix transposed where each of its uses is a Transpose, and remove those nodes.

    Weights in `keep` and of modules in `heads` are left as they are, because an adapter may replace them.
    """
    import onnx_ir as ir

    graph = model.graph
    for value in list(graph.initializers.values()):
        users = list(value.uses())
        nodes = [user for user, _ in users]
        kept = value.name.startswith(heads) or any(is_same_module(value.name, name) for name in keep)
        if kept or not nodes or any(node.op_type != "Transpose" for node in nodes) or len(value.shape) != 2:
            continue
        source = value.const_value

        def transposed(source: Any = source) -> Any:
            return ir.tensor(source.numpy().T.copy(), name=source.name)

        rows, columns = value.shape.numpy()
        folded = ir.Value(
            name=value.name,
            shape=ir.Shape((columns, rows)),
            type=value.type,
            const_value=ir.LazyTensor(transposed, dtype=source.dtype, shape=ir.Shape((columns, rows)), name=value.name),
        )
        for node in nodes:
            ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            graph.remove(node, safe=True)
        del graph.initializers[value.name]
        graph.register_initializer(folded)


if __name__ == "__main__":
    from .child_process import reporting

    reporting(main)
