"""What the plugin needs of vLLM, looked up in a wheel that cannot run here: python tests/serve/wheel_symbols.py WHEEL

The tables of symbols.py, cpu_kernel.py and pipeline_stages.py in serve/patches/ and of runtime_loading.py in
serve/api_server/ are compared with the wheel's sources, by their syntax trees: names, parameters, and the attributes
that functions use. Exit code 1 with a line for each that is missing.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from dataclasses import dataclass
from functools import cache

from adapter_merge.serve.api_server import runtime_loading
from adapter_merge.serve.patches import cpu_kernel, pipeline_stages, symbols
from adapter_merge.serve.patches.row_scale import LINEAR_CLASSES

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr
CPU_KERNELS, CPU_RUNNER = "vllm.lora.punica_wrapper.punica_cpu", "vllm.v1.worker.cpu_model_runner"


@dataclass(frozen=True)
class Found:
    """A definition and the module that it stands in."""

    node: Node
    module: str


class Wheel:
    """The sources of one wheel."""

    def __init__(self, path: str) -> None:
        self.archive = zipfile.ZipFile(path)
        self.names = set(self.archive.namelist())
        self.tree = cache(self._tree)

    def _tree(self, module: str) -> tuple[ast.Module, str] | None:
        """(syntax tree, package that its relative imports start from); None when there is no such module."""
        stem = module.replace(".", "/")
        for name, package in ((f"{stem}/__init__.py", module), (f"{stem}.py", module.rpartition(".")[0])):
            if name in self.names:
                return ast.parse(self.archive.read(name)), package
        return None

    def find(self, module: str, path: str) -> Found | None:
        """The definition at `path` in `module`, through imports and base classes."""
        first, _, rest = path.partition(".")
        found = self.top(module, first)
        for part in filter(None, rest.split(".")):
            found = None if found is None else self.member(found, part)
        return found

    def top(self, module: str, name: str) -> Found | None:
        loaded = self.tree(module)
        if loaded is None:
            return None
        tree, package = loaded
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return Found(node, module)
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if named and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                return Found(node.value, module)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        parts = package.split(".")
                        start = parts[: len(parts) - node.level + 1] if node.level else []
                        return self.top(".".join([*start, *filter(None, [node.module])]), alias.name)
        return None

    def member(self, found: Found, name: str) -> Found | None:
        if not isinstance(found.node, ast.ClassDef):
            return None
        for node in found.node.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return Found(node, found.module)
        for base in found.node.bases:
            above = self.top(found.module, base.id) if isinstance(base, ast.Name) else None
            inherited = self.member(above, name) if above is not None else None
            if inherited is not None:
                return inherited
        return None

    def parameters(self, found: Found) -> list[str]:
        node = found.node
        if isinstance(node, ast.ClassDef):
            made = self.member(found, "__init__")
            if made is None:  # a dataclass
                return [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)
                        and isinstance(each.target, ast.Name)]  # fmt: skip
            return self.parameters(made)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return []
        every = [*node.args.posonlyargs, *node.args.args]
        every += [arg for arg in (node.args.vararg, *node.args.kwonlyargs, node.args.kwarg) if arg is not None]
        return [arg.arg for arg in every]


def used(node: Node) -> set[str]:
    """Names and attributes in a definition."""
    names = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return names | {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def missing(wheel: Wheel) -> list[str]:
    """Return what the tables and the patches for CPUs look up, as far as the wheel lacks it."""
    problems: list[str] = []

    def look(module: str, path: str) -> Found | None:
        found = wheel.find(module, path)
        if found is None:
            problems.append(f"{module}.{path} is not there")
        return found

    functions = {(module, path): parameters for module, paths in symbols.FUNCTIONS.items()
                 for path, parameters in paths.items()}  # fmt: skip
    for (module, path), parameters in (functions | runtime_loading.FUNCTIONS).items():
        found = look(module, path)
        lost = [] if found is None else sorted(set(parameters) - set(wheel.parameters(found)))
        problems += [f"{module}.{path} has no parameter {', '.join(lost)}"] if lost else []
    attributes = {(module, path): names for module, paths in symbols.ATTRIBUTES.items()
                  for path, names in paths.items()}  # fmt: skip
    attributes[runtime_loading.MODELS, "OpenAIServingModels.__init__"] = runtime_loading.ATTRIBUTES
    for (module, path), names in attributes.items():
        found = look(module, path)
        lost = [] if found is None else sorted(set(names) - used(found.node))
        problems += [f"{module}.{path} does not use {', '.join(lost)}"] if lost else []
    exact = {("vllm.lora.layers", f"{name}.apply"): ["self", "x", "bias"] for name in LINEAR_CLASSES}
    exact[CPU_KERNELS, "PunicaWrapperCPU.add_lora_linear"] = cpu_kernel.LINEAR
    exact[CPU_RUNNER, "CPUModelRunner.sync_and_gather_intermediate_tensors"] = pipeline_stages.PARAMETERS
    for (module, path), wanted in exact.items():
        found = look(module, path)
        if found is not None and (have := wheel.parameters(found)) != wanted:
            problems.append(f"{module}.{path} takes {', '.join(have)}, not {', '.join(wanted)}")
    for name in LINEAR_CLASSES:
        look("vllm.lora.layers", f"{name}.create_lora_weights")
    look("vllm.lora.layers.classifier", "ClassificationHeadWithLoRA")  # heads of adapters: conversion/served_folder.py
    classes = look("vllm.lora.utils", "_all_lora_classes")
    lost = sorted(set(LINEAR_CLASSES) - used(classes.node)) if classes is not None else []
    problems += [f"vllm.lora.utils._all_lora_classes lacks {', '.join(lost)}"] if lost else []
    return problems


if __name__ == "__main__":
    lines = missing(Wheel(sys.argv[1]))
    print("\n".join(lines) or f"{sys.argv[1]}: all that the plugin needs is there")
    sys.exit(1 if lines else 0)
