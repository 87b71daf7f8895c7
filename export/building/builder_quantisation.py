"""Quantisation by the model builder, one weight at a time; the builder itself keeps all float weights in memory.

Each product is passed to the builder's own code as a model with one node, and its result replaces the product. Values
and names are therefore the builder's. In memory at any moment: one float weight, and the quantised ones (0.56 bytes a
value).
"""

from __future__ import annotations

from typing import Any


def quantise_by_weight(decoder: Any) -> None:
    """Change the builder's class (a base of `decoder`) so that it quantises its products one at a time.

    Settings that apply to the whole graph (overrides by node, embeddings) or produce several nodes keep the builder's
    own method. So does a builder without the method `to_nbits` (other than onnxruntime-genai 0.18): the graph is the
    same, with more memory.
    """
    owner = next((base for base in decoder.__mro__ if "to_nbits" in vars(base)), None)
    if owner is None:
        return
    quantise_graph = owner.to_nbits

    def to_nbits(self: Any) -> Any:
        overrides = ("exact_quant_override_names", "exact_quant_overrides", "int4_customized_weight_config")
        of_the_graph = any(getattr(self, name, None) for name in overrides) or self.quant_attrs["use_qdq"]
        if of_the_graph or tuple(self.quant_attrs["op_types_to_quantize"]) != ("MatMul",):
            return quantise_graph(self)
        model = self.model
        excluded = set(self.quant_attrs["nodes_to_exclude"])
        try:
            for node in list(model.graph):
                weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
                if weight is None or weight.const_value is None or node.name in excluded:
                    continue
                self.model = _make_single_product_model(model, node, weight)
                _replace_product(model.graph, node, weight, quantise_graph(self).graph)
                for initialiser in self.model.graph.initializers.values():
                    initialiser.const_value = None  # graphs have reference cycles, which are collected late
        finally:
            self.model = model
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        return model

    owner.to_nbits = to_nbits


def _make_single_product_model(model: Any, node: Any, weight: Any) -> Any:
    """Return a model that holds only `node` and its weight."""
    import onnx_ir as ir

    source = ir.Value(name=node.inputs[0].name, shape=node.inputs[0].shape, type=node.inputs[0].type)
    initialiser = ir.Value(name=weight.name, shape=weight.shape, type=weight.type, const_value=weight.const_value)
    product = ir.Node("", "MatMul", [source, initialiser], name=node.name)
    output, result = node.outputs[0], product.outputs[0]
    result.name, result.shape, result.type = output.name, output.shape, output.type
    graph = ir.Graph(
        [source],
        [result],
        nodes=[product],
        initializers=[initialiser],
        opset_imports=dict(model.graph.opset_imports),
        name=model.graph.name,
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _replace_product(graph: Any, node: Any, weight: Any, quantised: Any) -> None:
    """Replace `node` by the node of `quantised`, with its initialisers; remove a float weight without other uses."""
    import onnx_ir as ir

    (made,) = quantised
    if made.op_type == "MatMul":  # not quantised: its weight is not a matrix
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
