"""Quantisation by the model builder, one weight at a time: the builder itself holds all float weights at once.

Each product is handed to the builder's own code as a model of its own, and what comes back takes its place, so the
numbers and names are the builder's. Held at any moment: one float weight, and the quantised ones (0.56 bytes a value).
"""

from __future__ import annotations

from typing import Any


def quantise_by_weight(decoder: Any) -> None:
    """Change the builder's class (a base of `decoder`) so that it quantises its products one at a time.

    Leaves alone what its code decides over the whole graph (overrides by node, embeddings) or says in several nodes.
    A builder that quantises in another method (not onnxruntime-genai 0.18) makes the same graph in more memory.
    """
    owner = next((base for base in decoder.__mro__ if "to_nbits" in vars(base)), None)
    if owner is None:
        return
    whole = owner.to_nbits

    def to_nbits(self: Any) -> Any:
        told = ("exact_quant_override_names", "exact_quant_overrides", "int4_customized_weight_config")
        of_the_graph = any(getattr(self, name, None) for name in told) or self.quant_attrs["use_qdq"]
        if of_the_graph or tuple(self.quant_attrs["op_types_to_quantize"]) != ("MatMul",):
            return whole(self)
        model = self.model
        excluded = set(self.quant_attrs["nodes_to_exclude"])
        try:
            for node in list(model.graph):
                weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
                if weight is None or weight.const_value is None or node.name in excluded:
                    continue
                self.model = _alone(model, node, weight)
                _take_over(model.graph, node, weight, whole(self).graph)
                for held in self.model.graph.initializers.values():
                    held.const_value = None  # a graph is a ring, which the collector finds late
        finally:
            self.model = model
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        return model

    owner.to_nbits = to_nbits


def _alone(model: Any, node: Any, weight: Any) -> Any:
    """Return a model of only `node` and its weight."""
    import onnx_ir as ir

    source = ir.Value(name=node.inputs[0].name, shape=node.inputs[0].shape, type=node.inputs[0].type)
    held = ir.Value(name=weight.name, shape=weight.shape, type=weight.type, const_value=weight.const_value)
    product = ir.Node("", "MatMul", [source, held], name=node.name)
    output, result = node.outputs[0], product.outputs[0]
    result.name, result.shape, result.type = output.name, output.shape, output.type
    graph = ir.Graph(
        [source],
        [result],
        nodes=[product],
        initializers=[held],
        opset_imports=dict(model.graph.opset_imports),
        name=model.graph.name,
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _take_over(graph: Any, node: Any, weight: Any, quantised: Any) -> None:
    """Replace `node` by the node of `quantised`, with its initialisers; remove a float weight without other uses."""
    import onnx_ir as ir

    (made,) = quantised
    if made.op_type == "MatMul":  # not quantised: its weight is no matrix
        return
    inputs = [node.inputs[0]]
    for value in made.inputs[1:]:
        if value is None or value.const_value is None:
            inputs.append(None)
            continue
        if value.name not in graph.initializers:
            # A copy: the tensor itself would keep the whole protobuf message, float weight included.
            tensor = ir.Tensor(value.const_value.numpy().copy(), value.const_value.dtype, name=value.name)
            graph.register_initializer(
                ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=tensor)
            )
        inputs.append(graph.initializers[value.name])
    node.name, node.domain, node.op_type = made.name, made.domain, made.op_type
    node.attributes.clear()
    node.attributes.update(made.attributes)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    if not weight.uses() and weight.name in graph.initializers:
        del graph.initializers[weight.name]
        weight.const_value = None
