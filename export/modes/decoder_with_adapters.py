"""Begin of a decoder's export with adapters in its graph, switchable or batched: checks before the build, targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_merge.errors import MismatchError, Problem, raise_all
from adapter_merge.export.building.checks_before_build import Request, export_bytes, figures, open_request
from adapter_merge.export.graph.factor_folder import Factors
from adapter_merge.export.graph.targets import Layout, Target, decoder_targets
from adapter_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import onnx_ir as ir


def begin(
    base: str | Path, adapters: Mapping[str, Path], output: Path, mode: str, options: Mapping[str, Any]
) -> tuple[Request, dict[str, Factors], dict[str, Any]]:
    """Return the checked request, the adapters' factors, and the report of a dry run or the beginning of another one.

    Raises InputError, MismatchError, UnsupportedError, OutputError or MissingDependencyError.
    """
    request = open_request(base, adapters, output, mode=mode, **options)
    needed = request.reserve(export_bytes(request.checkpoint, request.precision))
    factors = request.factors()
    check_modules(factors, request.checkpoint)
    plan = request.plan({name: figures(value) for name, value in factors.items()})
    if request.dry_run:
        plan |= {"dry_run": True, "bytes_needed": needed}
    return request, factors, plan


def adapted_layout(model: ir.Model, request: Request, factors: Mapping[str, Factors]) -> Layout:
    """Return the layout: all linears of the layers are targets; lm_head only when an adapter adapts it (it is wide)."""
    shapes = {name: ref.shape for name, ref in request.checkpoint.tensors.items()}
    head = any("lm_head" in value.linears for value in factors.values())
    targets = decoder_targets([node.name or "" for node in model.graph], shapes, head=head)
    check_products(model, targets)
    return request.layout(targets)


def check_products(model: ir.Model, targets: tuple[Target, ...]) -> None:
    """Raise MismatchError unless every target's product has the shape that the checkpoint's linears have."""
    nodes = {node.name or "": node for node in model.graph}
    problems = []
    for target in targets:
        for name in target.nodes:
            node = nodes[name]
            if node.op_type == "MatMul":
                value = node.inputs[1]
                shape = tuple(value.shape) if value is not None and value.shape is not None else None
            else:
                shape = (node.attributes["K"].as_int(), node.attributes["N"].as_int())
            if shape != (target.k, target.n):
                problems.append(
                    Problem(f"{name}: the builder's product differs", str((target.k, target.n)), str(shape))
                )
    raise_all(problems, MismatchError)


LINEAR = re.compile(r"(model\.layers\.\d+\.(self_attn|mlp)\.\w+|lm_head)")


def check_modules(factors: Mapping[str, Factors], checkpoint: Checkpoint) -> None:
    """Raise MismatchError before the build when an adapter cannot be switched on this base."""
    problems = []
    for value in factors.values():
        for module, linear in value.linears.items():
            ref = checkpoint.tensors.get(f"{module}.weight")
            if ref is None and module == "lm_head":
                ref = checkpoint.tensors.get("model.embed_tokens.weight")
            got = (linear.up.shape[0], linear.down.shape[1])
            if ref is None or not LINEAR.fullmatch(module):
                problems.append(
                    Problem(
                        f"{value.source}: {module} cannot be switched in a graph",
                        expected="a linear of a layer's self_attn or mlp, or lm_head",
                        hint="export with --mode merged",
                    )
                )
            elif ref.shape != got:
                problems.append(Problem(f"{value.source}: {module} has another shape", str(ref.shape), str(got)))
        problems.extend(
            Problem(
                f"{value.source}: replaces {name} as a whole, which a decoder's graph cannot switch",
                hint="export with --mode merged",
            )
            for name in value.replacements
        )
    raise_all(problems, MismatchError)
