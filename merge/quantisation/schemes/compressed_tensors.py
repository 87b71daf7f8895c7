"""compressed-tensors checkpoints: the config group of each module, and the tensors that its format stores.

Targets of groups are module names, patterns "re:..." that match from the start of a name, and classes such as "Linear".
The first match decides, in this order: names, patterns (each sorted), classes (compressed-tensors 0.20, utils/match.py,
match_targets). A checkpoint does not contain the classes of modules: a module with quantised tensors that matches no
name and no pattern belongs to the group with a class as target. Modules that the config's "ignore" matches must be
dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter_merge.errors import Problem, UnsupportedError, raise_all
from adapter_merge.quantisation.findings import Findings
from adapter_merge.quantisation.known_settings import Configuration
from adapter_merge.quantisation.scale_grid import ScaleGrid
from adapter_merge.storage.tensor_io import read_tensor

from .fp8_layout import SCALE_DTYPES, add_scaled
from .mxfp4 import GROUP as MXFP4_GROUP
from .mxfp4 import Mxfp4Weight
from .nvfp4 import GROUP as NVFP4_GROUP
from .nvfp4 import Nvfp4Weight
from .pack_quantized import PackQuantizedWeight

CLASSES = ("Linear", "Embedding")
GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
ARGUMENT_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
FORMATS = {  # (type, num_bits): the formats that store such weights
    ("int", 4): ("pack-quantized",),
    ("int", 8): ("pack-quantized", "int-quantized", "naive-quantized"),
    ("float", 8): ("float-quantized", "naive-quantized"),
    ("float", 4): ("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
}
MIXED = "mixed-precision"  # format of a config whose groups have different formats
PACKED, DENSE = "weight_packed", "weight"
ACTIVATION_PARTS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")


@dataclass(frozen=True)
class Group:
    """One entry of config_groups: its targets, its arguments for weights, and its format."""

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    format: str

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the number of rows and columns of a weight of `shape` that share one scale."""
        strategy = self.weights["strategy"]
        if strategy == "block":
            rows, columns = self.weights["block_structure"]
            return rows, columns
        if strategy == "tensor":
            return shape
        return 1, shape[1] if strategy == "channel" else self.weights["group_size"]


def find_compressed_tensors(configuration: Configuration, findings: Findings) -> None:
    """Add every quantised weight of a checkpoint to `findings`. Raises UnsupportedError for unsupported groups."""
    groups = _read_groups(configuration)
    ordered = sorted(
        ((target, group) for group in groups for target in group.targets), key=lambda item: ("re:" in item[0], item[0])
    )
    ignored = [str(item) for item in configuration.settings.get("ignore") or []]
    names = {item for item in ignored if not item.startswith("re:")}
    patterns = [item for item in ignored if item.startswith("re:")]
    for name, ref in findings.tensors.items():
        module, _, part = name.rpartition(".")
        if part == PACKED or (part == DENSE and ref.dtype in ("F8_E4M3", "I8")):
            if module in names or any(matches(module, item) for item in patterns):
                findings.add_fault(name, "is quantised, but the config lists its module in ignore")
                continue
            group = _group_of(module, ordered)
            if group is None:
                findings.add_fault(name, "is quantised, but no group of the config targets its module")
            else:
                _add(findings, module, group)


def matches(module: str, target: str) -> bool:
    """Return True where `target`, a name or "re:" with a pattern, matches `module` (utils/match.py, match_name)."""
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error:
        return False


def _group_of(module: str, ordered: list[tuple[str, Group]]) -> Group | None:
    for target, group in ordered:
        if matches(module, target):
            return group
    return next((group for target, group in ordered if target in CLASSES), None)


def _read_groups(configuration: Configuration) -> list[Group]:
    """Return the config's groups. Raises UnsupportedError with every unknown key and unsupported value."""
    problems: list[Problem] = []
    groups = []
    for name, stated in configuration.settings["config_groups"].items():
        where = f"{configuration.where}: config_groups.{name}"
        if not isinstance(stated, dict):
            problems.append(Problem(f"{where} is not a JSON object", got=repr(stated)[:100]))
            continue
        group = _read_group(name, stated, configuration.settings["format"], where, problems)
        if group is not None:
            groups.append(group)
    overall, formats = configuration.settings["format"], {group.format for group in groups}
    if not problems and groups and overall not in formats and overall != MIXED:
        expected = " or ".join(sorted(formats if len(formats) == 1 else {*formats, MIXED}))
        problems.append(
            Problem(
                f"{configuration.where}: its format differs from the formats of its groups",
                expected,
                repr(overall)[:100],
            )
        )
    raise_all(problems, UnsupportedError)
    return groups


def _read_group(
    name: str, stated: Mapping[str, Any], overall: str, where: str, problems: list[Problem]
) -> Group | None:
    weights, targets = stated.get("weights"), stated.get("targets")
    before = len(problems)
    _refuse_unknown(stated, GROUP_KEYS, where, problems)
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        problems.append(Problem(f"{where} has no list of targets", got=repr(targets)[:100]))
    for target in targets if isinstance(targets, list) else []:
        try:
            re.compile(str(target).removeprefix("re:"))
        except re.error as error:
            problems.append(
                Problem(f"{where}: a target is not a valid regular expression", got=f"{target!r} ({error})"[:200])
            )
    if weights is None:
        return None  # the group quantises activations only
    if not isinstance(weights, dict):
        problems.append(Problem(f"{where}.weights is not a JSON object", got=repr(weights)[:100]))
        return None
    _refuse_unknown(weights, ARGUMENT_KEYS, f"{where}.weights", problems)
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": None, **weights}
    if arguments["strategy"] is None:  # quant_args.py, validate_model_after
        size = arguments["group_size"]
        arguments["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    for key, text in (("type", ("int", "float")), ("strategy", STRATEGIES)):
        if arguments[key] not in text:
            problems.append(Problem(f"{where}.weights: unsupported value of {key}", " or ".join(text),
                                    repr(arguments[key])[:100]))  # fmt: skip
    kind = [key for key in FORMATS if key == (arguments["type"], arguments["num_bits"])]
    formats = FORMATS[kind[0]] if kind else None
    if formats is None:
        problems.append(Problem(f"{where}.weights: this type and num_bits are not supported",
                                ", ".join(f"{kind} {bits}" for kind, bits in FORMATS),
                                f"{arguments['type']!r} {arguments['num_bits']!r}"[:100]))  # fmt: skip
    form = stated.get("format") or overall
    if formats is not None and form not in formats:
        problems.append(Problem(f"{where}: this format is not possible for its type and num_bits", " or ".join(formats),
                                repr(form)[:100]))  # fmt: skip
    _check_sizes(arguments, form, where, problems)
    if len(problems) > before:
        return None
    return Group(name, tuple(targets or ()), arguments, form)


def _check_sizes(arguments: Mapping[str, Any], form: str, where: str, problems: list[Problem]) -> None:
    size, block, strategy = arguments["group_size"], arguments.get("block_structure"), arguments["strategy"]
    expected_size = {"nvfp4-pack-quantized": NVFP4_GROUP, "mxfp4-pack-quantized": MXFP4_GROUP}.get(form)
    if strategy in ("group", "tensor_group") and (
        type(size) is not int or size <= 0 or size != (expected_size or size)
    ):
        problems.append(
            Problem(
                f"{where}.weights: unsupported value of group_size",
                str(expected_size or "a positive size"),
                repr(size)[:100],
            )
        )
    if strategy == "block" and not (
        isinstance(block, list) and len(block) == 2 and all(type(item) is int and item > 0 for item in block)
    ):
        problems.append(Problem(f"{where}.weights: no block_structure", "two positive sizes", repr(block)[:100]))
    if (expected_size is not None) != (strategy == "tensor_group" or form == "mxfp4-pack-quantized"):
        problems.append(
            Problem(f"{where}.weights: this strategy is not possible in this format", got=f"{strategy}, {form}")
        )
    if arguments["symmetric"] not in (True, False) or (not arguments["symmetric"] and arguments["type"] == "float"):
        problems.append(
            Problem(
                f"{where}.weights: unsupported value of symmetric", "true for float", repr(arguments["symmetric"])[:100]
            )
        )
    if arguments.get("dynamic") not in (None, False):
        problems.append(Problem(f"{where}.weights: dynamic quantisation of weights is not supported", "dynamic false"))


def _refuse_unknown(stated: Mapping[str, Any], known: set[str], where: str, problems: list[Problem]) -> None:
    unknown = sorted(str(key) for key in stated if key not in known)
    if unknown:
        problems.append(Problem(f"{where}: unknown keys", ", ".join(sorted(known)), ", ".join(unknown)))


def _add(findings: Findings, module: str, group: Group) -> None:
    """Add the weight of `module`, or record its faults."""
    prefix = f"{module}." if module else ""
    findings.side.update(name for part in ACTIVATION_PARTS if (name := prefix + part) in findings.tensors)
    packed = findings.tensors.get(prefix + PACKED)
    if (packed is None) != (group.format in ("float-quantized", "int-quantized", "naive-quantized")):
        findings.add_fault(prefix + (DENSE if packed is None else PACKED),
                       f"is not stored in the format of the config's group {group.name} ({group.format})")  # fmt: skip
    elif group.format == "pack-quantized":
        _add_packed(findings, prefix, group)
    elif group.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        _add_fp4(findings, prefix, group)
    else:
        _add_scaled(findings, prefix, group)


def _add_scaled(findings: Findings, prefix: str, group: Group) -> None:
    ref = findings.tensors[prefix + DENSE]
    kind = "F8_E4M3" if group.weights["type"] == "float" else "I8"
    if ref.dtype != kind or len(ref.shape) != 2 or not all(ref.shape):
        findings.add_fault(ref.name, f"is not stored as the config's group {group.name} states", f"a matrix of {kind}",
                       f"{ref.dtype} {list(ref.shape)}")  # fmt: skip
        return
    words = {"tensor": "tensor", "channel": "row", "group": f"g{group.weights['group_size']}"}
    if group.weights["strategy"] == "block":
        words["block"] = "block " + "x".join(map(str, group.weights["block_structure"]))
    scheme = f"{'fp8' if kind == 'F8_E4M3' else 'int8'} {words[group.weights['strategy']]}"
    zero_point = None if group.weights["symmetric"] else f"{prefix}weight_zero_point"
    rows, columns = ref.shape
    add_scaled(findings, ref, f"{prefix}weight_scale", group.block((rows, columns)), scheme,
               zero_point=zero_point, dtypes=SCALE_DTYPES)  # fmt: skip


def _add_packed(findings: Findings, prefix: str, group: Group) -> None:
    name, bits = prefix + DENSE, group.weights["num_bits"]
    stated = findings.find_part(f"{prefix}weight_shape", ("I64", "I32"), [(2,)], owner=name)
    if stated is None:
        return
    rows, columns = (int(size) for size in read_tensor(stated).tolist())
    words = -(-columns * bits // 32)
    packed = findings.find_part(prefix + PACKED, ("I32",), [(rows, words)], owner=name)
    block = group.block((rows, columns))
    if min(rows, columns) < 1 or (block[1] < columns and columns % block[1]):
        findings.add_fault(name, "group_size does not divide the columns", f"a divisor of {columns}", str(block[1]))
        return
    grid = ScaleGrid((rows, columns), block)
    shapes = [grid.cells, (1,)] if grid.cells == (1, 1) else [grid.cells]
    scale = findings.find_part(f"{prefix}weight_scale", SCALE_DTYPES, shapes, owner=name)
    if packed is None or scale is None:
        return
    parts = {"packed": packed, "scale": scale, "shape": stated}
    if not group.weights["symmetric"]:
        if group.weights["strategy"] == "tensor":
            zero = findings.find_part(f"{prefix}weight_zero_point", ("I8",), [(1,)], owner=name)
        else:
            shape = (-(-rows * bits // 32), grid.cells[1])
            zero = findings.find_part(f"{prefix}weight_zero_point", ("I32",), [shape], owner=name)
        if zero is None:
            return
        parts["zero_point"] = zero
    index = f"{prefix}weight_g_idx"
    if index in findings.tensors:
        order = findings.find_part(index, ("I32", "I64"), [(columns,)], owner=name)
        if order is None:
            return
        parts["group_index"] = order
    size = {"tensor": "tensor", "channel": "row"}.get(group.weights["strategy"], f"g{group.weights['group_size']}")
    kind = "" if group.weights["symmetric"] else " asymmetric"
    findings.add_weight(PackQuantizedWeight(name, f"pack-quantized int{bits}{kind} {size}", (rows, columns), parts,
                                     scale.dtype, bits, grid))  # fmt: skip


def _add_fp4(findings: Findings, prefix: str, group: Group) -> None:
    name, packed = prefix + DENSE, findings.tensors[prefix + PACKED]
    size = group.weights["group_size"]
    if packed.dtype != "U8" or len(packed.shape) != 2 or not all(packed.shape) or 2 * packed.shape[1] % size:
        findings.add_fault(packed.name, "is not a matrix of packed FP4 codes", f"U8, {size // 2} bytes for a group",
                       f"{packed.dtype} {list(packed.shape)}")  # fmt: skip
        return
    shape = (packed.shape[0], 2 * packed.shape[1])
    grid = ScaleGrid(shape, (1, size))
    nvidia = group.format == "nvfp4-pack-quantized"
    dtypes = ("F8_E4M3",) if nvidia else ("U8", "F8_E8M0")
    scale = findings.find_part(f"{prefix}weight_scale", dtypes, [grid.cells], owner=name)
    overall = findings.find_part(f"{prefix}weight_global_scale", ("F32",), [(1,), ()], owner=name) if nvidia else None
    if scale is None or (nvidia and overall is None):
        return
    if overall is None:
        findings.add_weight(Mxfp4Weight(name, "mxfp4", shape, {"packed": packed, "scale": scale}, "BF16", grid))
    else:
        parts = {"packed": packed, "scale": scale, "global_scale": overall}
        findings.add_weight(Nvfp4Weight(name, "nvfp4", shape, parts, "BF16", grid, divides=True))
