"""The parts of a diffusers pipeline, and which of them a base is: an image model's LoRA file holds modules of several.

A pipeline's folder (model_index.json) has one for each: unet or transformer (diffusers' config, with _class_name) and
text_encoder, text_encoder_2, ... (transformers'). A base is one of these folders; the modules of the others are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapter_merge.errors import InputError
from adapter_merge.storage.checkpoint import Checkpoint

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
IMAGE_COMPONENTS = ("unet", "transformer", "transformer_2")


def component_of(base: Checkpoint, held: Iterable[str]) -> str | None:
    """Return the component of `held` that `base` is, None where it is none of them.

    Diffusers' config names an image model; text encoders are told apart by their folder's name. Raises InputError where
    several of `held` are text encoders and the folder's name is none of theirs.
    """
    kept = [name for name in COMPONENTS if name in set(held)]
    kind = base.config.get("_class_name")
    if base.folder.name in kept and (base.folder.name in IMAGE_COMPONENTS) == isinstance(kind, str):
        return base.folder.name
    if isinstance(kind, str):
        wanted = "unet" if kind.startswith("UNet") else "transformer"
        return wanted if wanted in kept else None
    encoders = [name for name in kept if name not in IMAGE_COMPONENTS]
    if len(encoders) > 1:
        raise InputError(
            f"{base.folder}: the adapter holds modules of several text encoders",
            expected=f"a base whose folder has the name of its part: {', '.join(encoders)}",
            got=base.folder.name,
        )
    return encoders[0] if encoders else None


def others_note(counts: dict[str, int], component: str | None) -> tuple[str, ...]:
    """Return a note on the modules of other components than the one that is merged."""
    others = [f"{count} modules of {name}" for name, count in counts.items() if name != component and count]
    if component is None or not others:
        return ()
    return (f"not of this base: {', '.join(others)}; merge the file into these folders of the pipeline as well",)


_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<index>\d+)_(?P<place>\d+)_(?P<rest>.+)")
_MIDDLE = re.compile(r"middle_block_(?P<place>[012])_(?P<rest>.+)")
_RESNET = {
    "in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_0": "norm2",
    "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_SINGLE = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip


def diffusers_name(flat: str, layers_per_block: object) -> str | None:
    """Return diffusers' name of a U-Net's module in Stability's layout, which kohya's SDXL files use; both with _.

    None for a name that is not of this layout. Source: diffusers' convert_ldm_unet_checkpoint.
    """
    if flat in _SINGLE:
        return _SINGLE[flat]
    middle = _MIDDLE.fullmatch(flat)
    if middle:
        place, rest = int(middle["place"]), middle["rest"]
        if place == 1:
            return f"mid_block_attentions_0_{rest}"
        return f"mid_block_resnets_{place // 2}_{_RESNET[rest]}" if rest in _RESNET else None
    block = _BLOCK.fullmatch(flat)
    if block is None or not isinstance(layers_per_block, int):
        return None
    side, place, rest = block["side"], int(block["place"]), block["rest"]
    index = int(block["index"]) - (side == "input")
    number, layer = divmod(index, layers_per_block + 1)
    stem = f"{'down' if side == 'input' else 'up'}_blocks_{number}"
    if rest == "op":
        return f"{stem}_downsamplers_0_conv"
    if rest == "conv":
        return f"{stem}_upsamplers_0_conv"
    if place == 0:
        return f"{stem}_resnets_{layer}_{_RESNET[rest]}" if rest in _RESNET else None
    return f"{stem}_attentions_{layer}_{rest}"
