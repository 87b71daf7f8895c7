"""The graph of a batched export: each sequence picks its adapter by a number, the input adapter_ids (batch,).

Every target gathers its sequence's factors from stacks of all adapters; number 0 is the base. Numbers without an
adapter make the run fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .branching import add_optional_input
from .insertion import ADDED_NODES, IR_NAMES, attach, make_tensor, stamp
from .targets import Layout

if TYPE_CHECKING:
    import onnx_ir as ir

IDS = "adapter_ids"
CHECK = f"/{IDS} "  # prefix of the names of the nodes that check adapter_ids
IMPOSSIBLE = 2**31 - 1  # a batch size that no input has


def insert_stacks(
    model: ir.Model,
    layout: Layout,
    stacks: dict[str, tuple[Any, Any, Any]],  # target -> A (n, k, R), B (n, R, n_out), s (n, 1, n_out) or None
) -> None:
    """Add one adapter per sequence to the targets in `stacks`, in place; the input adapter_ids (batch,) selects it."""
    import numpy as np
    import onnx_ir as ir

    dtype = ir.DataType[IR_NAMES[layout.dtype]]
    graph = model.graph
    ids = graph.initializers.get(IDS)
    if ids is None:
        ids = add_optional_input(graph, IDS, ["adapter_batch_size"], np.zeros(1), ir.DataType.INT64)
    ids = check_ids(graph, ids, len(layout.adapters))
    nodes = {node.name: node for node in graph}
    for target in layout.targets:
        if target.name not in stacks:
            continue
        gathered: list[ir.Value | None] = []
        for name, stack in zip((target.down_name, target.up_name, target.scale_name), stacks[target.name], strict=True):
            if stack is None:
                gathered.append(None)
                continue
            value = ir.Value(
                name=name,
                shape=ir.Shape(stack.shape),
                type=ir.TensorType(dtype),
                const_value=make_tensor(stack, name, dtype),
            )
            graph.register_initializer(value)
            gather = ir.node("Gather", [value, ids], {"axis": 0}, name=f"/{name}/Gather")
            gather.outputs[0].name = f"{name}/gathered"
            graph.insert_before(nodes[target.nodes[0]], gather)
            gathered.append(gather.outputs[0])
        for number, node_name in enumerate(target.nodes):
            suffix = f"_{number}" if number else ""
            attach(graph, nodes[node_name], target.name + suffix, *gathered)
    stamp(model, layout)


def check_ids(graph: ir.Graph, ids: ir.Value, count: int) -> ir.Value:
    """Add nodes that make a run fail unless all adapter_ids are in 0 .. count; return the checked ids.

    Without them, Gather counts a negative number from the end, and on CUDA returns zeros (the base) for a number that
    is too large. A Reshape to an impossible size fails on every provider; the node's name states the reason.
    """
    import numpy as np
    import onnx_ir as ir

    def constant(name: str, value: list[int]) -> ir.Value:
        full = f"{CHECK}{name}"
        tensor = ir.Tensor(np.asarray(value, np.int64), name=full)
        made = ir.Value(name=full, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(made)
        return made

    outside = [
        ir.node("Less", [ids, constant("lowest", [0])], name=f"{CHECK}Less"),
        ir.node("Greater", [ids, constant("highest", [count])], name=f"{CHECK}Greater"),
    ]
    wrong = ir.node("Or", [node.outputs[0] for node in outside], name=f"{CHECK}Or")
    number = ir.node("Cast", wrong.outputs, {"to": ir.DataType.INT64}, name=f"{CHECK}Cast")
    most = ir.node("ReduceMax", number.outputs, {"keepdims": 0}, name=f"{CHECK}ReduceMax")
    any_wrong = ir.node("Cast", most.outputs, {"to": ir.DataType.BOOL}, name=f"{CHECK}AnyWrong")
    sizes = [any_wrong.outputs[0], constant("impossible", [IMPOSSIBLE]), constant("as_given", [-1])]
    shape = ir.node("Where", sizes, name=f"{CHECK}Where")
    checked = ir.node("Reshape", [ids, shape.outputs[0]], name=f"{CHECK}must be between 0 and {count}")
    made = [*outside, wrong, number, most, any_wrong, shape, checked]
    for node in made:
        node.outputs[0].name = f"{node.name}/output_0"
    graph.insert_before(graph[0], made)
    return checked.outputs[0]


def remove_stacks(model: ir.Model, layout: Layout) -> None:
    """Remove the nodes and initialisers that insert_stacks inserted, except adapter_ids."""
    import onnx_ir as ir

    graph = model.graph
    nodes = {node.name: node for node in graph}
    checks = [node for node in graph if (node.name or "").startswith(CHECK)]
    for node in checks:
        for gather, index in list(node.outputs[0].uses()):
            if gather not in checks:
                gather.replace_input_with(index, graph.initializers[IDS])
    graph.remove(reversed(checks), safe=True)
    for name in [name for name in graph.initializers if name.startswith(CHECK)]:
        del graph.initializers[name]
    for target in layout.targets:
        for number, product in enumerate(target.nodes):
            name = target.name + (f"_{number}" if number else "")
            parts = [nodes.get(f"/{name}/{end}") for end in ADDED_NODES]
            present = [node for node in parts if node is not None]
            if not present:
                continue
            y, value = nodes[product].outputs[0], present[-1].outputs[0]
            output = value in graph.outputs
            output_name = value.name
            ir.convenience.replace_all_uses_with(value, y, replace_graph_outputs=True)
            # The first node of the chain (Add or Mul) reads y, so the chain is removed from its end.
            graph.remove(reversed(present), safe=True)
            if output:
                y.name = output_name
        for name in (target.down_name, target.up_name, target.scale_name):
            gather = nodes.get(f"/{name}/Gather")
            if gather is not None:
                graph.remove(gather, safe=True)
                del graph.initializers[name]
