"""The products of a graph that can have an adapter, and the linear layers of the checkpoint that they compute.

The model builder packs q, k and v into one product (and gate and up, on request). Such a target has several parts,
which are ranges of its columns. The inputs of a target are named after the module's path, as in PEFT:
`model.layers.0.self_attn.o_proj.lora_A.weight`, and for a packed target
`model.layers.0.self_attn.qkv_proj.lora_A.weight`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter_merge.errors import FileFormatError, UnsupportedError

KEYS = ("mode", "base", "precision", "dtype", "targets", "heads", "adapters")
PREFIX = "adapter_merge."
# DeBERTa with share_att_key projects tokens and relative positions with one weight, and an adapter may apply to tokens
# only. The product of the positions is a separate target, whose name is the module's path and this suffix.
POSITIONS = ".positions"
NODE = re.compile(r"/model/layers\.(?P<layer>\d+)/(?P<block>attn|mlp)/(?P<name>\w+)/MatMul(NBits|_Q\d+)?")
HEAD = re.compile(r"/lm_head/MatMul(NBits|_Q\d+)?")
# product of the builder -> alternatives of linears; the first alternative that the checkpoint has is used
LINEARS: Mapping[tuple[str, str], tuple[tuple[str, ...], ...]] = {
    ("attn", "qkv_proj"): (
        ("self_attn.qkv_proj",),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    ("attn", "q_proj"): (("self_attn.q_proj",),),
    ("attn", "k_proj"): (("self_attn.k_proj",),),
    ("attn", "v_proj"): (("self_attn.v_proj",),),
    ("attn", "o_proj"): (("self_attn.o_proj",), ("self_attn.out_proj",), ("self_attn.dense",)),
    ("mlp", "gate_up_proj"): (("mlp.gate_up_proj",), ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp", "gate_proj"): (("mlp.gate_proj",),),
    ("mlp", "up_proj"): (("mlp.up_proj",),),
    ("mlp", "down_proj"): (("mlp.down_proj",),),
    ("mlp", "fc1"): (("mlp.fc1",),),
    ("mlp", "fc2"): (("mlp.fc2",),),
}  # fmt: skip


@dataclass(frozen=True)
class ModuleSlice:
    """One linear layer of the checkpoint: columns start .. start+size of its target's output."""

    module: str
    start: int
    size: int


@dataclass(frozen=True)
class Target:
    """One product x (.., k) -> y (.., n) of the graph that can have an adapter."""

    name: str  # the path with which the names of its three inputs begin
    nodes: tuple[str, ...]  # usually one; DeBERTa multiplies by the same key_proj twice in a layer
    k: int
    n: int
    parts: tuple[ModuleSlice, ...]

    @property
    def down_name(self) -> str:
        return f"{self.name}.lora_A.weight"  # (k, R)

    @property
    def up_name(self) -> str:
        return f"{self.name}.lora_B.weight"  # (R, n)

    @property
    def scale_name(self) -> str:
        return f"{self.name}.out_scale"  # (n,)


@dataclass(frozen=True)
class Layout:
    """The adapters' targets and settings, which the graph's metadata stores."""

    mode: str  # "switchable" or "batched" ("merged" has no targets)
    base: str  # fingerprint of the base checkpoint
    precision: str  # fp32, fp16, bf16, int4
    dtype: str  # of the adapter's tensors: "float32", "float16", "bfloat16"
    targets: tuple[Target, ...]
    heads: Mapping[str, str]  # tensor of the checkpoint -> input of the graph that replaces it
    adapters: tuple[str, ...] = ()  # batched: their order; id 0 is the base
    branched: bool = False  # switchable: adapters are applied in one branch of an If (branching.py)

    @property
    def version(self) -> int:
        """31 bits of a hash over base and targets, which identify the export that an adapter file was written for.

        ONNX Runtime's adapter format has no other field for it (model_version), and ONNX Runtime does not check it.
        """
        content = [
            self.base,
            self.dtype,
            [_encode(target) for target in self.targets],
            sorted(self.heads.items()),
            *([True] if self.branched else []),
        ]
        digest = hashlib.sha256(json.dumps(content).encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def metadata(self) -> dict[str, str]:
        """Return the entries for a model's metadata_props."""
        values: dict[str, Any] = {
            "mode": self.mode,
            "base": self.base,
            "precision": self.precision,
            "dtype": self.dtype,
            "targets": [_encode(target) for target in self.targets],
            "heads": dict(self.heads),
            "adapters": list(self.adapters),
            "branched": self.branched,
        }
        return {
            PREFIX + key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            for key, value in values.items()
        }


def read_layout(metadata: Mapping[str, str], source: str) -> Layout:
    """Read the layout in a model's metadata_props. Raises FileFormatError for a graph of another tool."""
    try:
        values = {key: metadata[PREFIX + key] for key in KEYS}
        targets = tuple(_decode(entry) for entry in json.loads(values["targets"]))
        heads = {str(key): str(value) for key, value in json.loads(values["heads"]).items()}
        adapters = tuple(str(name) for name in json.loads(values["adapters"]))
        branched = bool(json.loads(metadata.get(PREFIX + "branched", "false")))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"{source}: not an export of adapter-merge (its metadata has no {error}, or a wrong value)",
            expected=", ".join(PREFIX + key for key in KEYS),
        ) from error
    mode, base, precision, dtype = (values[key] for key in KEYS[:4])
    return Layout(mode, base, precision, dtype, targets, heads, adapters, branched)


def _encode(target: Target) -> list[Any]:
    parts = [[part.module, part.start, part.size] for part in target.parts]
    return [target.name, list(target.nodes), target.k, target.n, parts]


def _decode(entry: Any) -> Target:
    name, nodes, k, n, parts = entry
    decoded = tuple(ModuleSlice(str(module), int(start), int(size)) for module, start, size in parts)
    return Target(str(name), tuple(map(str, nodes)), int(k), int(n), decoded)


def decoder_targets(
    node_names: list[str],
    shapes: Mapping[str, tuple[int, ...]],  # tensors of the checkpoint
    *,
    head: bool = False,
) -> tuple[Target, ...]:
    """Return the targets of a graph of the model builder, in the graph's order.

    head: lm_head is a target too. Raises UnsupportedError for a product whose linears the checkpoint does not have.
    """
    targets = []
    for node in node_names:
        match = NODE.fullmatch(node)
        if match:
            prefix = f"model.layers.{match['layer']}."
            block = "self_attn" if match["block"] == "attn" else "mlp"
            choices = LINEARS.get((match["block"], match["name"]), ())
            for choice in choices:
                modules = [prefix + linear for linear in choice]
                if all(f"{module}.weight" in shapes for module in modules):
                    break
            else:
                raise UnsupportedError(
                    f"{node}: the checkpoint has no linear layer for this product",
                    expected=" or ".join("+".join(choice) for choice in choices) or "a known product",
                    hint="export with --mode merged",
                )
            name = modules[0] if len(modules) == 1 else f"{prefix}{block}.{match['name']}"
            targets.append(_target(name, node, modules, [shapes[f"{module}.weight"] for module in modules]))
        elif head and HEAD.fullmatch(node):
            shape = shapes.get("lm_head.weight") or shapes["model.embed_tokens.weight"]  # tied
            targets.append(_target("lm_head", node, ["lm_head"], [shape]))
    if not targets:
        raise UnsupportedError("no product of this graph can have an adapter", hint="export with --mode merged")
    return tuple(targets)


def _target(name: str, node: str, modules: list[str], shapes: list[tuple[int, ...]]) -> Target:
    parts, start = [], 0
    for module, (size, _) in zip(modules, shapes, strict=True):
        parts.append(ModuleSlice(module, start, size))
        start += size
    return Target(name, (node,), shapes[0][1], start, tuple(parts))
