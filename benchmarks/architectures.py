"""Families of transformers, base in hub and run-time layout: python benchmarks/architectures.py > docs/architectures.md

A pico model of each family gets random weights (F64) and a PEFT LoRA with random factors on all linear layers (in
mixtures of experts on their stacked parameters too) and on convolutions. The base is saved as transformers writes it
for the hub, and as the model holds it in memory (save_original_format=False). The adapter is merged into each,
transformers loads the result, and its answer is compared with that of PEFT's live, unmerged model, both in float64.
Arguments: the families to run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "merge"))

from model_families import MIXTURES, TEXT, VISION, VISION_MODELS, inputs  # type: ignore[import-not-found]
from pico_bases import quiet, randomise  # type: ignore[import-not-found]

from adapter_merge.api.merge import merge
from adapter_merge.errors import AdapterMergeError

EXACT = 1e-5  # |merged - live| / |live - base|: factors are float32, as PEFT saves them
DECODERS: dict[str, dict[str, Any]] = {  # class without "ForCausalLM" -> arguments beside TEXT
    "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {}, "Gemma": {}, "Gemma2": {}, "Phi": {}, "Phi3": {},
    "Cohere": {},
    "Cohere2": {}, "StableLm": {}, "Starcoder2": {}, "Olmo": {}, "Olmo2": {}, "Granite": {}, "Nemotron": {}, "Glm": {},
    "Glm4": {}, "SmolLM3": {}, "Ernie4_5": {}, "Helium": {}, "Persimmon": {}, "GPTNeoX": {}, "GPTJ": {"rotary_dim": 4},
    "GPTBigCode": {}, "GPT2": {}, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "Bloom": {}, "Falcon": {},
    "Mpt": {},
    "CodeGen": {"rotary_dim": 4}, "Mamba": {"state_size": 4}, "FalconMamba": {"state_size": 4},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1}, "BioGpt": {}, "Lfm2": {},
    "Exaone4": {}, "Olmo3": {}, "SeedOss": {}, "Arcee": {}, "Apertus": {}, "HunYuanDenseV1": {}, "Rwkv": {},
    "Bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
              "attn_layer_indices": [1]},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2}, "BitNet": {}, "Cwm": {},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "RecurrentGemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # class -> its config, arguments
    "T5ForConditionalGeneration": ("T5Config", T5), "MT5ForConditionalGeneration": ("MT5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", {}), "MBartForConditionalGeneration": ("MBartConfig", {}),
    "PegasusForConditionalGeneration": ("PegasusConfig", {}), "BertForMaskedLM": ("BertConfig", {}),
    "RobertaForMaskedLM": ("RobertaConfig", {}), "XLMRobertaForMaskedLM": ("XLMRobertaConfig", {}),
    "ElectraForMaskedLM": ("ElectraConfig", {"embedding_size": 32}), "AlbertForMaskedLM": ("AlbertConfig", {}),
    "DistilBertForMaskedLM": ("DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", {}), "ModernBertForMaskedLM": ("ModernBertConfig", {}),
    "SqueezeBertForMaskedLM": ("SqueezeBertConfig", {"embedding_size": 32}),
    "ConvBertForMaskedLM": ("ConvBertConfig", {"embedding_size": 32}),
    "WhisperForConditionalGeneration": ("WhisperConfig", {"num_mel_bins": 8, "max_source_positions": 12}),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", {"conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [2, 2],
                                          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}),
    "Dinov2ForImageClassification": ("Dinov2Config", {"patch_size": 8, "image_size": 16}),
    "SiglipForImageClassification": ("SiglipConfig", {"vision_config": VISION}),
    "SwinForImageClassification": ("SwinConfig", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
                                                  "image_size": 16, "patch_size": 2, "window_size": 2}),
    "SegformerForImageClassification": ("SegformerConfig", {"hidden_sizes": [8, 16], "depths": [1, 1],
                                                            "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
                                                            "sr_ratios": [2, 1]}),
    "ResNetForImageClassification": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}),
    "RegNetForImageClassification": ("RegNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                                      "groups_width": 4}),
    "ConvNextForImageClassification": ("ConvNextConfig", {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}),
    "BitForImageClassification": ("BitConfig", {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1],
                                                "num_groups": 2}),
}  # fmt: skip
LACKING = {"Falcon": ["head_dim"]}  # of TEXT
ENCODER_DECODER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
MAMBA = ["dt_proj", "out_proj", "conv1d"]  # PEFT refuses the latter two
EXCLUDED = {"jamba": ["dt_proj"], "MambaForCausalLM": MAMBA, "FalconMambaForCausalLM": MAMBA,
            "Mamba2ForCausalLM": MAMBA, "FalconH1ForCausalLM": ["out_proj", "conv1d"]}  # fmt: skip
NOTE = "without {}: the model reads weights past PEFT's layers there"
CONVOLUTIONAL = ("ResNet", "RegNet", "ConvNext", "BitFor")
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d)


def make(name: str) -> tuple[Any, Any]:
    """Return class and config of a family."""
    import transformers

    if name in VISION_MODELS:
        kind, config = VISION_MODELS[name]()
        return kind, config
    if name in MIXTURES:
        kind, config, own = MIXTURES[name]
        return getattr(transformers, kind), getattr(transformers, config)(**{**TEXT, "num_experts_per_tok": 2, **own})
    if name.removesuffix("ForCausalLM") in DECODERS:
        stem = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        config = getattr(transformers, f"{stem}Config")
        arguments = {**TEXT, **DECODERS[stem]}
        for key in LACKING.get(stem, ()):
            arguments.pop(key)
        return _causal(transformers, stem), config(**arguments)
    stated, own = OTHERS[name]
    config = getattr(transformers, stated)
    text = {} if "Image" in name else {**TEXT, "num_labels": 3}
    if name.startswith(("T5", "MT5")):
        text = {key: TEXT[key] for key in ("vocab_size", "pad_token_id", "eos_token_id")} | {
            "decoder_start_token_id": 1
        }
    elif "ConditionalGeneration" in name:
        text |= ENCODER_DECODER
    return getattr(transformers, name), config(**{**text, **own})


def _causal(transformers: Any, stem: str) -> Any:
    return getattr(transformers, f"{stem}ForCausalLM", None) or getattr(transformers, f"{stem}LMHeadModel")


def given(name: str) -> dict[str, torch.Tensor]:
    """Return the inputs of a family, float64 where they are numbers."""
    if name in MIXTURES or name in VISION_MODELS:
        made = inputs(name)
    else:
        torch.manual_seed(3)
        tokens = torch.randint(3, 60, (2, 9))
        made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if "Mamba" in name:
            made.pop("attention_mask")
        if "ConditionalGeneration" in name:
            made["decoder_input_ids"] = tokens[:, :5]
        if name.startswith("Whisper"):
            made = {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": tokens[:, :5]}
        if name.startswith("Wav2Vec2"):
            made = {"input_values": torch.randn(2, 64)}
        if "Image" in name:
            side = 32 if name.startswith((*CONVOLUTIONAL, "Segformer")) else 16
            made = {"pixel_values": torch.randn(2, 3, side, side)}
    return {key: value.double() if value.is_floating_point() else value for key, value in made.items()}


@torch.no_grad()
def answer(model: Any, name: str) -> torch.Tensor:
    """Return what the model says of the inputs, flat."""
    with quiet():
        out = model(**given(name))
    parts = [out.logits] if "logits" in out else [out.image_embeds, out.text_embeds]
    return torch.cat([part.double().flatten() for part in parts])


def load(folder: Path) -> Any:
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    with quiet():
        model, info = kind.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    lacking = [*info["missing_keys"], *info["unexpected_keys"]]
    if lacking:
        raise ValueError(f"transformers does not load {lacking[0]}")
    return plain_experts(model.eval())


def plain_experts(model: Any) -> Any:
    """Let experts run one after the other: the default kernel knows no float64."""
    model.config._experts_implementation = "eager"
    for part in ("text_config", "vision_config"):
        if hasattr(model.config, part):
            getattr(model.config, part)._experts_implementation = "eager"
    return model


def adapt(model: Any, name: str) -> Any:
    """Return the model in PEFT with a random LoRA on its linear layers, experts and ungrouped convolutions."""
    import peft

    inner = [path for path, module in model.named_modules() if isinstance(module, CONVOLUTIONS) and module.groups == 1]
    targets: Any = "all-linear"
    if name.startswith(CONVOLUTIONAL):
        targets = inner
    elif name == "phimoe":  # PEFT's wrapper of the router does not pass its tuple through
        targets = ["q_proj"]
    elif "Image" in name or name.startswith(("Whisper", "SqueezeBert", "ConvBert")):
        linear = [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]
        heads = ("classifier", "proj_out", "generator_lm_head")
        targets = [path for path in (*inner, *linear) if not path.endswith(heads)]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, exclude_modules=EXCLUDED.get(name))
    live = peft.get_peft_model(model, config)
    randomise(live, 0.05)
    for module in live.modules():
        if isinstance(getattr(module, "base_layer", None), torch.nn.Conv1d):
            module.stride = module.base_layer.stride  # Whisper reads it, and PEFT's layer lacks it
    return live.eval()


def measure(name: str, place: Path) -> tuple[str, str, list[str]]:
    """Return class, number of adapted tensors, and the outcome with each layout of the base."""
    kind, config = make(name)
    with quiet():
        torch.manual_seed(0)
        model = plain_experts(kind(config).double().eval())
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(place / "hub")
        model.save_pretrained(place / "run-time", save_original_format=False)
        plain = answer(model, name)
        live = adapt(model, name)
        live.save_pretrained(place / "adapter", save_embedding_layers=False)
        wanted = answer(live, name)
    count = sum("lora_A" in key for key, _ in live.named_parameters())
    effect = float((wanted - plain).abs().max())
    if not effect > 1e-6:
        raise ValueError("the adapter does not change the answer")
    outcomes = []
    for layout in ("hub", "run-time"):
        try:
            merge(place / layout, place / "adapter", place / f"{layout} merged")
            got = answer(load(place / f"{layout} merged"), name)
            figure = float((got - wanted).abs().max()) / effect
            outcomes.append(f"{'exact' if figure <= EXACT else 'WRONG'}, {figure:.1e}")
        except AdapterMergeError as error:
            outcomes.append(f"refused: {error.problems[-1].cause}".replace(str(place), "")[:160])
    return kind.__name__, str(count), outcomes


def main() -> None:
    import peft
    import transformers

    print(HEAD.format(peft=peft.__version__, transformers=transformers.__version__), flush=True)
    names = sys.argv[1:] or [*(f"{stem}ForCausalLM" for stem in DECODERS), *MIXTURES, *VISION_MODELS, *OTHERS]
    started = time.perf_counter()
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            try:
                kind, count, (hub, run_time) = measure(name, Path(place))
            except Exception as error:  # of the model or of PEFT, before anything of ours runs
                kind, count, hub = name, "", f"not run: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
                run_time = ""
        note = f" ({NOTE.format(', '.join(EXCLUDED[name]))})" if name in EXCLUDED else ""
        print(
            f"| {kind}{', ' + name.partition(', ')[2] if ', ' in name else ''}{note} | {count} | {hub} | {run_time} |",
            flush=True,
        )
    print(f"{len(names)} families, {time.perf_counter() - started:.0f} s", file=sys.stderr)


HEAD = """# Architectures

Written by `python benchmarks/architectures.py` with PEFT {peft} and transformers {transformers}. A LoRA with random
factors on all linear layers (in mixtures of experts on their stacked parameters too) and on ungrouped convolutions of a
pico model, merged into the base as transformers writes it for the hub and as the model holds it in memory. The figure
is the largest difference of the merged model's answer from that of PEFT's live, unmerged model, both in float64, as a
share of what the adapter changes. Adapters with transformers 4's names: tests/merge/binding/test_model_names.py.

| class | adapted weights | hub layout | run-time layout |
|---|---|---|---|"""

if __name__ == "__main__":
    main()
