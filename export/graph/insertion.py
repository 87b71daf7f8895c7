"""Insertion of adapters into a finished graph, as optional inputs.

Every target y = x W0 becomes y = (x W0 + (x A) B) * s. A, B and s are graph inputs with the default values A (k, 0),
B (0, n) and s = [1] (initialisers of the same names), with which the graph computes the base bit for bit. The bias is
added after s, as in DoRA and DuDe. Only the graph changes, not the weights file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .branching import add_optional_input, split_into_branches
from .targets import Layout

if TYPE_CHECKING:
    import onnx_ir as ir


def insert_switches(model: ir.Model, layout: Layout) -> None:
    """Add three optional inputs (A, B, s) for every target of `model`, and the layout as metadata, in place."""
    import numpy as np
    import onnx_ir as ir

    dtype = ir.DataType[IR_NAMES[layout.dtype]]
    graph = body = model.graph
    if layout.branched:
        body = split_into_branches(model, {name for target in layout.targets for name in target.nodes}, dtype)
    nodes = {node.name: node for node in body}
    for target in layout.targets:
        rank = f"{target.name}.rank"
        down = add_optional_input(graph, target.down_name, [target.k, rank], np.zeros((target.k, 0)), dtype)
        up = add_optional_input(graph, target.up_name, [rank, target.n], np.zeros((0, target.n)), dtype)
        scale = add_optional_input(graph, target.scale_name, [f"{target.name}.scale_size"], np.ones(1), dtype)
        for number, name in enumerate(target.nodes):
            suffix = f"_{number}" if number else ""
            attach(body, nodes[name], target.name + suffix, down, up, scale)
    stamp(model, layout)


def attach(
    graph: ir.Graph,
    product: ir.Node,  # x (.., k), W -> y (.., n)
    name: str,
    down: ir.Value | None,  # (k, R) or (batch, k, R)
    up: ir.Value | None,  # (R, n) or (batch, R, n)
    scale: ir.Value | None,  # (n,) or (batch, 1, n)
) -> None:
    """Replace y by (y + (x down) up) * scale in all its uses."""
    import onnx_ir as ir

    x, y = product.inputs[0], product.outputs[0]
    uses = list(y.uses())
    value = y
    last = product
    steps: list[tuple[str, ir.Value | None, str]] = [("MatMul", down, "lora_A"), ("MatMul", up, "lora_B")]
    if down is not None and up is not None:
        inner = x
        for kind, factor, label in steps:
            node = ir.node(kind, [inner, factor], name=f"/{name}/{label}/{kind}")
            inner = _append_node(graph, last, node, y)
            last = node
        node = ir.node("Add", [y, inner], name=f"/{name}/lora/Add")
        value, last = _append_node(graph, last, node, y), node
    if scale is not None:
        node = ir.node("Mul", [value, scale], name=f"/{name}/out_scale/Mul")
        value, last = _append_node(graph, last, node, y), node
    if value is y:
        return
    for user, index in uses:
        user.replace_input_with(index, value)
    for index, output in enumerate(graph.outputs):
        if output is y:  # logits: the graph's output keeps its name
            y.name, value.name = f"{y.name}/base", y.name
            value.shape = y.shape
            graph.outputs[index] = value


def stamp(model: ir.Model, layout: Layout) -> None:
    """Write the layout into the model's metadata_props."""
    model.metadata_props.update(layout.metadata())


ADDED_NODES = ("lora_A/MatMul", "lora_B/MatMul", "lora/Add", "out_scale/Mul")  # names of attach's nodes, in order
IR_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def make_tensor(array: Any, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    import onnx_ir as ir

    return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)


def _append_node(graph: ir.Graph, previous: ir.Node, node: ir.Node, like: ir.Value) -> ir.Value:
    graph.insert_after(previous, node)
    output = node.outputs[0]
    output.name = f"{node.name}/output_0"
    output.type = like.type
    return output


def insert_before(graph: ir.Graph, before: ir.Node, node: ir.Node) -> None:
    graph.insert_before(before, node)


def make_optional(model: ir.Model, name: str) -> None:
    """Make the initialiser `name` also an optional input, whose first size may differ (the number of labels)."""
    import onnx_ir as ir

    value = model.graph.initializers[name]
    assert value.shape is not None and value.name is not None
    value.shape = ir.Shape([f"{value.name}.rows", *value.shape.numpy()[1:]])
    model.graph.inputs.append(value)


def split_gemm(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """Replace a Gemm with alpha = beta = 1 by MatMul and Add; return the MatMul.

    The scale of an adapter is applied between the product and the bias.
    """
    import onnx_ir as ir

    attributes = {name: value.value for name, value in node.attributes.items()}
    assert attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
    assert not attributes.get("transA", 0)
    x, weight, output = node.inputs[0], node.inputs[1], node.outputs[0]
    assert weight is not None
    new = []
    if attributes.get("transB", 0):
        transpose = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{node.name}/Transpose")
        transpose.outputs[0].name = f"{transpose.name}/output_0"
        transpose.outputs[0].type = weight.type
        weight = transpose.outputs[0]
        new.append(transpose)
    product = ir.node("MatMul", [x, weight], name=f"{node.name}/MatMul")
    product.outputs[0].name = f"{product.name}/output_0"
    product.outputs[0].type = output.type
    new.append(product)
    result = product.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = ir.node("Add", [result, node.inputs[2]], name=f"{node.name}/Add")
        bias.outputs[0].name = f"{bias.name}/output_0"
        bias.outputs[0].type = output.type
        new.append(bias)
        result = bias.outputs[0]
    for step in new:
        step.metadata_props.update(node.metadata_props)
    graph.insert_before(node, new)
    replaced = output.name
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if result in graph.outputs:
        result.name, result.shape = replaced, output.shape
    return product
