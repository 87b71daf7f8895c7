"""Adapters of image models: merged parts of a pipeline against diffusers' own loading of the same file, live.

Pico models in the shapes of SDXL's U-Net, Flux' transformer and CLIP's text encoders, made by their libraries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_merge.api.delta import delta
from adapter_merge.api.factor import factor
from adapter_merge.api.inspect import inspect
from adapter_merge.api.merge import merge
from adapter_merge.api.options import MergeOptions, VerifyOptions
from adapter_merge.api.verify import verify
from adapter_merge.errors import AdapterError, AdapterMergeError, InputError

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle (extra test)")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "conv1", "conv2", "conv_in"]
FLUX_TARGETS = ["to_q", "to_k", "to_out.0", "add_q_proj", "proj_mlp", "proj_out", "x_embedder", "ff.net.2"]


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ).eval()  # fmt: skip


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip


def text_encoder(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


@torch.no_grad()
def output(model: Any) -> Tensor:
    g = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if isinstance(model, diffusers.UNet2DConditionModel):
        added = {"text_embeds": noise(2, 8), "time_ids": noise(2, 6)}
        return model(noise(2, 4, 8, 8), 10, noise(2, 5, 8), added_cond_kwargs=added).sample
    if isinstance(model, diffusers.FluxTransformer2DModel):
        return model(
            noise(2, 6, 4), noise(2, 5, 32), noise(2, 32), torch.tensor([0.4, 0.7]), noise(6, 3), noise(5, 3)
        ).sample
    return model(input_ids=torch.randint(3, 50, (2, 7), generator=g)).last_hidden_state


def save_pipeline(folder: Path, image: str = "unet") -> Path:
    """The parts that hold weights, as diffusers lays them out."""
    (unet() if image == "unet" else flux()).save_pretrained(folder / image, max_shard_size="30kB")
    text_encoder(1).save_pretrained(folder / "text_encoder")
    text_encoder(2).save_pretrained(folder / "text_encoder_2")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


def adapted(model: Any, targets: list[str], **settings: Any) -> Any:
    """The model with a LoRA beside its layers, as diffusers trains it."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **settings)
    live = peft.inject_adapter_in_model(config, model).eval()
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return live


def save_lora(folder: Path, parts: dict[str, Any], pipeline: Any, metadata: bool = True) -> Path:
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in parts.items()}
    pipeline.save_lora_weights(folder, **layers, **(_collate_lora_metadata(parts) if metadata else {}))
    return folder / "pytorch_lora_weights.safetensors"


def check_part(base: Path, file: Path, out: Path, live: Any, plain: Any) -> None:
    merge(base, file, out)
    merged = type(plain).from_pretrained(out).eval()
    wanted, before = output(live), output(plain)
    assert (wanted - before).abs().max() > 1e-3
    assert (output(merged) - wanted).abs().max() < 2e-5 * wanted.abs().max().clamp_min(1)
    assert verify(base, file, out, VerifyOptions(weights_only=True)).passed


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"rank_pattern": {"to_q": 3}, "use_rslora": True}])
def test_peft_format_of_sdxl(tmp_path: Path, settings: dict[str, Any]) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    parts = {
        "unet": adapted(unet(), UNET_TARGETS, **settings),
        "text_encoder": adapted(text_encoder(1), ["q_proj", "fc1"], **settings),
        "text_encoder_2": adapted(text_encoder(2), ["q_proj", "v_proj"], **settings),
    }
    file = save_lora(tmp_path / "lora", parts, diffusers.StableDiffusionXLPipeline)
    plain = {"unet": unet(), "text_encoder": text_encoder(1), "text_encoder_2": text_encoder(2)}
    for name, live in parts.items():
        check_part(pipeline / name, file, tmp_path / name, live, plain[name])
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.json" in names
    assert not any(name.startswith("model") for name in names)
    assert "text_encoder" in str(inspect(file, pipeline / "unet").as_json())


def test_peft_format_of_flux(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline", "transformer")
    live = adapted(flux(), FLUX_TARGETS)
    file = save_lora(tmp_path / "lora", {"transformer": live}, diffusers.FluxPipeline)
    check_part(pipeline / "transformer", file, tmp_path / "merged", live, flux())
    delta(pipeline / "transformer", file, tmp_path / "delta")
    factor(pipeline / "transformer", file, tmp_path / "factors")
    assert len(load_file(tmp_path / "factors" / "adapter_model.safetensors")) == len(load_file(file))


def test_without_metadata_the_scale_is_one_as_in_diffusers(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline", "transformer")
    trained = adapted(flux(), FLUX_TARGETS)
    file = save_lora(tmp_path / "lora", {"transformer": trained}, diffusers.FluxPipeline, metadata=False)
    live = flux()
    live.load_lora_adapter(load_file(file), prefix="transformer")
    check_part(pipeline / "transformer", file, tmp_path / "merged", live.eval(), flux())
    assert (output(live) - output(trained)).abs().max() > 1e-4


def kohya_of_unet(names: dict[str, str], folder: Path) -> Path:
    """A kohya file with factors for the modules `names` (diffusers' name -> the file's), and for both text encoders."""
    torch.manual_seed(8)
    tensors = {}
    weights = unet().state_dict()
    for name, flat in names.items():
        weight = weights[f"{name}.weight"]
        ones = (1,) * (weight.dim() - 2)
        tensors[f"{flat}.lora_down.weight"] = 0.3 * torch.randn(2, *weight.shape[1:])
        tensors[f"{flat}.lora_up.weight"] = 0.3 * torch.randn(weight.shape[0], 2, *ones)
        tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    for number in (1, 2):
        flat = f"lora_te{number}_text_model_encoder_layers_1_mlp_fc1"
        tensors[f"{flat}.lora_down.weight"] = 0.3 * torch.randn(2, 16)
        tensors[f"{flat}.lora_up.weight"] = 0.3 * torch.randn(24, 2)
        tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    folder.mkdir()
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


SGM = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks_3_1_transformer_blocks_1_attn1_to_q",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "middle_block_1_transformer_blocks_0_attn2_to_k",
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2": "output_blocks_1_1_transformer_blocks_0_ff_net_2",
    "down_blocks.0.resnets.0.conv2": "input_blocks_1_0_out_layers_3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "up_blocks.1.resnets.0.conv_shortcut": "output_blocks_2_0_skip_connection",
}
DIFFUSERS_NAMES = {name: name.replace(".", "_") for name in SGM}


@pytest.mark.parametrize("layout", ["stability", "diffusers"])
def test_kohya_file_of_sdxl(tmp_path: Path, layout: str) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    names = SGM if layout == "stability" else DIFFUSERS_NAMES
    file = kohya_of_unet({name: f"lora_unet_{flat}" for name, flat in names.items()}, tmp_path / "file")
    loader = diffusers.StableDiffusionXLPipeline
    state, alphas = loader.lora_state_dict(load_file(file), unet_config=unet().config)[:2]
    live = unet()
    live.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    assert len(live.peft_config["default_0"].target_modules) == len(SGM)
    check_part(pipeline / "unet", file, tmp_path / "merged", live.eval(), unet())
    for number, name in ((1, "text_encoder"), (2, "text_encoder_2")):
        merge(pipeline / name, file, tmp_path / name)
        found = load_file(tmp_path / name / "model.safetensors")
        plain = text_encoder(number).state_dict()
        key = next(key for key in found if key.endswith("layers.1.mlp.fc1.weight"))
        flat = f"lora_te{number}_text_model_encoder_layers_1_mlp_fc1"
        tensors = load_file(file)
        change = tensors[f"{flat}.lora_up.weight"] @ tensors[f"{flat}.lora_down.weight"] * 0.5
        torch.testing.assert_close(found[key], plain[key] + change, atol=1e-6, rtol=1e-6)


def test_refusals(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    file = save_lora(tmp_path / "lora", {"unet": adapted(unet(), ["to_q"])}, diffusers.StableDiffusionXLPipeline)
    with pytest.raises(InputError, match="a pipeline of several models"):
        merge(pipeline, file, tmp_path / "no")
    with pytest.raises(AdapterError, match="holds no modules of this base"):
        merge(pipeline / "text_encoder", file, tmp_path / "no")
    renamed = tmp_path / "renamed"
    text_encoder(1).save_pretrained(renamed)
    both = kohya_of_unet({}, tmp_path / "both")
    with pytest.raises(InputError, match="several text encoders"):
        merge(renamed, both, tmp_path / "no")
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, "unet.strange": torch.ones(2)}, tmp_path / "lora" / "strange.safetensors")
    with pytest.raises(AdapterError, match="unknown tensor"):
        merge(pipeline / "unet", tmp_path / "lora" / "strange.safetensors", tmp_path / "no")
    save_file({name: tensors[name]}, tmp_path / "lora" / "half.safetensors")
    with pytest.raises(AdapterMergeError, match="one of its two factors"):
        merge(pipeline / "unet", tmp_path / "lora" / "half.safetensors", tmp_path / "no", MergeOptions())
    assert not (tmp_path / "no").exists()
