"""Checkpoints of the DCFT reference: one full, unmerged state dict that holds both base and adapter.

pytorch_model.bin (or model.safetensors) holds, per adapted module, <module>.weight, .bias, .lora_A, .lora_B, .lora_C
and .ranknum; alpha and the method are only in config.json (apply_lora, lora_type "svd", lora_alpha). transformers
loads such a folder without a warning and drops the adapter.

Merging reproduces the unmerged forward() of class SVDLinear (github Godz-z/DCFT), which was trained. SVDLinear.eval()
can also merge, but adds the delta (in, out) untransposed to the weight (out, in): that gives another model where the
weight is square, and an error elsewhere. The reference's DeBERTa (its NLU folder, commit 38f71d2) builds
every layer with merge_weights=False, so its own evaluation ran forward() as well. There the positional queries of a
model with share_att_key skip the adapter: see binding/positional.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adapter_merge.errors import AdapterError, Problem, UnsupportedError, raise_all
from adapter_merge.methods.adapter import Adapter, AdapterFormat
from adapter_merge.storage.checkpoint import OUTPUT_HEADS, Checkpoint
from adapter_merge.storage.safetensors_header import TensorRef
from adapter_merge.storage.tensor_comparison import same_bytes, same_values

from .dcft_tensors import DCFT_ROLE, SHARED_ROLES, group_dcft, make_dcft_modules
from .known_settings import KnownSettings
from .statements import compare_number, compare_number_tensors

# Keys of the reference's training arguments, which the merged model's config must not contain.
TRAINING_KEYS = (
    "apply_lora",
    "lora_type",
    "lora_module",
    "lora_alpha",
    "lora_r",
    "apply_adapter",
    "adapter_type",
    "adapter_size",
)
# A key of a model's config that contains one of these words is a setting of an adapter, and must be a known one.
ADAPTER_WORDS = ("lora", "adapter", "dcft", "deconv", "bitfit", "peft", "prefix_tuning", "prompt_tuning")


def _check_settings(config: Mapping[str, object], file: str) -> list[Problem]:
    """Return a problem for each training argument that does not belong to a plain DCFT."""
    problems = []
    for key, right in (("apply_lora", True), ("lora_type", "svd"), ("apply_adapter", False)):
        value = config.get(key)
        if value is not None and value != right:
            problems.append(Problem(f"{file}: {key} is not the value of a DCFT", repr(right), f"{value!r:.100}"))
    rank = config.get("lora_r")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float) or rank <= 0):
        problems.append(Problem(f"{file}: lora_r is wrong", "a number above 0", f"{rank!r:.100}"))
    ours = {key: value for key, value in config.items() if any(word in key.lower() for word in ADAPTER_WORDS)}
    return problems + KnownSettings(frozenset(TRAINING_KEYS)).check(ours, file)[0]


def holds_dcft(checkpoint: Checkpoint) -> bool:
    """Return True when some module has all of lora_A, lora_B and lora_C."""
    names = set(checkpoint.tensors)
    modules = {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}
    modules &= {name.removesuffix(".lora_B") for name in names if name.endswith(".lora_B")}
    if names.intersection(SHARED_ROLES):
        return bool(modules)
    return any(f"{module}.{kernel}" in names for module in modules for kernel in ("lora_C", "lora_C.weight"))


def read_dcft_checkpoint(
    checkpoint: Checkpoint, alpha: float | None = None, base: Checkpoint | None = None, ranknum: float | None = None
) -> Adapter:
    """Read the adapter in a checkpoint of the reference. `alpha` overrides lora_alpha of config.json.

    The replacements are the heads that were trained beside the adapter (see `find_trained_tensors`). The frozen
    weights become `Adapter.own_base`, which combine/origin.py compares with a given base. Raises AdapterError with
    every problem, UnsupportedError for other methods.
    """
    weights = checkpoint.shards[0].file
    groups, other_tensors, problems = group_dcft(tuple(checkpoint.tensors.values()), "", weights)
    for name in groups:
        if f"{name}.weight" not in other_tensors or len(other_tensors[f"{name}.weight"].shape) != 2:
            problems.append(Problem(f"{weights}: {name} has DCFT tensors but no (out, in) weight"))
    problems += [
        Problem(f"{weights}: unknown tensor {name!r}", expected="lora_A, lora_B, lora_C, ranknum")
        for name in other_tensors
        if name.rpartition(".")[2].startswith(("lora_", "loraA", "loraB")) or ".lora_" in name
    ]
    raise_all(problems, AdapterError)
    shapes = {name: other_tensors[f"{name}.weight"].shape for name in groups}
    config = checkpoint.config
    raise_all(_check_settings(config, str(checkpoint.folder / "config.json")), UnsupportedError)
    modules, problems = make_dcft_modules(
        groups, config.get("lora_alpha") if alpha is None else alpha, None, shapes, weights, ranknum
    )
    raise_all(problems, AdapterError)
    contradictions = compare_number("alpha", alpha, config.get("lora_alpha"), checkpoint.folder / "config.json")
    contradictions += compare_number_tensors(
        "ranknum", ranknum, (group.get("ranknum") for group in groups.values()), weights
    )
    own_base = Checkpoint(
        checkpoint.folder,
        tuple(
            replace(
                shard,
                tensors=tuple(
                    ref for ref in shard.tensors if not DCFT_ROLE.fullmatch(ref.name) and ref.name not in SHARED_ROLES
                ),
            )
            for shard in checkpoint.shards
        ),
        {key: value for key, value in config.items() if key not in TRAINING_KEYS},
        checkpoint.snapshot,
    )
    adapted = {module.name for module in modules}
    return Adapter(
        folder=checkpoint.folder,
        format=AdapterFormat.DCFT,
        method="DCFT",
        modules=modules,
        replacements=find_trained_tensors(other_tensors, adapted, base, bool(config.get("tie_word_embeddings"))),
        config=config,
        base_name=config.get("_name_or_path"),
        own_base=own_base,
        files=tuple(dict.fromkeys(shard.file for shard in checkpoint.shards)),
        contradictions=contradictions,
    )


def find_trained_tensors(
    other_tensors: Mapping[str, TensorRef], adapted: set[str], base: Checkpoint | None, tied: bool
) -> dict[str, TensorRef]:
    """Return the tensors that were trained in full, out of `others`, which are those without a DCFT role.

    With a base: those that it lacks or holds with other values. Without one: everything outside the backbone (the
    first path component that all adapted modules share), and poolers, which the reference also trains
    (mark_only_lora_as_trainable in loralib/utils.py: names with classifier or pooler). A head that is `tied` to the
    embeddings, which torch.save writes a second time, is not counted as trained.
    """
    weights = {f"{name}.weight" for name in adapted}
    candidates = {name: ref for name, ref in other_tensors.items() if name not in weights}
    if tied:
        body_tensors = [ref for name, ref in candidates.items() if not name.endswith(OUTPUT_HEADS)]
        for name in [name for name in candidates if name.endswith(OUTPUT_HEADS)]:
            if any(ref.shape == candidates[name].shape and same_bytes(ref, candidates[name]) for ref in body_tensors):
                del candidates[name]
    if base is not None:
        return {
            name: ref
            for name, ref in candidates.items()
            if name not in base.tensors or not same_values(ref, base.tensors[name])
        }
    tops = {name.split(".", 1)[0] for name in adapted}
    backbone = f"{tops.pop()}." if len(tops) == 1 else ""
    return {
        name: ref for name, ref in candidates.items() if not name.startswith(backbone) or "pooler" in name.split(".")
    }
