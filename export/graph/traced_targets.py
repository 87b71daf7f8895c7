"""The products of a traced graph that can have an adapter, and the weights that an adapter can replace.

Every node of the graph has its module's path in its metadata (building/trace_process.py), so that a product is matched
with a linear of the model by path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapter_merge.binding.positional import QUERY
from adapter_merge.errors import Problem, UnsupportedError, raise_all
from adapter_merge.storage.module_paths import is_same_module

from .encoder_task import HEADS
from .insertion import split_gemm
from .targets import POSITIONS, ModuleSlice, Target

if TYPE_CHECKING:
    import onnx_ir as ir

LAYER = re.compile(r"(.*\.)?\d+\..*")


def traced_targets(model: ir.Model, named: set[str]) -> tuple[Target, ...]:
    """Return one target per linear: all linears of the layers, and the others whose module is in `named`."""
    graph = model.graph
    products: dict[str, list[Any]] = {}
    for node in list(graph):
        module = node.metadata_props.get("module")
        if module is None or node.op_type not in ("MatMul", "Gemm"):
            continue
        if LAYER.fullmatch(module) is None and not any(is_same_module(module, name) for name in named):
            continue
        if not _multiplies_by(node, f"{module}.weight"):
            continue  # the attention scores, which the forward of an attention module computes
        products.setdefault(module, []).append(split_gemm(graph, node) if node.op_type == "Gemm" else node)
    targets = []
    for path, nodes in _separate_positional(products).items():
        module = path.removesuffix(POSITIONS)
        weight = graph.initializers[f"{module}.weight"]
        assert weight.shape is not None
        rows, columns = (int(size) for size in weight.shape.numpy())
        is_transposed = nodes[0].inputs[1] is not weight
        k, n = (columns, rows) if is_transposed else (rows, columns)
        names = tuple(str(node.name) for node in nodes)
        targets.append(Target(path, names, k, n, (ModuleSlice(path, 0, n),)))
    return tuple(targets)


def _multiplies_by(product: Any, name: str) -> bool:
    """Return True for a product with the initialiser `name`, as it is stored or transposed."""
    weight = product.inputs[1]
    if weight is None:
        return False
    producer = weight.producer()
    return bool(weight.name == name or (producer is not None and producer.inputs[0].name == name))


def _separate_positional(products: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the products by module path, with the two products of a DeBERTa's query_proj under separate paths.

    The product of the tokens has the same input as value_proj. The other one has the relative positions' embeddings as
    its input; its path has the suffix POSITIONS.
    """
    separated: dict[str, list[Any]] = {}
    for module, nodes in products.items():
        if len(nodes) == 1 or not f".{module}".endswith(f".{QUERY}"):
            separated[module] = nodes
            continue
        tokens = products[module.replace("query_proj", "value_proj")][0].inputs[0]
        separated[module] = [node for node in nodes if node.inputs[0] is tokens]
        separated[module + POSITIONS] = [node for node in nodes if node.inputs[0] is not tokens]
        if [len(separated[module]), len(separated[module + POSITIONS])] != [1, 1]:
            raise UnsupportedError(
                f"{module}: the product of the tokens is not distinguishable from that of the positions",
                expected="two products, one of them with the input of value_proj",
                got=f"{len(nodes)} products",
                hint="export with --mode merged",
            )
    return separated


def head_tensors(model: ir.Model, replaced: set[str]) -> list[str]:
    """Return the names of the head's weights (pooler, classifier), and of the weights in `replaced`."""
    names = []
    for name in model.graph.initializers:
        outside = name.startswith(HEADS) or ".pooler." in name
        if outside or any(is_same_module(name, other) for other in replaced):
            names.append(name)
    return names


def separate_sequences(model: ir.Model, targets: list[Target]) -> None:
    """Change the input of every product of `targets` to (batch, sequence, k), in place.

    The input of GPT-2's products is reshaped to (batch * sequence, k); they take what is reshaped instead. Raises
    UnsupportedError for a product that has one input for all sequences, as that of a pooler or of DeBERTa's relative
    positions.
    """
    nodes = {node.name: node for node in model.graph}
    batch = next(value for value in model.graph.inputs if value.name == "input_ids").shape
    assert batch is not None
    problems = []
    for target in targets:
        for name in target.nodes:
            product = nodes[name]
            x = product.inputs[0]
            producer = x.producer() if x is not None else None
            if (
                producer is not None
                and producer.op_type == "Reshape"
                and _has_batch_dimension(producer.inputs[0], batch[0])
            ):
                product.replace_input_with(0, producer.inputs[0])
                product.outputs[0].shape = None
            elif not _has_batch_dimension(x, batch[0]):
                problems.append(
                    Problem(
                        f"{target.name}: is computed once for all sequences of a batch",
                        hint="export with --mode merged or switchable",
                    )
                )
    raise_all(problems, UnsupportedError)


def _has_batch_dimension(value: Any, batch: Any) -> bool:
    """Return True for a value (batch, sequence, k)."""
    return value is not None and value.shape is not None and len(value.shape) == 3 and value.shape[0] == batch
