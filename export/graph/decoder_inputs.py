"""Changes of a decoder's graph for onnxruntime without onnxruntime-genai: padding, KV cache shapes, sliding windows.

GroupQueryAttention takes the sum of a row's attention mask as the number of its tokens and reads them from the left.
Padding on the right is therefore correct; with padding on the left it reads padding as tokens, without an error. The
inserted nodes move the tokens of a step to the left of their row, in order, before the embedding, and move the hidden
states back before lm_head. Without padding both moves are the identity. Positions need no change: the operator derives
them from the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import MismatchError

from .targets import HEAD

if TYPE_CHECKING:
    import onnx_ir as ir

NODE_PREFIX = "/padding"
WINDOW = "sliding_window_cache"  # limits the KV cache to the window; onnxruntime then rejects padded rows


def prepare_graph(model: ir.Model, settings: Mapping[str, Any], *, whole_cache: bool = False) -> None:
    """Make the decoder `model` accept padding and state the head size in the shapes of its KV cache, in place.

    settings: the content of genai_config.json. whole_cache: layers with a sliding window keep all positions in the
    cache. Raises MismatchError for a graph without the expected inputs and lm_head.
    """
    import onnx_ir as ir

    accept_padding(model)
    size = int(settings["model"]["decoder"]["head_size"])
    for value in (*model.graph.inputs, *model.graph.outputs):
        if (value.name or "").startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], size])
    if whole_cache:
        for node in model.graph:
            node.attributes.pop(WINDOW, None)


def accept_padding(model: ir.Model) -> None:
    """Change the decoder `model` in place, so that the padding of a prompt does not change its logits.

    The valid tokens (mask 1) of a step move to the left, the padding moves to their right: with m the mask's last S
    columns, the new column is cumsum(m) - 1 where m is 1, else sum(m) + column - cumsum(m). Raises MismatchError for a
    graph without input_ids, attention_mask or lm_head.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    heads = [node for node in graph if HEAD.fullmatch(node.name or "")]
    if "input_ids" not in inputs or "attention_mask" not in inputs or len(heads) != 1:
        raise MismatchError(
            "the graph of the model builder has other inputs or another head",
            expected="inputs input_ids and attention_mask, and one lm_head",
            got=f"inputs {', '.join(map(str, inputs))}, and {len(heads)} products named lm_head",
        )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    readers = list(ids.uses())
    make = _NodeBuilder(graph)
    zero, one = make.constant("0", [0]), make.constant("1", [1])
    scalars = make.constant("zero", 0), make.constant("one", 1)
    size = make.node("Size", "Gather", [make.node("Shape", "Shape", [ids]), one], axis=0)  # [S]
    total = make.node("Total", "Gather", [make.node("MaskShape", "Shape", [mask]), one], axis=0)
    start = make.node("Start", "Sub", [total, size])
    valid = make.node("Valid", "Slice", [mask, start, total, one])  # (batch, S)
    before = make.node("CumSum", "CumSum", [valid, scalars[1]])
    count = make.node("Count", "ReduceSum", [valid, one], keepdims=1)  # (batch, 1)
    length = make.node("Length", "Squeeze", [size, zero])
    columns = make.node("Columns", "Range", [scalars[0], length, scalars[1]])  # (S,)
    valid_places = make.node("Kept", "Sub", [before, one])
    behind = make.node("Behind", "Add", [make.node("Padding", "Sub", [columns, before]), count])
    place = make.node("Place", "Where", [make.node("IsValid", "Greater", [valid, zero]), valid_places, behind])
    moved = make.node("Tokens", "ScatterElements", [ids, place, ids], axis=1)
    index = make.node("Index", "Unsqueeze", [place, make.constant("2", [2])])  # (batch, S, 1)
    for user, position in readers:
        if user.op_type != "Shape":
            user.replace_input_with(position, moved)
    make.insert_before(graph[0])
    hidden = heads[0].inputs[0]
    back = _NodeBuilder(graph)
    restored = back.node("Restored", "GatherND", [hidden, index], batch_dims=1)
    restored.type = hidden.type if hidden is not None else None
    back.insert_before(heads[0])
    heads[0].replace_input_with(0, restored)


class _NodeBuilder:
    """Builds nodes whose names begin with NODE_PREFIX, and inserts them into the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, value: Any) -> ir.Value:
        """Add an int64 constant as an initialiser of the graph."""
        import numpy as np
        import onnx_ir as ir

        full_name = f"{NODE_PREFIX}/constant_{name}"
        tensor = ir.Tensor(np.asarray(value, np.int64), name=full_name)
        result = ir.Value(name=full_name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(result)
        return result

    def node(self, name: str, kind: str, inputs: list[Any], **attributes: Any) -> ir.Value:
        """Create a node of operator `kind`; return its output. `insert_before` inserts it."""
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes, name=f"{NODE_PREFIX}/{name}")
        node.outputs[0].name = f"{NODE_PREFIX}/{name}/output_0"
        self.nodes.append(node)
        return node.outputs[0]

    def insert_before(self, node: ir.Node) -> None:
        """Insert all created nodes before `node`."""
        self.graph.insert_before(node, self.nodes)
