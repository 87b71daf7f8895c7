"""The parameters in a graph that torch.onnx traced: how they are stored, and which operators use them.

A parameter is stored under the name that transformers gives it, as floats or as int8 codes (int8_matrix.py). The weight
of a Linear, (out, in) in the model, may be stored transposed. Only the operators that use it say whether it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .int8_matrix import ENDINGS, Int8Matrix, read_int8_matrix
from .stored_adapter import read_initialiser

if TYPE_CHECKING:
    import onnx_ir as ir

# How an operator uses a parameter.
FACTOR = "factor"  # x W: a product with the matrix as it is stored
TRANSPOSED = "transposed"  # x W^T
VALUES = "values"  # rows that are looked up, a bias that is added, the weight or bias of a norm

VALUE_USES = {  # (operator, input) of what uses the values of a parameter
    ("Gather", 0),
    ("Add", 0),
    ("Add", 1),
    ("LayerNormalization", 0),
    ("LayerNormalization", 1),
    ("LayerNormalization", 2),
}
INT8_USES = {("MatMulInteger", 1): FACTOR, ("Gather", 0): VALUES}


class UnexpectedUse(Exception):
    """The graph computes something with a parameter that the model does not."""


class TracedGraph:
    """The initialisers of a traced graph. It records which of them were read."""

    def __init__(self, graph: ir.Graph) -> None:
        self.initialisers = {name: value for name, value in graph.initializers.items() if value.const_value is not None}
        self._read: set[str] = set()

    def has_parameter(self, name: str) -> bool:
        """Return True when the graph stores the parameter, as floats or as int8 codes."""
        return name in self.initialisers or self._codes_of(name) is not None

    def read_parameter(self, name: str, is_conv1d: bool) -> Tensor | Int8Matrix:
        """Return a stored parameter in the model's shape and orientation.

        is_conv1d: the model's weight is (in, out), as in GPT-2's Conv1D, and multiplies without a transpose.
        Raises UnexpectedUse where the graph computes something else with it than the model.
        """
        if name in self.initialisers:
            stored: Tensor | Int8Matrix = self.read(name)
            uses = {use for node, index in self.initialisers[name].uses() for use in _uses_by(node, index)}
        else:
            matrix, codes = read_int8_matrix(name, self.read_if_stored), self._codes_of(name)
            assert matrix is not None and codes is not None
            stored = matrix
            uses = {INT8_USES.get((node.op_type, index), node.op_type) for node, index in codes.uses()}
        unknown = uses - {FACTOR, TRANSPOSED, VALUES}
        if unknown or not uses:
            raise UnexpectedUse(f"{name} is used by {', '.join(sorted(unknown)) or 'nothing'}")
        if FACTOR in uses and len(uses) > 1 and not is_conv1d:
            raise UnexpectedUse(f"{name} is used both as it is stored and transposed")
        if TRANSPOSED in uses and is_conv1d:
            raise UnexpectedUse(f"{name} is used transposed")
        return stored.T if FACTOR in uses and not is_conv1d else stored

    def multiplies_the_same(self, down: str, weight: str) -> bool:
        """Return True when every product with A (`down`) has the input of a product with the parameter `weight`."""
        names = [weight, *(f"{weight}{ending}_quantized" for ending in ENDINGS)]
        values = [self.initialisers[name] for name in names if name in self.initialisers]
        inputs = {id(value) for stored in values for value in _inputs_of_products(stored)}
        added = [id(value) for value in _inputs_of_products(self.initialisers[down])]
        return bool(added) and inputs.issuperset(added)

    def unread(self) -> list[str]:
        """Return the names of the initialisers with more than one value that were not read, sorted."""
        return sorted(
            name
            for name, value in self.initialisers.items()
            if name not in self._read and value.const_value is not None and value.const_value.size > 1
        )

    def was_read(self, name: str) -> bool:
        """Return True when the initialiser was read."""
        return name in self._read

    def read(self, name: str) -> Tensor:
        """Return an initialiser in its own dtype and shape."""
        self._read.add(name)
        return read_initialiser(self.initialisers[name])

    def read_if_stored(self, name: str) -> Tensor | None:
        """Return an initialiser in its own dtype and shape; None where the graph has none of this name."""
        return self.read(name) if name in self.initialisers else None

    def _codes_of(self, name: str) -> ir.Value | None:
        """Return the int8 codes of a parameter; None where it is not quantised."""
        names = (f"{name}{ending}_quantized" for ending in ENDINGS)
        return next((self.initialisers[codes] for codes in names if codes in self.initialisers), None)


def _uses_by(node: ir.Node, index: int) -> set[str]:
    """Return how an operator uses its input `index`: FACTOR, TRANSPOSED, VALUES, or a text that names the operator."""
    key = (str(node.op_type), index)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if key == ("MatMul", 1):
        return {FACTOR}
    if key == ("Gemm", 1) and attributes.get("alpha", 1.0) == 1.0 and not attributes.get("transA", 0):
        return {TRANSPOSED if attributes.get("transB", 0) else FACTOR}
    if key == ("Gemm", 2) and attributes.get("beta", 1.0) == 1.0:
        return {VALUES}
    if key == ("Transpose", 0):
        uses = list(node.outputs[0].uses())
        is_matrix = list(attributes.get("perm", ())) == [1, 0]
        return {TRANSPOSED if is_matrix and uses and all(_uses_by(*use) == {FACTOR} for use in uses) else "Transpose"}
    return {VALUES} if key in VALUE_USES else {f"{key[0]} (input {index})"}


def _inputs_of_products(matrix: ir.Value) -> list[ir.Value]:
    """Return the other input of every product that uses `matrix`, before it is quantised to whole numbers."""
    inputs = []
    for node, index in matrix.uses():
        if node.op_type in ("Transpose", "Gather") and index == 0:
            inputs += _inputs_of_products(node.outputs[0])
        elif index == 1 and node.op_type in ("MatMul", "Gemm", "MatMulInteger"):
            x = node.inputs[0]
            producer = x.producer() if x is not None else None
            if producer is not None and producer.op_type == "DynamicQuantizeLinear":
                x = producer.inputs[0]
            if x is not None:
                inputs.append(x)
    return inputs
