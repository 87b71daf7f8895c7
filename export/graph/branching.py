"""Duplication of a decoder's layers, with and without adapters; an input of the graph selects the branch that runs.

An adapter needs four nodes at every product. On a small model they cost the base 3 to 6 % even when no adapter is
active. The layers are therefore the two branches of one If, and without an adapter the branch without these nodes runs.
Both branches multiply by the same weights, of which onnxruntime 1.31 keeps one packed copy, and write to the same KV
cache.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

ACTIVE = "adapter_active"  # [0.] by default; every adapter file sets [1.]


def split_into_branches(model: ir.Model, targets: Collection[str], dtype: ir.DataType) -> ir.Graph:
    """Move the nodes between those named in `targets` into an If; return the branch for the adapters.

    Adds the optional input ACTIVE. Nodes before the first target (embedding, mask) and after the last target (norm,
    lm_head) are not duplicated.
    """
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    body = _select_between(graph, targets)
    inside = set(body)
    ends = [
        value
        for node in body
        for value in node.outputs
        if value in graph.outputs or any(user not in inside for user, _ in value.uses())
    ]
    results = []
    for value in ends:
        result = ir.Value(name=value.name, shape=value.shape, type=value.type)
        for user, index in list(value.uses()):
            if user not in inside:
                user.replace_input_with(index, result)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result
        value.name = f"adapted/{value.name}"
        results.append(result)
    graph.remove(body)
    adapted = ir.Graph([], ends, nodes=body, name="adapted")
    plain = adapted.clone(allow_outer_scope_values=True)
    plain.name = "plain"
    for node in plain:
        node.name = f"plain{node.name}"
        for value in node.outputs:
            if value.name:
                value.name = f"plain/{value.name.removeprefix('adapted/')}"
    active = add_optional_input(graph, ACTIVE, [1], np.zeros(1), dtype)
    condition = ir.node("Cast", [active], {"to": ir.DataType.BOOL}, name=f"/{ACTIVE}/Cast")
    condition.outputs[0].name = f"/{ACTIVE}/Cast/output_0"
    choice = ir.Node(
        "",
        "If",
        condition.outputs,
        [ir.AttrGraph("then_branch", adapted), ir.AttrGraph("else_branch", plain)],
        outputs=results,
        name=f"/{ACTIVE}/If",
    )
    graph.extend([condition, choice])
    graph.sort()
    return adapted


def add_optional_input(
    graph: ir.Graph, name: str, shape: list[int | str], default: object, dtype: ir.DataType
) -> ir.Value:
    """Add an optional input to `graph`, with the array `default` as its initialiser."""
    import numpy as np
    import onnx_ir as ir

    tensor = ir.Tensor(np.asarray(default).astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def _select_between(graph: ir.Graph, targets: Collection[str]) -> list[ir.Node]:
    """Return the targets and every node on a path from one target to another, in the graph's order."""
    nodes = list(graph)
    after_first: set[ir.Node] = set()
    for node in nodes:
        if node.name in targets or any(parent in after_first for parent in node.predecessors()):
            after_first.add(node)
    before_last: set[ir.Node] = set()
    for node in reversed(nodes):
        if node.name in targets or any(child in before_last for child in node.successors()):
            before_last.add(node)
    return [node for node in nodes if node in after_first and node in before_last]
