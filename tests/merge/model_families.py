"""Pico models of many families of transformers, as `save_pretrained` lays them out for the hub, and inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pico_bases import TOKENS, quiet, save
from torch import Tensor

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = 60  # the image token
TEXT_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

# family -> (class, class of the config, its arguments)
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 24}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4}),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    ),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", {"num_local_experts": 4, "block_size": 4}),
    "dots1": (
        "Dots1ForCausalLM",
        "Dots1Config",
        {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", "FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"num_local_experts": 4}),
    "granitemoe, square": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {"num_local_experts": 4, "intermediate_size": 32},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "moe_intermediate_size": 24}
        | {"moe_shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
        | {"qk_nope_head_dim": 4, "num_key_value_heads": 4, "head_dim": 4},
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
        | {"qk_nope_head_dim": 4, "num_key_value_heads": 4},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2}
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": 4}),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
}


def mixture(name: str, folder: Path) -> Path:
    import transformers

    kind, config, own = MIXTURES[name]
    with quiet():
        return save(
            getattr(transformers, kind),
            getattr(transformers, config)(**{**TEXT, "num_experts_per_tok": 2, **own}),
            folder,
        )


def llava(tied: bool = False) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16).to_dict(),
        text_config=LlamaConfig(**{**TEXT, "tie_word_embeddings": tied}).to_dict(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
    return LlavaForConditionalGeneration, config


def llava_next() -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16).to_dict(),
        text_config=LlamaConfig(**TEXT).to_dict(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
    )
    return LlavaNextForConditionalGeneration, config


def mistral3() -> tuple[Any, Any]:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, head_dim=8).to_dict(),
        text_config=MistralConfig(**TEXT).to_dict(),
        image_token_index=IMAGE,
        spatial_merge_size=1,
    )
    return Mistral3ForConditionalGeneration, config


def paligemma() -> tuple[Any, Any]:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32).to_dict(),
        text_config=GemmaConfig(**{**TEXT, "tie_word_embeddings": True}).to_dict(),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration, config


def gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        text_config=Gemma3TextConfig(**{**TEXT, "tie_word_embeddings": True}).to_dict(),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration, config


def qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {**TEXT, "rope_parameters": TEXT_ROPE}
    text.pop("head_dim")
    vision = {"embed_dim": 16, "depth": 2, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=61,
                           vision_end_token_id=62, video_token_id=63)  # fmt: skip
    return Qwen2VLForConditionalGeneration, config


def qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**TEXT, "rope_parameters": TEXT_ROPE}
    text.pop("head_dim")
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    vision |= {"intermediate_size": 24, "fullatt_block_indexes": [1], "window_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=61,
                              vision_end_token_id=62, video_token_id=63)  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration, config


def qwen3_vl_moe(experts: int = 24) -> tuple[Any, Any]:
    """Experts stacked under the same names on the hub and in the model, the other way round."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {**TEXT, "rope_parameters": TEXT_ROPE, "num_experts": 4, "num_experts_per_tok": 2}
    text |= {"moe_intermediate_size": experts}
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    vision |= {"intermediate_size": 24, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=61,
                              vision_end_token_id=62, video_token_id=63)  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration, config


def nomic_bert() -> tuple[Any, Any]:
    """q, k and v fused on the hub, apart in the model."""
    from transformers import NomicBertConfig, NomicBertForMaskedLM

    return NomicBertForMaskedLM, NomicBertConfig(**{**TEXT, "num_key_value_heads": 4, "tie_word_embeddings": True})


def vit() -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification, ViTConfig(**VISION, num_labels=3)


def clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return CLIPModel, CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)


VISION_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava, tied": lambda: llava(tied=True),
    "llava_next": llava_next,
    "mistral3": mistral3,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_vl_moe, square": lambda: qwen3_vl_moe(32),
    "nomic_bert": nomic_bert,
    "vit": vit,
    "clip": clip,
}


def vision(name: str, folder: Path) -> Path:
    with quiet():
        return save(*VISION_MODELS[name](), folder)


def inputs(name: str) -> dict[str, Tensor]:
    """Tokens and, where the model sees, one image of random pixels."""
    torch.manual_seed(3)
    name = name.partition(",")[0]
    if name in MIXTURES or name == "nomic_bert":
        return {"input_ids": TOKENS}
    pixels = torch.randn(1, 3, 16, 16)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"pixel_values": pixels, "input_ids": torch.tensor([[1, 7, 9, 2]])}
    tokens = torch.tensor([[1, 5, 61, *[IMAGE] * 4, 62, 7, 9, 3]])
    made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if name.startswith(("qwen2", "qwen3")):
        return {
            **made,
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (tokens == IMAGE).int(),
        }
    if name == "llava_next":
        image = torch.tensor([[1, 5, *[IMAGE] * 10, 7, 9]])
        return {
            "input_ids": image,
            "attention_mask": torch.ones_like(image),
            "pixel_values": torch.stack([pixels, pixels], 1),
            "image_sizes": torch.tensor([[16, 16]]),
        }
    if name == "mistral3":
        made["image_sizes"] = torch.tensor([[16, 16]])
    if name in ("gemma3", "paligemma"):
        made["token_type_ids"] = (tokens == IMAGE).long()
    return {**made, "pixel_values": pixels}
