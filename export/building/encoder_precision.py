"""Encoders in fp16 and int8, by onnxruntime's own tools; files as transformers.js and Optimum name them.

fp16: onnxruntime.transformers.float16, answers stay float32. int8: onnxruntime.quantization.quantize_dynamic, weights
of products by column and embeddings as int8, activations quantised at run time; an adapter's factors and heads stay in
float.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

PRECISIONS = ("fp32", "fp16", "int8")
FOLDER = "onnx"
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
INLINE_BYTES = 1_800_000_000  # of weights in the graph's own file, which protobuf ends at 2 GiB
QUANTISED = ("MatMul", "Gather")
ADDED = ("/lora_A/", "/lora_B/")  # in the names of an adapter's products (graph/insertion.py)


def half(model: ir.Model) -> ir.Model:
    """Return `model` in float16, with outputs in float32."""
    import onnx_ir as ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    ir.external_data.load_to_model(model)
    proto = convert_float_to_float16(ir.to_proto(model), keep_io_types=True, disable_shape_infer=True)
    return ir.from_proto(proto)


def save_encoder(model: ir.Model, folder: Path, precision: str) -> None:
    """Write `model` into onnx/ of `folder`, quantised for int8; its weights lie in one file with it below 1.8 GB."""
    import onnx_ir as ir

    from adapter_merge.export.folder.contents import check_outputs

    file = folder / FOLDER / FILES[precision]
    file.parent.mkdir()
    check_outputs(model, file)
    ir.external_data.load_to_model(model)
    if precision == "int8":
        _quantise(model, file)
        return
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, file, external_data=f"{file.name}_data" if size > INLINE_BYTES else None)


def _quantise(model: ir.Model, file: Path) -> None:
    import onnx_ir as ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    optional = {value.name for value in model.graph.inputs}
    kept = [
        str(node.name)
        for node in model.graph
        if any(part in str(node.name) for part in ADDED)
        or any(value is not None and value.name in optional for value in node.inputs)
    ]
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=file.parent) as temporary:
        source = Path(temporary) / "model.onnx"
        ir.save(model, source, external_data="model.onnx.data")
        quantize_dynamic(
            source,
            file,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
        )
